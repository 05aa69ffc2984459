"""`jaxgrad convert`: flags -> `convert_model`."""

from absl import flags

from jaxgrad import command_line
from jaxgrad.command_line import Command, FlagGroup
from jaxgrad.commands import flag_groups

DESCRIPTION = (
    "Writes a model (Hugging Face directory, hub id or GGUF file) as an Orbax checkpoint with its config "
    "and tokenizer. The command analyze takes it as --model_path and restores it straight onto its "
    "devices. The weights keep their dtype; those that an adapter changes are written merged, in float32. "
    "What was written is restored and compared with the source before it gets its name."
)


def define_flags() -> list[FlagGroup]:
    """The flags of --help."""
    command_line.define_path("output_dir", "New directory for the checkpoint.")
    return [flag_groups.define_model_flags(), FlagGroup("Result", ("output_dir",))]


def main() -> None:
    """Convert."""
    output_dir = command_line.required("output_dir", "the directory for the checkpoint")
    from jaxgrad.checkpoints.convert import convert_model

    convert_model(flags.FLAGS.model_path, output_dir, flag_groups.model_options())


run = Command(
    main,
    DESCRIPTION,
    define_flags,
    after_interrupt="the next conversion replaces the incomplete OUTPUT_DIR.partial",
).run
