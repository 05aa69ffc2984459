"""Memory: predicted against XLA's own account, chosen to fit, and what is at hand."""

import dataclasses

import numpy as np
import pytest
from decoder_configs import tiny_config

from jaxgrad.data.batches import BatchShape
from jaxgrad.gradients.selection import select_parameters
from jaxgrad.measure import memory
from jaxgrad.measure.disk import predict_disk
from jaxgrad.measure.memory import choose_batch_tokens, predict_memory
from jaxgrad.measure.programs import Programs
from jaxgrad.models.decoder import num_parameters
from jaxgrad.options import MeasureSettings
from jaxgrad.results import schema

SMOL = tiny_config(  # SmolLM2-135M
    vocab_size=49152,
    width=576,
    mlp_width=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_size=64,
    tied_embeddings=True,
)
QWEN = tiny_config(  # Qwen2-1.5B, two layers of it
    vocab_size=151936,
    width=1536,
    mlp_width=8960,
    num_layers=2,
    num_heads=12,
    head_size=128,
    tied_embeddings=True,
    qkv_bias=True,
)
TINY = tiny_config(
    vocab_size=300,
    width=132,
    mlp_width=71,
    num_heads=6,
    num_kv_heads=3,
    head_size=14,
    tied_embeddings=True,
)


def settings_of(config, parameters="attention", **changes):
    return MeasureSettings(select_parameters(config, parameters), **changes)


@pytest.mark.parametrize(
    ("config", "dtype", "shape", "changes"),
    [
        (SMOL, "float32", (1, 1024, 512), {}),
        (QWEN, "float32", (2, 256, 64), {"similarity": True}),
        (TINY, "float64", (1, 64, 16), {}),
    ],
)
def test_the_prediction_is_within_20_percent_of_xlas_account(
    shipped_compiler, config, dtype, shape, changes
):
    settings = settings_of(config, **changes)
    shape = BatchShape(*shape)
    account = Programs(config, dtype, settings).memory(shape)
    predicted = predict_memory(config, dtype, settings, shape)
    assert predicted.weights == account.weights == memory.weight_bytes(config, dtype)
    assert predicted.work_space == pytest.approx(account.work_space, rel=0.2)


def test_factors_are_counted_array_by_array():
    shape = BatchShape(2, 64, 16)
    D, queries, keys, L = 132, 6 * 14, 3 * 14, 3
    # One X for q, k and v; o has its own.
    numbers = (D + queries + 2 * keys) + (queries + D)
    predicted = predict_memory(TINY, "float32", settings_of(TINY), shape)
    assert predicted.factors == 2 * L * 64 * numbers * 4
    only_o = predict_memory(TINY, "float32", settings_of(TINY, "o_proj"), shape)
    assert only_o.factors == 2 * L * 64 * (queries + D) * 4


def test_bfloat16_needs_half_the_weights_and_on_a_device_half_the_factors():
    shape = BatchShape(1, 64, 16)
    settings = dataclasses.replace(settings_of(SMOL), backend="gpu")
    narrow, wide = (
        predict_memory(SMOL, dtype, settings, shape) for dtype in ("bfloat16", "float32")
    )
    assert 2 * narrow.weights == wide.weights == 4 * num_parameters(SMOL)
    assert 2 * narrow.factors == wide.factors


def test_similarity_and_the_definition_need_more():
    shape = BatchShape(1, 64, 16)
    plain, dense, similar = (
        predict_memory(SMOL, "float32", settings_of(SMOL, **changes), shape)
        for changes in ({}, {"method": "dense"}, {"similarity": True})
    )
    assert dense.work_space > plain.work_space
    assert similar.reduction > plain.reduction


def test_batch_tokens_are_halved_until_the_largest_batch_fits():
    settings, sizes = settings_of(SMOL), [(64, 16), (512, 64)]

    def need(batch_tokens):
        shapes = [BatchShape(max(1, batch_tokens // T), T, S) for T, S in sizes]
        return max(predict_memory(SMOL, "float32", settings, shape).total for shape in shapes)

    def choose(at_hand):
        return choose_batch_tokens(SMOL, "float32", settings, sizes, default=8192, at_hand=at_hand)

    assert choose(None).batch_tokens == choose(10**12).batch_tokens == 8192
    at_hand = int(need(2048) / 0.9) + 1  # exactly enough for 2048, too little for 4096
    choice = choose(at_hand)
    assert (choice.batch_tokens, choice.default, choice.fits) == (2048, 8192, True)
    assert choice.needed == need(2048)
    hopeless = choose(10**8)
    assert not hopeless.fits and hopeless.needed == need(1)


def test_memory_of_the_machine_and_of_its_control_group(tmp_path):
    assert memory.memory_at_hand() > 0
    proc, group = tmp_path / "proc", tmp_path / "sys" / "fs" / "cgroup"
    proc.mkdir()
    group.mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:   700 kB\n")
    assert memory._machine_memory(tmp_path) == 700 * 1024
    (group / "memory.max").write_text("max\n")
    assert memory._machine_memory(tmp_path) == 700 * 1024
    (group / "memory.max").write_text("5000\n")
    (group / "memory.current").write_text("4000\n")
    (group / "memory.stat").write_text("anon 1000\ninactive_file 3000\n")
    assert memory._machine_memory(tmp_path) == 5000 - 4000 + 3000
    assert memory._machine_memory(tmp_path / "nothing") > 0  # by sysconf


@pytest.mark.parametrize(
    "changes", [{}, {"extremes": True}, {"similarity": True}, {"spectrum": True}]
)
def test_disk_is_predicted_within_20_percent_of_a_table_of_random_numbers(changes):
    config = dataclasses.replace(SMOL, num_layers=12, layer_kinds=(0,) * 12)
    settings, random = settings_of(config, **changes), np.random.default_rng(0)
    count, layers, num_tokens = 48, 12, 100

    def result(index):
        def column():
            return random.lognormal(size=count)

        names = ("nuclear_norm", "sigma_max", "frobenius_norm", "entry_mean", "effective_rank")
        columns = {name: column() for name in (*names, "stable_rank", "condition_number")}
        columns |= {"layer": np.repeat(np.arange(12.0), 4), "projection": [*"qkvo"] * layers}
        columns |= {"rank_bound": np.full(count, num_tokens), "sigma_min": np.zeros(count)}
        if settings.extremes:
            columns |= {"entry_max": column(), "entry_min": column()}
        if settings.similarity:
            columns["layer_cosines"] = list(random.normal(size=(count, layers)).astype(np.float32))
        if settings.spectrum:
            columns["singular_values"] = list(random.lognormal(size=(count, num_tokens)))
        return schema.ExampleResult(
            index, str(index), num_tokens, 50, 50, False, 1.0, "ok", None, "", "", columns
        )

    results = [result(index) for index in range(64)]
    tables = schema.matrices_table(results), schema.examples_table(results)
    written = sum(len(schema.parquet_bytes(table)) for table in tables)
    predicted = predict_disk(settings, config, [(num_tokens, 0)] * 64, window=256)
    assert predicted.parquet == pytest.approx(written, rel=0.2)
    journal = sum(len(schema.encode_batch([result], "key")) for result in results)
    assert predicted.journal == pytest.approx(journal, rel=0.25)
    assert predicted.total == predicted.parquet + predicted.journal
