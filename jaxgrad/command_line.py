"""What every binary does around its one library call: flags in groups, help, errors, exit codes."""

import dataclasses
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from absl import app, flags, logging

from jaxgrad import stopping
from jaxgrad.errors import BAD_INPUT, INTERRUPTED, RUN_AGAIN, UserError
from jaxgrad.examples import Fields

if TYPE_CHECKING:
    from jaxgrad.analysis import Resampling
    from jaxgrad.options import AnalyzeOptions
    from jaxgrad.processes import Group


@dataclasses.dataclass(frozen=True)
class FlagGroup:
    """Flags that stand together in --help."""

    title: str
    names: tuple[str, ...]


def run(
    main: Callable[[], int | None],
    description: str,
    groups: Sequence[FlagGroup],
    *,
    after_interrupt: str = "nothing was written",
    more_of: str | None = None,
) -> NoReturn:
    """Parse flags, call `main`, turn what happens into an exit code.

    Arguments that are no flags and follow the flag `more_of` are further values of it.

    0 or main's own code; 2 with a one-line message for a `UserError` or a bad flag; 130 after Ctrl-C and
    75 after SIGTERM, with a line that says how to go on. Any other exception keeps its traceback.
    """
    stopping.catch_sigterm()
    # Compiled programs are kept between runs: the second analysis of a model starts at once.
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jaxgrad/compiled")
    )
    # transformers' advice (that torch is missing, say) is not for our users.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    def parse(arguments: list[str]) -> list[str]:
        if any(word in ("--help", "-h", "-help") for word in arguments[1:]):
            print(help_text(os.path.basename(arguments[0]), description, groups))
            sys.exit(0)
        try:
            rest = flags.FLAGS(_flag_for_each(arguments, more_of))
        except flags.Error as error:
            _fail(f"{error} (--help lists the flags)")
        if len(rest) > 1:
            _fail(f"argument {rest[1]!r} is not a flag: give --name=value (--help lists the flags)")
        return rest

    def guarded(_: list[str]) -> int | None:
        # absl shows INFO by default, and JAX tells there which backends it did not find.
        logging.set_verbosity(logging.WARNING)
        try:
            return main()
        except UserError as error:
            _fail(str(error))
        except stopping.Stopped as stopped:
            stopping.exit_now(RUN_AGAIN, f"\n{stopped}")
        except KeyboardInterrupt:
            _end_interrupted(after_interrupt)

    def unraisable(failure: Any) -> None:
        # Ctrl-C that arrives inside a destructor or a callback of the garbage collector (JAX has one)
        # is printed by Python and forgotten, and the program would go on.
        if isinstance(failure.exc_value, KeyboardInterrupt):
            _end_interrupted(after_interrupt)
        sys.__unraisablehook__(failure)

    sys.unraisablehook = unraisable
    try:
        app.run(guarded, flags_parser=parse)
    except SystemExit as ended:
        if stopping.threads_stay() and isinstance(ended.code, int | None):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code or 0)
        raise
    raise AssertionError("app.run always exits")


def _end_interrupted(after_interrupt: str) -> NoReturn:
    # XLA's threads may still be at work on a batch; waiting for it is not what Ctrl-C asks.
    stopping.exit_now(INTERRUPTED, f"\ninterrupted: {after_interrupt}")


def _flag_for_each(arguments: list[str], name: str | None) -> list[str]:
    """--NAME A B --other as --NAME=A --NAME=B --other."""
    spread, collecting = [], False
    for argument in arguments:
        if argument == f"--{name}":
            collecting = True
        elif collecting and not argument.startswith("-"):
            spread.append(f"--{name}={argument}")
        else:
            collecting = argument.startswith(f"--{name}=")
            spread.append(argument)
    return spread


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(BAD_INPUT)


def help_text(program: str, description: str, groups: Sequence[FlagGroup]) -> str:
    """The text of --help: the description, then each group's flags with defaults and meanings."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    lines = [f"usage: {program} [--flag=value ...]", "", *textwrap.wrap(description, width)]
    for group in groups:
        lines += ["", f"{group.title}:"]
        for name in group.names:
            flag = flags.FLAGS[name]
            lines.append(f"  --{_usage(name, flag)}")
            lines += textwrap.wrap(
                _meaning(flag), width, initial_indent=" " * 8, subsequent_indent=" " * 8
            )
    return "\n".join(lines)


def _meaning(flag: Any) -> str:
    # absl puts an enum's values before its help; they stand in the usage already. Behind a list's help
    # it says how to repeat it.
    text = flag.help.split(";\n    repeat this option", 1)[0]
    return text.split(">: ", 1)[1] if text.startswith("<") else text


def _usage(name: str, flag: Any) -> str:
    if flag.boolean:
        return f"[no]{name}  (default: {'yes' if flag.default else 'no'})"
    choices = getattr(flag.parser, "enum_values", None)
    value = "|".join(choices) if choices else flag.parser.flag_type().upper()
    default = "" if flag.default in (None, "", []) else f"  (default: {flag.default})"
    return f"{name}={value}{default}"


def define_model_flags() -> FlagGroup:
    """The model."""
    flags.DEFINE_string(
        "model_path",
        None,
        "A Hugging Face directory (safetensors), a hub id, a .gguf file, or a directory of bin/convert. "
        "Not given: the embedded SmolLM2-135M-Instruct.",
    )
    return FlagGroup("Model", ("model_path",))


def define_directory_flags() -> FlagGroup:
    """Where a converted model goes."""
    flags.DEFINE_string("output_dir", None, "New directory for the checkpoint.")
    return FlagGroup("Result", ("output_dir",))


def define_input_flags(*, limit: int | None = None, several: bool = False) -> FlagGroup:
    """The model and the examples.

    Args:
        limit: the default of --limit, None for all.
        several: whether --data_path takes several files.
    """
    define_model_flags()
    flags.DEFINE_string(
        "data_path",
        None,
        "JSON list, JSON lines or Parquet of {instruction, input, output} or of {messages} records."
        + (
            " Several files, with commas: a run for each in OUTPUT_DIR/NAME, model loaded once."
            * several
        ),
    )
    flags.DEFINE_integer("start", 0, "Index of the first example, from 0.")
    not_given = " Not given: all." if limit is None else ""
    flags.DEFINE_integer("limit", limit, f"How many examples at most.{not_given}")
    flags.DEFINE_string("instruction_field", "instruction", "Name of the instruction's field.")
    flags.DEFINE_string(
        "input_field", "input", "Name of the field that may add to the instruction."
    )
    flags.DEFINE_string("output_field", "output", "Name of the response's field.")
    names = ("model_path", "data_path", "start", "limit")
    return FlagGroup("Model and data", (*names, "instruction_field", "input_field", "output_field"))


def define_output_flags() -> FlagGroup:
    """Where the results go."""
    flags.DEFINE_string(
        "output_dir",
        None,
        "Directory for the results, or a URL (gs://, s3://); a run that stands there is continued.",
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
    flags.DEFINE_enum(
        "protocol",
        "paper",
        ["paper", "clean"],
        "paper: the authors' way, to compare with. clean: exactly one BOS, and the response's tokens "
        "found by character offsets.",
    )
    flags.DEFINE_enum(
        "chat",
        "auto",
        ["auto", "yes", "no"],
        "Whether the chat template is applied. auto: where the tokenizer has one.",
    )
    flags.DEFINE_integer("max_length", 1024, "Tokens after which an example is cut.")
    flags.DEFINE_string(
        "date",
        None,
        "YYYY-MM-DD: the day that chat templates print which ask for one (Llama 3.2, SmolLM3). "
        "Not given: today, or the day of the run that is continued.",
    )
    return FlagGroup("Examples to tokens", ("protocol", "chat", "max_length", "date"))


def define_method_flags() -> FlagGroup:
    """Which weights are measured, and how."""
    flags.DEFINE_string(
        "parameters",
        "attention",
        "attention (q, k, v, o), mlp (gate, up, down), all (both, and an untied lm_head), or a regular "
        "expression searched in the weights' names, such as 'layers.[0-3].self_attn.q_proj' (in Llama's "
        "words, whatever the family).",
    )
    flags.DEFINE_enum(
        "method",
        "auto",
        ["auto", "factored", "dense"],
        "auto: from the factors where that is cheaper, else from the built matrix. factored: always "
        "from the factors. dense: the definition, each weight's own gradient and its full SVD (slow).",
    )
    return FlagGroup("What is measured", ("parameters", "method"))


def define_measure_flags() -> FlagGroup:
    """What is measured: the method group, and what is kept besides the usual statistics."""
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
    flags.DEFINE_integer(
        "batch_tokens",
        None,
        "Padded tokens of a batch. Not given: 512 on a CPU, 8192 elsewhere, times the D of --mesh, or as "
        "many as fit in the memory; a run that is continued keeps its own.",
        lower_bound=1,
    )
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16", "float64"], "Of the weights and the arithmetic."
    )
    flags.DEFINE_enum(
        "precision",
        "highest",
        ["highest", "high", "default"],
        "Of the model's matrix products, on devices that have a choice.",
    )
    flags.DEFINE_enum(
        "layerwise",
        "auto",
        ["auto", "yes", "no"],
        "Reduce each layer inside the backward pass: memory for one layer's factors instead of all, for "
        "one more forward pass. auto: where the memory is too small otherwise. Not with --similarity.",
    )
    flags.DEFINE_string(
        "mesh",
        "auto",
        "DxM: split the examples of a batch over D devices of this process and the weights over M. auto: "
        "weights are split only where the model does not fit on one device; on a CPU one device.",
    )
    return FlagGroup("Computation", ("batch_tokens", "dtype", "precision", "layerwise", "mesh"))


def define_process_flags() -> FlagGroup:
    """Several processes that share one run."""
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0. Not given: one process, or as SLURM, Open MPI, a TPU pod or an indexed "
        "Kubernetes job says.",
    )
    flags.DEFINE_integer(
        "num_processes", None, "How many processes share the run. 1: this one, whatever SLURM says."
    )
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")
    flags.DEFINE_integer(
        "process_timeout",
        60,
        "Seconds without a sign of life after which a process counts as dead and the others end. All "
        "have five times as long to come together.",
        lower_bound=2,
    )
    names = ("coordinator", "num_processes", "process_id", "process_timeout")
    return FlagGroup("Several processes", names)


def join_processes() -> "Group":
    """The group of processes that the flags, or else the environment, tell of."""
    from jaxgrad.processes import join

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


def split_pair(name: str, value: str) -> tuple[str, str]:
    """A=B of the flag `name`."""
    first, equals, second = value.partition("=")
    if not (first.strip() and equals and second.strip()):
        raise UserError(f"--{name}: {value!r} is not of the form A=B")
    return first.strip(), second.strip()


def define_study_flags() -> FlagGroup:
    """A study: its file, its place, and what is done of it."""
    flags.DEFINE_string("config", None, "The study's TOML file, such as configs/demo.toml.")
    flags.DEFINE_string(
        "output_dir", None, "Directory for runs and report. Not given: runs/NAME of the file."
    )
    flags.DEFINE_integer(
        "limit",
        None,
        "How many examples of each data file at most. Not given: as the file says.",
        lower_bound=1,
    )
    flags.DEFINE_bool("dry_run", False, "Print the cells, and what of them is there; do nothing.")
    flags.DEFINE_bool("report_only", False, "Measure nothing; report the cells that are finished.")
    flags.DEFINE_bool("progress", True, "Show progress bars.")
    flags.DEFINE_integer(
        "num_processes",
        None,
        "1: this process alone, whatever SLURM says. A study runs as one process.",
    )
    names = ("config", "output_dir", "limit", "dry_run", "report_only", "progress", "num_processes")
    return FlagGroup("Study", names)


def required(name: str, what: str) -> str:
    """The value of a flag that has to be given."""
    value = flags.FLAGS[name].value
    if not value:
        raise UserError(f"--{name} is missing: {what}")
    return value


def analyze_options() -> "AnalyzeOptions":
    """The flags of the protocol, measure and compute groups as options."""
    from jaxgrad.options import AnalyzeOptions

    values = flags.FLAGS
    names = [field.name for field in dataclasses.fields(AnalyzeOptions)]
    chosen: dict[str, Any] = {name: values[name].value for name in names if name in values}
    return AnalyzeOptions(**chosen)


def record_fields() -> Fields:
    """The names of a record's fields."""
    values = flags.FLAGS
    return Fields(values.instruction_field, values.input_field, values.output_field)
