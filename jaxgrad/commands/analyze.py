"""`jaxgrad analyze`: flags -> `run_analysis`, or `dry_run`."""

from absl import flags

from jaxgrad import command_line
from jaxgrad.command_line import Command, FlagGroup
from jaxgrad.commands import flag_groups
from jaxgrad.errors import UserError
from jaxgrad.paths import expanded, split_paths

DESCRIPTION = (
    "Takes the gradient of each example's loss by the model's weight matrices, reduces every gradient "
    "matrix to its singular-value statistics, and writes them as Parquet. The same command continues an "
    "interrupted run. Exit codes: 2 bad input, 69 another process of the run has died, 75 stopped by "
    "SIGTERM, 130 by Ctrl-C; after 69 and 75 run it again."
)


def define_flags() -> list[FlagGroup]:
    """The flags of --help."""
    return [
        flag_groups.define_input_flags(several=True),
        flag_groups.define_output_flags(),
        flag_groups.define_protocol_flags(),
        flag_groups.define_measure_flags(),
        flag_groups.define_compute_flags(),
        flag_groups.define_process_flags(),
        flag_groups.define_dry_run_flags(),
    ]


def main() -> None:
    """Check what needs no JAX, then run."""
    values, options = flags.FLAGS, flag_groups.analyze_options()
    data_path = command_line.required("data_path", "files of records, or hf:ORG/NAME:SPLIT")
    if values.calibrate and not values.dry_run:
        raise UserError("--calibrate belongs to --dry_run: give both, or neither")
    from jaxgrad.results.losses import RESPONSE_MEAN

    if values.output_format == "jsonl" and options.loss != RESPONSE_MEAN:
        raise UserError(
            f"--output_format=jsonl holds gradients of --loss={RESPONSE_MEAN}, as the authors' files do, "
            f"and this run has --loss={options.loss}: give --output_format=parquet"
        )
    output_dir = values.output_dir
    if not values.dry_run:
        output_dir = command_line.required("output_dir", "the directory for the results")
    import jaxgrad

    asked = {
        "model_path": values.model_path,
        "model_options": flag_groups.model_options(),
        "data_paths": [expanded(path) for path in split_paths(data_path)],
        "output_dir": output_dir,
        "options": options,
        "start": values.start,
        "limit": values.limit,
        "fields": flag_groups.record_fields(),
        "data_format": values.data_format,
        "response": values.response,
        "mesh": values.mesh,
    }
    if values.dry_run:
        jaxgrad.dry_run(**asked, calibrate=values.calibrate)
        return
    with flag_groups.join_processes() as group:
        jaxgrad.run_analysis(**asked, output_format=values.output_format, group=group)


run = Command(
    main,
    DESCRIPTION,
    define_flags,
    after_interrupt="finished batches are kept; the same command continues from them",
).run
