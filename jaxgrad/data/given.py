"""A record that was tokenized before -> its tokens, and which of them count.

`input_ids` are the tokens. A token counts where every mask that the record has says so: `labels` (-100: it
does not), `assistant_masks`, `completion_mask`, `loss_mask` (0: it does not). Padding (0 in
`attention_mask`) is cut off at either end. Several texts in one record are refused: their tokens would see
each other.
"""

from collections.abc import Mapping
from typing import Any

from jaxgrad.data.examples import GivenTokens
from jaxgrad.data.formats import kind_of
from jaxgrad.errors import UserError

IDS = "input_ids"
MASKS = ("assistant_masks", "completion_mask", "loss_mask")
LABELS, ATTENTION, POSITIONS = "labels", "attention_mask", "position_ids"
# What packed records say of the texts in them.
_LENGTHS = "seq_lengths"
TOKEN_FIELDS = (IDS, LABELS, *MASKS, ATTENTION, POSITIONS, _LENGTHS)
IGNORED = -100
_LARGEST_ID = 2**31 - 1


def read_given(record: Mapping[str, Any], where: str) -> GivenTokens:
    """The tokens of a record.

    Args:
        record: Its fields of `TOKEN_FIELDS`; `input_ids` is there.
        where: For messages: file and record.

    Raises:
        UserError: A field is no list of whole numbers as long as the tokens; a label is another token than
            the one in its place; the record is packed; nothing but padding is there.
    """
    ids = _numbers(record, IDS, where)
    if any(not 0 <= token <= _LARGEST_ID for token in ids):
        raise UserError(f"{where}: {IDS!r} has a number that is no token's; tokenize it again")
    columns = {
        name: _numbers(record, name, where)
        for name in (LABELS, *MASKS, ATTENTION, POSITIONS)
        if record.get(name) is not None
    }
    for name, values in columns.items():
        if len(values) != len(ids):
            raise UserError(
                f"{where}: {name!r} has {len(values)} numbers, {IDS!r} has {len(ids)}; "
                "tokenize the record again"
            )
        if name in (*MASKS, ATTENTION) and set(values) - {0, 1}:
            raise UserError(f"{where}: {name!r} has other numbers than 0 and 1; mend the mask")
    begin, end = _real_part(columns.get(ATTENTION, [1] * len(ids)), where)
    _refuse_packed(record, columns, begin, end, where)
    labels = columns.get(LABELS, ids)
    _check_labels(labels[begin:end], ids[begin:end], where)
    targets = tuple(
        labels[i] != IGNORED and all(columns[name][i] for name in MASKS if name in columns)
        for i in range(begin, end)
    )
    return GivenTokens(tuple(ids[begin:end]), targets)


def _numbers(record: Mapping[str, Any], name: str, where: str) -> list[int]:
    values = record[name]
    kind = kind_of(values)
    if isinstance(values, list):
        odd = [value for value in values if not isinstance(value, int)]
        if not odd:
            return [int(value) for value in values]  # true and false are 1 and 0
        kind = f"a list with {kind_of(odd[0])} in it"
    raise UserError(
        f"{where}: field {name!r} is {kind}, not a list of whole numbers; "
        "write one text's tokens in a record"
    )


def _real_part(attention: list[int], where: str) -> tuple[int, int]:
    """Where the text begins and ends between its padding."""
    if 1 not in attention:
        raise UserError(f"{where}: {IDS!r} has no token that is not padding; leave the record out")
    begin, end = attention.index(1), len(attention) - attention[::-1].index(1)
    if 0 in attention[begin:end]:
        raise UserError(
            f"{where}: {ATTENTION!r} has zeros between ones; only padding at an end can be left out, "
            "so give the text without it"
        )
    return begin, end


def _refuse_packed(
    record: Mapping[str, Any], columns: Mapping[str, list[int]], begin: int, end: int, where: str
) -> None:
    positions = columns.get(POSITIONS)
    lengths = record.get(_LENGTHS)
    restarts = positions is not None and positions[begin:end] != list(range(end - begin))
    if restarts or (isinstance(lengths, list) and len(lengths) > 1):
        raise UserError(
            f"{where}: {POSITIONS if restarts else _LENGTHS!r} says that several texts are packed "
            "into it; give each text as a record of its own"
        )


def _check_labels(labels: list[int], ids: list[int], where: str) -> None:
    """Raise if a label is another token than the one in its place."""
    for i, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label not in (IGNORED, token):
            follows = i + 1 < len(ids) and label == ids[i + 1]
            shifted = " (it is the next one: labels must not be shifted)" if follows else ""
            raise UserError(
                f"{where}: {LABELS!r}[{i}] is {label}, and the token there is {token}{shifted}; "
                f"write the token, or {IGNORED} where its loss does not count"
            )
