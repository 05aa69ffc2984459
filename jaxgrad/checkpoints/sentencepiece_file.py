"""Reads a SentencePiece model (tokenizer.model): its pieces, and what it does to a text before.

The file is a protocol buffer of a few fields, so it is read here, without the packages sentencepiece and
protobuf. The numbers of the fields are those of sentencepiece_model.proto.
"""

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxgrad.errors import UserError

# Types of pieces.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2  # kinds of models

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_MOST_BYTES = 1 << 28
_LONGEST_PIECE = 1024  # characters; the longest of Gemma have 31


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """A SentencePiece model.

    Attributes:
        pieces: by id: the piece, its score and its type.
        kind: `UNIGRAM`, `BPE` or another number.
        byte_fallback: whether characters that it lacks become pieces of their bytes.
        space_behind: whether a space belongs to the word before it.
        unknown_id: id of the piece for unknown characters.
        bos_id: id of the piece that starts a text; negative for none.
        eos_id: id of the piece that ends a text; negative for none.
        charsmap: the compiled table that normalizes characters; empty for none.
        adds_prefix: whether a text gets a space in front.
        collapses_spaces: whether outer spaces are dropped and runs of inner ones become one.
        escapes_spaces: whether a space becomes the character of `tokenizer_rules.SPACE`.
    """

    pieces: list[tuple[str, float, int]]
    kind: int
    byte_fallback: bool
    space_behind: bool
    unknown_id: int
    bos_id: int
    eos_id: int
    charsmap: bytes
    adds_prefix: bool
    collapses_spaces: bool
    escapes_spaces: bool

    def of_type(self, *types: int) -> list[str]:
        """The pieces of these types, in the order of their ids."""
        return [piece for piece, _, kind in self.pieces if kind in types]


def read_sentencepiece(path: Path) -> SentencePieceModel | None:
    """The model in a file; None if the file is of another format.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path} is too large for a SentencePiece model")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        pieces = []
        trainer: dict[int, Any] = {}
        normalizer: dict[int, Any] = {}
        for number, value in _fields(content):
            if number == _PIECES:
                piece = dict(_fields(value))
                text = piece[1].decode("utf-8")
                if len(text) > _LONGEST_PIECE:
                    raise ValueError(f"a piece of {len(text)} characters")
                pieces.append((text, _float(piece.get(2)), piece.get(3, NORMAL)))
            elif number == _TRAINER:
                trainer = dict(_fields(value))
            elif number == _NORMALIZER:
                normalizer = dict(_fields(value))
        model = SentencePieceModel(
            pieces,
            kind=trainer.get(3, UNIGRAM),
            byte_fallback=bool(trainer.get(35, 0)),
            space_behind=bool(trainer.get(24, 0)),
            unknown_id=_signed(trainer.get(40, 0)),
            bos_id=_signed(trainer.get(41, 1)),
            eos_id=_signed(trainer.get(42, 2)),
            charsmap=normalizer.get(2, b""),
            adds_prefix=bool(normalizer.get(3, 1)),
            collapses_spaces=bool(normalizer.get(4, 1)),
            escapes_spaces=bool(normalizer.get(5, 1)),
        )
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None
    return model if pieces else None


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a message: an int, or bytes."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(content, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(content, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field of kind {kind}")
        if at + size > len(content):
            raise ValueError("it ends inside a field")
        yield key >> 3, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(content):
            raise ValueError("it ends inside a number")
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number without end")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _float(value: bytes | None) -> float:
    return 0.0 if value is None else struct.unpack("<f", value)[0]
