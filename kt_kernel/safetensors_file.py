"""One safetensors file: header, tensors as views of a mapping, and a writer that places tensors in any order.

Knows no model. The safetensors package itself is not used because it neither gives pages back (a checkpoint is larger
than memory) nor writes a tensor before the others are there.

Source: https://huggingface.co/docs/safetensors, section "Format": u64 header length, JSON header, data.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 100_000_000
# Not in Python 3.11's mmap module. The mapping is private only because torch wants writable memory; nothing is ever
# written, so no swap must be reserved for it.
_MAP_NORESERVE = 0x4000


class TensorInfo(NamedTuple):
    """Where a tensor lies: dtype word of the header, shape, byte range in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


class SafetensorsFile:
    """A safetensors file opened for reading.

    The header is read at once; the data is mapped at the first tensor. Thread-safe after construction.

    Raises
    ------
    ValueError
        Not a safetensors file, or shorter than its header says (the message names the file).
    FileNotFoundError
        No such file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.num_bytes = self.path.stat().st_size
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._read_header()
        self._map: mmap.mmap | None = None

    def _read_header(self) -> None:
        with open(self.path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, self.num_bytes - 8):
                raise ValueError(
                    f"{self.path} is no safetensors file or is cut off ({self.num_bytes} bytes); copy it again."
                )
            header = file.read(length)
        self.header_crc32 = zlib.crc32(prefix + header)
        data_start = 8 + length
        try:
            entries = json.loads(header)
            self.metadata = dict(entries.pop("__metadata__", None) or {})
            for name, entry in entries.items():
                begin, end = entry["data_offsets"]
                shape = tuple(int(size) for size in entry["shape"])
                self.tensors[name] = TensorInfo(
                    str(entry["dtype"]), shape, data_start + int(begin), data_start + int(end)
                )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} has a broken safetensors header ({error}); copy the file again.") from error
        for name, info in self.tensors.items():
            if not data_start <= info.start <= info.end <= self.num_bytes:
                raise ValueError(
                    f"{self.path} is cut off: tensor {name} ends at byte {info.end} of {self.num_bytes}; "
                    f"copy the file again."
                )
            dtype = _DTYPES.get(info.dtype)
            if dtype is not None and math.prod(info.shape) * dtype.itemsize != info.num_bytes:
                raise ValueError(
                    f"{self.path} is broken: tensor {name} of shape {list(info.shape)} and type {info.dtype} "
                    f"has {info.num_bytes} bytes; copy the file again."
                )

    def _mapping(self) -> mmap.mmap:
        if self._map is None:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(
                    file.fileno(),
                    0,
                    flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
        return self._map

    def tensor(self, name: str) -> torch.Tensor:
        """View of one tensor; valid as long as it is referenced, must not be written.

        Raises
        ------
        KeyError
            No such tensor.
        ValueError
            A type torch cannot hold here (8-bit floats and narrower).
        """
        info = self.tensors[name]
        dtype = _DTYPES.get(info.dtype)
        if dtype is None:
            raise ValueError(f"tensor {name} of {self.path} has type {info.dtype}, which is not supported yet.")
        count = math.prod(info.shape)
        if count == 0:
            return torch.empty(info.shape, dtype=dtype)
        flat = torch.frombuffer(self._mapping(), dtype=dtype, count=count, offset=info.start)
        # Old writers did not align the data; kernels read whole elements.
        if flat.data_ptr() % dtype.itemsize:
            flat = flat.clone()
        return flat.view(info.shape)

    def _advise(self, name: str, advice: int, part: tuple[int, int] | None) -> None:
        if self._map is None:
            return
        info = self.tensors[name]
        start, end = info.start, info.end
        if part is not None:
            index, count = part
            size = info.num_bytes // count
            start, end = info.start + index * size, info.start + (index + 1) * size
        start -= start % mmap.PAGESIZE
        if end > start:
            self._map.madvise(advice, start, end - start)

    def prefetch(self, name: str, part: tuple[int, int] | None = None) -> None:
        """Ask the kernel to read a tensor, or part ``(index, count)`` of it, ahead of its use."""
        self._mapping()
        self._advise(name, mmap.MADV_WILLNEED, part)

    def release(self, name: str, part: tuple[int, int] | None = None) -> None:
        """Give the pages of a tensor, or of part ``(index, count)`` of it, back; a later read maps them again."""
        self._advise(name, mmap.MADV_DONTNEED, part)


class SafetensorsWriter:
    """Writes uint8 tensors of known sizes, each at its place, in any order and from any thread.

    The bytes go to ``<name>.part``; only :meth:`commit` gives the file its name. Disk space is reserved at once, so a
    full disk shows before any work is done.

    Parameters
    ----------
    path : Path
        Final name.
    sizes : Mapping[str, int]
        Bytes of each tensor, in file order.
    metadata : Mapping[str, str]
        Strings for the header.

    Raises
    ------
    OSError
        The file cannot be created or the disk is full (one sentence; nothing is left behind).
    """

    def __init__(self, path: Path, sizes: Mapping[str, int], metadata: Mapping[str, str]) -> None:
        self.path = Path(path)
        self.part_path = part_path(self.path)
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        offset = 0
        places = {}
        for name, size in sizes.items():
            header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [offset, offset + size]}
            places[name] = (offset, size)
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        # Data begins at a multiple of 64 bytes, so mapped panels are aligned as kernels want them.
        text += b" " * (-(8 + len(text)) % 64)
        prefix = len(text).to_bytes(8, "little") + text
        self.header_crc32 = zlib.crc32(prefix)
        self.num_bytes = len(prefix) + offset
        self._places = {name: (len(prefix) + start, size) for name, (start, size) in places.items()}
        self._fd = -1
        try:
            self._fd = os.open(self.part_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                os.posix_fallocate(self._fd, 0, self.num_bytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                os.ftruncate(self._fd, self.num_bytes)
            self._write_at(memoryview(prefix), 0)
        except OSError as error:
            self.abort()
            raise write_error(error, self.path, self.num_bytes) from error

    def _write_at(self, data: memoryview, offset: int) -> None:
        while data:
            written = os.pwrite(self._fd, data, offset)
            data = data[written:]
            offset += written

    def write(self, name: str, tensor: torch.Tensor) -> int:
        """Write one tensor and return its CRC-32.

        Raises
        ------
        ValueError
            Other bytes than announced.
        OSError
            The disk is full or fails (one sentence).
        """
        start, size = self._places[name]
        if tensor.dtype != torch.uint8 or tensor.numel() != size:
            raise ValueError(
                f"tensor {name} of {self.path.name} has {tensor.numel()} elements of {tensor.dtype}; "
                f"{size} bytes were announced."
            )
        data = memoryview(tensor.contiguous().view(-1).numpy())
        try:
            self._write_at(data, start)
        except OSError as error:
            raise write_error(error, self.path, self.num_bytes) from error
        return zlib.crc32(data)

    def commit(self) -> None:
        """Flush to the disk and give the file its final name.

        Raises
        ------
        OSError
            The disk is full or fails (one sentence); the part file is removed.
        """
        try:
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1
            os.replace(self.part_path, self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            self.abort()
            raise write_error(error, self.path, self.num_bytes) from error

    def abort(self) -> None:
        """Remove the unfinished file; harmless after :meth:`commit`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.part_path.unlink(missing_ok=True)


def part_path(path: Path) -> Path:
    """The name a file has while it is being written."""
    return path.with_name(path.name + ".part")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_error(error: OSError, path: Path, num_bytes: int) -> OSError:
    """The sentence for a write that failed; names the file and, where the disk is full, the space needed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        try:
            status = os.statvfs(path.parent)
            free = f"{status.f_bavail * status.f_frsize / 1e9:.2f} GB free"
        except OSError:
            free = "too little free"
        text = f"the disk of {path.parent} is full: {path.name} needs {num_bytes / 1e9:.2f} GB, {free}; "
        return OSError(error.errno, text + "make room and start the same command again, finished layers are kept.")
    return OSError(error.errno, f"writing {path} failed: {error.strerror or error}.")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that its name never shows half of it.

    Raises
    ------
    OSError
        The disk is full or fails (one sentence); an earlier file of that name is untouched.
    """
    part = part_path(path)
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise write_error(error, path, len(data)) from error
