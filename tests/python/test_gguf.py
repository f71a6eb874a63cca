"""Reading GGUF: rows and types against the gguf package's own reader, splits, folders, refusals, and what it costs."""

from __future__ import annotations

import filecmp
import mmap
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize
from gguf_files import random_biases, random_layer, sizes_of, write_gguf
from test_checkpoint import resident_kib
from test_tree import ROOT

from kt_kernel.checkpoint import expert_weights, open_checkpoint, resolve_folder
from kt_kernel.checkpoint.gguf import READABLE_TYPES, GgufCheckpoint, is_gguf
from kt_kernel.checkpoint.gguf_header import read_header
from kt_kernel.loader import open_source
from kt_kernel.methods import METHODS, weight_dtype_of
from kt_kernel.packed_folder import is_packed_folder

GOLDEN = ROOT / "tests/data/formats/gguf"
PARTS = ("gate", "up", "down")


def package_rows(files: list[Path]) -> dict[str, tuple[str, np.ndarray]]:
    """Type and raw rows ``[E, n, row_bytes]`` of every expert tensor, as the gguf package reads them."""
    tensors = (tensor for file in files for tensor in GGUFReader(file).tensors if "_exps." in tensor.name)
    return {
        tensor.name: (tensor.tensor_type.name, np.ascontiguousarray(tensor.data).view(np.uint8)) for tensor in tensors
    }


def assert_holds(checkpoint: GgufCheckpoint, files: list[Path]) -> set[str]:
    """Compare every matrix with the package's; the types met."""
    expected = package_rows(files)
    assert len(expected) == 3 * len(checkpoint.layers)
    sizes = checkpoint.sizes
    for layer in checkpoint.layers:
        checkpoint.check_layer(layer)
        layer_bytes = 0
        for part in PARTS:
            kind, rows = expected[f"blk.{layer}.ffn_{part}_exps.weight"]
            shape = (sizes.hidden_size, sizes.intermediate_size)
            number = GGMLQuantizationType[kind]
            for expert in range(sizes.num_experts):
                source, (blocks,) = checkpoint.source(layer, expert, part)
                assert source == f"gguf:{kind}"
                assert blocks.dtype == torch.uint8 and blocks.is_contiguous()
                assert np.array_equal(blocks.numpy(), rows[expert])
                values = dequantize(blocks.numpy(), number)
                assert values.shape == (shape if part == "down" else shape[::-1])
                assert np.isfinite(values).all() and values.any()
                assert np.array_equal(values, dequantize(rows[expert], number))
            layer_bytes += rows[0].nbytes
        assert checkpoint.expert_bytes(layer) == layer_bytes
    checkpoint.close()
    return {kind for kind, _ in expected.values()}


def test_golden_files_are_read() -> None:
    met = set()
    for name in ("small_blocks", "k_blocks", "floats"):
        met |= assert_holds(GgufCheckpoint(GOLDEN / f"{name}.gguf"), [GOLDEN / f"{name}.gguf"])
    assert met == set(READABLE_TYPES)


@pytest.mark.parametrize("name", ["small_blocks", "k_blocks", "floats", "mixture-00001-of-00003"])
def test_golden_files_decode_to_what_the_package_says(name: str) -> None:
    checkpoint = GgufCheckpoint(GOLDEN / f"{name}.gguf")
    for layer in checkpoint.layers:
        for expert in range(checkpoint.sizes.num_experts):
            for projection, found in zip(PARTS, expert_weights(checkpoint, layer, expert), strict=True):
                source, (blocks,) = checkpoint.source(layer, expert, projection)
                values = dequantize(blocks.numpy(), GGMLQuantizationType[source.removeprefix("gguf:")])
                assert np.array_equal(found.numpy(), values)


@pytest.mark.parametrize("kind", READABLE_TYPES)
def test_the_method_names_every_format_that_types_are_kept_in(tmp_path: Path, kind: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", {0: random_layer(kind, hidden=256, inter=256)}, sizes_of(2, 256, 256, 1))
    kept = {weight_dtype_of(layout) for layout in open_source(path, METHODS["LLAMAFILE"]).layouts(0)}
    assert kept <= ({"bf16"} if kind in ("BF16", "F16", "F32") else set(METHODS["LLAMAFILE"].formats))


def test_golden_files_are_what_their_script_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "tests/data/formats/make_gguf.py", tmp_path], check=True)
    names = sorted(path.name for path in GOLDEN.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert filecmp.cmpfiles(GOLDEN, tmp_path, names, shallow=False) == (names, [], [])


@pytest.mark.parametrize("given", ["", "mixture-00001-of-00003.gguf", "mixture-00003-of-00003.gguf"])
def test_a_mixture_in_splits_is_read_from_folder_and_from_any_file(tmp_path: Path, given: str) -> None:
    files = [shutil.copy(file, tmp_path) for file in sorted(GOLDEN.glob("mixture-*"))]
    below = tmp_path / "other"
    below.mkdir()
    shutil.copy(GOLDEN / "floats.gguf", below)
    checkpoint = GgufCheckpoint(tmp_path / given)
    assert checkpoint.layers == [0, 1]
    assert assert_holds(checkpoint, files) == {"Q4_K", "Q6_K"}
    assert [checkpoint.source(layer, 1, "down")[0] for layer in (0, 1)] == ["gguf:Q6_K", "gguf:Q4_K"]
    assert checkpoint.files(0) == ["mixture-00001-of-00003.gguf", "mixture-00002-of-00003.gguf"]
    assert checkpoint.dtypes(0) == {"Q4_K", "Q6_K"} and checkpoint.dtypes(1) == {"Q4_K"}
    assert checkpoint.describe() == "GGUF weights (Q4_K, Q6_K)"
    assert checkpoint.tensor_name(1, 0, "up") == "blk.1.ffn_up_exps.weight[0]"


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    for file in sorted(GOLDEN.glob("mixture-*"))[::2]:
        shutil.copy(file, tmp_path)
    for given in (tmp_path, tmp_path / "mixture-00003-of-00003.gguf"):
        with pytest.raises(ValueError, match="one of 3 files, of which mixture-00002-of-00003.gguf is missing"):
            GgufCheckpoint(given)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({1: "a-00002-of-00003", 2: "a-00001-of-00003", 3: "a-00003-of-00003"}, "split 1 of 3, counted from 0, and by"),
        ({1: "a-00001-of-00002", 2: "a-00002-of-00002"}, "split 0 of 3, counted from 0, and by its name 0 of 2"),
        ({1: "renamed"}, "split 0 of 3, counted from 0, and by its name 0 of 1"),
        ({1: "a-00000-of-00000"}, "split 0 of 3, counted from 0, and by its name 0 of 1"),
        ({1: "a-00001-of-99999"}, "one of 99999 files, of which a-00002-of-99999.gguf is missing"),
    ],
)
def test_renamed_splits_are_refused(tmp_path: Path, names: dict[int, str], words: str) -> None:
    for number, name in names.items():
        shutil.copy(GOLDEN / f"mixture-{number:05d}-of-00003.gguf", tmp_path / f"{name}.gguf")
    with pytest.raises(ValueError, match=words):
        GgufCheckpoint(tmp_path)


def test_a_split_of_another_model_is_refused(tmp_path: Path) -> None:
    for file in GOLDEN.glob("mixture-*"):
        shutil.copy(file, tmp_path)
    layer = random_layer("Q4_K", hidden=256, inter=256)
    layers = {7: layer, 8: layer, 9: layer}
    write_gguf(tmp_path / "b.gguf", layers, sizes_of(2, 256, 256, 10), split_max_tensors=5)
    shutil.copy(tmp_path / "b-00002-of-00003.gguf", tmp_path / "mixture-00002-of-00003.gguf")
    with pytest.raises(ValueError, match="mixture-00001-of-00003.gguf promises 9 tensors, but 11 are there"):
        GgufCheckpoint(tmp_path / "mixture-00001-of-00003.gguf")


def test_files_beside_the_model_are_passed_over(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "floats.gguf", tmp_path / "model.gguf")
    write_gguf(tmp_path / "mmproj-model.gguf", {}, {}, arch="clip")
    assert_holds(GgufCheckpoint(tmp_path), [tmp_path / "model.gguf"])
    shutil.copy(GOLDEN / "k_blocks.gguf", tmp_path / "other.gguf")
    with pytest.raises(ValueError, match=r"2 models with experts \(model.gguf, other.gguf\); give the file of one"):
        GgufCheckpoint(tmp_path)
    assert_holds(GgufCheckpoint(tmp_path / "other.gguf"), [tmp_path / "other.gguf"])


def test_gate_and_up_in_one_tensor(tmp_path: Path) -> None:
    layer = random_layer("Q8_0", fused=True)
    checkpoint = GgufCheckpoint(write_gguf(tmp_path / "x.gguf", {0: layer}, sizes_of(2, 64, 32, 1)))
    for expert in range(2):
        gate_up = np.concatenate([checkpoint.source(0, expert, part)[1][0].numpy() for part in ("gate", "up")])
        assert np.array_equal(gate_up, layer["gate_up"][1][expert])
        assert np.array_equal(checkpoint.source(0, expert, "down")[1][0].numpy(), layer["down"][1][expert])
    assert checkpoint.expert_bytes(0) == sum(rows[0].nbytes for _, rows in layer.values())
    assert checkpoint.tensor_name(0, 1, "up") == "blk.0.ffn_gate_up_exps.weight[1]"


def test_a_type_for_each_projection(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", {0: random_layer(("Q4_0", "Q8_0", "F16"))}, sizes_of(2, 64, 32, 1))
    checkpoint = GgufCheckpoint(path)
    assert [checkpoint.source(0, 0, part)[0] for part in PARTS] == ["gguf:Q4_0", "gguf:Q8_0", "gguf:F16"]
    assert_holds(checkpoint, [path])


def test_blocks_that_draft_tokens_are_left_out(tmp_path: Path) -> None:
    layers = {layer: random_layer("Q8_0", seed=layer) for layer in (1, 2)}
    layers[2].pop("up")
    values = sizes_of(2, 64, 32, 3) | {"nextn_predict_layers": 1}
    assert GgufCheckpoint(write_gguf(tmp_path / "x.gguf", layers, values)).layers == [1]
    values["block_count"] = 2
    with pytest.raises(ValueError, match="experts only beyond the 1 layers that its block_count promises"):
        GgufCheckpoint(write_gguf(tmp_path / "x.gguf", layers, values))


def test_sizes(tmp_path: Path) -> None:
    values = sizes_of(2, 64, 32, 1)
    path = write_gguf(tmp_path / "x.gguf", {0: random_layer("Q8_0")}, values | {"feed_forward_length": 999})
    sizes = GgufCheckpoint(path).sizes
    assert sizes == (type(sizes))("test_moe", 2, 2, 64, 32, 1)
    values["feed_forward_length"] = values.pop("expert_feed_forward_length")
    assert GgufCheckpoint(write_gguf(path, {0: random_layer("Q8_0")}, values)).sizes == sizes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v, p: v.pop("expert_count"), "has no test_moe.expert_count; kt_kernel needs .* mixture-of-experts"),
        (lambda v, p: v.pop("embedding_length"), "has no test_moe.embedding_length"),
        (lambda v, p: v.update(expert_count=3), r"gate_exps.weight .* shape \[2, 32, 64\], .* mean \[3, 32, 64\]"),
        (lambda v, p: v.update(embedding_length=32), r"has shape \[2, 32, 64\], .* mean \[2, 32, 32\]"),
        (lambda v, p: v.update(expert_feed_forward_length=64), r"has shape \[2, 32, 64\], .* mean \[2, 64, 64\]"),
        (lambda v, p: p.pop("up"), "has down, gate as the experts of layer 0; kt_kernel needs gate, up and down"),
        (lambda v, p: p.update(gate_up=p["up"]), "has down, gate, gate_up, up as the experts"),
        (lambda v, p: p.clear(), "holds no expert tensors that kt_kernel knows .first of 2 tensors: token_embd.weight"),
    ],
)
def test_a_wrong_model_is_refused_in_a_sentence(tmp_path: Path, change, words: str) -> None:
    values, parts = sizes_of(2, 64, 32, 1), random_layer("Q8_0")
    change(values, parts)
    path = write_gguf(tmp_path / "x.gguf", {0: parts}, values)
    with pytest.raises(ValueError, match=words) as caught:
        GgufCheckpoint(path)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_experts_that_are_more_than_weights_and_biases_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", {0: random_layer("F32")}, sizes_of(2, 64, 32, 1), kind="scale")
    with pytest.raises(ValueError, match=r"has a scale for its experts \(tensor blk.0.ffn_gate_exps.scale\)"):
        GgufCheckpoint(path)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("fused", [False, True])
def test_biases(tmp_path: Path, kind: str, fused: bool) -> None:
    layer = random_layer("MXFP4", fused=fused)
    biases = random_biases(layer, kind)
    path = write_gguf(tmp_path / "x.gguf", {0: layer, 1: layer}, sizes_of(2, 64, 32, 2), biases={1: biases})
    checkpoint = GgufCheckpoint(path)
    assert checkpoint.biases(0, 1) is None
    for expert in range(2):
        found = checkpoint.biases(1, expert)
        assert [bias.shape for bias in found] == [(32,), (32,), (64,)]
        joined = np.concatenate([bias.float().numpy() for bias in found])
        raw = np.concatenate([rows[expert] for _, rows in biases.values()])
        assert np.array_equal(joined, dequantize(raw, GGMLQuantizationType[kind]))
    checkpoint.check_layer(1)


def test_wrong_biases_are_refused(tmp_path: Path) -> None:
    layer = random_layer("MXFP4")
    for change, words in (
        (lambda b: b.pop("up"), "has biases for down, gate of layer 0 only"),
        (lambda b: b.update(up=b["down"]), r"ffn_up_exps.bias of .* has shape \[2, 64\], .* mean \[2, 32\]"),
        (
            lambda b: b.update(up=("Q8_0", b["up"][1][:, :34])),
            "ffn_up_exps.bias of .* has type Q8_0; kt_kernel reads BF16, F",
        ),
    ):
        biases = random_biases(layer, "F32")
        change(biases)
        path = write_gguf(tmp_path / "x.gguf", {0: layer}, sizes_of(2, 64, 32, 1), biases={0: biases})
        with pytest.raises(ValueError, match=words):
            GgufCheckpoint(path)


def test_files_and_folders_are_told_from_others(tmp_path: Path) -> None:
    for path in (GOLDEN / "floats.gguf", tmp_path):
        shutil.copy(GOLDEN / "floats.gguf", tmp_path)
        assert resolve_folder(path) == path
        assert isinstance(open_checkpoint(path, "LLAMAFILE"), GgufCheckpoint)
        assert not is_packed_folder(path)
    (tmp_path / "model.safetensors").touch()
    assert not is_gguf(tmp_path), "a projector beside a checkpoint"


def test_a_layer_without_experts_is_named() -> None:
    with pytest.raises(ValueError, match="no experts in layer 3; layers with experts are 0-2"):
        GgufCheckpoint(GOLDEN / "floats.gguf").check_layer(3)


# --- before anything is read ---


@pytest.mark.parametrize("kind", sorted(set(GGMLQuantizationType.__members__) - set(READABLE_TYPES)) + ["number 99"])
def test_other_types_are_refused_by_name_before_anything_is_read(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of 60 GB, of which the file system holds the header only."""
    number = 99 if kind == "number 99" else GGMLQuantizationType[kind]
    values = sizes_of(512, 4096, 14336, 1)
    path = write_gguf(tmp_path / "x.gguf", {0: random_layer("F32", num_experts=1, hidden=3, inter=1)}, values)
    data = path.read_bytes()
    for part, shape in (("gate", (3, 1, 1)), ("up", (3, 1, 1)), ("down", (1, 3, 1))):
        name = f"blk.0.ffn_{part}_exps.weight".encode()
        small = name + np.array([3], "<u4").tobytes() + np.array(shape, "<u8").tobytes()
        at = data.index(small) + len(small)
        large = np.array((14336, 4096, 512) if part == "down" else (4096, 14336, 512), "<u8").tobytes()
        data = data[: at - 24] + large + np.array([number], "<u4").tobytes() + data[at + 4 :]
        # The tensors behind it go to the end of the file, one after the other.
    offset = 1 << 36
    for part in PARTS:
        name = f"blk.0.ffn_{part}_exps.weight".encode()
        at = data.index(name) + len(name) + 4 + 24 + 4
        data = data[:at] + np.array([offset], "<u8").tobytes() + data[at + 8 :]
        offset += 1 << 38
    path.write_bytes(data)
    with path.open("r+b") as file:
        file.truncate(offset)
    monkeypatch.setattr("kt_kernel.checkpoint.gguf._map_file", lambda header: pytest.fail("weights were mapped"))
    with pytest.raises(
        ValueError, match=f"blk.0.ffn_gate_exps.weight of .*x.gguf has type {kind}; kt_kernel reads Q4_0"
    ):
        GgufCheckpoint(path)


def test_long_vocabularies_are_skipped(tmp_path: Path) -> None:
    """The gguf package needs 2 s for this header, which it reads token by token."""
    path = write_gguf(tmp_path / "x.gguf", {0: random_layer("Q8_0")}, sizes_of(2, 64, 32, 1), tokens=150_000)
    started = time.process_time()
    GgufCheckpoint(path)
    assert time.process_time() - started < 0.5


def test_every_kind_of_value_is_passed(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "test_moe")
    for number in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "uint64", "int64", "float64"):
        getattr(writer, f"add_{number}")(f"x.{number}", 7)
    writer.add_bool("x.bool", True)
    writer.add_string("x.string", "words \u00e9")
    writer.add_string("x.long", "x" * 5000)
    for name, array in {
        "ints": [1, 2], "floats": [0.5] * 3, "bools": [True], "strings": ["a", "", "\u00e9"], "bytes": b"abc",
    }.items():  # fmt: skip
        writer.add_array(f"x.{name}", array)
    writer.add_int32("x.last", -3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    values = read_header(tmp_path / "x.gguf").values
    expected = {
        key: field.contents()
        for key, field in GGUFReader(tmp_path / "x.gguf").fields.items()
        if field.types[0] != gguf.GGUFValueType.ARRAY and not key.startswith("GGUF.") and key != "x.long"
    }
    assert len(expected) == 14
    assert values == expected


# --- how it reads ---


def test_weights_are_views_and_closed_files_are_unmapped(tmp_path: Path) -> None:
    layer = random_layer("F16", num_experts=4, hidden=1024, inter=1024)
    checkpoint = GgufCheckpoint(write_gguf(tmp_path / "x.gguf", {0: layer}, sizes_of(4, 1024, 1024, 1)))
    expected = layer["down"][1][3].copy()
    del layer
    anon, file = resident_kib("RssAnon"), resident_kib("RssFile")
    for expert in range(4):
        for part in PARTS:
            blocks = checkpoint.source(0, expert, part)[1][0]
            blocks.max()
    mapped = resident_kib("RssFile") - file
    assert mapped > 20_000, "four experts of 6 MiB were read where they are"
    assert resident_kib("RssAnon") - anon < 6_000, "not one of them was copied"
    checkpoint.close()
    assert np.array_equal(blocks.numpy(), expected), "a view outlives close()"
    del blocks
    assert resident_kib("RssFile") - file < mapped / 8
    assert np.array_equal(checkpoint.source(0, 3, "down")[1][0].numpy(), expected)


def test_the_kernel_is_told_that_it_is_read_once(tmp_path: Path) -> None:
    checkpoint = GgufCheckpoint(GOLDEN / "k_blocks.gguf")
    blocks = checkpoint.source(0, 0, "gate")[1][0]
    mappings = Path("/proc/self/smaps").read_text().split("VmFlags:")
    (ours,) = [text for text, before in zip(mappings[1:], mappings, strict=False) if "k_blocks.gguf" in before]
    flags = ours.splitlines()[0].split()
    assert "sr" in flags, "read in sequence"
    assert "nr" in flags, "no swap is reserved for it"
    assert blocks.numel() % mmap.PAGESIZE


def test_a_file_that_changes_is_refused(tmp_path: Path) -> None:
    path = Path(shutil.copy(GOLDEN / "floats.gguf", tmp_path))
    checkpoint = GgufCheckpoint(path)
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(ValueError, match="floats.gguf changed while it was being read"):
        checkpoint.source(0, 0, "gate")
    path.unlink()
    with pytest.raises(ValueError, match="floats.gguf cannot be mapped"):
        checkpoint.source(0, 0, "gate")
