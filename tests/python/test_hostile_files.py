"""Damaged and hostile files, of every kind but GGUF: each is refused in one sentence, at once and in little memory.

What no table thinks of is left to scripts/fuzz_readers.py, which runs here for a while.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import random_experts, write_checkpoint
from quantized_checkpoints import QUANTIZERS, quantized_layer, single_names, write_folder
from refusals import HUGE, assert_refused, limited_memory_and_time  # noqa: F401
from safetensors.torch import save_file
from test_tree import ROOT

from kt_kernel.checkpoint import Checkpoint
from kt_kernel.packed_folder import PackedFolder, encode_manifest, read_manifest, verify

sys.path.append(str(ROOT / "scripts"))
import fuzz_readers

# --- safetensors ---

NAME = "model.layers.0.mlp.experts.0.gate_proj.weight"


def write_header(path: Path, header: bytes, length: int | None = None) -> None:
    """Replace the header of a safetensors file, and say that it has `length`."""
    data = path.read_bytes()
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data[begin:])


def read_header(path: Path) -> dict:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def read_all(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    for layer in checkpoint.layers:
        checkpoint.check_layer(layer)
        for projection in ("gate", "up", "down"):
            checkpoint.source(layer, 0, projection)


SAFETENSORS_DEFECTS: dict[str, tuple[Callable[[dict], object], str]] = {
    "unknown type": (lambda t: t.update(dtype="Q9"), "no safetensors file .* unknown variant"),
    "type that cannot be printed": (
        lambda t: t.update(dtype="a\nb"),
        r"no safetensors file .* unknown variant `a\\nb`",
    ),
    "wrong type": (lambda t: t.update(dtype="I16"), f"{NAME} of .* is quantized in a way that kt_kernel does not read"),
    "larger type": (lambda t: t.update(dtype="F32"), "no safetensors file or is cut off"),
    "wrong shape": (lambda t: t["shape"].reverse(), rf"{NAME} has shape \[32, 16\], but .* means \[16, 32\]"),
    "shape of one": (lambda t: t.update(shape=[512]), rf"{NAME} has shape \[512\]"),
    "huge shape": (lambda t: t.update(shape=[HUGE, HUGE]), "no safetensors file or is cut off"),
    "shape whose product wraps": (lambda t: t.update(shape=[1 << 32, 1 << 32]), "no safetensors file or is cut off"),
    "size 0": (lambda t: t.update(shape=[0, 32]), "no safetensors file or is cut off"),
    "negative shape": (lambda t: t.update(shape=[-16, -32]), "no safetensors file or is cut off"),
    "offsets that overlap": (lambda t: t.update(data_offsets=[0, 1024]), "no safetensors file or is cut off"),
    "huge offsets": (lambda t: t.update(data_offsets=[HUGE, HUGE + 1024]), "no safetensors file or is cut off"),
    "offsets backwards": (lambda t: t["data_offsets"].reverse(), "no safetensors file or is cut off"),
    "nesting": (lambda t: t.update(shape="@deep@"), "no safetensors file or is cut off"),
    "no shape": (lambda t: t.pop("shape"), "no safetensors file or is cut off"),
}


@pytest.mark.parametrize("defect", SAFETENSORS_DEFECTS)
def test_hostile_safetensors(tmp_path: Path, defect: str) -> None:
    path = write_checkpoint(tmp_path, {0: random_experts(2, 32, 16)}) / "model.safetensors"
    header = read_header(path)
    before = json.dumps(header)
    change, words = SAFETENSORS_DEFECTS[defect]
    change(header[NAME])
    if defect == "offsets that overlap":  # with those of the tensor that begins the data
        header[NAME]["data_offsets"] = next(t["data_offsets"] for t in header.values() if t["data_offsets"][0] == 0)
    assert json.dumps(header) != before
    write_header(path, json.dumps(header).replace('"@deep@"', "[" * 50_000 + "]" * 50_000).encode())
    assert_refused(lambda: read_all(tmp_path), words)


@pytest.mark.parametrize(
    ("header", "length"),
    [(b"{}", HUGE), (b"{}", 1 << 31), (b"{}", 0), (b"\xff\xff", None), (b"[" * 100_000, None), (b"null", None),
     (b'{"\xff": 1}', None), (b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}' * 2, None)],
)  # fmt: skip
def test_headers_that_are_none(tmp_path: Path, header: bytes, length: int | None) -> None:
    path = write_checkpoint(tmp_path, {0: random_experts(2, 32, 16)}) / "model.safetensors"
    write_header(path, header, length)
    assert_refused(lambda: read_all(tmp_path), "model.safetensors is no safetensors file or is cut off")


def test_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, {0: random_experts(2, 32, 16)}) / "model.safetensors"
    header = read_header(path)
    other = NAME.replace("gate", "up")
    write_header(path, json.dumps(header).replace(other, NAME).encode())
    assert_refused(lambda: read_all(tmp_path), "no safetensors file or is cut off")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a\nb", r"has a tensor 'a\\nb', which no model has"),
        ("x" * 300, "xxx"),
        ("model.layers." + "9" * 5000 + ".mlp", "'model.layers.9999"),
    ],
)
def test_odd_names_of_tensors(tmp_path: Path, name: str, words: str) -> None:
    write_checkpoint(tmp_path, {0: random_experts(2, 32, 16)})
    save_file({name: torch.zeros(1)}, tmp_path / "model.safetensors")
    assert_refused(lambda: read_all(tmp_path), words)


@pytest.mark.parametrize(
    ("form", "tensor", "change", "words"),
    [
        ("fp8", "weight_scale_inv", None, "lacks weight_scale_inv of gate of expert 1"),
        ("fp8", "weight_scale_inv", lambda t: t[:0], r"weight_scale_inv has shape \[0, 1\]"),
        ("fp8", "weight_scale_inv", lambda t: t.half(), "weight_scale_inv has type F16"),
        ("rawint4", "weight_scale", None, "lacks weight_scale of gate of expert 1"),
        ("rawint4", "weight_packed", lambda t: t[:, :1].clone(), "weight_packed has shape"),
        ("gptq", "qzeros", None, "lacks qzeros of gate of expert 1"),
        ("nvfp4", "weight_scale_2", lambda t: t * float("nan"), "has a weight_scale_2 of nan, which is no scale"),
        ("nvfp4", "weight_scale_2", lambda t: t * 0, "has a weight_scale_2 of 0, which is no scale"),
        ("mxfp4", "scale", lambda t: t.view(torch.uint8)[:, :1].clone(), "scale has shape"),
    ],
)
def test_hostile_scales(tmp_path: Path, form: str, tensor: str, change: Callable | None, words: str) -> None:
    tensors = single_names(quantized_layer(QUANTIZERS[form].make, 2, 64, 64))
    name = f"model.layers.0.mlp.experts.1.gate_proj.{tensor}"
    tensors |= {name: change(tensors[name])} if change else {}
    if change is None:
        tensors.pop(name)
    folder = write_folder(tmp_path, tensors, QUANTIZERS[form].config, sizes=(2, 64, 64))

    def read() -> None:
        checkpoint = Checkpoint(folder)
        checkpoint.check_layer(0)
        checkpoint.source(0, 1, "gate")

    assert_refused(read, words)


@pytest.mark.parametrize(
    ("form", "scale"), [("fp8", "weight_scale_inv"), ("rawint4", "weight_scale"), ("gptq", "scales")]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_refused_when_they_are_packed(
    tmp_path: Path, form: str, scale: str, value: float
) -> None:
    tensors = single_names(quantized_layer(QUANTIZERS[form].make, 2, 64, 64))
    tensors[f"model.layers.0.mlp.experts.1.gate_proj.{scale}"].view(-1)[-1] = value
    checkpoint = Checkpoint(write_folder(tmp_path, tensors, QUANTIZERS[form].config, sizes=(2, 64, 64)))
    checkpoint.check_layer(0)
    source, parts = checkpoint.source(0, 1, "gate")
    layout = torch.ops.kt_kernel.source_layout(parts, source, 64, 64)
    with pytest.raises(RuntimeError, match="(nan|inf|NaN)"):
        torch.ops.kt_kernel.repack(parts, source, layout, 64, 64)


# --- index and config ---


@pytest.mark.parametrize(
    "file",
    ["../other/model.safetensors", "/etc/passwd", "a/../../b", "..", ".", "", "a/", "/", "a\nb", "a\x00b", "\ud800",
     "x" * 300, "\u00e9" * 200],
)  # fmt: skip
def test_an_index_that_leads_elsewhere(tmp_path: Path, file: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model.safetensors").write_bytes(b"secret")
    folder = write_checkpoint(tmp_path / "model", {0: random_experts(2, 32, 16)}, num_shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][NAME] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(lambda: read_all(folder), "index.json names .*, which is not in the folder; do not use")


@pytest.mark.parametrize("what", ["missing", "a folder", "a pipe"])
def test_an_index_to_what_is_no_file(tmp_path: Path, what: str) -> None:
    folder = write_checkpoint(tmp_path, {0: random_experts(2, 32, 16)}, num_shards=2)
    path = folder / "model-00002-of-00002.safetensors"
    path.unlink()
    {"missing": lambda: None, "a folder": path.mkdir, "a pipe": lambda: os.mkfifo(path)}[what]()
    assert_refused(lambda: read_all(folder), "names model-00002-of-00002.safetensors, which is not there")


JSON_DEFECTS = {
    "nesting": b"[" * 100_000 + b"]" * 100_000,
    "nesting below": b'{"weight_map": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "a long number": b'{"num_experts": ' + b"9" * 5000 + b"}",
    "cut off": b'{"weight_map": {"a',
    "empty": b"",
    "a list": b"[]",
    "NUL": bytes(100),
}


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("defect", [*JSON_DEFECTS, "a folder", "a pipe"])
def test_hostile_json(tmp_path: Path, file: str, defect: str) -> None:
    folder = write_checkpoint(tmp_path, {0: random_experts(2, 32, 16)}, num_shards=2)
    path = folder / file
    path.unlink()
    if defect in JSON_DEFECTS:
        path.write_bytes(JSON_DEFECTS[defect])
    else:
        path.mkdir() if defect == "a folder" else os.mkfifo(path)
    assert_refused(lambda: read_all(folder), f"{file} is no JSON")


@pytest.mark.parametrize("key", ["num_experts", "hidden_size", "moe_intermediate_size", "num_hidden_layers"])
@pytest.mark.parametrize("amount", [HUGE, 10**400, -1, 0, True, "2", 2.0, None, [], float("nan")])
def test_hostile_sizes(tmp_path: Path, key: str, amount: object) -> None:
    folder = write_checkpoint(tmp_path, {0: random_experts(2, 32, 16)})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: amount}))
    if key == "num_hidden_layers":
        read_all(folder)  # only says which layers to leave out
    else:
        assert_refused(lambda: read_all(folder), "config.json")


PAIR = "which is no pair of positive numbers"
# The form of the tensors, what config.json says of them beside what is right, and the words of the refusal.
QUANTIZATION_DEFECTS: tuple[tuple[str, object, str], ...] = (
    ("fp8", {"quant_method": "a\nb"}, r"is a a\\nb checkpoint, which kt_kernel does not read"),
    ("fp8", {"quant_method": 7}, "is a 7 checkpoint, which kt_kernel does not read"),
    ("fp8", {"weight_block_size": [0, 0]}, rf"weight_block_size in .*config.json is \[0, 0\], {PAIR}"),
    ("fp8", {"weight_block_size": [HUGE, HUGE]}, rf"weight_block_size in .* is \[{HUGE}, {HUGE}\], {PAIR}"),
    ("fp8", {"weight_block_size": "x"}, f"weight_block_size in .* is 'x', {PAIR}"),
    ("fp8", ["a"], r"quantization_config of .*config.json is \['a'\], which is no JSON object"),
    ("gptq", {"group_size": HUGE}, f"qweight has scales for groups of {HUGE} of 64 elements; kt_kernel reads groups"),
    ("gptq", {"bits": [4]}, r"bits in .*config.json is \[4\], which is no whole number"),
    ("gptq", {"bits": HUGE}, f"is a gptq checkpoint that has {HUGE}-bit weights"),
    ("awq", {"version": ["gemm"]}, r"is a awq checkpoint that has version \['gemm'\]"),
    ("rawint4", {"config_groups": [1]}, "compressed-tensors pack-quantized checkpoint that says no num_bits"),
    ("rawint4", {"config_groups": {"a": {"weights": {}}}}, "pack-quantized checkpoint that says no num_bits"),
    ("rawint4", {"config_groups": {"a": {"weights": {"num_bits": [4]}}}}, r"num_bits .* is \[4\], which is no whole"),
    ("rawint4", {"format": ["x"]}, r"is a compressed-tensors \['x'\] checkpoint, which"),
    ("fp8_compressed_blocks", {"config_groups": {"a": {"weights": {"block_structure": [128]}}}}, rf"\[128\], {PAIR}"),
    ("nvfp4", {"quant_algo": ["NVFP4"]}, r"is a modelopt \['NVFP4'\] checkpoint, which"),
)


@pytest.mark.parametrize(("form", "changes", "words"), QUANTIZATION_DEFECTS)
def test_hostile_quantization(tmp_path: Path, form: str, changes: object, words: str) -> None:
    tensors, right = single_names(quantized_layer(QUANTIZERS[form].make, 2, 64, 64)), QUANTIZERS[form].config
    read_all(write_folder(tmp_path / "right", tensors, right, sizes=(2, 64, 64)))
    wrong = {**right, **changes} if isinstance(changes, dict) else changes
    folder = write_folder(tmp_path / "wrong", tensors, wrong, sizes=(2, 64, 64))
    assert_refused(lambda: read_all(folder), words)


# --- the manifest and the files of converted experts ---


def read_converted(folder: Path) -> None:
    packed = PackedFolder(folder)
    w13_bytes, w2_bytes = fuzz_readers.PACKED_BYTES
    for layer in packed.layers:
        packed.check_sizes(
            layer, num_experts=2, hidden_size=32, intermediate_size=16, w13_bytes=w13_bytes, w2_bytes=w2_bytes
        )
        packed.expert(layer, 1)


def entry_of(manifest: dict) -> dict:
    return next(iter(manifest["layers"]["3"].values()))


def rename(entries: dict, name: str) -> None:
    entries[name] = entries.pop(next(iter(entries)))


MANIFEST_DEFECTS: dict[str, tuple[Callable[[dict], object], str]] = {
    **{
        f"{key} {changed!r}": (
            lambda m, key=key, changed=changed: m.update({key: changed}),
            f"has a value of {key} that",
        )
        for key, changed in (
            ("layers", []),
            ("layers", None),
            ("model", 3),
            ("method", None),
            ("layout", "a\nb"),
            ("moe_layers", {}),
            ("complete", 1),
            ("copied_files", []),
        )
    },
    **{
        f"{size} {amount!r}": (
            lambda m, size=size, amount=amount: m["model"].update({size: amount}),
            f"model.{size} that",
        )
        for size, amount in (
            ("num_experts", -1),
            ("num_experts", True),
            ("hidden_size", 2.0),
            ("intermediate_size", None),
        )
    },
    "experts": (
        lambda m: m["model"].update(num_experts=HUGE),
        f"has {HUGE} experts a layer, but the model being served",
    ),
    "hidden size": (
        lambda m: m["model"].update(hidden_size=HUGE),
        f"hidden_size {HUGE}, but the model being served has 32",
    ),
    "layer": (lambda m: m.update(moe_layers=[HUGE]), f"promises layer {HUGE} and does not list it"),
    "layer as text": (lambda m: m.update(moe_layers=["3"]), r"value of moe_layers\[0\] that"),
    "layer by another name": (lambda m: rename(m["layers"], "x"), "name 'x' that no conversion writes"),
    "layer with a long number": (lambda m: rename(m["layers"], "9" * 5000), "name '9999"),
    "file elsewhere": (lambda m: rename(m["layers"]["3"], "../../x"), r"name '../../x' that no conversion writes"),
    "file by an absolute name": (
        lambda m: rename(m["layers"]["3"], "/etc/passwd"),
        "name '/etc/passwd' that no conver",
    ),
    "file that cannot be printed": (lambda m: rename(m["layers"]["3"], "a\nb"), r"name 'a\\nb' that no conversion"),
    "file with a long name": (lambda m: rename(m["layers"]["3"], "x" * 300), "name 'xxx"),
    "file that is missing": (lambda m: rename(m["layers"]["3"], "x"), "/x is missing"),
    "bytes of a file": (lambda m: entry_of(m).update(bytes=HUGE), f"instead of {HUGE}; copy it again"),
    "bytes as text": (
        lambda m: entry_of(m).update(bytes="7"),
        "value of layers.3.kt-layer-00003-00000.safetensors.bytes",
    ),
    "no tensors": (lambda m: entry_of(m).update(tensors={}), "lists no tensor experts.0.w13 in layer 3"),
    "tensor by another name": (
        lambda m: rename(entry_of(m)["tensors"], "x"),
        "lists no tensor experts.0.w13 in layer 3",
    ),
    "tensor without a checksum": (
        lambda m: entry_of(m)["tensors"]["experts.0.w2"].pop("crc32"),
        "experts.0.w2.crc32 that",
    ),
    "copied file elsewhere": (
        lambda m: m.update(copied_files={"/etc/passwd": ""}),
        "name '/etc/passwd' that no conversion",
    ),
    "version": (lambda m: m.update(format_version="a\nb"), r"has format version 'a\\nb' and this"),
}


@pytest.mark.parametrize("defect", MANIFEST_DEFECTS)
def test_hostile_manifest(tmp_path: Path, defect: str) -> None:
    """Its checksum is right, so that no accident made it."""
    fuzz_readers.valid_packed(tmp_path)
    read_converted(tmp_path)
    assert verify(tmp_path) == []
    manifest = read_manifest(tmp_path)
    change, words = MANIFEST_DEFECTS[defect]
    change(manifest)
    (tmp_path / "manifest.json").write_bytes(encode_manifest(manifest))
    assert_refused(lambda: read_converted(tmp_path), words)


@pytest.mark.parametrize("defect", [*JSON_DEFECTS, "a folder", "a pipe"])
def test_manifest_that_is_none(tmp_path: Path, defect: str) -> None:
    fuzz_readers.valid_packed(tmp_path)
    path = tmp_path / "manifest.json"
    path.unlink()
    if defect in JSON_DEFECTS:
        path.write_bytes(JSON_DEFECTS[defect])
    else:
        path.mkdir() if defect == "a folder" else os.mkfifo(path)
    assert_refused(lambda: read_converted(tmp_path), "manifest.json (is damaged|is no manifest|is no file)")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, "shape", "missing"])
def test_converted_tensors_of_another_type(tmp_path: Path, dtype: torch.dtype | str) -> None:
    fuzz_readers.valid_packed(tmp_path)
    path = tmp_path / "kt-layer-00003-00001.safetensors"
    w13, w2 = (torch.zeros(size, dtype=torch.uint8) for size in fuzz_readers.PACKED_BYTES)
    changed = {"shape": w13.view(2, -1)}.get(dtype, w13) if isinstance(dtype, str) else w13.view(dtype)
    tensors = {"experts.1.w2": w2, "x" if dtype == "missing" else "experts.1.w13": changed}
    save_file(tensors, path, metadata={"kt-packed-experts": "int8_n64k4_r512_v1"})
    manifest = read_manifest(tmp_path)
    manifest["layers"]["3"][path.name]["bytes"] = path.stat().st_size
    (tmp_path / "manifest.json").write_bytes(encode_manifest(manifest))
    assert_refused(lambda: read_converted(tmp_path), "tensor experts.1.w13 of .* (has shape|is missing)")
    assert len(verify(tmp_path)) == 1


# --- what no table thinks of ---


def test_the_fuzzer_finds_nothing() -> None:
    command = [sys.executable, ROOT / "scripts/fuzz_readers.py", "--seconds", "60", "--cases", "300", "--seed", "7"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    counts = dict(line.split(":") for line in result.stdout.splitlines())
    assert counts.keys() == fuzz_readers.TARGETS.keys()


def raises(error: BaseException) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        raise error

    return read


@pytest.mark.parametrize(
    "read",
    [
        raises(KeyError("x")),
        raises(MemoryError()),
        raises(RecursionError()),
        raises(ValueError("no end")),
        raises(ValueError("two\nlines.")),
        raises(UnicodeDecodeError("utf-8", b"x", 0, 1, "bad.")),
        raises(SystemExit(0)),
        lambda folder: time.sleep(60),
        lambda folder: bytearray(1 << 32),
    ],
)
def test_a_reader_that_does_what_none_may_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(fuzz_readers, "CASE_SECONDS", 0.5)
    with pytest.raises(fuzz_readers.Finding):
        fuzz_readers.judge(read, tmp_path)


def test_a_reader_that_refuses_or_reads_is_none() -> None:
    assert fuzz_readers.judge(lambda folder: None, Path())
    assert not fuzz_readers.judge(raises(ValueError("it is damaged; copy it again.")), Path())
