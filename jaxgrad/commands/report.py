"""`jaxgrad report`: flags -> `write_report`."""

from absl import flags

from jaxgrad import command_line
from jaxgrad.command_line import Command, FlagGroup
from jaxgrad.commands import flag_groups

DESCRIPTION = (
    "Compares finished runs: mean curves, MAD, RD and similarities with bootstrap intervals, paired "
    "tests, and controls for response length and leakage. Writes index.html (works offline), "
    "report.md, tables (Markdown, CSV, LaTeX) and figures (SVG, PNG)."
)


def define_flags() -> list[FlagGroup]:
    """The flags of --help."""
    flags.DEFINE_multi_string(
        "runs",
        None,
        "LABEL=PATH, once for each run or several after one another. PATH: the directory or the URL of a "
        "finished run, or a file in the authors' JSONL. LABEL: SETTING, SET/SETTING, SET/SETTING/RESPONSE "
        "(correct or irrelevant) or MODEL/SET/SETTING/RESPONSE. Runs that differ in one part are compared, "
        "the first given is the reference.",
    )
    flags.DEFINE_multi_string(
        "pairs", [], "BASE=TUNED, names of two models to compare; once for each pair."
    )
    command_line.define_path("output_dir", "Directory for the report.")
    flags.DEFINE_string("title", "Gradients by layer", "Heading of the report.")
    flags.DEFINE_string(
        "y_limits", "shared", "Figures' limits: shared (over a data set), free, or LOW,HIGH."
    )
    flags.DEFINE_list(
        "statistics",
        [],
        "Further statistics to compare, with commas: columns of the matrices, such as "
        "stable_rank,condition_number.",
    )
    return [
        FlagGroup("Runs", ("runs", "pairs")),
        FlagGroup("Report", ("output_dir", "title", "y_limits", "statistics")),
        flag_groups.define_resampling_flags(),
    ]


def main() -> None:
    """Write the report, and say where it is."""
    values = flags.FLAGS
    command_line.required("runs", "LABEL=PATH of at least one run")
    output_dir = command_line.required("output_dir", "the directory for the report")
    from jaxgrad.report import read_labelled, read_y_limits, write_report

    page = write_report(
        read_labelled([command_line.split_pair("runs", run) for run in values.runs]),
        output_dir,
        title=values.title,
        model_pairs=[command_line.split_pair("pairs", pair) for pair in values.pairs],
        resampling=flag_groups.resampling(),
        y_limits=read_y_limits(values.y_limits),
        statistics=values.statistics,
        progress=True,
    )
    print(f"report: {page}")


run = Command(
    main,
    DESCRIPTION,
    define_flags,
    more_of="runs",
).run
