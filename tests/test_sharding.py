"""Meshes: the table of rules, what is asked for and chosen, and eight CPU devices against one."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import sharded_runs
from process_groups import free_port
from test_memory import QWEN, SMOL, settings_of
from tiny_models import Tiny, save_tiny

import jaxgrad
from jaxgrad import AnalyzeOptions, UserError
from jaxgrad.checkpoints.convert import convert_model
from jaxgrad.data.batches import BatchShape
from jaxgrad.measure.memory import predict_memory, weight_bytes
from jaxgrad.measure.programs import Programs
from jaxgrad.models.decoder import num_parameters, parameter_shapes
from jaxgrad.models.families import FAMILIES, read_config
from jaxgrad.models.sharding import (
    MODEL,
    MeshShape,
    check_mesh,
    laid_out,
    make_mesh,
    parameter_specs,
    parse_mesh,
    replicated_line,
    shares_of_each,
)
from jaxgrad.runs import plan

TESTS = Path(__file__).resolve().parent
PUBLISHED = json.loads((TESTS / "published_configs.json").read_text("utf-8"))
DECODERS = [n for n, known in PUBLISHED.items() if known["config"]["model_type"] in FAMILIES]
# The effective rank depends on all singular values. The condition number depends on the last one above a
# cutoff, on which two correct programs may differ; instead, the singular values are compared.
TOLERANCES = {"effective_rank": 1e-4, "condition_number": np.inf}


def published(name):
    return read_config(PUBLISHED[name]["config"], name)[1]


def test_a_mesh_is_read_or_refused_in_one_line():
    assert parse_mesh("auto") is None
    assert parse_mesh("4x2") == MeshShape(4, 2) and str(MeshShape(4, 2)) == "4x2"
    for text in ("", "4", "4x", "x2", "0x2", "4x0", "-1x2", "4*2", "4x2x1", "2.0x1", "AUTO"):
        with pytest.raises(UserError, match=f"--mesh={text}".replace("*", r"\*")):
            parse_mesh(text)
    assert make_mesh(MeshShape(1, 1)) is None
    with pytest.raises(UserError, match="--mesh=9x9 takes 81 devices, but this process has 1"):
        make_mesh(MeshShape(9, 9))


def test_too_few_devices_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="takes 2 devices"):
        jaxgrad.run_analysis(
            model_path=None, data_paths=["none"], output_dir=tmp_path / "d", mesh="2x1"
        )
    with pytest.raises(UserError, match="auto"):
        jaxgrad.load_model(mesh="auto")


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX asks of a device to place it."""

    id: int
    coords: tuple[int, int, int] = (0, 0, 0)
    process_index: int = 0
    device_kind: str = "TPU v4"
    platform: str = "tpu"
    core_on_chip: int = 0
    slice_index: int = 0


def host_of(device_kind, x, y):
    places = [(i, j, 0) for j in range(y) for i in range(x)]
    return [Chip(number, place, device_kind=device_kind) for number, place in enumerate(places)]


@pytest.mark.parametrize(
    ("device_kind", "x", "y"), [("TPU v4", 2, 2), ("TPU v5 lite", 2, 4), ("TPU v6 lite", 2, 4)]
)
def test_chips_of_a_tpu_that_are_no_box_are_refused_in_one_line(device_kind, x, y):
    chips = host_of(device_kind, x, y)
    choices = {n: chips[:n] for n in range(1, len(chips) + 1)}
    boxes = {4: "1, 2 or 4", 8: "1, 2, 4, 6 or 8"}[len(chips)]
    for number in choices:
        for shape in (MeshShape(d, number // d) for d in range(1, number + 1) if not number % d):
            if number in (3, 5, 7):
                with pytest.raises(UserError) as refused:
                    laid_out(shape, choices)
                assert str(refused.value) == (
                    f"--mesh={shape}: {number} chips of this TPU are no box, and JAX makes meshes of boxes "
                    f"only; give {boxes} devices in all"
                )
            else:
                found = laid_out(shape, choices)
                assert found.shape == shape and set(found.flat) == set(chips[:number])


def test_a_mesh_across_processes_takes_equally_many_devices_of_each():
    # Process 1 has more, and its ids come first.
    devices = [Chip(k, process_index=1 - k // 6, platform="gpu") for k in range(10)]
    choices = shares_of_each(MeshShape(2, 4), devices)
    assert list(choices) == [8]
    assert [(d.process_index, d.id) for d in choices[8]] == [
        *((0, k) for k in (6, 7, 8, 9)),
        *((1, k) for k in (0, 1, 2, 3)),
    ]
    # "data" is split over the processes first.
    assert {d.process_index for d in laid_out(MeshShape(2, 4), choices)[0]} == {0}
    for shape in (MeshShape(9, 1), MeshShape(7, 1), MeshShape(10, 1), MeshShape(2, 100)):
        with pytest.raises(UserError) as refused:
            shares_of_each(shape, devices)
        assert str(refused.value) == (
            f"--mesh={shape} takes {shape.num_devices} devices: too many for one of these 2 processes, "
            "which have 4 to 6 each (gpu), and a mesh across processes takes equally many of each; give 8 "
            "devices or a mesh that fits one process"
        )


@pytest.mark.parametrize("num_model", [1, 2, 4, 8, 5])
@pytest.mark.parametrize("name", DECODERS)
def test_every_parameter_of_every_family_has_a_rule_that_divides(name, num_model):
    config = published(name)
    shapes = parameter_shapes(config)
    for parameter, spec in parameter_specs(config, shapes, num_model).items():
        split = [size for size, axis in zip(shapes[parameter], spec, strict=False) if axis == MODEL]
        assert len(split) <= 1 and all(size % num_model == 0 for size in split), parameter
        if "norm" in parameter and config.qk_norm != "full":
            assert not split, parameter


def test_weights_shrink_by_the_devices_but_for_the_norms():
    """Llama-3.1-8B and a 70B: their 65 and 161 norm vectors are replicated, all else is split."""
    small = published("Llama-3.1-8B")
    large = dataclasses.replace(
        small, width=8192, mlp_width=28672, num_layers=80, num_heads=64, layer_kinds=(0,) * 80
    )
    for config in (small, large):
        count, norms = num_parameters(config), (2 * config.num_layers + 1) * config.width
        for num_model in (2, 4, 8):
            expected = (count - norms) // num_model + norms
            assert weight_bytes(config, "bfloat16", MeshShape(8, num_model)) == 2 * expected
    # Sixteen devices for eight kv heads: k and v are replicated, too.
    kv = 2 * small.num_layers * small.num_kv_heads * small.head_size * small.width
    norms = (2 * small.num_layers + 1) * small.width
    expected = (num_parameters(small) - norms - kv) // 16 + norms + kv
    assert weight_bytes(small, "float32", MeshShape(1, 16)) == 4 * expected


def test_what_does_not_divide_is_said_and_what_divides_nothing_is_refused():
    assert replicated_line(published("Llama-3.1-8B"), MeshShape(2, 8)) is None
    line = replicated_line(SMOL, MeshShape(1, 2))
    assert line is not None and "9 attention heads, 3 kv heads" in line and "vocab" not in line
    check_mesh(SMOL, MeshShape(1, 2))
    odd = dataclasses.replace(SMOL, mlp_width=1537, vocab_size=49153)
    with pytest.raises(UserError, match="--mesh=1x2: neither the 9 attention heads nor"):
        check_mesh(odd, MeshShape(1, 2))
    check_mesh(odd, MeshShape(8, 1))


def settled_mesh(asked, options, config):
    return plan.settle_mesh(asked, plan.settings_for(options, config), options, config, ())


def fitted(options, config, mesh=MeshShape(1, 1)):
    """The options with batch_tokens and layerwise settled."""
    settings = plan.settings_for(options, config)
    return plan.fit_batches(options, settings, config, (), mesh=mesh)[0]


@pytest.fixture
def machine(monkeypatch):
    """Eight accelerators of so many bytes each."""

    def build(num_bytes):
        monkeypatch.setattr(jax, "local_devices", lambda: [None] * 8)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(plan, "memory_at_hand", lambda: num_bytes)

    return build


def test_auto_splits_weights_only_where_they_do_not_fit(machine):
    config, options = published("Llama-3.1-8B"), AnalyzeOptions(dtype="bfloat16")
    weights = weight_bytes(config, "bfloat16")

    def settled(num_bytes, **changes):
        machine(num_bytes)
        return settled_mesh(None, dataclasses.replace(options, **changes), config)

    assert settled(2 * weights) == settled(None) == MeshShape(8, 1)
    assert settled(weights) == MeshShape(4, 2)
    assert settled(weights // 3) == MeshShape(2, 4)
    # Nothing fits: the smallest part of the weights, which `fit_batches` then refuses.
    assert settled(1000) == MeshShape(1, 8)
    with pytest.raises(UserError, match="splits the weights over more devices"):
        fitted(options, config, MeshShape(1, 8))
    assert settled_mesh(MeshShape(2, 2), options, config) == MeshShape(2, 2)


def test_auto_spans_the_processes_only_where_one_is_too_small(machine, monkeypatch):
    """Four processes of eight accelerators each."""
    config, options = published("Llama-3.1-8B"), AnalyzeOptions(dtype="bfloat16")
    settings, weights = plan.settings_for(options, config), weight_bytes(config, "bfloat16")
    devices = [Chip(k, process_index=k // 8, platform="gpu") for k in range(32)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "process_count", lambda: 4)

    def settled(num_bytes, **across):
        machine(num_bytes)
        return plan.settle_mesh(None, settings, options, config, (), **across)

    assert settled(2 * weights, across=True) == MeshShape(8, 1)
    assert settled(weights // 3, across=True) == MeshShape(2, 4)
    assert settled(weights // 9, across=True) == MeshShape(2, 16)
    assert settled(weights // 9) == MeshShape(1, 8)
    # Its devices are found, and it is known what each has.
    fixed = AnalyzeOptions(dtype="bfloat16", batch_tokens=512)
    for mesh, at_hand in ((MeshShape(2, 16), weights), (MeshShape(33, 1), None)):
        machine(weights)
        assert plan.fit_batches(fixed, settings, config, (), mesh=mesh)[2].at_hand == at_hand


def test_memory_that_runs_out_across_processes_is_refused_with_a_mend(monkeypatch):
    """A batch is not halved at run time there: the other processes may have memory for it."""
    config = sharded_runs.read_config(sharded_runs.MODELS["llama_gqa"], "tiny")[1]
    settings = settings_of(config, "attention")
    monkeypatch.setattr(Programs, "spans", True)
    programs = Programs(config, "float32", settings)

    def fails(self, state, shape, arrays):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(Programs, "_measure_whole", fails)
    with pytest.raises(UserError, match=r"12 x 24 tokens .*; give --batch_tokens=144 and another"):
        programs.measure(None, BatchShape(12, 24, 16), None)
    assert not programs.halves


def test_auto_is_one_device_on_a_cpu(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [None] * 8)
    monkeypatch.setattr(plan, "memory_at_hand", lambda: 1)
    assert settled_mesh(None, AnalyzeOptions(), SMOL) == MeshShape(1, 1)


def test_a_mesh_has_a_batch_for_each_device_of_data(machine):
    machine(None)
    mesh = MeshShape(4, 2)

    def tokens(**changes):
        return fitted(AnalyzeOptions(**changes), QWEN, mesh).batch_tokens

    one = fitted(AnalyzeOptions(), QWEN).batch_tokens
    assert tokens() == 4 * one
    # A given one is kept.
    assert tokens(batch_tokens=one) == one


def test_layers_one_by_one_only_where_weights_are_whole(machine):
    asked = AnalyzeOptions(layerwise="yes")
    with pytest.raises(UserError, match="--layerwise=yes does not go with --mesh=4x2"):
        fitted(asked, QWEN, MeshShape(4, 2))
    machine(1000)  # too little for any batch
    fixed = AnalyzeOptions(batch_tokens=512)
    for mesh, chosen in ((MeshShape(8, 1), "yes"), (MeshShape(4, 2), "no")):
        assert fitted(fixed, QWEN, mesh).layerwise == chosen


def test_the_prediction_shrinks_with_the_mesh():
    config = published("Llama-3.1-8B")
    settings = dataclasses.replace(settings_of(config, "all"), backend="gpu")

    def need(mesh, num_examples):
        shape = BatchShape(num_examples, 512, 64)
        return predict_memory(config, "float32", settings, shape, mesh=mesh)

    one, data, model = need(MeshShape(1, 1), 1), need(MeshShape(8, 1), 8), need(MeshShape(1, 8), 1)
    # Eight examples on eight devices are one on each; a ninth makes it two.
    assert dataclasses.replace(data, shape=one.shape, mesh=one.mesh) == one
    assert need(MeshShape(8, 1), 9).residuals == 2 * one.residuals
    assert 7.9 < one.weights / model.weights <= 8
    assert model.work_space < one.work_space / 2
    assert model.head == one.head // 8
    # Inputs of q and gate and outputs of o and down are not split.
    D, F, T, L = config.width, config.mlp_width, 512, config.num_layers
    kv = config.num_kv_heads * config.head_size
    stacked = T * L * (4 * D + (2 * D + 2 * kv + 3 * F) // 8)
    assert model.factors == 4 * (stacked + 64 * (D + config.vocab_size // 8))


def test_a_dry_run_needs_no_devices(tmp_path):
    model = save_tiny(Tiny(8, 4, tied=True, width=56), tmp_path / "model")
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": "what", "output": "so it is"}]))
    lines = []
    asked = {"model_path": str(model), "data_paths": [data], "say": lines.append}
    (found,) = jaxgrad.dry_run(
        **asked, mesh="8x8", options=AnalyzeOptions(max_length=48, chat="no")
    )
    assert any(line.startswith("memory per device of mesh 8x8: ") for line in lines)
    assert found.plan.memory.mesh == MeshShape(8, 8)
    assert any("4 kv heads, the MLP's width 71" in line for line in lines), lines
    # The devices are not there, so their memory is unknown and batches are not made smaller.
    assert found.plan.choice.at_hand is None
    assert found.plan.choice.batch_tokens == 8 * fitted(AnalyzeOptions(), SMOL).batch_tokens


def run_script(*arguments, timeout=900):
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(TESTS / "sharded_runs.py"), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    # The compiler's warning that it cannot split efficiently.
    assert "rematerialization" not in done.stderr, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def run_in_two_processes(*arguments, timeout=900):
    """What both printed: two processes of four devices each."""
    where = f"127.0.0.1:{free_port()}"
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(TESTS / "sharded_runs.py"), *arguments]
    started = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"JAXGRAD_TEST_PROCESS": f"{k}:{where}"},
        )
        for k in range(2)
    ]
    found = []
    for process in started:
        out, err = process.communicate(timeout=timeout)
        assert process.returncode == 0 and "rematerialization" not in err, err[-4000:]
        found.append(json.loads(out.splitlines()[-1]))
    return found


def check_differences(results):
    for case, found in results.items():
        for number, worst in found.items():
            assert worst <= TOLERANCES.get(number, 1e-5), (case, number, worst)


def test_a_mesh_gives_the_numbers_of_one_device():
    """Key heads and a vocabulary that do not divide, rows and layers of padding, an untied head."""
    results = run_script("compare", "llama_gqa", "2x4", "all")
    check_differences(results)


@pytest.mark.slow
@pytest.mark.parametrize("model", list(sharded_runs.MODELS))
def test_every_mesh_gives_the_numbers_of_one_device(model):
    results = run_script("compare", model, "1x1,8x1,4x2,2x4,1x8", "all", timeout=3000)
    print(json.dumps(results))
    check_differences(results)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama_gqa", "qwen2_gqa", "gemma2_gqa"])
def test_every_option_gives_the_numbers_of_one_device(model):
    options = "attention,similarity,dense,dense_similarity,uneven"
    results = run_script("compare", model, "8x1,2x4", options, timeout=3000)
    results |= run_script("compare", model, "8x1", "layerwise", timeout=3000)
    print(json.dumps(results))
    check_differences(results)


@pytest.mark.slow
def test_a_mesh_across_processes_gives_the_numbers_of_one_device():
    options = "all,similarity,dense,dense_similarity,uneven"
    found = run_in_two_processes("compare", "llama_gqa", "8x1,2x4,1x8", options, timeout=3000)
    found += run_in_two_processes("compare", "llama_gqa", "8x1", "layerwise", timeout=3000)
    print(json.dumps(found))
    for results in found:
        check_differences(results)


def test_a_process_holds_and_reads_its_own_shards_only(tmp_path):
    """Mesh 1x8 over two processes: each has half of what is split, and reads no more than it must."""
    source = save_tiny(Tiny(8, 8, tied=False, width=72), tmp_path / "source")
    convert_model(str(source), tmp_path / "saved", say=lambda _: None, progress=False)
    config = jaxgrad.load_model(str(source)).config
    shapes = parameter_shapes(config)
    halves = {name for name, spec in parameter_specs(config, shapes, 8).items() if MODEL in spec}
    assert {f"layers.attention.{name}.weight" for name in "qkvo"} <= halves
    held = sum(4 * math.prod(s) // (2 if name in halves else 1) for name, s in shapes.items())
    found = run_in_two_processes("share", str(tmp_path))
    for process in found:
        for kind in ("source", "saved"):
            assert process[kind]["held"] == held < process[kind]["whole"]
        # Half of the weights for the fingerprint, and of the others what it holds.
        assert held <= process["source"]["read"] < 0.9 * process["source"]["read_whole"]
    total = sum(process["source"]["read"] for process in found)
    assert total == found[0]["source"]["read_whole"] + held


def test_a_model_goes_straight_to_its_devices_and_a_run_from_mesh_to_mesh(tmp_path):
    """Safetensors and Orbax; a run interrupted on one mesh and continued on another."""
    tiny = Tiny(6, 3, tied=True, rope="linear", sharded=True)
    source = save_tiny(tiny, tmp_path / "source")
    convert_model(str(source), tmp_path / "saved", say=lambda _: None, progress=False)
    rows = [{"instruction": "return what", "output": " so it is"[: 3 + i % 4]} for i in range(8)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    found = run_script("load", str(tmp_path))
    # Embedding, q, k, v and o are split over three devices; the MLP (width 71) and the norms are not.
    config = jaxgrad.load_model(str(source)).config
    shapes = parameter_shapes(config)
    split = {"embedding", *(f"layers.attention.{name}.weight" for name in "qkvo")}
    expected = {
        name: 4 * math.prod(shape) // (3 if name in split else 1) for name, shape in shapes.items()
    }
    assert found["bytes"] == {"source": expected, "saved": expected}
    total = sum(expected.values())
    assert total == weight_bytes(config, "float32", MeshShape(2, 3)) == found["weight_bytes"]
    assert found["halves"] == [[13, 8], [8, 4]] and found["halved_worst"] < 1e-5
    assert found["refused"].startswith("the memory of cpu is too small for one example")
    assert found["sessions"] == ["2x3", "4x1"]
    assert found["computed"] and found["worst"] < 1e-5
    # Of eight examples on two devices, and three layers on three.
    assert found["reduced"] == [[4, 1]]
    # Each of eight devices needs as much as a single one with the same examples.
    assert found["work_space"]["8x1"] == pytest.approx(found["work_space"]["1x1"], rel=0.1)
