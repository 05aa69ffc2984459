"""Eight CPU devices, in one process or two: every mesh compared with one device. Not a test itself.

`python sharded_runs.py compare MODELS MESHES OPTIONS` (each a list with commas) prints one line of JSON:
for every combination the largest relative difference of each statistic. `python sharded_runs.py load DIR`
loads the models in DIR to their shards and moves a run from mesh to mesh. `test_sharding.py` runs it,
because the number of devices is settled before JAX is imported.

With JAXGRAD_TEST_PROCESS=K:HOST:PORT in the environment it is process K of two with four devices each, and
`share DIR` loads the models in DIR over both.
"""

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # Eight devices may share two cores, so a device's thread may wait long for the others.
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count="
        f"{4 if 'JAXGRAD_TEST_PROCESS' in os.environ else 8} "
        "--xla_cpu_collective_call_terminate_timeout_seconds=600"
    )

import jax
import numpy as np

import jaxgrad
from jaxgrad import UserError
from jaxgrad.checkpoints import open_checkpoint
from jaxgrad.checkpoints.sources import SafetensorsFiles
from jaxgrad.data.batches import BatchShape, ExampleArrays
from jaxgrad.gradients.selection import select_parameters
from jaxgrad.measure.on_mesh import measure_batch_on
from jaxgrad.measure.programs import Programs
from jaxgrad.models.decoder import abstract_decoder, named_parameters, with_parameters
from jaxgrad.models.families import read_config
from jaxgrad.models.sharding import MeshShape, make_mesh, parameter_shardings, parse_mesh
from jaxgrad.options import MeasureSettings
from jaxgrad.processes.group import join
from jaxgrad.runs import windows
from jaxgrad.spectra import FINITE_FLAGS

LAYERS = 3  # divides by no mesh


def raw_config(model_type, num_kv_heads, **changes):
    return {
        "model_type": model_type,
        "vocab_size": 232,
        "hidden_size": 52,
        "intermediate_size": 72,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    } | changes


GEMMA2 = {
    "head_dim": 10,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 7,
    "query_pre_attn_scalar": 10,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
}
GPT_NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 232,
    "hidden_size": 64,
    "intermediate_size": 72,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
    "rotary_pct": 0.5,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "tie_word_embeddings": False,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 231,
    "n_embd": 56,
    "n_layer": LAYERS,
    "n_head": 8,
    "n_positions": 64,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}
# 8 heads: a mesh of 8 splits them all. Key heads divide by none, some or all of the meshes.
MODELS = {
    "llama": raw_config("llama", 8, head_dim=10, hidden_act="silu", tie_word_embeddings=False),
    "llama_gqa": raw_config(
        "llama", 2, head_dim=10, hidden_act="silu", tie_word_embeddings=True, vocab_size=233
    ),
    "qwen2_gqa": raw_config(
        "qwen2", 4, hidden_size=80, hidden_act="silu", tie_word_embeddings=False
    ),
    "qwen2_mqa": raw_config(
        "qwen2", 1, hidden_size=80, hidden_act="silu", tie_word_embeddings=True
    ),
    # 12 query heads, 3 kv heads: no split of the devices keeps a kv head's query heads together.
    "qwen2_odd": raw_config(
        "qwen2",
        3,
        num_attention_heads=12,
        hidden_size=120,
        hidden_act="silu",
        tie_word_embeddings=True,
    ),
    "gemma2_gqa": raw_config("gemma2", 2, **GEMMA2),
    "gemma2_mha": raw_config("gemma2", 8, intermediate_size=71, **GEMMA2),
    # Norms of queries and keys, by head and over all heads; biases; no gates; learned positions.
    "qwen3": raw_config("qwen3", 2, head_dim=10, hidden_act="silu", tie_word_embeddings=True),
    "olmo2": raw_config(
        "olmo2",
        4,
        hidden_size=80,
        hidden_act="silu",
        tie_word_embeddings=False,
        attention_bias=True,
    ),
    "gpt_neox": GPT_NEOX,
    "gpt2": GPT2,
}
OPTIONS = {
    "attention": {"parameters": "attention"},
    "all": {"parameters": "all", "spectrum": True, "extremes": True},
    "similarity": {"parameters": "attention", "similarity": True},
    "dense": {"parameters": "all", "method": "dense", "extremes": True},
    "dense_similarity": {"parameters": "attention", "method": "dense", "similarity": True},
    "uneven": {"parameters": r"layers\.(1|2)\.self_attn\.q|layers\.0\.self_attn\.k|lm_head"},
    "layerwise": {"parameters": "all", "layerwise": True},
}
# An odd number of examples: every mesh has rows of padding.
SHAPE, RESPONSES = BatchShape(7, 24, 16), (16, 3, 9, 11, 5, 1, 8)


def random_weights(config):
    """Weights whose scale keeps every activation near one, as NumPy arrays by name."""
    shapes = named_parameters(abstract_decoder(config, np.float32)[1])
    arrays = {}
    for seed, (name, value) in enumerate(shapes.items()):
        noise = np.random.default_rng(seed).standard_normal(value.shape)
        if "norm" in name:
            arrays[name] = 0.2 * noise + (config.norm != "rms_plus_one")
        else:
            arrays[name] = noise if name == "embedding" else 1.5 * noise / value.shape[-1] ** 0.5
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def random_batch(config):
    rng = np.random.default_rng(5)
    B, T, S = SHAPE.num_examples, SHAPE.num_tokens, SHAPE.num_responses
    weights_BS = np.zeros((B, S))
    for row, count in zip(weights_BS, RESPONSES, strict=True):
        row[:count] = 1 / count
    return ExampleArrays(
        rng.integers(0, config.vocab_size, (B, T), np.int32),
        np.tile(np.arange(T - S - 1, T - 1, dtype=np.int32), (B, 1)),
        rng.integers(0, config.vocab_size, (B, S), np.int32),
        weights_BS,
    )


def random_state(config, mesh):
    arrays = random_weights(config)
    shardings = {} if mesh is None else parameter_shardings(config, arrays, mesh)

    def placed(name, array):
        if mesh is None or not mesh.is_multi_process:
            return jax.device_put(array, shardings.get(name))
        return jax.make_array_from_callback(array.shape, shardings[name], array.__getitem__)

    return with_parameters(
        abstract_decoder(config, np.float32)[1],
        {name: placed(name, array) for name, array in arrays.items()},
    )


def measure(config, mesh, settings):
    programs = Programs(config, "float32", settings, mesh)
    return programs.measure(random_state(config, mesh), SHAPE, random_batch(config))


def differences(found, expected):
    """Largest difference of each number, relative to it, or to sigma_1 for what may be near zero."""
    loss_B, measured = found
    largest = {"loss": float(np.max(np.abs(loss_B / expected[0] - 1)))}
    assert list(measured) == list(expected[1])
    for name, want in expected[1].items():
        got = measured[name]
        assert got.keys() == want.keys()
        for column in want.keys() - set(FINITE_FLAGS):
            ours, theirs = got[column], want[column]
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, (name, column)
            assert np.array_equal(np.isnan(ours), np.isnan(theirs)), (name, column)
            if not ours.size or np.isnan(ours).all():
                continue
            scale = np.abs(theirs)
            if column.startswith(("entry", "sigma_min", "singular")):
                sigma_max = want["sigma_max"]
                scale = sigma_max[..., None] if column.startswith("singular") else sigma_max
            elif "cosine" in column:
                scale = 1.0
            worst = float(np.nanmax(np.abs(ours - theirs) / scale))
            largest[column] = max(largest.get(column, 0.0), worst)
    return largest


def compare(models, meshes, options):
    """Differences of every mesh from one device."""
    results = {}
    for model in models:
        config = read_config(MODELS[model], model)[1]
        for option in options:
            asked = dict(OPTIONS[option])
            selection = select_parameters(config, asked.pop("parameters"))
            settings = MeasureSettings(selection, **asked)
            expected = measure(config, None, settings)
            assert all(np.all(values["nuclear_norm"] > 0) for values in expected[1].values())
            for text in meshes:
                mesh = make_mesh(parse_mesh(text))
                found = measure(config, mesh, settings)
                results[f"{model} {option} {text}"] = differences(found, expected)
    return results


def halved(config):
    """A mesh whose devices have memory for two rows each: a batch of 13 is halved; then for none."""
    settings = MeasureSettings(select_parameters(config, "q_proj"))
    whole = measure(config, None, settings)
    mesh, original = make_mesh(MeshShape(4, 1)), Programs.compiled
    shape, room = dataclasses.replace(SHAPE, num_examples=13), 1

    def compiled(self, shape):
        if shape.num_examples > 4 * room:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return original(self, shape)

    Programs.compiled = compiled
    try:
        programs = Programs(config, "float32", settings, mesh)
        arrays = random_batch(config)
        rows = [*range(7), *range(6)]
        longer = ExampleArrays(*(array[rows] for array in arrays))
        loss_B, _ = programs.measure(random_state(config, mesh), shape, longer)
        room, refused = 0, ""
        try:
            Programs(config, "float32", settings, mesh).memory(shape)
        except UserError as error:
            refused = str(error)
    finally:
        Programs.compiled = original
    worst = float(np.max(np.abs(loss_B / whole[0][rows] - 1)))
    halves = [[one.num_examples, other.num_examples] for one, other in programs.halves.items()]
    return {"halves": halves, "halved_worst": worst, "refused": refused}


def load(directory):
    """Shards of a loaded model; a run that is interrupted on one mesh and continued on another."""
    found = {"bytes": {}}
    for source in ("source", "saved"):
        path = str(directory / source)
        whole, split = jaxgrad.load_model(path), jaxgrad.load_model(path, mesh="2x3")
        assert whole.fingerprint == split.fingerprint
        expected = named_parameters(whole.state)
        for name, array in named_parameters(split.state).items():
            assert np.array_equal(array, expected[name]), name
            assert len(array.addressable_shards) == 6
            sizes = {shard.data.nbytes for shard in array.addressable_shards}
            (found["bytes"].setdefault(source, {})[name],) = sizes
        found["weight_bytes"] = split.weight_bytes
    config = whole.config
    found |= halved(config) | work_spaces(config) | reduced_shapes(config)
    return found | moved(directory)


def share(directory, exchange):
    """A model loaded over two processes: what each holds and reads of it, compared with one device."""
    found, original, num_read = {}, SafetensorsFiles._take, 0

    def counted(self, *arguments):
        nonlocal num_read
        values = original(self, *arguments)
        num_read += values.nbytes
        return values

    SafetensorsFiles._take = counted
    for source in ("source", "saved"):
        checkpoint = open_checkpoint(str(directory / source))
        num_read = 0
        whole = checkpoint.load()
        read_whole, num_read = num_read, 0
        split = checkpoint.load(mesh=make_mesh(MeshShape(1, 8)), exchange=exchange)
        assert whole.fingerprint == split.fingerprint
        expected, held = named_parameters(whole.state), 0
        for name, array in named_parameters(split.state).items():
            assert not array.is_fully_addressable and len(array.addressable_shards) == 4
            for shard in array.addressable_shards:
                assert np.array_equal(shard.data, np.asarray(expected[name])[shard.index]), name
            held += sum({str(s.index): s.data.nbytes for s in array.addressable_shards}.values())
        found[source] = {"held": held, "whole": whole.weight_bytes}
        found[source] |= {"read": num_read, "read_whole": read_whole}
    return found


def work_spaces(config):
    """XLA's reported memory for three examples on one device, and for 24 on eight."""
    settings = MeasureSettings(select_parameters(config, "q_proj"))
    spaces = {}
    for text, num_examples in (("1x1", 3), ("8x1", 24)):
        mesh, shape = make_mesh(parse_mesh(text)), dataclasses.replace(SHAPE, num_tokens=48)
        shape = dataclasses.replace(shape, num_examples=num_examples)
        spaces[text] = Programs(config, "float32", settings, mesh).memory(shape).work_space
    return {"work_space": spaces}


def reduced_shapes(config):
    """Numbers of examples and layers that each device of mesh 2x3 reduces, of 8 examples and all layers."""
    mesh = make_mesh(MeshShape(2, 3))
    settings = MeasureSettings(select_parameters(config, "all"))
    graphdef, state = abstract_decoder(config, np.float32)
    sizes = [(8, 24), (8, 16), (8, 16), (8, 16)]
    kinds = (np.int32, np.int32, np.int32, np.float64)
    batch = [jax.ShapeDtypeStruct(*pair) for pair in zip(sizes, kinds, strict=True)]
    with jax.enable_x64(True):
        traced = jax.make_jaxpr(measure_batch_on, static_argnums=(0, 3, 4))(
            graphdef, state, ExampleArrays(*batch), settings, mesh
        )
    (program,) = traced.eqns
    found = set()
    for equation in program.params["jaxpr"].eqns:
        if equation.primitive.name == "shard_map":
            inner = equation.params["jaxpr"]
            found |= {variable.aval.shape[:2] for variable in inner.invars}
    return {"reduced": sorted(found)}


def moved(directory):
    """One device for all; and mesh 2x3 up to the first batch, then 4x1."""
    options = jaxgrad.AnalyzeOptions(max_length=48, chat="no", parameters="q_proj", batch_tokens=96)
    lines = []

    def run(name, mesh):
        jaxgrad.run_analysis(
            model_path=str(directory / "source"),
            data_paths=[directory / "data.json"],
            output_dir=directory / name,
            options=options,
            mesh=mesh,
            say=lines.append,
            progress=False,
        )
        return json.loads((directory / name / "run.json").read_text())

    undisturbed = run("one", "1x1")
    original = windows.measured

    def interrupted(*arguments, **options):
        yield next(original(*arguments, **options))
        raise KeyboardInterrupt

    windows.measured = interrupted
    with contextlib.suppress(KeyboardInterrupt):
        run("moved", "2x3")
    windows.measured = original
    continued = run("moved", "4x1")
    assert continued["identity"] == undisturbed["identity"]
    ours, theirs = (jaxgrad.read_results(directory / name).matrices for name in ("moved", "one"))
    assert len(ours) == len(theirs) > 0
    worst = (ours["nuclear_norm"] / theirs["nuclear_norm"] - 1).abs().max()
    sessions = [session["info"]["device"]["mesh"] for session in continued["sessions"]]
    return {"sessions": sessions, "computed": len(ours), "worst": float(worst)}


def main(command, *arguments):
    """One line of JSON."""
    told = os.environ.get("JAXGRAD_TEST_PROCESS")
    if told is None:
        print(json.dumps(commanded(command, arguments, None)))
        return
    process, where = told.split(":", 1)
    with join(where, 2, int(process), timeout=20) as group:
        exchange = group.begin_run()
        print(json.dumps(commanded(command, arguments, exchange)), flush=True)
        exchange.wait_for_all()
    os._exit(0)  # JAX's threads may be at work


def commanded(command, arguments, exchange):
    if command == "load":
        return load(Path(*arguments))
    if command == "share":
        return share(Path(*arguments), exchange)
    return compare(*(argument.split(",") for argument in arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
