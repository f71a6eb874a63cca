"""The header of a GGUF file: its values and where its tensors lie. Reads no weights; every number is checked first.

The ``gguf`` package's own reader builds an array for every token of the vocabulary: 7.8 s for 150000 tokens and as many
merges, where this one skips them in 0.1 s. The package gives the types: their numbers, names and block sizes.

Source: the GGUF specification in https://github.com/ggml-org/ggml, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, NoReturn

from gguf import GGML_QUANT_SIZES

# Limits that keep a lie in the file from costing time or memory. The largest vocabularies take some 20 MB.
_HEADER_BYTES = 128 << 20
_MAX_VALUES = 1 << 16
_MAX_TENSORS = 1 << 20
_MAX_DIMENSIONS = 4
_NAME_BYTES = 255
# Longer strings (chat templates) are skipped.
_STRING_BYTES = 1024

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_SCALARS = {number: struct.Struct(f"<{code}") for number, code in enumerate("BbHhIif?")}
_SCALARS |= {10: struct.Struct("<Q"), 11: struct.Struct("<q"), 12: struct.Struct("<d")}
_STRING, _ARRAY = 8, 9
# Name, elements of a block and its bytes, by number.
_TYPES = {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


class TensorInfo(NamedTuple):
    """One tensor: ``shape`` outermost first; ``offset`` in the file; ``num_bytes`` 0 if the type is unknown."""

    name: str
    type_number: int
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def type_name(self) -> str:
        """``Q4_K``; ``number 99`` for a type that the installed gguf package does not have."""
        return _TYPES.get(self.type_number, (f"number {self.type_number}",))[0]


@dataclass(frozen=True)
class GgufHeader:
    """What a file says of itself.

    Attributes
    ----------
    path : Path
        The file.
    file_bytes : int
        Its size when the header was read.
    values : dict
        Numbers and short strings by key; arrays and long strings are left out.
    tensors : dict of TensorInfo
        By name.
    """

    path: Path
    file_bytes: int
    values: dict[str, int | float | bool | str]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises
    ------
    ValueError
        No GGUF file, cut off, damaged or of a form that cannot be read; one sentence.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for a writer
            raise ValueError(f"{path} is no file; give a GGUF file or a folder of them.")
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            if file_bytes < 24:
                raise ValueError(f"{path} is cut off: it has {file_bytes} bytes; download it again.")
            mapped = mmap.mmap(file.fileno(), min(file_bytes, _HEADER_BYTES), access=mmap.ACCESS_READ)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check its permissions and its disk.") from error
    with mapped, memoryview(mapped) as data:
        return _Parser(path, file_bytes, data).header()


class _Parser:
    def __init__(self, path: Path, file_bytes: int, data: memoryview) -> None:
        self._path = path
        self._file_bytes = file_bytes
        self._data = data
        self._at = 0

    def _fail(self, reason: str, fix: str = "download it again") -> NoReturn:
        raise ValueError(f"{self._path} {reason}; {fix}.")

    # --- pieces ---

    def _skip(self, num_bytes: int) -> int:
        """Where the next so many bytes begin."""
        begin = self._at
        if num_bytes > len(self._data) - begin:
            if self._file_bytes > len(self._data):
                self._fail(f"has a header of more than {_HEADER_BYTES >> 20} MiB, so it is damaged")
            self._fail(f"is cut off or damaged: its header goes beyond its {self._file_bytes} bytes")
        self._at = begin + num_bytes
        return begin

    def _number(self, form: struct.Struct) -> int | float | bool:
        return form.unpack_from(self._data, self._skip(form.size))[0]

    def _text(self, what: str) -> str:
        """A name or a key."""
        length = self._number(_U64)
        if length > _NAME_BYTES:
            self._fail(f"is damaged: {what} has {length} bytes, above the limit of {_NAME_BYTES}")
        begin = self._skip(length)
        try:
            text = str(self._data[begin : begin + length], "utf-8")
        except UnicodeDecodeError:
            self._fail(f"is damaged: {what} is no UTF-8")
        if not text.isprintable():
            self._fail(f"is damaged: {what} has characters that cannot be printed ({text!a})")
        return text

    def _value(self, key: str) -> int | float | bool | str | None:
        kind = self._number(_U32)
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            length = self._number(_U64)
            begin = self._skip(length)
            return None if length > _STRING_BYTES else str(self._data[begin : begin + length], "utf-8", "replace")
        if kind != _ARRAY:
            self._fail(f"is damaged: {key} has the unknown type {kind}")
        element, count = self._number(_U32), self._number(_U64)
        if element in _SCALARS:
            self._skip(count * _SCALARS[element].size)
        elif element == _STRING:
            self._skip_strings(count)
        else:
            self._fail(f"is damaged: {key} is an array of the unknown type {element}")
        return None

    def _skip_strings(self, count: int) -> None:
        unpack, data, end, at = _U64.unpack_from, self._data, len(self._data) - 8, self._at
        if count > len(data) // 8:
            self._skip(8 * count)
        for _ in range(count):
            if at > end:
                break
            at += 8 + unpack(data, at)[0]
        else:
            self._at = at
            self._skip(0)
            return
        self._skip(len(data))

    # --- parts ---

    def header(self) -> GgufHeader:
        magic, version = bytes(self._data[:4]), _U32.unpack_from(self._data, 4)[0]
        if magic != b"GGUF":
            self._fail("is no GGUF file")
        if version not in (2, 3):
            big_endian = version & 0xFFFF == 0
            found = "is big-endian" if big_endian else f"has GGUF version {version}"
            self._fail(found, "kt_kernel reads little-endian GGUF of version 2 and 3, so convert the model again")
        self._at = 8
        num_tensors, num_values = self._number(_U64), self._number(_U64)
        for count, limit, what in ((num_tensors, _MAX_TENSORS, "tensors"), (num_values, _MAX_VALUES, "values")):
            if count > limit:
                self._fail(f"is damaged: it promises {count} {what}, above the limit of {limit}")
        values: dict[str, int | float | bool | str] = {}
        keys = set()
        for _ in range(num_values):
            key = self._text("a key")
            if key in keys:
                self._fail(f"is damaged: it has the key {key} twice")
            keys.add(key)
            value = self._value(key)
            if value is not None:
                values[key] = value
        return GgufHeader(self._path, self._file_bytes, values, self._tensors(num_tensors, self._alignment(values)))

    def _alignment(self, values: dict) -> int:
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment not in (1 << bit for bit in range(32)):
            self._fail(f"is damaged: general.alignment is {alignment!a}, which is no power of two below 2^32")
        return alignment

    def _tensors(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        raw = [self._tensor() for _ in range(count)]
        begin = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, number, offset in raw:
            if name in tensors:
                self._fail(f"is damaged: it has the tensor {name} twice")
            if offset % alignment:
                self._fail(f"is damaged: tensor {name} lies at {offset}, no multiple of the alignment {alignment}")
            num_bytes = self._tensor_bytes(name, shape, number)
            if begin + offset + num_bytes > self._file_bytes:
                self._fail(
                    f"is cut off or damaged: tensor {name} ends at byte {begin + offset + num_bytes} of a file of "
                    f"{self._file_bytes} bytes"
                )
            tensors[name] = TensorInfo(name, number, shape, begin + offset, num_bytes)
        self._check_overlaps(tensors)
        return tensors

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text("the name of a tensor")
        dimensions = self._number(_U32)
        if dimensions > _MAX_DIMENSIONS:
            self._fail(f"is damaged: tensor {name} has {dimensions} dimensions, above the limit of {_MAX_DIMENSIONS}")
        shape = tuple(self._number(_U64) for _ in range(dimensions))[::-1]
        return name, shape, self._number(_U32), self._number(_U64)

    def _tensor_bytes(self, name: str, shape: tuple[int, ...], number: int) -> int:
        if number not in _TYPES:
            return 0
        kind, block, block_bytes = _TYPES[number]
        if shape and shape[-1] % block:
            self._fail(f"is damaged: tensor {name} has rows of {shape[-1]}, no multiple of the {block} of {kind}")
        return math.prod(shape) // block * block_bytes

    def _check_overlaps(self, tensors: dict[str, TensorInfo]) -> None:
        by_offset = sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.num_bytes))
        for first, second in pairwise(by_offset):
            if first.offset + first.num_bytes > second.offset:
                self._fail(f"is damaged: tensors {first.name} and {second.name} overlap")
