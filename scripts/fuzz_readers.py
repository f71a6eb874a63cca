#!/usr/bin/env python3
"""Feeds damaged and hostile files to every reader: GGUF, safetensors, its index, config.json, the manifest.

A case takes a tiny valid folder, changes it one to three times and reads it. It passes if the reader succeeds or raises
ValueError with one printable sentence, within five seconds and 1 GiB of address space. Anything else - another
exception, a crash, a longer time - is a finding: the case is named, and its files are left for a look.

Usage: fuzz_readers.py [--seconds S | --cases N] [--seed N] [--target NAME] [--replay CASE]

Cases depend on the seed and their number only. Exits 1 on the first finding.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/python")]

CASE_SECONDS = 5
CASE_BYTES = 1 << 30
LARGE = (0, 1, 2, 3, 31, 33, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 60, 1 << 63, (1 << 64) - 1)
VALUES = (
    None, True, -1, 0, 1, 3, 1 << 31, 1 << 60, (1 << 64) - 1, 1 << 64, 10**400, -(1 << 63), 0.5, 1e308, float("nan"),
    "", "a\nb", "\x00", "\ud800", "../x", "/etc/passwd", "x" * 300, "9" * 5000, "model.safetensors", "BF16", "F8_E4M3",
    "U8", "F64", "BOOL", "I32", [], {}, [[]], [1 << 60, 1 << 60], [0, 0], [1, 1 << 62], "@deep@",
)  # fmt: skip
PACKED_BYTES = (600, 300)
# In place of a file's contents.
FOLDER, PIPE = "folder", "pipe"
Contents = dict[str, bytes | str]


class Finding(Exception):
    """A reader did what none may."""


class TooSlow(BaseException):
    """A case took longer than CASE_SECONDS."""


# --- what is read ---


def valid_gguf(folder: Path) -> None:
    from gguf_files import random_biases, random_layer, sizes_of, write_gguf

    layers = {0: random_layer(("Q4_0", "Q8_0", "F16"), hidden=32), 1: random_layer("MXFP4", hidden=32, fused=True)}
    write_gguf(
        folder / "m.gguf",
        layers,
        sizes_of(2, 32, 32, 2),
        split_max_tensors=3,
        biases={1: random_biases(layers[1], "F32")},
    )


def valid_checkpoint(folder: Path, style: str, num_shards: int) -> None:
    from checkpoints import random_experts, write_checkpoint

    write_checkpoint(folder, {1: random_experts(2, 32, 16)}, style=style, num_shards=num_shards)


def valid_quantized(folder: Path, form: str) -> None:
    from quantized_checkpoints import QUANTIZERS, quantized_layer, single_names, write_folder

    tensors = single_names(quantized_layer(QUANTIZERS[form].make, 2, 64, 64))
    write_folder(folder, tensors, QUANTIZERS[form].config, sizes=(2, 64, 64))


KT_CASE = ("INT8", 2, 1, 64, 128)  # method, NUMA parts, experts, hidden and intermediate size


def valid_kt_tree(folder: Path) -> None:
    import kt_files

    for name, data in kt_files.tree_files(kt_files.Case(*KT_CASE)).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def valid_kt_merged(folder: Path) -> None:
    import kt_files
    from checkpoints import config_of, random_experts

    tensors = {
        name: torch.from_numpy(array.copy()) for name, array in kt_files.merged_arrays(kt_files.Case(*KT_CASE)).items()
    }
    save_file(tensors, folder / "model-00001-of-00001.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(random_experts(1, 64, 128), 1)))


def valid_packed(folder: Path) -> None:
    from kt_kernel.packed_folder import PackedDescription
    from kt_kernel.packed_writer import PackedMatrix, PackedWriter

    model = {"model_type": "x", "num_experts": 2, "hidden_size": 32, "intermediate_size": 16}
    description = PackedDescription("AMXINT8", "int8_n64k4_r512_v1", "0", "bf16", model, [3], {}, "")
    with contextlib.closing(PackedWriter(folder, description)) as writer:
        shards = {}
        for expert in range(2):
            matrices = {"w13": torch.ones(PACKED_BYTES[0]), "w2": torch.ones(PACKED_BYTES[1])}
            shards |= writer.write_shard(
                3,
                expert,
                {
                    f"experts.{expert}.{name}": PackedMatrix.of(matrix.byte(), torch.ones(2))
                    for name, matrix in matrices.items()
                },
            )
        writer.finish_layer(3, shards)
        (folder / "config.json").write_text("{}")
        writer.finish({}, {"config.json": sha256(b"{}").hexdigest()})


def read_gguf(folder: Path) -> None:
    from kt_kernel.checkpoint.gguf import GgufCheckpoint

    checkpoint = GgufCheckpoint(folder)
    read_sources(checkpoint)
    sizes = checkpoint.sizes
    for projection, rows in (("up", sizes.intermediate_size), ("down", sizes.hidden_size)):
        (blocks,) = checkpoint.source(checkpoint.layers[0], 0, projection)[1]
        if blocks.dim() != 2 or blocks.shape[0] != rows or not blocks.numel():
            raise Finding(f"{list(blocks.shape)} blocks for {rows} rows")


def read_sources(checkpoint: Any) -> None:
    for layer in checkpoint.layers[:4]:
        checkpoint.check_layer(layer)
        checkpoint.expert_bytes(layer)
        for expert in {0, checkpoint.sizes.num_experts - 1}:
            checkpoint.biases(layer, expert)
            for projection in ("gate", "up", "down"):
                checkpoint.tensor_name(layer, expert, projection)
                for part in checkpoint.source(layer, expert, projection)[1]:
                    part.view(torch.uint8).sum()


def read_checkpoint(folder: Path) -> None:
    from kt_kernel.checkpoint import Checkpoint

    checkpoint = Checkpoint(folder)
    read_sources(checkpoint)
    checkpoint.describe()


def read_kt(folder: Path) -> None:
    from kt_kernel.checkpoint.kt_folder import KtFolder, is_kt_folder

    if not is_kt_folder(folder):
        raise ValueError("no folder of kt-kernel's.")
    read_sources(KtFolder(folder, "AMXINT8"))


def read_packed(folder: Path) -> None:
    from kt_kernel.packed_folder import PackedFolder, is_packed_folder, verify

    is_packed_folder(folder)
    packed = PackedFolder(folder)
    for layer in packed.layers[:4]:
        packed.check_sizes(
            layer,
            num_experts=2,
            hidden_size=32,
            intermediate_size=16,
            w13_bytes=PACKED_BYTES[0],
            w2_bytes=PACKED_BYTES[1],
        )
        packed.expert_bytes(layer)
        for matrix in packed.expert(layer, 1):
            matrix.max()
    for problem in verify(folder):
        check_sentence(problem)


TARGETS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "gguf": (valid_gguf, read_gguf),
    "safetensors": (lambda folder: valid_checkpoint(folder, "long", 1), read_checkpoint),
    "fused": (lambda folder: valid_checkpoint(folder, "fused", 1), read_checkpoint),
    "index": (lambda folder: valid_checkpoint(folder, "long", 2), read_checkpoint),
    **{form: (partial(valid_quantized, form=form), read_checkpoint) for form in ("fp8", "rawint4", "gptq", "nvfp4")},
    "kt_tree": (valid_kt_tree, read_kt),
    "kt_merged": (valid_kt_merged, read_kt),
    "packed": (valid_packed, read_packed),
}


# --- how it is changed ---


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flips, numbers, cuts and copies, more in the first 2 KB, where headers are."""
    if not data:
        return rng.randbytes(rng.randrange(64))
    at = rng.randrange(min(len(data), rng.choice((2048, len(data)))))
    length = rng.choice((1, 4, 8, 16, 64))
    size = rng.choice((4, 8))
    number = (rng.choice(LARGE) % (1 << 8 * size)).to_bytes(size, "little")
    names = [match.end() for match in re.finditer(rb"[a-z_.0-9]{6,}", data[:8192])]
    if names and rng.random() < 0.3:  # the numbers of GGUF stand behind names
        at = rng.choice(names) + rng.choice((-16, 0, 4, 8, 12, 20, 24, 28, 32))
        return data[:at] + number + data[at + size :]
    return rng.choice(
        (
            lambda: data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
            lambda: data[:at] + number + data[at + size :],
            lambda: data[:at] + number + data[at + size :],
            lambda: data[:at] + rng.randbytes(length) + data[at + length :],
            lambda: data[:at],
            lambda: data[:at] + data[at + length :],
            lambda: data[:at] + data[at : at + length] * rng.choice((2, 3, 1000)) + data[at + length :],
            lambda: data + rng.randbytes(length),
        )
    )()


def places(tree: object) -> Iterator[tuple[dict | list, object]]:
    """Every container of a JSON tree with every key in it."""
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from places(tree[key])


def change_json(rng: random.Random, text: bytes) -> bytes:
    """Replaces, removes, renames or copies one value; text that is no JSON is changed as bytes."""
    try:
        tree = json.loads(text)
        container, key = rng.choice(list(places(tree)))
    except (ValueError, IndexError, RecursionError):
        return change_bytes(rng, text)
    match rng.randrange(6):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container[rng.choice([value for value in VALUES if isinstance(value, str)])] = container.pop(key)
        case 2:
            container[key] = rng.choice(list(places(tree)))[1]
        case 3 if isinstance(container[key], int):
            container[key] += rng.choice((-1, 1, 8, 1 << 32))
        case _:
            container[key] = rng.choice(VALUES)
    return json.dumps(tree).replace('"@deep@"', "[" * 50_000 + "]" * 50_000).encode()


def change_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with another value in its header, whose length fits."""
    length = int.from_bytes(data[:8], "little")
    header = change_json(rng, data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def change_manifest(rng: random.Random, data: bytes) -> bytes:
    """A manifest with another value, half of them with the checksum that fits."""
    from kt_kernel.packed_folder import encode_manifest

    data = change_json(rng, data)
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        if rng.random() < 0.8:
            data = encode_manifest(json.loads(data))
    return data


def change_folder(rng: random.Random, contents: Contents) -> None:
    """Change one file of a folder."""
    name = rng.choice(sorted(contents))
    data = contents[name]
    if rng.random() < 0.05 or isinstance(data, str):
        other = rng.choice(sorted(contents))
        contents[name] = rng.choice((b"", FOLDER, PIPE, contents[other]))
        if rng.random() < 0.6:
            renamed = re.sub(r"\d+", lambda match: str(rng.choice((match[0], 0, 7, 1 << 40))), name)
            contents[renamed] = contents.pop(name)
        if rng.random() < 0.3:
            contents.pop(name, None)
        return
    structured = change_json if name.endswith(".json") else None
    if name.endswith(".safetensors"):
        structured = change_header
    elif name == "manifest.json":
        structured = change_manifest
    contents[name] = (structured if structured and rng.random() < 0.7 else change_bytes)(rng, data)


def write_folder(folder: Path, contents: Contents) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if data == FOLDER:
            (folder / name).mkdir()
        elif data == PIPE:
            os.mkfifo(folder / name)
        else:
            (folder / name).write_bytes(data)


# --- how it is judged ---


def check_sentence(message: str) -> None:
    if not message.endswith(".") or not message.isprintable() or len(message) > 12_000:
        raise Finding(f"no sentence: {message[:500]!r}")


def judge(read: Callable[[Path], None], folder: Path) -> bool:
    """Whether a folder was read; False if it was refused.

    Raises
    ------
    Finding
        What is neither.
    """

    def too_slow(number: int, frame: object) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, too_slow)
    faulthandler.dump_traceback_later(4 * CASE_SECONDS, exit=True)  # where no Python code runs, no handler does either
    signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
    try:
        read(folder)
        return True
    except ValueError as error:
        if type(error) is not ValueError:
            raise Finding(f"{type(error).__name__}: {error}") from error
        check_sentence(str(error))
        return False
    except Finding:
        raise
    except TooSlow:
        raise Finding(f"it took longer than {CASE_SECONDS} s.") from None
    except BaseException as error:
        raise Finding(f"{type(error).__name__}: {str(error)[:500]}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def valid_contents(names: list[str]) -> dict[str, Contents]:
    """The files of every target, each read once: they are valid."""
    found: dict[str, Contents] = {}
    for name in names:
        make, read = TARGETS[name]
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "valid"
            folder.mkdir()
            make(folder)
            if not judge(read, folder):
                raise Finding(f"the valid {name} was refused.")
            found[name] = {
                path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
            }
    return found


def run_cases(args: argparse.Namespace, folder: Path) -> int:
    """The worker: cases from args.first on, the number of each written to the file `case` before it begins."""
    names = [args.target] if args.target else list(TARGETS)
    valid = valid_contents(names)
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + CASE_BYTES, resource.RLIM_INFINITY))
    counts = {name: [0, 0] for name in names}
    end = time.monotonic() + args.seconds
    case = args.first
    while case < args.first + args.cases and time.monotonic() < end:
        (folder / "case").write_text(str(case))
        rng = random.Random(f"{args.seed}/{case}")
        name = rng.choice(names)
        contents = dict(valid[name])
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            change_folder(rng, contents)
            if not contents:
                break
        write_folder(folder / "files", contents)
        try:
            counts[name][judge(TARGETS[name][1], folder / "files")] += 1
        except Finding as finding:
            print(f"fuzz_readers: case {case} ({name}): {finding}", file=sys.stderr)
            if args.replay is not None and finding.__cause__ is not None:
                raise finding.__cause__ from None
            return 1
        case += 1
    for name, (refused, read) in counts.items():
        print(f"{name}: {refused + read} cases, {read} read, {refused} refused")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Feed damaged and hostile files to every reader.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--cases", type=int, default=1 << 40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=TARGETS, help="only this reader; changes what a case number means")
    parser.add_argument("--replay", type=int, help="only this case, with the traceback of its finding")
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.replay is not None:
        args.first, args.cases = args.replay, 1
    if args.worker:
        return run_cases(args, args.worker)
    folder = Path(tempfile.mkdtemp(prefix="kt-fuzz-"))
    result = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--worker", folder])
    if result.returncode == 0:
        shutil.rmtree(folder)
        return 0
    case = (folder / "case").read_text() if (folder / "case").exists() else "none"
    options = f"--seed {args.seed}" + (f" --target {args.target}" if args.target else "")
    print(
        f"fuzz_readers: exit code {result.returncode} at case {case}; its files are in {folder / 'files'}; again: "
        f"scripts/fuzz_readers.py {options} --replay {case}",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
