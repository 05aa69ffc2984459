"""Valid files -> nearly valid files: flipped bytes, wrong JSON.

All randomness comes from a `random.Random`, so a file is identified by its seed, or hypothesis controls it.
"""

import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

# Raw JSON to replace a value: other types, numbers too large for any type, deep nesting, half characters.
RAW_JSON = (
    "null", "true", "false", "0", "1", "-1", "-0.0", "1.5", "2147483648", "4294967296",
    "1152921504606846976", "9223372036854775807", "18446744073709551616", "1e999999", "-1e999999",
    "1e-999999", "NaN", "Infinity", "1" + "0" * 4000, "1" + "0" * 20000, '""', '" "', '"\\ud800"',
    '"\\u0000"', '"../../etc/passwd"', '"/dev/zero"', '"' + "x" * 70000 + '"', '"<b onload=x>"',
    '"\\u202e\\u2028\\n"', "[]", "{}", "[[]]", '[""]', "[0]", "[null]", "[1, 2, 3]", '{"": 0}', '{"a": {}}',
    "[" * 100000, "[" * 500 + "]" * 500, '{"a":' * 100000, '{"a":' * 300 + "0" + "}" * 300,
)  # fmt: skip
NUMBERS = (0, 1, 2, 3, 7, 8, 127, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1)
FORMATS = ("<B", "<H", "<I", "<Q", ">I", ">Q")
MARK = "@@mutated@@"


def mutate_bytes(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One to four changes to any file, half of them near its start or end, where lengths are stored."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        size = len(changed)
        near = min(size, rng.choice((64, 4096, size, size)))
        at = rng.randrange(near) if near else 0
        if rng.random() < 0.25:
            at = size - at
        kind = rng.randrange(8)
        if kind == 0 and size:
            changed[min(at, size - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            changed[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 2, 8, 40))))
        elif kind == 3:
            del changed[at : at + rng.choice((1, 4, 8, 100))]
        elif kind == 4:
            form = rng.choice(FORMATS)
            number = rng.choice(NUMBERS) % 2 ** (8 * struct.calcsize(form))
            changed[at : at + struct.calcsize(form)] = struct.pack(form, number)
        elif kind == 5:
            begin = rng.randrange(size + 1)
            changed[at:at] = changed[begin : begin + rng.choice((1, 8, 64, 1000))]
        elif kind == 6:
            other = rng.choice(others)
            begin = rng.randrange(len(other) + 1)
            end = begin + rng.choice((8, 64, 1000))
            changed[at : at + end - begin] = other[begin:end]
        else:
            changed[at : at + 1] = bytes((rng.randrange(256),))
    return bytes(changed)


def _entries(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    found: list[tuple[Any, Any]] = []
    rest = [value]
    while rest:
        node = rest.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in items:
            found.append((node, key))
            if isinstance(child, dict | list):
                rest.append(child)
    return found


def mutate_json(rng: random.Random, text: str) -> str:
    """One to three changes to values and names of a JSON document that is an object or a list.

    Entries at the root are nearly as likely as all others together: a vocabulary has thousands.
    """
    tree = json.loads(text)
    raw: list[str] = []

    def placeholder(content: str) -> str:
        raw.append(content)
        return f"{MARK}{len(raw) - 1}{MARK}"

    for _ in range(rng.choice((1, 1, 2, 3))):
        entries = _entries(tree)
        if not entries:
            break
        at_root = [entry for entry in entries if entry[0] is tree]
        container, key = rng.choice(at_root if rng.random() < 0.4 else entries)
        kind = rng.randrange(8)
        if kind <= 3:
            container[key] = placeholder(rng.choice(RAW_JSON))
        elif kind == 4:
            del container[key]
        elif kind == 5:
            other, other_key = rng.choice(entries)
            container[key] = json.loads(json.dumps(other[other_key]))
        elif kind == 6 and isinstance(container, dict):
            # A duplicate name, or an invalid one.
            name = rng.choice((json.dumps(key), '"\\ud800"', '""', '"' + "k" * 5000 + '"'))
            container[placeholder(f"{name}: {rng.choice(RAW_JSON)}, {json.dumps(key)}")] = 0
        elif isinstance(container, dict):
            container[rng.choice(("", "x" * 300, "layers", str(rng.choice(NUMBERS))))] = (
                container.pop(key)
            )
        else:
            container.insert(key, json.loads(json.dumps(container[key])))
    text = json.dumps(tree)
    for number, content in enumerate(raw):
        text = text.replace(f'"{MARK}{number}{MARK}"', content)
    return text


def mutate_json_file(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A JSON document, changed as one or as bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data, others)
    return mutate_json(rng, data.decode()).encode("utf-8", "surrogatepass")


def mutate_json_lines(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One line of a file of JSON objects, or its bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data, others)
    lines = data.decode().splitlines()
    at = rng.randrange(len(lines))
    lines[at] = mutate_json(rng, lines[at])
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def mutate_safetensors(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """The header's JSON under a right or a wrong length, or the bytes."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, data, others)
    (size,) = struct.unpack("<Q", data[:8])
    header = mutate_json(rng, data[8 : 8 + size].decode()).encode("utf-8", "surrogatepass")
    stated_size = len(header) if rng.random() < 0.9 else rng.choice(NUMBERS)
    return struct.pack("<Q", stated_size) + header + data[8 + size :]


def mutate_text(
    snippets: Sequence[str],
) -> Callable[[random.Random, bytes, Sequence[bytes]], bytes]:
    """For text with a grammar: inserts and deletes lines; the inserted ones are known to be nasty."""

    def mutate(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
        if rng.random() < 0.4:
            return mutate_bytes(rng, data, others)
        lines = data.decode().splitlines(keepends=True)
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.randrange(len(lines) + 1)
            if rng.random() < 0.3 and at < len(lines):
                del lines[at]
            else:
                lines.insert(at, rng.choice(snippets))
        return "".join(lines).encode("utf-8", "surrogatepass")

    return mutate
