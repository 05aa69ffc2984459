"""The flags that several commands share, in groups, and the values made from them."""

import dataclasses
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxgrad import command_line
from jaxgrad.command_line import FlagGroup
from jaxgrad.data.examples import Fields
from jaxgrad.data.read import AUTO, FORMAT_NAMES
from jaxgrad.data.record import RESPONSE_NAMES
from jaxgrad.data.records import KINDS
from jaxgrad.options import (
    CHOICES,
    DTYPE_NAMES,
    METHODS,
    MOST_TOKENS,
    PRECISIONS,
    PROTOCOL_NAMES,
    TURNS,
    AnalyzeOptions,
    ModelOptions,
)

if TYPE_CHECKING:
    from jaxgrad.analysis import Resampling
    from jaxgrad.processes.group import Group


MODEL_FLAGS = ("model_path", "base_model_path", "adapter", "revision")


def define_model_flags() -> FlagGroup:
    """The model."""
    command_line.define_path(
        "model_path",
        "A Hugging Face directory (safetensors), that of a LoRA adapter, a hub id, a .gguf file, or a "
        "directory that the command convert wrote. Not given: the embedded SmolLM2-135M-Instruct.",
    )
    command_line.define_path(
        "base_model_path",
        "The model that an adapter is merged into. Not given: the one that the adapter names.",
    )
    flags.DEFINE_enum(
        "adapter",
        "auto",
        CHOICES,
        "Whether a directory's adapter is used. auto: if it holds no whole weights; with both, say which.",
    )
    flags.DEFINE_string(
        "revision", None, "Branch, tag or commit of a hub id. Not given: its main branch."
    )
    return FlagGroup("Model", MODEL_FLAGS)


def model_options() -> ModelOptions:
    """The flags besides --model_path that decide which weights are read."""
    values = flags.FLAGS
    return ModelOptions(values.base_model_path, values.adapter, values.revision)


def define_input_flags(*, limit: int | None = None, several: bool = False) -> FlagGroup:
    """The model and the examples.

    Args:
        limit: the default of --limit, None for all.
        several: whether --data_path takes several files.
    """
    define_model_flags()
    more = (
        " Several files, with commas (\\, for one in a name): each gets a run in OUTPUT_DIR/NAME, the "
        "model is loaded once."
    )
    flags.DEFINE_string(
        "data_path",
        None,
        "JSON, JSON lines, CSV, Parquet or Arrow, also .gz or .zst; a directory that datasets saved; or a "
        "set of the hub, hf:ORG/NAME:SPLIT. docs/data.md lists the records that are read."
        + (more if several else ""),
    )
    flags.DEFINE_integer("start", 0, "Index of the first example, from 0.")
    not_given = " Not given: all." if limit is None else ""
    flags.DEFINE_integer("limit", limit, f"How many examples at most.{not_given}")
    flags.DEFINE_string("instruction_field", "instruction", "Name of the instruction's field.")
    flags.DEFINE_string(
        "input_field", "input", "Name of the field that may add to the instruction."
    )
    flags.DEFINE_string("output_field", "output", "Name of the response's field.")
    flags.DEFINE_enum(
        "data_format",
        AUTO,
        FORMAT_NAMES,
        "What the records are: " + "; ".join(f"{kind.name}: {kind.form}" for kind in KINDS) + ". "
        "auto: by their fields.",
    )
    flags.DEFINE_enum(
        "response",
        None,
        RESPONSE_NAMES,
        "Which response of {chosen, rejected} records; each makes a run of its own.",
    )
    names = (*MODEL_FLAGS, "data_path", "data_format", "response", "start", "limit")
    return FlagGroup("Model and data", (*names, "instruction_field", "input_field", "output_field"))


def record_fields() -> Fields:
    """The names of a record's fields."""
    values = flags.FLAGS
    return Fields(values.instruction_field, values.input_field, values.output_field)


def define_output_flags() -> FlagGroup:
    """Where the results go."""
    command_line.define_path(
        "output_dir",
        "Directory for the results, or a URL (gs://, s3://). A run that is there is continued.",
    )
    flags.DEFINE_enum(
        "output_format",
        "parquet",
        ["parquet", "jsonl"],
        "jsonl: write the authors' JSONL (OUTPUT_DIR/authors.jsonl) as well; implies --extremes.",
    )
    return FlagGroup("Results", ("output_dir", "output_format"))


def define_protocol_flags() -> FlagGroup:
    """How an example becomes tokens."""
    default = AnalyzeOptions()
    flags.DEFINE_enum(
        "protocol",
        default.protocol,
        PROTOCOL_NAMES,
        "paper: the authors' way, to compare with. clean: exactly one BOS, conversations as the template "
        "renders them whole, and the response's tokens found by character offsets.",
    )
    flags.DEFINE_enum(
        "turns",
        default.turns,
        TURNS,
        "Which turns of a conversation carry the loss: the assistant's last one, or all of the assistant's "
        "(with --protocol=clean).",
    )
    flags.DEFINE_enum(
        "chat",
        default.chat,
        CHOICES,
        "Whether the chat template is applied. auto: if the tokenizer has one.",
    )
    flags.DEFINE_integer(
        "max_length",
        default.max_length,
        f"Tokens after which an example is cut. Not given: {MOST_TOKENS}, or the model's positions where "
        "they are fewer.",
    )
    flags.DEFINE_string(
        "date",
        default.date,
        "YYYY-MM-DD: the day that some chat templates print (Llama 3.2, SmolLM3). Not given: today, or "
        "the day of the run that is continued.",
    )
    return FlagGroup("Examples to tokens", ("protocol", "turns", "chat", "max_length", "date"))


def define_method_flags() -> FlagGroup:
    """Which weights are measured, and how."""
    default = AnalyzeOptions()
    flags.DEFINE_string(
        "parameters",
        default.parameters,
        "attention (q, k, v, o), mlp (gate, up, down), all (both, and an untied lm_head), or a regular "
        "expression searched in the weights' names, such as 'layers.[0-3].self_attn.q_proj' (Llama's "
        "names, whatever the family).",
    )
    flags.DEFINE_enum(
        "method",
        default.method,
        METHODS,
        "auto: from the factors where that is cheaper, else from the built matrix. factored: always "
        "from the factors. dense: the definition, each weight's own gradient and its full SVD (slow).",
    )
    flags.DEFINE_string(
        "loss",
        default.loss,
        "response_mean: mean over the response's tokens, the authors'. response_sum: their sum. An "
        "unknown name lists all.",
    )
    return FlagGroup("What is measured", ("parameters", "method", "loss"))


def define_measure_flags() -> FlagGroup:
    """The method's group, and what is kept besides the usual statistics."""
    group = define_method_flags()
    flags.DEFINE_bool("spectrum", False, "Keep every singular value.")
    flags.DEFINE_bool("extremes", False, "Also find the largest and smallest entry.")
    flags.DEFINE_bool(
        "similarity",
        False,
        "Also take the cosines between gradients: of each projection over layers, and of q and o, k and v "
        "in a layer.",
    )
    return FlagGroup(group.title, (*group.names, "spectrum", "extremes", "similarity"))


def define_compute_flags() -> FlagGroup:
    """How it is computed."""
    default = AnalyzeOptions()
    flags.DEFINE_integer(
        "batch_tokens",
        default.batch_tokens,
        "Padded tokens of a batch. Not given: 512 on a CPU, 8192 elsewhere, times the D of --mesh, or as "
        "many as fit in the memory; a run that is continued keeps its own.",
        lower_bound=1,
    )
    flags.DEFINE_enum("dtype", default.dtype, DTYPE_NAMES, "Of the weights and the arithmetic.")
    flags.DEFINE_enum(
        "precision",
        default.precision,
        PRECISIONS,
        "Of the model's matrix products, on devices that have a choice.",
    )
    flags.DEFINE_enum(
        "layerwise",
        default.layerwise,
        CHOICES,
        "Reduce each layer inside the backward pass. It needs the memory of one layer's factors instead "
        "of all, and one more forward pass. auto: if the memory is too small otherwise. Not with "
        "--similarity.",
    )
    flags.DEFINE_string(
        "mesh",
        "auto",
        "DxM: split the examples of a batch over D devices and the weights over M. They are this process's "
        "or, where these are too few, those of all processes. auto: the weights are split only if the "
        "model does not fit on one device; on a CPU one device.",
    )
    return FlagGroup("Computation", ("batch_tokens", "dtype", "precision", "layerwise", "mesh"))


def analyze_options() -> AnalyzeOptions:
    """The flags of the protocol, measure and compute groups as options."""
    values = flags.FLAGS
    names = [field.name for field in dataclasses.fields(AnalyzeOptions)]
    chosen: dict[str, Any] = {name: values[name].value for name in names if name in values}
    return AnalyzeOptions(**chosen)


def define_process_flags() -> FlagGroup:
    """Several processes that share one run."""
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0. Not given: what SLURM, Open MPI, a TPU pod or an indexed Kubernetes job "
        "says, or else one process.",
    )
    flags.DEFINE_integer(
        "num_processes", None, "How many processes share the run. 1: this one, whatever SLURM says."
    )
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")
    flags.DEFINE_integer(
        "process_timeout",
        60,
        "Seconds without a sign of life after which a process counts as dead and the others end. At the "
        "start they wait for each other five times as long.",
        lower_bound=2,
    )
    names = ("coordinator", "num_processes", "process_id", "process_timeout")
    return FlagGroup("Several processes", names)


def join_processes() -> "Group":
    """The group of processes that this one belongs to, by the flags or else by the environment."""
    from jaxgrad.processes.group import join

    v = flags.FLAGS
    return join(v.coordinator, v.num_processes, v.process_id, timeout=v.process_timeout)


def define_dry_run_flags() -> FlagGroup:
    """Plan instead of run."""
    flags.DEFINE_bool(
        "dry_run",
        False,
        "Print examples, tokens, batches, memory and disk of the run; load no weights, write nothing.",
    )
    flags.DEFINE_bool(
        "calibrate", False, "With --dry_run: load the weights, time one batch, estimate the time."
    )
    return FlagGroup("Before a run", ("dry_run", "calibrate"))


def define_resampling_flags() -> FlagGroup:
    """How intervals and p are made."""
    flags.DEFINE_float("level", 0.95, "Nominal coverage of the intervals.")
    flags.DEFINE_integer("num_resamples", 2000, "Bootstrap resamples.")
    flags.DEFINE_integer("num_permutations", 9999, "Sign patterns drawn for p.")
    flags.DEFINE_integer("seed", 0, "The same seed gives the same numbers.")
    return FlagGroup("Statistics", ("level", "num_resamples", "num_permutations", "seed"))


def resampling() -> "Resampling":
    """The flags of the statistics group."""
    from jaxgrad.analysis import Resampling

    v = flags.FLAGS
    return Resampling(v.level, v.num_resamples, v.num_permutations, v.seed)
