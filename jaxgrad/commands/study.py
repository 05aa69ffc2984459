"""`jaxgrad study`: flags -> `run_study`, or `plan_study`."""

from pathlib import Path

from absl import flags

from jaxgrad import command_line
from jaxgrad.command_line import Command, FlagGroup

DESCRIPTION = (
    "Does what analyze does for every cell of a grid that a TOML file declares (models x data sets x "
    "settings x correct and irrelevant responses), then writes a report: OUTPUT_DIR/report/index.html. A "
    "file or a model that is missing is named, and the rest is done. The same command continues an "
    "interrupted study; finished runs are not computed again. Exit codes: 2 bad input, 75 stopped by "
    "SIGTERM (run it again), 130 by Ctrl-C."
)


def define_flags() -> list[FlagGroup]:
    """The flags of --help."""
    command_line.define_path("config", "The study's TOML file, such as configs/demo.toml.")
    command_line.define_path(
        "output_dir", "Directory for runs and report. Not given: runs/NAME of the file."
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
    return [FlagGroup("Study", names)]


def main() -> None:
    """Run the study, or print its plan."""
    values = flags.FLAGS
    config_path = command_line.required("config", "a study's TOML file, such as configs/demo.toml")
    output_dir = values.output_dir or Path("runs") / Path(config_path).stem
    from jaxgrad import study

    study.refuse_several_processes(values.num_processes)
    config = study.read_study(config_path, limit=values.limit)
    if values.dry_run:
        plan = study.plan_study(config, output_dir)
        print("\n".join([*plan.grid(), *plan.summary()[:1]]))
        return
    study.run_study(config, output_dir, report_only=values.report_only, progress=values.progress)


run = Command(
    main,
    DESCRIPTION,
    define_flags,
    after_interrupt="finished batches are kept; the same command continues from them",
).run
