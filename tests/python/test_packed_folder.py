"""The folder of converted experts: what is written, and every way it can be damaged or not fit."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from checkpoints import random_experts, write_checkpoint
from safetensors import SafetensorError
from safetensors.torch import load_file

from kt_kernel import KTMoEWrapper, converter, files, packed_folder, packed_writer
from kt_kernel.converter import ConvertOptions, convert
from kt_kernel.loader import close_sources, open_source
from kt_kernel.methods import FLOAT_METHODS, get_method
from kt_kernel.packed_folder import PackedDescription, PackedFolder, encode_manifest, read_manifest, verify

E, H, INNER = 4, 64, 48
LAYERS = (1, 2)
# Three experts of AMXINT4 to a file, one of the other methods.
SHARD_BYTES = 21_000
FILES = [f"kt-layer-{layer:05d}-{shard:05d}.safetensors" for layer in LAYERS for shard in (0, 1)]


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter, "SHARD_BYTES", SHARD_BYTES)


def convert_tiny(root: Path, method: str = "AMXINT4", **changes) -> Path:
    source = root / "source"
    if not source.exists():
        write_checkpoint(source, {layer: random_experts(E, H, INNER, seed=layer) for layer in LAYERS})
    output = root / f"converted-{method}"
    convert(ConvertOptions(input_path=str(source), output=output, method=get_method(method), **changes))
    return output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return convert_tiny(tmp_path)


def rewrite_manifest(folder: Path, **changes) -> None:
    manifest = read_manifest(folder)
    manifest.update(changes)
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))


def test_the_manifest_says_what_was_made_from_what(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest["format"] == "kt-packed-experts" and manifest["format_version"] == 2
    assert (manifest["method"], manifest["layout"]) == ("AMXINT4", FLOAT_METHODS["AMXINT4"].layout)
    assert manifest["moe_layers"] == list(LAYERS) and manifest["complete"] is True
    assert manifest["model"]["num_experts"] == E and manifest["input_type"] == "bf16"
    assert manifest["source_sha256"].keys() == {"model.safetensors"} == manifest["source_bytes"].keys()
    tensors = {name: entry for layer, name, entry in packed_folder.manifest_tensors(manifest) if layer == 1}
    assert list(tensors) == [f"experts.{expert}.{part}" for expert in range(E) for part in ("w13", "w2")]
    # int4 in groups of 32 of a normal distribution: an error near 0.08, and never 0 or 1
    assert all(0.05 < tensor["relative_error"] < 0.12 for tensor in tensors.values())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", *FILES, "manifest.json"]
    assert [name for entries in manifest["layers"].values() for name in entries] == FILES


def test_files_hold_as_many_experts_as_fit(folder: Path) -> None:
    packed = PackedFolder(folder)
    for name, experts in zip(FILES, ((0, 1, 2), (3,)) * 2, strict=True):
        tensors = load_file(folder / name)
        assert set(tensors) == {f"experts.{expert}.{part}" for expert in experts for part in ("w13", "w2")}
        assert sum(tensor.numel() for tensor in tensors.values()) <= SHARD_BYTES
        for expert in experts:
            for part, found in zip(("w13", "w2"), packed.expert(int(name[9:14]), expert), strict=True):
                assert torch.equal(found, tensors[f"experts.{expert}.{part}"])
        assert (folder / name).stat().st_mode & 0o777 == 0o644


def test_the_recorded_error_is_that_of_the_stored_bytes(folder: Path) -> None:
    ops = torch.ops.kt_kernel
    packed = PackedFolder(folder)
    experts = random_experts(E, H, INNER, seed=2)
    wanted = torch.cat((experts.gate[3], experts.up[3])).double()
    stored = torch.cat(ops.dequantize_w13(packed.expert(2, 3)[0].clone(), packed.layout, INNER, H)).double()
    error = ((stored - wanted).norm() / wanted.norm()).item()
    recorded = packed.manifest["layers"]["2"][FILES[-1]]["tensors"]["experts.3.w13"]
    assert recorded["relative_error"] == pytest.approx(error, rel=1e-4)


def test_a_whole_folder_verifies(folder: Path) -> None:
    seen: list[int] = []
    assert verify(folder, seen.append) == []
    assert sum(seen) == sum(PackedFolder(folder).expert_bytes(layer) * E for layer in LAYERS)


def test_any_flipped_bit_is_found_and_a_tensors_is_named(folder: Path) -> None:
    generator = random.Random(7)
    for file in sorted(path for path in folder.iterdir()):
        original = file.read_bytes()
        for _ in range(8):
            place = generator.randrange(len(original))
            data = bytearray(original)
            data[place] ^= 1 << generator.randrange(8)
            file.write_bytes(data)
            if file.name == "manifest.json":
                with pytest.raises(ValueError, match="manifest.json|format version"):
                    verify(folder)
            else:
                assert len(verify(folder)) == 1
                assert file.name in verify(folder)[0]
        file.write_bytes(original)
    assert verify(folder) == []


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b'{"format": "kt-packed-expertz"}'])
def test_a_damaged_manifest_is_not_taken_for_a_checkpoint(folder: Path, data: bytes) -> None:
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"manifest.json is (damaged|no manifest of kt_kernel)"):
        open_source(folder, get_method("AMXINT4"))
    for path in folder.glob("kt-layer-*"):
        path.unlink()
    (folder / "manifest.json").write_bytes(b'{"format": "kt-packed-experts", ')
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        open_source(folder, get_method("AMXINT4"))


def test_a_manifest_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == "manifest.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(ValueError, match="manifest.json cannot be read .Permission denied."):
        open_source(folder, get_method("AMXINT4"))


def test_a_checkpoint_with_a_manifest_of_its_own_is_read(folder: Path) -> None:
    source = folder.parent / "source"
    (source / "manifest.json").write_text('{"files": []}')
    assert open_source(source, get_method("AMXINT4")).folder == source


def test_verify_names_the_tensor(folder: Path) -> None:
    path = folder / FILES[2]
    data = bytearray(path.read_bytes())
    data[data.index(load_file(path)["experts.1.w13"].numpy().tobytes()) + 17] ^= 4
    path.write_bytes(data)
    assert verify(folder) == [f"tensor experts.1.w13 of {path} does not match its checksum."]


def test_missing_and_short_files_are_named(folder: Path) -> None:
    path = folder / FILES[0]
    path.write_bytes(path.read_bytes()[:-1])
    (folder / "config.json").unlink()
    problems = verify(folder)
    assert len(problems) == 2 and "instead of" in problems[0] and "config.json is missing" in problems[1]
    with pytest.raises(ValueError, match="kt-layer-00001-00000.safetensors has .* instead of"):
        PackedFolder(folder)
    path.unlink()
    with pytest.raises(ValueError, match="kt-layer-00001-00000.safetensors is missing"):
        PackedFolder(folder)


def test_an_unfinished_folder_is_refused(folder: Path) -> None:
    manifest = read_manifest(folder)
    rewrite_manifest(folder, complete=False, layers={"1": manifest["layers"]["1"]})
    with pytest.raises(ValueError, match=r"unfinished conversion \(1 of 2 layers\)"):
        PackedFolder(folder)
    assert "unfinished" in verify(folder)[0]


def test_another_format_version_is_refused(folder: Path) -> None:
    rewrite_manifest(folder, format_version=1)
    for read in (PackedFolder, verify):
        with pytest.raises(ValueError, match="format version 1 and this kt_kernel reads version 2"):
            read(folder)


def test_an_unknown_layout_is_refused(folder: Path) -> None:
    rewrite_manifest(folder, layout="int4g32_n64k8_r512_v9")
    wrapper = make_wrapper(folder)
    with pytest.raises((ValueError, RuntimeError), match="int4g32_n64k8_r512_v9"):
        wrapper.load_weights(torch.arange(E))


def make_wrapper(folder: Path, **changes) -> KTMoEWrapper:
    arguments = {
        "layer_idx": 1,
        "num_experts": E,
        "num_experts_per_tok": 2,
        "hidden_size": H,
        "moe_intermediate_size": INNER,
        "cpuinfer_threads": 2,
        "weight_path": str(folder),
        "method": "AMXINT4",
    }
    return KTMoEWrapper(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "AMXINT8"}, "converted for method AMXINT4, but method AMXINT8.*--kt-method AMXINT4"),
        ({"hidden_size": 128}, "hidden_size 64, but the model being served has 128"),
        ({"moe_intermediate_size": 64}, "intermediate_size 48, but the model being served has 64"),
        ({"num_experts": 3}, "has 4 experts a layer, but the model being served has 3"),
        ({"layer_idx": 0}, "has no experts for layer 0"),
    ],
)
def test_another_models_folder_is_refused(folder: Path, changes: dict, words: str) -> None:
    wrapper = make_wrapper(folder, **changes)
    with pytest.raises(ValueError, match=words):
        wrapper.load_weights(torch.arange(wrapper.num_experts))


def test_the_number_of_experts_is_that_of_the_served_model(folder: Path) -> None:
    packed = PackedFolder(folder)
    w13, w2 = packed.expert(1, 0)
    sizes = {"hidden_size": H, "intermediate_size": INNER, "w13_bytes": w13.numel(), "w2_bytes": w2.numel()}
    for num_experts in (E, E + 2):  # the second with redundant copies
        packed.check_sizes(1, num_experts=num_experts, **sizes)
    with pytest.raises(ValueError, match="has 4 experts a layer, but the model being served has 3"):
        packed.check_sizes(1, num_experts=3, **sizes)


def test_redundant_copies_of_experts_are_loaded(folder: Path) -> None:
    wrapper = make_wrapper(folder, num_experts=E + 2)
    wrapper.load_weights(torch.tensor([0, 1, 2, 3, 1, 2]))
    with pytest.raises(ValueError, match=r"map\[4\] is 4, but the weights have experts 0-3"):
        make_wrapper(folder, num_experts=E + 2).load_weights(torch.arange(E + 2))


@pytest.mark.parametrize("changes", [{"hidden_size": 128}, {"num_experts": 3}, {"layer_idx": 0}])
def test_another_models_checkpoint_is_refused(folder: Path, changes: dict) -> None:
    wrapper = make_wrapper(folder.parent / "source", **changes)
    with pytest.raises(ValueError, match="served|no experts in layer 0"):
        wrapper.load_weights(torch.arange(wrapper.num_experts))


def test_tensors_of_wrong_size_are_refused(folder: Path) -> None:
    rewrite_manifest(folder, layout="int4g64_n64k8_r512_v1")
    with pytest.raises(ValueError, match=r"experts.0.w13 .*has shape \[\d+\] of U8 instead of \[\d+\]"):
        make_wrapper(folder).load_weights(torch.arange(E))


@pytest.mark.parametrize("method", list(FLOAT_METHODS))
@pytest.mark.parametrize("group_size", [None, 64, 0])
def test_converted_and_online_experts_are_the_same_bytes(tmp_path: Path, method: str, group_size: int | None) -> None:
    if group_size is not None and method != "AMXINT4":
        with pytest.raises(ValueError, match="has no groups"):
            convert_tiny(tmp_path, method, group_size=group_size)
        return
    folder = convert_tiny(tmp_path, method, group_size=group_size)
    mapping = torch.tensor([2, 0, 3, 1])
    mask = torch.tensor([False, True, False, False])
    from_folder = make_wrapper(folder, method=method, gpu_experts_mask=mask)
    from_folder.load_weights(mapping)
    source = PackedFolder(folder)
    for expert in (0, 2, 3):
        for found, wanted in zip(
            from_folder.moe.export_packed(expert), source.expert(1, int(mapping[expert])), strict=True
        ):
            assert torch.equal(found, wanted)
    if group_size is None:
        online = make_wrapper(tmp_path / "source", method=method, gpu_experts_mask=mask)
        online.load_weights(mapping)
        for expert in (0, 2, 3):
            for found, wanted in zip(
                from_folder.moe.export_packed(expert), online.moe.export_packed(expert), strict=True
            ):
                assert torch.equal(found, wanted)
    hidden = torch.randn(5, H)
    output = from_folder.forward(hidden, torch.randint(0, E, (5, 2)), torch.rand(5, 2))
    assert output.shape == (5, H) and output.isfinite().all()


def test_the_source_is_opened_once_for_all_layers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(folder, get_method("AMXINT4"))
    monkeypatch.setattr(packed_folder, "read_manifest", lambda path: pytest.fail("the manifest is read again"))
    for layer in LAYERS:
        make_wrapper(folder, layer_idx=layer).load_weights(torch.arange(E))
    assert open_source(folder, get_method("AMXINT4")) is source


def test_the_log_says_once_what_a_folder_holds(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    close_sources()
    caplog.set_level("INFO", "kt_kernel.loader")
    for _ in range(2):
        open_source(folder, get_method("AMXINT4"))
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder} holds experts converted for AMXINT4 (int4g32_n64k8_r512_v1)"
    ]


# --- disks that fail ---


@pytest.mark.parametrize("call", ["fsync", "replace", "save_file"])
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_full_disk_leaves_only_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, after: int
) -> None:
    wanted = {path.name: path.read_bytes() for path in convert_tiny(tmp_path / "whole").iterdir()}
    owner = packed_writer if call == "save_file" else os
    real = getattr(owner, call)
    left = [after]

    def full(*args, **kwargs):
        left[0] -= 1
        if left[0] >= 0:
            return real(*args, **kwargs)
        if call != "save_file":
            raise OSError(errno.ENOSPC, "No space left on device")
        args[1].write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    (tmp_path / "source").symlink_to(tmp_path / "whole" / "source")
    output = tmp_path / "converted-AMXINT4"
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, full)
        with pytest.raises(OSError, match=r"is full: .* needs \d+.\d\d MB, \d+.\d\d MB free") as caught:
            convert_tiny(tmp_path)
    assert caught.value.errno == errno.ENOSPC and "\n" not in caught.value.strerror
    for path in output.iterdir():
        assert path.name in wanted or path.name == ".kt-source-state.json", f"{path.name} is left behind"
        if path.suffix == ".safetensors":
            assert path.read_bytes() == wanted[path.name]
    convert_tiny(tmp_path)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == wanted


def test_a_write_that_the_system_refuses_is_a_sentence(tmp_path: Path) -> None:
    """The package itself fails to write, by a limit on file sizes."""
    convert_tiny(tmp_path)
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, 16_384))\n"
        "from kt_kernel.convert_command import main\n"
        f"sys.exit(main(['-i', {str(tmp_path / 'source')!r}, '--input-type', 'bf16', '-o', {str(tmp_path / 'o')!r}]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
    assert len(errors) == 1 and f"writing {tmp_path}/o/kt-layer-00001-00000.safetensors failed" in errors[0]
    assert "File too large" in errors[0]
    assert {path.name for path in (tmp_path / "o").iterdir()} <= {"manifest.json", ".kt-source-state.json"}


def test_a_write_that_fails_keeps_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    files.write_atomically(path, b"first")

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="writing .*x failed: Input/output error"):
        files.write_atomically(path, b"second")
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


def test_a_foreign_output_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "converted-AMXINT4"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not empty.*thesis.tex"):
        convert_tiny(tmp_path)
    assert [path.name for path in output.iterdir()] == ["thesis.tex"]


def test_a_second_writer_is_refused(folder: Path) -> None:
    import fcntl

    with open(folder / ".kt-convert.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another conversion is writing"):
            convert_tiny(folder.parent)


def test_a_lock_whose_file_was_removed_is_taken_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first writer ends between the second's opening of the file and its lock; a third comes."""
    import fcntl

    lock = folder / ".kt-convert.lock"
    real = fcntl.flock
    calls: list[int] = []

    def late(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            lock.unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    manifest = read_manifest(folder)
    description = PackedDescription(**{field.name: manifest[field.name] for field in fields(PackedDescription)})
    second = packed_writer.PackedWriter(folder, description)
    with pytest.raises(ValueError, match="another conversion is writing"):
        packed_writer.PackedWriter(folder, description)
    assert len(calls) == 3 and lock.exists()
    second.close()
    assert not lock.exists()


def test_the_manifest_survives_a_round_trip(folder: Path) -> None:
    data = (folder / "manifest.json").read_bytes()
    assert encode_manifest(json.loads(data)) == data
