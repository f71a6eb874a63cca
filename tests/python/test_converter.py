"""The converter: same bytes for any number of threads and kills, its command line, its refusals."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from checkpoints import config_of, layer_tensors, random_experts, write_checkpoint
from safetensors.torch import save_file

import kt_kernel
from kt_kernel import converter, packed_writer
from kt_kernel.checkpoint import expert_weights, open_checkpoint
from kt_kernel.config import usable_cpus
from kt_kernel.convert_command import main
from kt_kernel.methods import METHODS
from kt_kernel.packed_folder import PackedFolder, read_manifest, verify

GGUF = Path(__file__).resolve().parents[1] / "data/formats/gguf"
E, H, INNER = 4, 64, 48
# Three experts of AMXINT4 to a file, one of the other methods.
SHARD_BYTES = 21_000


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter, "SHARD_BYTES", SHARD_BYTES)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    layers = {layer: random_experts(E, H, INNER, seed=layer) for layer in (1, 2, 4)}
    folder = write_checkpoint(tmp_path / "source", layers, num_shards=2)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def run(source: Path, output: Path, *flags: str, input_type: str = "bf16") -> int:
    return main(["-i", str(source), "--input-type", input_type, "-o", str(output), *flags])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("quant", "files_per_layer"), [("int4", 2), ("int8", 4), ("bf16", 4)])
def test_the_bytes_do_not_depend_on_threads_or_nodes(
    source: Path, tmp_path: Path, quant: str, files_per_layer: int
) -> None:
    assert run(source, tmp_path / "one", "--quant-method", quant, "--cpuinfer-threads", "1") == 0
    assert run(source, tmp_path / "four", "--quant-method", quant, "--threadpool-count", "8") == 0
    found = contents(tmp_path / "one")
    assert found == contents(tmp_path / "four")
    assert set(found) == {
        *(f"kt-layer-{layer:05d}-{shard:05d}.safetensors" for layer in (1, 2, 4) for shard in range(files_per_layer)),
        *("manifest.json", "config.json", "tokenizer.json"),
    }


def test_the_incumbents_command_line_works(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    flags = (
        "--quant-method int8 --cpuinfer-threads 60 --threadpool-count 2 --gpu --no-merge-safetensor --resume-layer 1"
    )
    assert (
        main(["--input-path", str(source), "--input-type", "bf16", "--output", str(tmp_path / "o"), *flags.split()])
        == 0
    )
    notes = [record.getMessage() for record in caplog.records if "no effect" in record.getMessage()]
    assert len(notes) == 4 and all("\n" not in note for note in notes)
    assert "cut to the" in caplog.text and "complete: 3 layers" in caplog.text
    assert "layer 4 (3/3)" in caplog.text and "GB/s" in caplog.text


@pytest.mark.parametrize(("quota", "threads"), [(0.0, 6), (2.5, 2), (0.5, 1), (64.0, 6)])
def test_threads_are_the_cpus_that_the_cgroup_grants(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    quota: float,
    threads: int,
) -> None:
    caplog.set_level("INFO")
    nodes = [{"cpus": [0, 1, 2, 3]}, {"cpus": [6, 7]}]
    monkeypatch.setattr(kt_kernel._ext, "topology", lambda: {"nodes": nodes, "cpu_quota": quota})
    made: list[int] = []
    real = converter.ThreadPoolExecutor
    monkeypatch.setattr(converter, "ThreadPoolExecutor", lambda count: made.append(count) or real(count))
    assert run(source, tmp_path / "o") == 0
    assert made == [threads, 1], "packing, and hashing the source"
    assert run(source, tmp_path / "o", "--cpuinfer-threads", "32") == 0
    assert f"--cpuinfer-threads 32 is cut to the {threads} CPUs this process may use" in caplog.text
    assert usable_cpus() == threads


@pytest.mark.parametrize(
    ("group", "layout"),
    [("64", "int4g64_n64k8_r512_v1"), ("0", "int4_n64k8_r512_v1"), ("-1", "int4_n64k8_r512_v1")],
)
def test_group_sizes(source: Path, tmp_path: Path, group: str, layout: str) -> None:
    assert run(source, tmp_path / "o", "--group-size", group) == 0
    assert read_manifest(tmp_path / "o")["layout"] == layout
    assert verify(tmp_path / "o") == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_float_types(tmp_path: Path, dtype: torch.dtype) -> None:
    source = write_checkpoint(tmp_path / "source", {0: random_experts(E, H, INNER, dtype=dtype)})
    name = {torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    assert run(source, tmp_path / "o", input_type=name) == 0
    assert read_manifest(tmp_path / "o")["input_type"] == name


@pytest.mark.parametrize("name", ["small_blocks", "mixture-*"])
def test_gguf_is_converted_by_its_folder_by_a_file_and_by_any_split(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "gguf"
    folder.mkdir()
    files = [Path(shutil.copy(file, folder)) for file in sorted(GGUF.glob(f"{name}.gguf"))]
    found = []
    for given in (folder, *files):
        output = tmp_path / f"from-{given.name}"
        for _ in range(2):  # the second looks at the files and leaves all as it is
            assert run(given, output, input_type="gguf") == 0
            found.append(contents(output))
    assert all(each == found[0] for each in found)
    checkpoint, packed = open_checkpoint(folder, "AMXINT4"), PackedFolder(output)
    for layer in checkpoint.layers:
        for expert in range(checkpoint.sizes.num_experts):
            gate, up, down = expert_weights(checkpoint, layer, expert)
            w13, w2 = packed.expert(layer, expert)
            assert torch.equal(w13, torch.ops.kt_kernel.quantize_pack_w13(gate, up, packed.layout)[0])
            assert torch.equal(w2, torch.ops.kt_kernel.quantize_pack(down, packed.layout)[0])


def test_layers_beyond_the_model_are_not_converted(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    assert run(source, tmp_path / "o") == 0
    assert read_manifest(tmp_path / "o")["moe_layers"] == [1, 2]
    assert "is complete: 2 layers" in caplog.text
    assert not list((tmp_path / "o").glob("kt-layer-00004-*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--input-type", "fp8"], "are bf16; give --input-type bf16"),
        (["--input-type", "fp16"], "are bf16; give --input-type bf16"),
        (["--quant-method", "awq"], "serve an AWQ checkpoint as it is with --kt-method AWQ"),
        (["--group-size", "48"], "48 is no multiple of 32"),
        (["--quant-method", "int8", "--group-size", "64"], "AMXINT8 has no groups"),
        (["--cpuinfer-threads", "0"], "--cpuinfer-threads is 0"),
        (["--save-backward-weights"], "fine-tuning"),
        (["-i", "/nowhere/model"], "/nowhere/model does not exist"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, flags: list[str], words: str
) -> None:
    assert run(source, tmp_path / "o", *flags) == 1
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1 and words in errors[0] and "\n" not in errors[0]
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("hidden", "inner", "changes", "words"),
    [
        (72, 48, {}, "cannot be converted: hidden_size is 72; the kernels compute multiples of 16 only"),
        (64, 40, {}, "cannot be converted: intermediate_size is 40; the kernels compute multiples of 16 only"),
        (64, 48, {"num_experts_per_tok": 5}, "cannot be converted: top_k is 5, above num_experts = 4"),
    ],
)
def test_a_model_that_cannot_be_computed_is_refused_before_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, hidden: int, inner: int, changes: dict, words: str
) -> None:
    experts = random_experts(E, hidden, inner)
    source = write_checkpoint(tmp_path / "source", {0: experts}, config=config_of(experts, 1, **changes))
    assert run(source, tmp_path / "o") == 1
    assert words in caplog.text
    assert not (tmp_path / "o").exists()


def test_missing_flags_and_the_source_as_output(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main([]) == 1
    assert "--input-path and --input-type and --output must be given" in caplog.text
    before = contents(source)
    assert run(source, source) == 1
    assert "is the folder of the checkpoint; give another" in caplog.text and contents(source) == before


def test_an_output_that_cannot_be_a_folder_is_named(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "o", tmp_path / "file" / "o" / "p"):
        caplog.clear()
        assert run(source, output) == 1
        assert [record.getMessage() for record in caplog.records] == [
            f"--output {output} cannot be a folder, because {tmp_path / 'file'} is a file; give another path."
        ]


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    experts = random_experts(E, H, INNER)
    experts.down[2, 5, 6] = float("inf")
    source = write_checkpoint(tmp_path / "source", {0: experts})
    assert run(source, tmp_path / "o") == 1
    assert "model.layers.0.mlp.experts.2.down_proj.weight cannot be packed" in caplog.text
    assert not list((tmp_path / "o").glob("*.safetensors*"))


def test_verify_by_command_line(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = tmp_path / "o"
    assert run(source, output) == 0
    assert main(["--verify", str(output)]) == 0
    assert main(["--verify", "-o", str(output)]) == 0
    path = output / "kt-layer-00002-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main(["--verify", str(output)]) == 1
    assert f"tensor experts.3.w2 of {path} does not match" in caplog.text
    assert main(["--verify", str(source)]) == 1
    assert main(["--verify"]) == 1


# --- resuming ---


class Killed(BaseException):
    """Stands for the end of the process, at a place a signal could hit."""


@pytest.mark.parametrize("place", ["save_file", "PackedWriter.write_shard", "PackedWriter._write_manifest"])
@pytest.mark.parametrize("moment", [0, 1, 2])
@pytest.mark.parametrize("before", [True, False])
def test_a_kill_at_every_step_costs_one_layer_at_most(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, moment: int, before: bool
) -> None:
    assert run(source, tmp_path / "whole") == 0
    *owner, name = place.split(".")
    target = getattr(packed_writer, owner[0]) if owner else packed_writer
    real = getattr(target, name)
    left = [moment]

    def dying(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0 and before:
            raise Killed
        result = real(*args, **kwargs)
        if left[0] < 0:
            raise Killed
        return result

    output = tmp_path / "o"
    with monkeypatch.context() as patch:
        patch.setattr(target, name, dying)
        with pytest.raises(Killed):
            run(source, output, "--cpuinfer-threads", "1")
    # What a real kill leaves besides: a file being written and the lock.
    (output / ".kt-part-x").mkdir()
    (output / ".kt-part-x" / "kt-layer-00004-00000.safetensors").write_bytes(b"half")
    (output / ".kt-convert.lock").touch()
    finished = len(read_manifest(output)["layers"])
    result = converter.convert(
        converter.ConvertOptions(
            input_path=str(source), output=output, method=METHODS["AMXINT4"]
        )
    )
    assert result.resumed_layers == finished
    assert contents(output) == contents(tmp_path / "whole")


def has_file_of(folder: Path, layer: int) -> bool:
    """Whether a file of a layer is there or being written."""
    return any(name.startswith(f"kt-layer-{layer:05d}-") for _, _, names in os.walk(folder) for name in names)


def test_sigkill_at_random_moments_then_resume_is_byte_identical(tmp_path: Path) -> None:
    layers = {layer: random_experts(8, 512, 512, seed=layer) for layer in range(4)}
    source = write_checkpoint(tmp_path / "source", layers, num_shards=3)
    output = tmp_path / "o"
    generator = random.Random(11)
    # One thread, three experts to a file: a layer takes a tenth of a second, longer than the longest wait below.
    code = (
        "import sys\n"
        "from kt_kernel import convert_command, converter\n"
        "converter.SHARD_BYTES = 1_500_000\n"
        "sys.exit(convert_command.main())\n"
    )
    command = [sys.executable, "-c", code, "-i", str(source), "--input-type", "bf16", "--cpuinfer-threads", "1", "-o"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    assert len(list((tmp_path / "whole").glob("kt-layer-00000-*"))) == 3
    kills = 0
    for layer in range(4):
        process = subprocess.Popen([*command, str(output)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            # A random moment while this layer is being written, if it is still to come.
            while process.poll() is None and not has_file_of(output, layer):
                time.sleep(0.001)
            time.sleep(generator.random() * 0.05)
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        finally:
            process.wait()
    assert kills >= 3, "the kills must hit running conversions"
    subprocess.run([*command, str(output)], check=True, capture_output=True)
    assert contents(output) == contents(tmp_path / "whole")
    assert verify(output) == []


def test_a_finished_conversion_is_left_alone(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert run(source, tmp_path / "o") == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "o").iterdir()}
    assert run(source, tmp_path / "o") == 0
    assert "3 from an earlier run" in caplog.text
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "o").iterdir()} == before


@pytest.mark.parametrize("finished", [True, False])
def test_another_version_of_the_package_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    output = tmp_path / "o"
    assert run(source, output) == 0
    whole = contents(output)
    if not finished:
        (output / "kt-layer-00002-00001.safetensors").unlink()
    monkeypatch.setattr(kt_kernel, "__version__", "99.0")
    assert run(source, output) == 0
    assert contents(output) == whole
    assert read_manifest(output)["package_version"] != "99.0"


def test_reading_layers_again_is_shown(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert run(source, tmp_path / "o") == 0
    assert "checking" not in caplog.text
    caplog.clear()
    assert run(source, tmp_path / "o") == 0
    assert re.search(r"checking finished layers: layer 1 \(1/3\), .*, ETA", caplog.text)
    assert re.search(r"checking finished layers: layer 4 \(3/3\), .*, done in", caplog.text)
    assert re.search(r"checking the source: file model-00002-of-00002.safetensors \(2/2\), .*, done in", caplog.text)
    caplog.clear()
    assert main(["--verify", str(tmp_path / "o")]) == 0
    assert re.search(r"verifying: layer 1 \(1/3\), .*, ETA", caplog.text)
    assert re.search(r"verifying: layer 4 \(3/3\), .*, done in", caplog.text)


def test_a_damaged_layer_is_made_again(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run(source, tmp_path / "o") == 0
    whole = contents(tmp_path / "o")
    path = tmp_path / "o" / "kt-layer-00002-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 16
    path.write_bytes(data)
    (tmp_path / "o" / "kt-layer-00004-00000.safetensors").unlink()
    assert run(source, tmp_path / "o") == 0
    assert "tensor experts.3.w2" in caplog.text and "Layer 4 is converted again" in caplog.text
    assert contents(tmp_path / "o") == whole


def test_another_conversion_is_not_resumed(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = tmp_path / "o"
    assert run(source, output) == 0
    before = contents(output)
    assert run(source, output, "--quant-method", "int8") == 1
    assert 'begun with method "AMXINT4" and this run has "AMXINT8"' in caplog.text
    assert run(source, output, "--group-size", "64") == 1
    assert "begun with layout" in caplog.text
    other = write_checkpoint(tmp_path / "other", {1: random_experts(E, H, INNER)})
    assert run(other, output) == 1
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"note": 1}))
    assert run(source, output) == 1
    assert "config_sha256" in caplog.text
    assert contents(output) == before


@pytest.mark.parametrize("finished", [True, False])
def test_a_source_of_equal_size_and_other_weights_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, finished: bool
) -> None:
    output = tmp_path / "o"
    if finished:
        assert run(source, output) == 0
    else:
        with monkeypatch.context() as patch:
            patch.setattr(converter.PackedWriter, "finish", lambda *args: (_ for _ in ()).throw(Killed()))
            with pytest.raises(Killed):
                run(source, output)
    path = source / "model-00002-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert run(source, output) == 1
    assert "model-00002-of-00002.safetensors has changed since" in caplog.text


def layers_in_files_of_their_own(folder: Path, seeds: dict[int, int]) -> Path:
    """A checkpoint with a file for each layer."""
    folder.mkdir(exist_ok=True)
    weight_map: dict[str, str] = {}
    for layer, seed in seeds.items():
        tensors = layer_tensors(layer, random_experts(E, H, INNER, seed=seed))
        save_file(tensors, folder / f"{layer}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{layer}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config_of(random_experts(E, H, INNER), len(seeds))))
    return folder


def later(path: Path) -> None:
    """Let a file look written a second later."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


@pytest.fixture
def killed_before_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a conversion killed after layer 0 of 2, when no source file had been hashed."""
    source = layers_in_files_of_their_own(tmp_path / "source", {0: 1, 1: 2})
    real = packed_writer.PackedWriter.finish_layer

    def dying(*args) -> None:
        real(*args)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(packed_writer.PackedWriter, "finish_layer", dying)
        patch.setattr(packed_writer.PackedWriter, "store_source_state", lambda *args: None)
        with pytest.raises(Killed):
            run(source, tmp_path / "o")
    assert list(read_manifest(tmp_path / "o")["layers"]) == ["0"]
    return tmp_path / "o"


def test_a_source_replaced_before_it_was_hashed_is_refused(
    tmp_path: Path, killed_before_the_hash: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = killed_before_the_hash
    old = tmp_path / "source" / "0.safetensors"
    size, data, times = old.stat().st_size, old.read_bytes(), old.stat()
    layers_in_files_of_their_own(tmp_path / "source", {0: 11, 1: 12})
    later(old)
    assert old.stat().st_size == size and old.read_bytes() != data
    assert run(tmp_path / "source", output) == 1
    assert "0.safetensors has changed since" in caplog.text
    assert list(read_manifest(output)["layers"]) == ["0"]
    # Back again, and only a file replaced that no layer was made from: all is of one source.
    old.write_bytes(data)
    os.utime(old, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run(tmp_path / "source", output) == 0
    assert run(tmp_path / "source", tmp_path / "whole") == 0
    assert contents(output) == contents(tmp_path / "whole")


@pytest.mark.parametrize("listed", [True, False])
def test_a_source_that_changes_while_it_is_converted_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, listed: bool
) -> None:
    source = layers_in_files_of_their_own(tmp_path / "source", {0: 1, 1: 2})
    written = threading.Event()
    method = "finish_layer" if listed else "write_shard"
    real, real_hash = getattr(packed_writer.PackedWriter, method), converter._SourceFiles._hash

    def write_and_change(*args):
        result = real(*args)
        later(source / "0.safetensors")
        written.set()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(packed_writer.PackedWriter, method, write_and_change)
        patch.setattr(converter._SourceFiles, "_hash", lambda *args: written.wait(60) and real_hash(*args))
        assert run(source, tmp_path / "o") == 1
    assert "0.safetensors has changed since" in caplog.text
    manifest = read_manifest(tmp_path / "o")
    assert not manifest["complete"] and ("0" in manifest["layers"]) == listed
    # A layer that was not kept can be made again; one that was kept is of another file.
    assert run(source, tmp_path / "o") == (1 if listed else 0)


def test_memory_is_one_file_and_a_few_experts(tmp_path: Path) -> None:
    # 40 experts of 6 MiB bf16, 3 MiB packed, in files of 16 MiB: were they all held, it would be 126 MB packed alone.
    source = write_checkpoint(tmp_path / "source", {0: random_experts(40, 1024, 1024)})
    code = (
        "from memory import anonymous_peak_kib\n"
        "from kt_kernel import convert_command, converter\n"
        "converter.SHARD_BYTES = 16 << 20\n"
        f"command = ['-i', {str(source)!r}, '--input-type', 'bf16', '-o', {str(tmp_path / 'o')!r}]\n"
        "command += ['--quant-method', 'int8', '--cpuinfer-threads', '2']\n"
        "print(anonymous_peak_kib(lambda: convert_command.main(command)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    assert len(list((tmp_path / "o").glob("*.safetensors"))) == 8
    # A file of 16 MiB, two experts being packed with their rows in fp32, threads and imports.
    assert int(result.stdout) < 60_000
