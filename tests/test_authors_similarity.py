"""The authors' files with similarities, and a report of a run's export against the run's own."""

import dataclasses
import json
import math

import numpy as np
import pytest
from analysis_runs import PROJECTIONS, example, identity, results, with_cosines

from jaxgrad.analysis import (
    DEFAULT_STATISTICS,
    Resampling,
    contrast,
    describe,
    example_set,
    length_regression,
    matched_contrast,
    mean_similarity,
    sum_loss_contrast,
)
from jaxgrad.errors import UserError
from jaxgrad.report.cells import Role, read_cell, read_run
from jaxgrad.results import RunDirectory, read_authors_jsonl, write_authors_jsonl

FAST = Resampling(num_resamples=100, num_permutations=100)
L, P, K = 3, 4, 5


def measured(index, *, gradient_LPK=None, skipped=False, cosines=True):
    """An example with all that either form needs: the statistics of random spectra."""
    if skipped:
        return example(index, np.ones((L, P)), status="skipped")
    rng = np.random.default_rng(index)
    sigma_LPR = -np.sort(-rng.lognormal(size=(L, P, K)), axis=-1)
    gradient_LPK = rng.normal(size=(L, P, K)) if gradient_LPK is None else gradient_LPK
    sigma_LPR *= (gradient_LPK != 0).any(axis=-1)[..., None]
    norm_LP = sigma_LPR.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = sigma_LPR / norm_LP[..., None]
        rank_LP = np.exp(-(p * np.log(p)).sum(axis=-1))
    given = example(
        index, norm_LP, loss=1 + 0.1 * index, tokens=5 + index,
        sigma_max=sigma_LPR[..., 0], sigma_min=sigma_LPR[..., -1], effective_rank=rank_LP,
        rank_bound=np.full((L, P), K), frobenius_norm=np.linalg.norm(sigma_LPR, axis=-1),
        entry_mean=np.zeros((L, P)), entry_max=np.ones((L, P)), entry_min=-np.ones((L, P)),
    )  # fmt: skip
    spectra = list(sigma_LPR.reshape(-1, K))
    given = dataclasses.replace(given, matrices={**given.matrices, "singular_values": spectra})
    return with_cosines(given, gradient_LPK) if cosines else given


def exported(tmp_path, rows, name="a.jsonl", **options):
    path = tmp_path / name
    write_authors_jsonl(results(rows, num_layers=L), path, **options)
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_the_fields_are_theirs(tmp_path):
    given = measured(0)
    (record,) = lines(exported(tmp_path, [given], with_spectrum=True))
    assert list(record)[-2:] == ["cosine_sim", "cosine_sim_qkvo"]
    names = [f"{name}_proj" for name in PROJECTIONS]
    assert list(record["cosine_sim"]) == names
    rows = np.array(given.matrices["layer_cosines"]).reshape(L, P, L)
    for at, name in enumerate(names):
        assert record["cosine_sim"][name] == {
            "layer_indices": [0, 1, 2],
            "matrix": rows[:, at].tolist(),
        }
    pairs = given.matrices["partner_cosine"].reshape(L, P)
    assert record["cosine_sim_qkvo"] == {
        str(l): {"q_proj_x_o_proj": pairs[l, 0], "k_proj_x_v_proj": pairs[l, 1]} for l in range(L)
    }


def test_only_the_form_with_the_spectrum_has_them(tmp_path):
    (record,) = lines(exported(tmp_path, [measured(0)]))
    assert not {"cosine_sim", "cosine_sim_qkvo"} & set(record)
    (record,) = lines(exported(tmp_path, [measured(0, cosines=False)], with_spectrum=True))
    assert not {"cosine_sim", "cosine_sim_qkvo"} & set(record)


def test_there_and_back(tmp_path):
    rows = [measured(e) for e in range(3)]
    path = exported(tmp_path, rows, with_spectrum=True)
    back, given = read_authors_jsonl(path), results(rows, num_layers=L)
    np.testing.assert_array_equal(
        np.stack(back.matrices["layer_cosines"]), np.stack(given.matrices["layer_cosines"])
    )
    np.testing.assert_array_equal(back.matrices["partner_cosine"], given.matrices["partner_cosine"])
    again = tmp_path / "b.jsonl"
    write_authors_jsonl(back, again, with_spectrum=True)
    assert again.read_bytes() == path.read_bytes()
    bare = read_authors_jsonl(path, with_spectrum=False).matrices
    assert bare["singular_values"].isna().all()
    np.testing.assert_array_equal(bare["effective_rank"], back.matrices["effective_rank"])


def test_a_cosine_with_a_zero_gradient_is_0_there_and_undefined_here(tmp_path):
    gradient = np.random.default_rng(0).normal(size=(L, P, K))
    gradient[1, 3] = 0
    given = measured(0, gradient_LPK=gradient)
    given.matrices["effective_rank"][7] = np.nan
    path = exported(tmp_path, [given], with_spectrum=True)
    (record,) = lines(path)
    matrix = record["cosine_sim"]["o_proj"]["matrix"]
    assert matrix[1] == [0, 0, 0] and [row[1] for row in matrix] == [0, 0, 0]
    assert record["cosine_sim_qkvo"]["1"]["q_proj_x_o_proj"] == 0
    back = read_authors_jsonl(path)
    assert back.examples["status"].tolist() == ["ok"]
    for name, width in (("layer_cosines", L), ("partner_cosine", 1)):
        got, want = (
            np.stack(m[name]).reshape(-1, width)
            for m in (back.matrices, results([given], num_layers=L).matrices)
        )
        np.testing.assert_array_equal(got, want)
        assert np.isnan(got).any()


def test_partners_alone_and_a_projection_without(tmp_path):
    given = measured(0)
    del given.matrices["layer_cosines"]
    path = exported(tmp_path, [given], with_spectrum=True)
    assert lines(path)[0]["cosine_sim"] == {}
    back = read_authors_jsonl(path).matrices
    assert back["layer_cosines"].isna().all() and back["partner_cosine"].notna().all()
    given = measured(0)
    given.matrices["layer_cosines"][0] = None
    given.matrices["partner_cosine"][[1, 2]] = np.nan  # of two gradients that are not zero
    (record,) = lines(exported(tmp_path, [given], with_spectrum=True))
    assert list(record["cosine_sim"]) == ["k_proj", "v_proj", "o_proj"]
    assert list(record["cosine_sim_qkvo"]["0"]) == ["q_proj_x_o_proj"]
    given.matrices["layer_cosines"][1] = np.ones(L + 1)
    with pytest.raises(UserError, match="Example 0 has 4 cosines of a matrix of k, for 3 layers"):
        exported(tmp_path, [given], with_spectrum=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cosine_sim": []}, "cosine_sim is not an object"),
        ({"cosine_sim": {"x_proj": {}}}, "'x_proj', which is none of q_proj"),
        ({"cosine_sim": {"q_proj": {}}}, "q_proj is not an object of layer_indices and matrix"),
        ({"cosine_sim": {"q_proj": [0.1, 0.2]}}, "q_proj is not an object of layer_indices"),
        ({"layer_indices": [0, 1]}, "layer_indices are not the layers of the record's q_proj"),
        ({"layer_indices": "012"}, "layer_indices are not the layers"),
        ({"matrix": [[1.0] * 3] * 2}, "the matrix of q_proj is not 3 x 3 numbers"),
        ({"matrix": [0.1, 0.2]}, "the matrix of q_proj is not 3 x 3 numbers"),
        ({"matrix": [[1], [1, 2], [1, 2, 3]]}, "not 3 x 3 numbers"),
        ({"matrix": [["1"] * 3] * 3}, "not 3 x 3 numbers"),
        ({"matrix": [[None] * 3] * 3}, "not 3 x 3 numbers"),
        ({"cosine_sim_qkvo": [0.1]}, "cosine_sim_qkvo is not an object"),
        ({"cosine_sim_qkvo": {"0": 0.1}}, "layer '0' is not an object of q_proj_x_o_proj and k_"),
        ({"cosine_sim_qkvo": {"0": {"q_x_o": 0.1}}}, "layer '0' is not an object of"),
        ({"cosine_sim_qkvo": {"0": {"q_proj_x_o_proj": None}}}, "of layer '0' is not a number"),
        ({"cosine_sim_qkvo": {"3": {"q_proj_x_o_proj": 0.1}}}, "not both weights .* layer '3'"),
        ({"cosine_sim_qkvo": {"x\ny": {"q_proj_x_o_proj": 0.1}}}, r"layer 'x\\ny'"),
    ],
)
def test_unknown_shapes_are_named(tmp_path, change, message):
    path = exported(tmp_path, [measured(0), measured(1)], with_spectrum=True)
    first, second = lines(path)
    inner = set(change) & {"layer_indices", "matrix"}
    (second["cosine_sim"]["q_proj"] if inner else second).update(change)
    path.write_text(json.dumps(first) + "\n" + json.dumps(second))
    with pytest.raises(UserError, match=message) as refusal:
        read_authors_jsonl(path)
    assert f"{path}, line 2" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_numbers_that_are_not_finite(tmp_path):
    """NaN is an undefined cosine, an infinity a broken example."""
    records = []
    for value in (math.nan, math.inf):
        (record,) = lines(exported(tmp_path, [measured(0)], with_spectrum=True))
        record["cosine_sim"]["q_proj"]["matrix"][0][1] = value
        record["cosine_sim_qkvo"]["0"]["q_proj_x_o_proj"] = value
        records.append(json.dumps(record) + "\n")
    path = tmp_path / "a.jsonl"
    path.write_text("".join(records))
    back = read_authors_jsonl(path)
    assert back.examples["status"].tolist() == ["ok", "non_finite"]
    assert back.examples["reason"][1] == "not finite in the file: cosine_sim, cosine_sim_qkvo"
    assert np.isnan(back.matrices["layer_cosines"][0][1])
    assert np.isnan(back.matrices["partner_cosine"][0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "line 1: not JSON"),
        ('{"instruction": "a", "output": "b", "loss": 1, "x\\ny": 1}', "line 1, 'x.ny'.*neither"),
        ('{"instruction": "a", "output": "b", "loss": 1, "' + "z" * 500 + '": 1}', "z{70}'... *:"),
        ('{"instruction": "a", "output": "b", "loss": 1, "model.layers.9999999.self_attn.'
         'q_proj.weight": {}}', "neither a known field"),
        ('{"instruction": "a", "output": "b", "loss": 1, "model.layers.00.self_attn.'
         'q_proj.weight": {}}', "neither a known field"),
        ('{"instruction": "a", "output": "b", "loss": 1, "model.layers.0.self_attn.'
         'q_proj.weight": {"S_list": [' + "9" * 400 + ', 1.5]}}', "S_list is not a list"),
        ("\x00\x01", "line 1: not JSON"),
        ('{"instruction": "a", "output": "b", "loss": 1, "model.layers.0.self_attn.q_proj.weight": {},'
         '"model.layers.0.self_attn.o_proj.weight": {}, "cosine_sim_qkvo": {"0": {"q_proj_x_o_proj":'
         '[0.5]}}}', "q_proj_x_o_proj of layer '0' is not a number"),
    ],
)  # fmt: skip
def test_lines_that_broke_other_readers(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match=message) as refusal:
        read_authors_jsonl(path)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


def test_a_broken_character_and_a_huge_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "\\ud800", "output": "b", "loss": ' + "9" * 400 + "}")
    back = read_authors_jsonl(path)
    assert back.examples["instruction"].tolist() == ["?"]
    assert back.examples["status"].tolist() == ["non_finite"]


def run_and_export(tmp_path, label, indices, *, with_spectrum):
    """A finished run directory and its export; one example of it was skipped."""
    rows = [measured(e) for e in indices] + [measured(99, skipped=True)]
    run = RunDirectory.open(tmp_path / label, identity(L), {"model": "a model"})
    run.write_batch(0, 0, rows)
    run.finish_window(0)
    run.finish({})
    path = tmp_path / f"{label}.jsonl"
    write_authors_jsonl(read_run(tmp_path / label), path, with_spectrum=with_spectrum)
    return tmp_path / label, path


def flat(value):
    """All numbers of a dataclass of intervals, by name."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            if field.name not in ("values", "first", "second", "examples", "run", "label"):
                for name, numbers in flat(getattr(value, field.name)):
                    yield f"{field.name}.{name}", numbers
    elif isinstance(value, np.ndarray | float | int) and value is not None:
        yield "", np.asarray(value, np.float64)


def assert_same(one, two, rtol=0.0):
    ours, theirs = dict(flat(one)), dict(flat(two))
    assert len(ours) > 3 and list(ours) == list(theirs)
    for name, numbers in ours.items():
        np.testing.assert_allclose(theirs[name], numbers, rtol=rtol, err_msg=name)


@pytest.mark.parametrize("with_spectrum", [False, True])
def test_an_export_gives_the_report_of_its_run(tmp_path, with_spectrum):
    """All that the form carries: the same numbers, and of S_list up to the rounding of its sum."""
    first, second = (
        run_and_export(tmp_path, label, indices, with_spectrum=with_spectrum)
        for label, indices in (("one", range(24)), ("two", range(3, 26)))
    )
    sets = [
        [example_set(read_run(path), label) for label, path in zip("ab", paths, strict=True)]
        for paths in zip(first, second, strict=True)
    ]
    carried = ["nuclear_norm", "sigma_ratio", "loss_normalised_norm"]
    rtol = 0.0
    if with_spectrum:
        carried.append("effective_rank")
        rtol = 1e-11
    for statistic in carried:
        ours, theirs = (contrast(*pair, statistic, resampling=FAST) for pair in sets)
        assert_same(ours, theirs, rtol)
        assert len(theirs.pairs) == 21 and "unknown" in theirs.note
        one, two = (describe(pair[0].values(statistic), FAST) for pair in sets)
        assert one.mad_P is not None
        assert_same(one, two, rtol)
    for statistic in set(DEFAULT_STATISTICS) - set(carried):
        with pytest.raises(UserError, match=r"a: \w+ was not measured, and .* needs it"):
            contrast(*sets[1], statistic)
    for control in (sum_loss_contrast, matched_contrast, length_regression):
        with pytest.raises(UserError, match=r"a: .*(not measured|response tokens are unknown)"):
            control(*sets[1])
    found = [
        mean_similarity(read_run(path), pair[0]) for path, pair in zip(first, sets, strict=True)
    ]
    if with_spectrum:
        assert_same(*found)
        assert found[1].layer_cosine_PLL.shape == (P, L, L)
    else:
        assert found[0] is not None and found[1] is None
    cell = read_cell(Role("", "data", "none"), first[1])
    assert cell.role.model == "unknown model" and cell.examples.num_examples == 24


def test_paths_that_are_no_run(tmp_path):
    """One clear line each."""
    empty, broken, image = (tmp_path / name for name in ("empty.jsonl", "broken.jsonl", "a.png"))
    empty.write_bytes(b"\n \n")
    good = exported(tmp_path, [measured(0)]).read_text()
    broken.write_text(good + good[: len(good) // 2])
    image.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    folder = tmp_path / "folder"
    folder.mkdir()
    for path, message in (
        (tmp_path / "absent", "does not exist. Give a run's directory or the authors' JSONL"),
        (empty, "is empty: it should have a line for every example"),
        (broken, "broken.jsonl, line 2: not JSON"),
        (image, "a.png, line 1: not JSON"),
        (folder, "has no run.json. Give the --output_dir of an analyze command"),
    ):
        with pytest.raises(UserError, match=message) as refusal:
            read_run(path)
        assert "\n" not in str(refusal.value)
    RunDirectory.open(folder, identity(L), {}).close()
    with pytest.raises(UserError, match="is not finished"):
        read_run(folder)
