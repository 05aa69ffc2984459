"""Reading runs by window, and the authors' JSONL: both forms, field for field, there and back."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from jaxgrad.errors import UserError
from jaxgrad.results import (
    ExampleResult,
    RunDirectory,
    examples_table,
    iter_results,
    matrices_table,
    read_authors_jsonl,
    read_results,
    write_authors_jsonl,
)
from jaxgrad.results.authors import refuse_other_loss
from jaxgrad.results.read import results_of

ROWS, COLS, RANK = 5, 3, 2
# Neither in the order of layers nor of projections: the writer has to sort.
MATRICES = [(None, "lm_head"), (10, "q"), (2, "down"), (2, "o"), (2, "q"), (2, "gate"), (2, "v")]
ORDER = [
    "model.layers.2.self_attn.q_proj.weight",
    "model.layers.2.self_attn.v_proj.weight",
    "model.layers.2.self_attn.o_proj.weight",
    "model.layers.2.mlp.gate_proj.weight",
    "model.layers.2.mlp.down_proj.weight",
    "model.layers.10.self_attn.q_proj.weight",
    "lm_head.weight",
]


def example(index, status="ok", without=()):
    """An example whose matrices are real ones: every statistic comes from its entries."""
    rng = np.random.default_rng(index)
    columns = {"layer": [], "projection": [], "rows": [], "cols": [], "singular_values": []}
    columns |= {name: [] for name in ("nuclear_norm", "sigma_max", "sigma_min", "frobenius_norm")}
    columns |= {name: [] for name in ("entry_mean", "entry_max", "entry_min", "effective_rank")}
    for layer, projection in MATRICES:
        g = rng.normal(size=(ROWS, RANK)) @ rng.normal(size=(RANK, COLS))
        sigma = np.linalg.svd(g, compute_uv=False)[:RANK]
        p = sigma / sigma.sum()
        row = dict(
            layer=layer, projection=projection, rows=ROWS, cols=COLS, singular_values=sigma,
            nuclear_norm=sigma.sum(), sigma_max=sigma[0], sigma_min=0.0,
            frobenius_norm=np.linalg.norm(g), entry_mean=g.mean(), entry_max=g.max(),
            entry_min=g.min(), effective_rank=np.prod(p**-p),
        )  # fmt: skip
        for name, value in row.items():
            columns[name].append(value)
    measured = {name: column for name, column in columns.items() if name not in without}
    return ExampleResult(
        index, f"id-{index}", 17, 5, 12, False, 1.5 + index, status, None, "Frage é", "r\n",
        {} if status == "skipped" else measured,
    )  # fmt: skip


def results(*rows):
    return results_of({}, examples_table(rows), matrices_table(rows))


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_the_file_field_for_field(tmp_path):
    path = tmp_path / "out.jsonl"
    rows = [example(0), example(1, "skipped"), example(2, "non_finite"), example(3)]
    assert write_authors_jsonl(results(*rows), path) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    records = lines(path)
    assert [record["loss"] for record in records] == [1.5, 4.5]
    assert list(records[1]) == ["instruction", "output", "loss", *ORDER]
    assert records[1]["instruction"] == "Frage é" and records[1]["output"] == "r\n"
    given = rows[3].matrices
    for name, at in zip(ORDER, (4, 6, 3, 5, 2, 1, 0), strict=True):
        assert records[1][name] == {
            "M_mean": given["entry_mean"][at],
            "M_max": given["entry_max"][at],
            "M_min": given["entry_min"][at],
            "frobenius_norm": given["frobenius_norm"][at],
            "S_sum": given["nuclear_norm"][at],
            "S_max": given["sigma_max"][at],
            "S_min": 0.0,
        }
        assert list(records[1][name])[-3:] == ["S_sum", "S_max", "S_min"]


def test_the_form_with_the_spectrum(tmp_path):
    path = tmp_path / "out.jsonl"
    given = example(3)
    assert write_authors_jsonl(results(given), path, with_spectrum=True) == 1
    entry = lines(path)[0]["lm_head.weight"]
    assert list(entry) == ["M_mean", "M_max", "M_min", "frobenius_norm", "S_list"]
    sigma = given.matrices["singular_values"][0]
    assert entry["S_list"] == [*sigma, 0.0]  # min(rows, cols) = 3 values, 2 of them stored
    assert math.isclose(sum(s * s for s in entry["S_list"]), entry["frobenius_norm"] ** 2)


def test_there_and_back(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_authors_jsonl(results(example(0), example(3)), first)
    back = read_authors_jsonl(first)
    assert back.run == {"authors_jsonl": str(first)}
    assert back.examples["example_index"].tolist() == [0, 1]
    assert back.examples["example_id"].tolist() == ["0", "1"]
    assert back.examples["status"].tolist() == ["ok", "ok"]
    for name in ("num_tokens", "num_prompt_tokens", "num_response_tokens", "truncated", "reason"):
        assert back.examples[name].isna().all()
    want = results(example(0), example(3)).matrices
    key = ["example_index", "layer", "projection"]
    want["example_index"] = want["example_index"].replace({3: 1})
    merged = back.matrices.merge(want, on=key, suffixes=("", "_want"))
    assert len(merged) == 2 * len(MATRICES)
    for name in ("nuclear_norm", "sigma_max", "sigma_min", "frobenius_norm", "entry_max"):
        np.testing.assert_array_equal(merged[name], merged[f"{name}_want"])
    unknown = ["rows", "cols", "rank_bound", "stable_rank", "condition_number", "effective_rank"]
    assert back.matrices[[*unknown, "singular_values"]].isna().all(axis=None)
    assert back.matrices["layer"].isna().sum() == 2 and str(back.matrices["layer"].dtype) == "Int32"
    assert write_authors_jsonl(back, second) == 2
    assert second.read_bytes() == first.read_bytes()
    with pytest.raises(UserError, match=r"needs S_list.*keeps the singular values"):
        write_authors_jsonl(back, second, with_spectrum=True)


def test_there_and_back_with_the_spectrum(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_authors_jsonl(results(example(0), example(3)), first, with_spectrum=True)
    back = read_authors_jsonl(first)
    assert write_authors_jsonl(back, second, with_spectrum=True) == 2
    assert second.read_bytes() == first.read_bytes()
    assert back.matrices["singular_values"].map(len).unique().tolist() == [3]
    want = results(example(0), example(3)).matrices
    want["example_index"] = want["example_index"].replace({3: 1})
    merged = back.matrices.merge(
        want, on=["example_index", "layer", "projection"], suffixes=("", "_want")
    )
    for name in ("nuclear_norm", "sigma_max", "sigma_min", "effective_rank"):
        np.testing.assert_allclose(merged[name], merged[f"{name}_want"], rtol=1e-13)


def test_statistics_that_were_not_measured_are_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("what was there")
    bare = results(example(0), example(1, without=("entry_max", "entry_min")))
    with pytest.raises(UserError, match=r"needs M_max, M_min.*example 1.*with --extremes\."):
        write_authors_jsonl(bare, path)
    with pytest.raises(UserError, match=r"needs S_list.*singular values"):
        write_authors_jsonl(
            results(example(1, without=("singular_values",))), path, with_spectrum=True
        )
    fused = example(0)
    fused.matrices["projection"][0] = "qkv"
    with pytest.raises(UserError, match="projection 'qkv'"):
        write_authors_jsonl(results(fused), path)
    # A refusal leaves the file that was there, and nothing half written.
    assert path.read_text() == "what was there" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="Cannot write"):
        write_authors_jsonl(bare, tmp_path / "absent/out.jsonl")


def test_another_loss_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    given = results(example(0))
    for options in ({}, {"loss": "response_mean"}):
        assert write_authors_jsonl(of_run(given, options), path) == 1
    path.write_text("what was there")
    with pytest.raises(UserError, match=r"mean loss .*not of --loss=response_sum"):
        write_authors_jsonl(of_run(given, {"loss": "response_sum"}), path)
    assert path.read_text() == "what was there"
    with pytest.raises(UserError, match="--loss=response_sum"):
        refuse_other_loss("response_sum")
    refuse_other_loss("response_mean")


def of_run(given, options):
    return type(given)({"identity": {"options": options}}, given.examples, given.matrices)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [("expert", 3, "expert 3 of up"), ("part", "lora_A", "part lora_A of up")],
)
def test_experts_and_parts_have_no_name_in_these_files(tmp_path, column, value, message):
    path = tmp_path / "out.jsonl"
    given = example(0)
    given.matrices["projection"][2] = "up"
    given.matrices[column] = [value if k == 2 else None for k in range(len(MATRICES))]
    with pytest.raises(UserError, match=f"no name for an expert or a part.*{message}") as refusal:
        write_authors_jsonl(results(given), path)
    assert "\n" not in str(refusal.value) and not path.exists()


def test_tables_without_experts_and_parts_are_written(tmp_path):
    path, earlier_path = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    given = results(example(0))
    earlier = type(given)(
        given.run, given.examples, given.matrices.drop(columns=["expert", "part"])
    )
    write_authors_jsonl(given, path)
    write_authors_jsonl(earlier, earlier_path)
    assert path.read_bytes() == earlier_path.read_bytes()


def test_an_unfinished_run_is_read_only_when_allowed(tmp_path):
    run = RunDirectory.open(tmp_path, {"a": 1}, {})
    run.write_batch(0, 0, [example(1), example(0)])
    run.finish_window(0)
    run.write_batch(1, 3, [example(3)])
    run.write_batch(1, 0, [example(4), example(2)])
    # A matrices part alone, as a kill leaves it, is not a window.
    (tmp_path / "matrices/part-00001.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 examples in 1 finished windows and 2 batches.*same"):
        read_results(tmp_path)
    with pytest.raises(UserError, match="not finished"):
        iter_results(tmp_path)
    results = read_results(tmp_path, allow_unfinished=True)
    assert results.examples["example_index"].tolist() == [0, 1, 2, 3, 4]
    assert results.matrices["example_index"].tolist() == [i for i in range(5) for _ in MATRICES]
    assert not results.run["finished"]


def test_a_run_is_written_window_by_window(tmp_path):
    run = RunDirectory.open(tmp_path / "run", {"a": 1}, {})
    for window in range(2):
        run.write_batch(window, 0, [example(2 * window + 1), example(2 * window)])
        run.finish_window(window)
    run.finish({})
    whole, streamed = tmp_path / "whole.jsonl", tmp_path / "streamed.jsonl"
    assert write_authors_jsonl(read_results(tmp_path / "run"), whole) == 4
    assert write_authors_jsonl(iter_results(tmp_path / "run"), streamed) == 4
    assert streamed.read_bytes() == whole.read_bytes()
    assert [record["loss"] for record in lines(whole)] == [1.5, 2.5, 3.5, 4.5]
    # A part that turns out damaged half way leaves no file.
    (tmp_path / "run/matrices/part-00001.parquet").write_bytes(b"x")
    with pytest.raises(UserError, match="part-00001"):
        write_authors_jsonl(iter_results(tmp_path / "run"), tmp_path / "new.jsonl")
    assert not [path for path in tmp_path.iterdir() if "new" in path.name]


def record(**fields):
    entry = {"M_mean": 0.0, "M_max": 1.0, "M_min": -1.0, "frobenius_norm": 2.0, "S_list": [2, 1]}
    return {"instruction": "i", "output": "o", "loss": 1.0, ORDER[0]: entry} | fields


def written(tmp_path, *records):
    path = tmp_path / "authors.jsonl"
    path.write_text("\n\n".join(map(json.dumps, records)) + "\n", "utf-8")
    return path


def test_files_of_the_authors_own_program(tmp_path):
    """Blank lines, similarities of nothing, NaN as Python prints it, a zero gradient."""
    zero = {"M_mean": 0.0, "frobenius_norm": 0.0, "S_list": [0.0, 0.0, 0.0]}
    path = written(
        tmp_path,
        record(cosine_sim={}, cosine_sim_qkvo={"2": {}}),
        record(loss=math.nan),
        record(**{ORDER[1]: {"S_sum": math.inf}}),
        record(**{ORDER[0]: zero}),
        {"instruction": "i", "output": "o", "loss": 2},
    )
    assert "NaN" in path.read_text()
    back = read_authors_jsonl(path)
    assert back.examples["status"].tolist() == ["ok", "non_finite", "non_finite", "ok", "ok"]
    assert back.examples["reason"][1] == "not finite in the file: loss"
    assert ORDER[1] in back.examples["reason"][2]
    assert back.matrices["example_index"].tolist() == [0, 1, 2, 2, 3]
    first, last = back.matrices.iloc[0], back.matrices.iloc[-1]
    assert (first["nuclear_norm"], first["sigma_max"], first["sigma_min"]) == (3.0, 2.0, 1.0)
    # p = 2/3 and 1/3: exp(entropy) = 3 / 2^(2/3).
    assert first["effective_rank"] == pytest.approx(3 / 2 ** (2 / 3), rel=1e-14)
    assert last["nuclear_norm"] == 0 and pd.isna(last["effective_rank"])
    assert pd.isna(last["entry_max"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": "i", "outp', "line 3: not JSON"),
        ("[1]", "line 3: not a JSON object"),
        (json.dumps({"instruction": "i", "loss": 1.0}), "output is not a text"),
        (json.dumps(record(loss=None)), "loss is not a number"),
        (json.dumps(record(loss=True)), "loss is not a number"),
        (json.dumps(record(score=1)), "score: neither a known field"),
        (json.dumps(record(**{"model.layers.0.self_attn.qkv.weight": {}})), "qkv.weight: neither"),
        (json.dumps(record(**{ORDER[0]: {"S_all": 1}})), "no such statistic: S_all"),
        (json.dumps(record(**{ORDER[0]: {"S_sum": "1"}})), "S_sum is not a number"),
        (json.dumps(record(**{ORDER[0]: {"S_list": []}})), "S_list is not a list of numbers"),
        (json.dumps(record(**{ORDER[0]: {"S_list": ["a"]}})), "S_list is not a list of numbers"),
    ],
)
def test_lines_that_are_not_understood_are_named(tmp_path, line, message):
    path = written(tmp_path, record())
    path.write_text(path.read_text() + "\n" + line)
    with pytest.raises(UserError, match=message) as refusal:
        read_authors_jsonl(path)
    assert f"{path}, line 3" in str(refusal.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="Cannot read"):
        read_authors_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="Cannot read"):
        read_authors_jsonl(tmp_path)
