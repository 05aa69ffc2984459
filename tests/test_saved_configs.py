"""Configs as six versions of transformers save them: every family, with the same meaning.

`saved_configs/write.py` makes the files by running those versions. What a config should mean is read from
the attributes that were given to the config class, in `CASES`.
"""

import json
from pathlib import Path

import pytest
from saved_configs.write import CASES

from jaxgrad.models.families import FAMILIES, ignored_attributes, read_config

FOLDER = Path(__file__).parent / "saved_configs"
WRITTEN = {path.stem: json.loads(path.read_text("utf-8")) for path in FOLDER.glob("*.json")}
FILES = [
    pytest.param(case, entry, id=f"{version}-{case}")
    for version, entries in sorted(WRITTEN.items())
    for case, entry in entries.items()
    if isinstance(entry, dict)
]


@pytest.mark.parametrize(("case", "entry"), FILES)
def test_a_saved_config_and_a_full_one_mean_what_was_given(case, entry):
    model_type, given = CASES[case]
    wanted = read_config({"model_type": model_type, **given}, "given")[1]
    for raw in (entry["saved"], entry["saved"] | entry["more"]):
        assert read_config(raw, "config.json")[1] == wanted
        # transformers reads all that it writes.
        assert ignored_attributes(raw, "config.json") == ()


def test_every_family_is_saved_by_the_two_newest_versions_with_and_without_other_values():
    assert {"4.40.2", "4.46.3", "4.51.3", "4.57.1"} < WRITTEN.keys()
    newest = [version for version in WRITTEN if version.startswith("5.")]
    for version in ["4.57.1", *newest]:
        types = [
            CASES[case][0] for case, entry in WRITTEN[version].items() if isinstance(entry, dict)
        ]
        assert all(types.count(model_type) >= 2 for model_type in FAMILIES)


def test_only_what_is_newer_than_a_version_is_missing_from_its_file():
    reasons = {why for entries in WRITTEN.values() for why in entries.values() if type(why) is str}
    # 4.40 knows no rope of Llama 3.1.
    assert len(reasons) == 2 and "the family is newer" in reasons


def test_the_cases_mean_different_models():
    by_family = {}
    for model_type, given in CASES.values():
        config = read_config({"model_type": model_type, **given}, "given")[1]
        by_family.setdefault(model_type, []).append(config)
    assert all(len(set(configs)) == len(configs) for configs in by_family.values())
