"""`jaxgrad export`: flags -> `write_authors_jsonl`."""

from absl import flags

from jaxgrad import command_line
from jaxgrad.command_line import Command, FlagGroup

DESCRIPTION = (
    "Writes the measured examples of a run as the authors' JSONL, field for field: one line an example, "
    "one object a matrix. Their M_max and M_min need a run made with --extremes."
)


def define_flags() -> list[FlagGroup]:
    """The flags of --help."""
    command_line.define_path("run_dir", "The run's directory or URL: --output_dir of analyze.")
    command_line.define_path("output_path", "The JSONL file to write, a path or a URL.")
    flags.DEFINE_bool(
        "spectrum",
        False,
        "Write the follow-up paper's form: S_list (every singular value) in place of S_sum, S_max and "
        "S_min, and the cosines of a run made with --similarity; needs a run made with --spectrum.",
    )
    return [FlagGroup("Export", ("run_dir", "output_path", "spectrum"))]


def main() -> None:
    """Write the file, and say how many examples it has."""
    run_dir = command_line.required("run_dir", "the directory of a finished run")
    path = command_line.required("output_path", "the JSONL file to write")
    from jaxgrad.results import iter_results, write_authors_jsonl

    parts = iter_results(run_dir)
    count = write_authors_jsonl(parts, path, with_spectrum=flags.FLAGS.spectrum)
    print(f"{path}: {count} examples")


run = Command(main, DESCRIPTION, define_flags).run
