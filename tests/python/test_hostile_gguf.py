"""Hostile GGUF files: each is refused in one sentence, at once and in little memory."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import HALVES, random_rows
from refusals import HUGE, assert_refused, limited_memory_and_time  # noqa: F401

from kt_kernel.checkpoint.gguf import READABLE_TYPES, GgufCheckpoint

U8, U32, F32, STRING, ARRAY, U64 = 0, 4, 6, 8, 9, 10


def text(words: str | bytes, length: int | None = None) -> bytes:
    raw = words.encode() if isinstance(words, str) else words
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def value(key: str | bytes, kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def number(key: str, amount: int, kind: int = U32) -> bytes:
    return value(key, kind, struct.pack("<Q" if kind == U64 else "<I", amount))


def tensor(name: str | bytes, shape: tuple[int, ...], kind: int, offset: int, dimensions: int | None = None) -> bytes:
    """Shape innermost first, as files have it."""
    rank = len(shape) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", rank, *shape, kind, offset)


def values(**changes: bytes) -> list[bytes]:
    """The values of a model of 2 experts, hidden size 32, intermediate size 64; changed or added to by name."""
    found = {
        "arch": value("general.architecture", STRING, text("moe")),
        "experts": number("moe.expert_count", 2),
        "used": number("moe.expert_used_count", 1),
        "hidden": number("moe.embedding_length", 32),
        "inter": number("moe.expert_feed_forward_length", 64),
        "blocks": number("moe.block_count", 1),
    }
    return list({**found, **changes}.values())


Q8_0, GATE, UP, DOWN = 8, "blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight", "blk.0.ffn_down_exps.weight"
BYTES = 2 * 64 * 34
TENSORS = [
    tensor(GATE, (32, 64, 2), Q8_0, 0),
    tensor(UP, (32, 64, 2), Q8_0, BYTES),
    tensor(DOWN, (64, 32, 2), Q8_0, 2 * BYTES),
]


def gguf_bytes(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    values: list[bytes] = values(),  # noqa: B008
    tensors: list[bytes] = TENSORS,
    counts: tuple[int | None, int | None] = (None, None),
    data: int = 3 * BYTES,
) -> bytes:
    num_tensors, num_values = (
        len(x) if count is None else count for x, count in zip((tensors, values), counts, strict=True)
    )
    header = magic + struct.pack("<IQQ", version, num_tensors, num_values) + b"".join(values + tensors)
    return header + bytes(-len(header) % 32) + bytes(data)


def with_gate(*changed: object, **keywords: object) -> dict:
    return {"tensors": [tensor(*changed, **keywords), *TENSORS[1:]]}


def one_value(key: str | bytes, kind: int, raw: bytes) -> dict:
    return {"values": values(added=value(key, kind, raw))}


GGUF_DEFECTS: dict[str, tuple[dict, str]] = {
    "magic": ({"magic": b"GGML"}, "is no GGUF file"),
    "version 1": ({"version": 1}, "has GGUF version 1; kt_kernel reads little-endian GGUF of version 2 and 3"),
    "big-endian": ({"version": 3 << 24}, "is big-endian; kt_kernel reads little-endian"),
    "tensor count": ({"counts": (HUGE, None)}, f"promises {HUGE} tensors, above the limit of 1048576"),
    "tensor count beyond the header": ({"counts": (4, None), "data": 0}, "its header goes beyond its"),
    "value count": ({"counts": (None, HUGE)}, f"promises {HUGE} values, above the limit of 65536"),
    "key length": ({"values": [text("x", HUGE)]}, f"a key has {HUGE} bytes, above the limit of 255"),
    "key that is no UTF-8": (one_value(b"\xff\xfe", U32, bytes(4)), "a key is no UTF-8"),
    "key with a newline": (
        one_value("a\nb", U32, bytes(4)),
        r"a key has characters that cannot be printed \('a\\nb'\)",
    ),
    "key twice": (one_value("moe.block_count", U32, bytes(4)), "has the key moe.block_count twice"),
    "unknown value": (one_value("x", 13, bytes(4)), "x has the unknown type 13"),
    "string length": (one_value("x", STRING, text("x", HUGE)), "header goes beyond its"),
    "array length": (one_value("x", ARRAY, struct.pack("<IQ", U8, HUGE)), "header goes beyond its"),
    "array of strings": (one_value("x", ARRAY, struct.pack("<IQ", STRING, HUGE)), "header goes beyond its"),
    "array with a string": (
        one_value("x", ARRAY, struct.pack("<IQ", STRING, 2) + text("", HUGE)),
        "header goes beyond",
    ),
    "array of arrays": (
        one_value("x", ARRAY, struct.pack("<IQ", ARRAY, 1) * 50),
        "x is an array of the unknown type 9",
    ),
    "no architecture": ({"values": values(arch=number("x", 1))}, "does not say its general.architecture"),
    "architecture as a number": (
        {"values": values(arch=number("general.architecture", 1))},
        "does not say its general",
    ),
    "architecture that cannot be printed": (
        {"values": values(arch=value("general.architecture", STRING, text("a\nb")))},
        "does not say its general",
    ),
    "no experts": ({"values": values(experts=number("moe.expert_count", 0))}, "has no moe.expert_count"),
    "experts": ({"values": values(experts=number("moe.expert_count", HUGE, U64))}, rf"mean \[{HUGE}, 64, 32\]"),
    "experts as a float": ({"values": values(experts=number("moe.expert_count", 2, F32))}, "has no moe.expert_count"),
    "hidden size": ({"values": values(hidden=number("moe.embedding_length", HUGE, U64))}, rf"mean \[2, 64, {HUGE}\]"),
    "no hidden size": ({"values": values(hidden=number("moe.embedding_length", 0))}, "has no moe.embedding_length"),
    "intermediate size": (
        {"values": values(inter=number("moe.feed_forward_length", HUGE, U64))},
        rf"mean \[2, {HUGE}, 32",
    ),
    "no blocks": (
        {"values": values(next=number("moe.nextn_predict_layers", HUGE, U64))},
        "experts only beyond the -?[0-9]+ layers",
    ),
    "splits": (
        {"values": values(split=number("split.count", HUGE, U64))},
        f"split 0 of {HUGE}, counted from 0, and by its",
    ),
    "split number": (
        {"values": values(split=number("split.no", 7))},
        "split 7 of 1, counted from 0, and by its name 0 of 1",
    ),
    "tensors of all splits": (
        {"values": values(split=number("split.tensors.count", HUGE, U64))},
        f"promises {HUGE} tens",
    ),
    "alignment 0": (
        {"values": values(align=number("general.alignment", 0))},
        "general.alignment is 0, which is no power",
    ),
    "alignment 3": (
        {"values": values(align=number("general.alignment", 3))},
        "general.alignment is 3, which is no power",
    ),
    "alignment": (
        {"values": values(align=number("general.alignment", HUGE, U64))},
        "general.alignment is 1152921504606846",
    ),
    "alignment as a string": (
        {"values": values(align=value("general.alignment", STRING, text("32")))},
        "is '32', which",
    ),
    "alignment beyond the file": (
        {"values": values(align=number("general.alignment", 1 << 31))},
        "is cut off or damaged",
    ),
    "name length": ({"tensors": [text("x", HUGE)]}, f"the name of a tensor has {HUGE} bytes"),
    "name that is no UTF-8": (with_gate(b"blk.\xff", (32,), Q8_0, 0), "the name of a tensor is no UTF-8"),
    "name that cannot be printed": (with_gate("a\tb", (32,), Q8_0, 0), r"cannot be printed \('a\\tb'\)"),
    "tensor twice": ({"tensors": [*TENSORS, TENSORS[0]]}, f"has the tensor {GATE} twice"),
    "dimensions": (
        with_gate(GATE, (32,), Q8_0, 0, dimensions=1 << 31),
        "has 2147483648 dimensions, above the limit of 4",
    ),
    "five dimensions": (with_gate(GATE, (32, 64, 2, 1, 1), Q8_0, 0), "has 5 dimensions, above the limit of 4"),
    "no dimensions": (with_gate(GATE, (), 0, 0), r"has shape \[\], but the file's own sizes"),
    "two dimensions": (with_gate(GATE, (32, 128), Q8_0, 0), r"has shape \[128, 32\], but .* mean \[2, 64, 32\]"),
    "size 0": (with_gate(GATE, (32, 64, 0), Q8_0, 0), r"has shape \[0, 64, 32\], but .* mean \[2, 64, 32\]"),
    "rows of size 0": (with_gate(GATE, (0, 64, 2), Q8_0, 0), r"has shape \[2, 64, 0\], but"),
    "shape": (with_gate(GATE, (64, 32, 2), Q8_0, 0), r"has shape \[2, 32, 64\], but .* mean \[2, 64, 32\]"),
    "huge shape": (with_gate(GATE, (HUGE, HUGE, HUGE), Q8_0, 0), "is cut off or damaged: tensor .* ends at byte"),
    "shape whose product is 0 in 64 bits": (with_gate(GATE, (1 << 32, 1 << 32, 1), Q8_0, 0), "ends at byte"),
    "rows that are no blocks": (with_gate(GATE, (33, 64, 2), Q8_0, 0), "has rows of 33, no multiple of the 32 of Q8_0"),
    "type that is not read": (with_gate(GATE, (256, 32, 2), 16, 0), f"{GATE} of .* has type IQ2_XXS; kt_kernel reads"),
    "type that does not exist": (
        with_gate(GATE, (32, 64, 2), 1 << 31, 0),
        f"{GATE} of .* has type number 2147483648; kt",
    ),
    "larger type": (with_gate(GATE, (32, 64, 2), 0, 0), f"tensor {GATE} ends at byte"),
    "overlap": ({"tensors": [TENSORS[0], tensor(UP, (32, 64, 2), Q8_0, 32), TENSORS[2]]}, f"{GATE} and {UP} overlap"),
    "the same bytes twice": ({"tensors": [TENSORS[0], tensor(UP, (32, 64, 2), Q8_0, 0), TENSORS[2]]}, f"{UP} overlap"),
    "offset": (with_gate(GATE, (32, 64, 2), Q8_0, HUGE), "is cut off or damaged: tensor .* ends at byte"),
    "offset that wraps": (with_gate(GATE, (32, 64, 2), Q8_0, (1 << 64) - 32), "ends at byte"),
    "offset between": (with_gate(GATE, (32, 64, 2), Q8_0, 16), "lies at 16, no multiple of the alignment 32"),
    "half the data": ({"data": BYTES}, f"tensor {UP} ends at byte"),
}


@pytest.mark.parametrize("defect", GGUF_DEFECTS)
def test_hostile_gguf(tmp_path: Path, defect: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes())
    assert GgufCheckpoint(path).layers == [0]
    change, words = GGUF_DEFECTS[defect]
    path.write_bytes(gguf_bytes(**change))
    assert_refused(lambda: GgufCheckpoint(path), words)


def test_gguf_cut_off_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    data = gguf_bytes()
    header = len(data) - 3 * BYTES
    for keep in [*range(header), *range(header, len(data), 499), len(data) - 1]:
        path.write_bytes(data[:keep])
        assert_refused(lambda: GgufCheckpoint(path), "is cut off")


def test_gguf_with_an_endless_header(tmp_path: Path) -> None:
    """Only the header is mapped, and no more of it than any model has; the file system holds none of the rest."""
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(values=values(x=value("x", ARRAY, struct.pack("<IQ", U8, 1 << 33)))))
    os.truncate(path, 1 << 34)
    assert_refused(lambda: GgufCheckpoint(path), "has a header of more than 128 MiB, so it is damaged")


@pytest.mark.parametrize("what", ["a folder", "a pipe", "nothing", "a link to itself"])
def test_gguf_that_is_no_file(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.gguf"
    {"a folder": path.mkdir, "a pipe": lambda: os.mkfifo(path), "nothing": lambda: None,
     "a link to itself": lambda: path.symlink_to(path)}[what]()  # fmt: skip
    assert_refused(lambda: GgufCheckpoint(path), "has no .*gguf file|is no file")
    if what != "nothing":
        assert_refused(lambda: GgufCheckpoint(tmp_path), "has no .*gguf file|is no file")


@pytest.mark.parametrize("kind", [kind for kind in HALVES if kind in READABLE_TYPES])
@pytest.mark.parametrize("bits", [0x7C00, 0xFE01])
def test_scales_that_are_no_numbers_are_refused_when_they_are_packed(kind: str, bits: int) -> None:
    rows = random_rows(kind, 64, 256, np.random.default_rng(0))
    source = f"gguf:{kind}"
    layout = torch.ops.kt_kernel.source_layout([torch.from_numpy(rows)], source, 64, 256)
    for begin in HALVES[kind]:
        changed = rows.copy()
        changed[63, begin : begin + 2] = struct.unpack("2B", struct.pack("<H", bits))
        with pytest.raises(RuntimeError, match=r"(nan|inf|NaN).* row 63, "):
            torch.ops.kt_kernel.repack([torch.from_numpy(changed)], source, layout, 64, 256)
