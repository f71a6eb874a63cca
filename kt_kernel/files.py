"""Files read through the safetensors package, and files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

# Begins the names of the folders that hold files being written; a killed process leaves one behind.
PART_PREFIX = ".kt-part-"


def sayable(text: object) -> str:
    """What a file or a library says, fit for a message: its beginning, with what cannot be printed escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text)[:300])


def open_safetensors(path: Path) -> safe_open:
    """Open a safetensors file; its tensors are views of the mapped file, which lives as long as one of them.

    Raises
    ------
    ValueError
        Missing, cut off, no safetensors file, or larger than the system lets be mapped; one sentence that names it.
    """
    if not path.is_file():  # opening a pipe would wait for a writer
        raise ValueError(f"{path} is missing; copy it again.")
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no safetensors file or is cut off ({sayable(error)}); copy it again.") from error
    except RuntimeError as error:  # torch, which maps the data privately and so needs the kernel to allow for its size
        raise ValueError(f"{path} cannot be mapped ({sayable(error)}); allow more memory (ulimit -v).") from error


def read_small_file(path: Path) -> bytes:
    """All bytes of a regular file: a pipe would make the reader wait.

    Raises
    ------
    FileNotFoundError
        Missing.
    ValueError
        No file, or not readable; one sentence.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file; copy it again.")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check its permissions and its disk.") from error


def is_file_name(name: str) -> bool:
    """Whether a name that a file gives is that of a file in its folder or below, and can be said in a message."""
    parts = name.split("/")
    return name.isprintable() and len(name.encode()) <= 255 and not {"", ".", ".."}.intersection(parts)


class OpenFiles:
    """safetensors files of a folder by name: opened at the first use and kept until :meth:`close`. Thread-safe.

    Parameters
    ----------
    folder : Path
        Folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._files: dict[str, safe_open] = {}

    def __getitem__(self, name: str) -> safe_open:
        with self._lock:
            if name not in self._files:
                self._files[name] = open_safetensors(self._folder / name)
            return self._files[name]

    def close(self) -> None:
        """Forget the files; each is unmapped with its last view, and the next use opens it again."""
        with self._lock:
            self._files.clear()


@contextmanager
def atomic_file(path: Path, num_bytes: int) -> Iterator[Path]:
    """A path to write to in place of `path`, which gets its name when the block ends, whole and on the disk.

    Parameters
    ----------
    path : Path
        Final name; an earlier file of that name is untouched if the block fails.
    num_bytes : int
        Expected size, for the message.

    Raises
    ------
    OSError
        The disk is full or fails (one sentence); nothing is left behind.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=PART_PREFIX, dir=path.parent) as folder:
            part = Path(folder) / path.name
            yield part
            part.chmod(0o644)  # safetensors makes files that only their owner can read
            _sync(part)
            os.replace(part, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise _write_error(error, path, num_bytes) from error


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_error(error: Exception, path: Path, num_bytes: int) -> OSError:
    # safetensors has the system's error in its text only.
    number = re.search(r"os error (\d+)", str(error))
    code = error.errno if isinstance(error, OSError) else int(number[1]) if number else errno.EIO
    if code in (errno.ENOSPC, errno.EDQUOT):
        return OSError(
            code,
            f"the disk of {path.parent} is full: {path.name} needs {num_bytes / 1e6:.2f} MB, "
            f"{shutil.disk_usage(path.parent).free / 1e6:.2f} MB free; make room and start the same command again, "
            f"what is written is kept.",
        )
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return OSError(code, f"writing {path} failed: {reason}.")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that its name never shows half of it; errors are those of :func:`atomic_file`."""
    with atomic_file(path, len(data)) as part:
        part.write_bytes(data)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed writers left in a folder."""
    for left in folder.glob(PART_PREFIX + "*"):
        shutil.rmtree(left)
