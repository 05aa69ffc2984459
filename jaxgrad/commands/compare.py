"""`jaxgrad compare`: flags -> `compare_with_torch`."""

import dataclasses

from absl import flags

from jaxgrad import command_line
from jaxgrad.command_line import Command, FlagGroup
from jaxgrad.commands import flag_groups
from jaxgrad.data.read import read_examples
from jaxgrad.options import DtypeName
from jaxgrad.paths import expanded

DESCRIPTION = (
    "Measures the same examples with jaxgrad and with the authors' procedure in PyTorch (autograd by "
    "each weight, then a full SVD), and prints the relative differences of every statistic. Exit code 1 "
    "if one is beyond its tolerance."
)


def define_flags() -> list[FlagGroup]:
    """The flags of --help."""
    flags.DEFINE_bool("dtype64", False, "Compute in float64 on both sides.")
    flags.DEFINE_float(
        "tolerance",
        None,
        "Largest relative difference. Not given: 1e-4, or 1e-8 with --dtype64. In float32 a tenth of "
        "it for the loss, five times as much for the effective rank.",
        lower_bound=0.0,
    )
    flags.DEFINE_bool(
        "wide_loss",
        True,
        "PyTorch's cross entropy in float64. --nowide_loss: in float32, as the authors ran it. On a CPU "
        "that is biased over a large vocabulary, by more than all other rounding together.",
    )
    return [
        flag_groups.define_input_flags(limit=5),
        flag_groups.define_protocol_flags(),
        flag_groups.define_method_flags(),
        FlagGroup("Comparison", ("dtype64", "tolerance", "wide_loss")),
    ]


def main() -> int:
    """Print the table; 1 if a statistic is beyond its tolerance."""
    values, fields = flags.FLAGS, flag_groups.record_fields()
    data_path = command_line.required("data_path", "a file of records, or hf:ORG/NAME:SPLIT")
    data = read_examples(
        expanded(data_path),
        start=values.start,
        limit=values.limit,
        fields=fields,
        data_format=values.data_format,
        response=values.response,
    )
    for line in data.lines:
        print(line)
    from jaxgrad import reference

    dtype: DtypeName = "float64" if values.dtype64 else "float32"
    options = dataclasses.replace(flag_groups.analyze_options(), dtype=dtype, extremes=True)
    tolerances = reference.default_tolerances(dtype, values.tolerance)
    comparison = reference.compare_with_torch(
        values.model_path,
        data.examples,
        options,
        model_options=flag_groups.model_options(),
        wide_loss=values.wide_loss,
    )
    print(comparison.table(tolerances))
    beyond = [f"{d.statistic} ({d.where})" for d in comparison.beyond(tolerances)]
    print(f"beyond the tolerance: {'; '.join(beyond)}" if beyond else "within the tolerances")
    return 1 if beyond else 0


run = Command(main, DESCRIPTION, define_flags).run
