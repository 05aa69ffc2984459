"""What a run will write, in bytes, before anything is compiled or loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.device_sizes import projection_sizes
from jaxgrad.options import MeasureSettings

# Bytes on disk, from real runs: a row of the matrices table without lists, with the two extremes, a
# number in a list of singular values and of cosines; a row of the examples table and a character of its
# texts; a file of each.
ROW_BYTES, EXTREMES_BYTES, VALUE_BYTES, COSINE_BYTES = 63, 16, 8, 6.3
EXAMPLE_BYTES, CHARACTER_BYTES, FILE_BYTES = 60, 0.45, 4500
# The journal is not compressed: bytes of a batch, and of a row without lists.
JOURNAL_BATCH_BYTES, JOURNAL_ROW_BYTES = 5000, 137


@dataclass(frozen=True)
class DiskPrediction:
    """What a run writes, in bytes: the Parquet that stays, and the journal at its largest."""

    parquet: int
    journal: int

    @property
    def total(self) -> int:
        """Both: the journal of a window is there until its Parquet is."""
        return self.parquet + self.journal


def predict_disk(
    settings: MeasureSettings,
    config: DecoderConfig,
    examples: Sequence[tuple[int, int]],
    *,
    window: int,
    examples_a_batch: float = 1,
) -> DiskPrediction:
    """What a run writes.

    Args:
        settings: what is measured.
        config: the model.
        examples: tokens, and characters of the texts, of every example that will be measured.
        window: examples that become one part file.
        examples_a_batch: how many share a file of the journal, on average.
    """
    sizes, selection = projection_sizes(config), settings.selection
    fixed_row = ROW_BYTES + EXTREMES_BYTES * settings.extremes
    per_example, parquet, journal = [], 0.0, 0.0
    for num_tokens, characters in examples:
        lists = 0.0
        for name in selection.names:
            layers = selection[name]
            if settings.spectrum:
                lists += VALUE_BYTES * len(layers) * min(num_tokens, *sizes[name])
            if settings.similarity:
                lists += COSINE_BYTES * len(layers) ** 2
        rows = selection.num_matrices
        parquet += rows * fixed_row + lists + EXAMPLE_BYTES + CHARACTER_BYTES * characters
        batch = JOURNAL_BATCH_BYTES / examples_a_batch
        per_example.append(rows * JOURNAL_ROW_BYTES + lists * 8 / COSINE_BYTES + characters + batch)
    for begin in range(0, len(per_example), window):
        journal = max(journal, sum(per_example[begin : begin + window]))
        parquet += 2 * FILE_BYTES
    return DiskPrediction(int(parquet), int(journal))
