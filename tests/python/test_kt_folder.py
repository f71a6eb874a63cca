"""Reading folders of kt-kernel's converter: both forms, what they decode to, and every way they can be wrong.

The folders are those of kt_files.py, which test_golden.py proves to be kt-kernel's own byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import kt_files
import numpy as np
import pytest
import torch
from format_oracles import decode
from kt_files import Case
from safetensors.torch import save_file

from kt_kernel.checkpoint.kt_folder import KtFolder, is_kt_folder
from kt_kernel.convert_command import main
from kt_kernel.loader import open_source
from kt_kernel.methods import get_method

TREES = Path(__file__).resolve().parents[1] / "data/formats/kt"
# method, NUMA parts, experts, hidden size, intermediate size, layer
SMALL = Case("INT8", 2, 3, 64, 128)
CASES = (SMALL, Case("INT8", 1, 2, 128, 64, layer=5), Case("INT4", 2, 2, 128, 256), Case("INT4", 4, 1, 128, 512))
FORMS = ("tree", "merged")


def config_of(case: Case, **changes) -> dict:
    config = {
        "num_experts": case.num_experts,
        "num_experts_per_tok": 1,
        "hidden_size": case.hidden_size,
        "moe_intermediate_size": case.intermediate_size,
        "num_hidden_layers": case.layer + 1,
        # of the model that was converted: nothing to do with what the experts are now
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    return config | changes


def write_tree(folder: Path, *cases: Case, change: Callable[[dict[str, bytes]], None] | None = None) -> Path:
    files = {name: contents for case in cases for name, contents in kt_files.tree_files(case).items()}
    if change:
        change(files)
    for name, contents in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(contents)
    return folder


def merged_tensors(case: Case) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array.copy()) for name, array in kt_files.merged_arrays(case).items()}


def write_merged(folder: Path, *cases: Case, change: Callable[[dict], None] | None = None, **config) -> Path:
    """As the converter: a file a layer, the last with all that is no expert, config.json beside."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = [merged_tensors(case) for case in cases]
    if change:
        change(shards[0])
    shards.append({"token_embd.weight": torch.zeros(4, 64), "blk.0.attn_norm.weight": torch.zeros(64)})
    for number, shard in enumerate(shards, 1):
        save_file(shard, folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(cases[-1], **config)))
    return folder


def write(form: str, folder: Path, *cases: Case) -> Path:
    return (write_tree if form == "tree" else write_merged)(folder, *cases)


def method_of(case: Case) -> str:
    return f"AMX{case.method}"


def assert_holds(reader: KtFolder, case: Case) -> None:
    """Every matrix of a layer decodes to the codes and scales that kt-kernel makes of its source."""
    reader.check_layer(case.layer)
    bits = kt_files.METHODS[case.method]
    for projection in kt_files.PROJECTIONS:
        for expert, matrix in enumerate(kt_files.source(case, projection)):
            source, parts = reader.source(case.layer, expert, projection)
            cut = "columns" if projection == "down" else "rows"
            assert source == f"kt_int{bits}x{case.parts}_{cut}"
            assert [part.dtype for part in parts] == [torch.uint8, torch.float32] * case.parts
            assert {part.dim() for part in parts} == {1}
            wanted = []
            for part in range(case.parts):
                codes, scale = kt_files.quantize(kt_files.part_of(matrix, projection, part, case.parts), bits)
                wanted.append(codes * scale[:, None] * np.float32(1 if bits == 8 else 16))
            joined = np.concatenate(wanted, axis=1 if projection == "down" else 0)
            np.testing.assert_array_equal(decode(source, parts, *matrix.shape), joined)


# What is there.


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("form", FORMS)
def test_both_forms_are_read(tmp_path: Path, form: str, case: Case) -> None:
    folder = write(form, tmp_path, case)
    assert is_kt_folder(folder)
    reader = KtFolder(folder, method_of(case))
    assert (reader.layers, reader.num_parts) == ([case.layer], case.parts)
    assert reader.describe() == f"AMX{case.method} experts that kt-kernel converted for {case.parts} NUMA nodes"
    sizes = reader.sizes
    assert (sizes.num_experts, sizes.hidden_size, sizes.intermediate_size) == (
        case.num_experts, case.hidden_size, case.intermediate_size,
    )  # fmt: skip
    assert sizes.top_k == (0 if form == "tree" else 1)
    contents = kt_files.tree_files(case)
    assert reader.expert_bytes(case.layer) * case.num_experts == sum(map(len, contents.values()))
    if form == "tree":
        assert reader.files(case.layer) == sorted(contents)
        assert reader.tensor_name(case.layer, 0, "up") in contents
    else:
        assert reader.files(case.layer) == ["model-00001-of-00002.safetensors"]
        assert reader.tensor_name(case.layer, 0, "up") == f"blk.{case.layer}.ffn_up_exps.0.numa.0.weight"
    assert_holds(reader, case)


@pytest.mark.parametrize("case", kt_files.KEPT, ids=lambda case: case.name)
def test_kt_kernels_own_trees_are_read(case: Case) -> None:
    assert_holds(KtFolder(TREES / f"{case.method.lower()}x{case.parts}", method_of(case)), case)


@pytest.mark.parametrize("form", FORMS)
def test_layers_are_kept_apart_and_close_lets_go(tmp_path: Path, form: str) -> None:
    cases = [Case("INT8", 2, 1, 64, 128, layer=layer, seed=layer) for layer in (1, 3, 12)]
    reader = KtFolder(write(form, tmp_path, *cases), "AMXINT8")
    assert reader.layers == [1, 3, 12]
    _, parts = reader.source(1, 0, "gate")
    kept = parts[0].clone()
    for case in cases:
        assert_holds(reader, case)
        reader.close()
    assert torch.equal(parts[0], kept), "views outlive close()"
    with pytest.raises(ValueError, match="no experts in layer 2; layers with experts are 1, 3, 12"):
        reader.check_layer(2)


def test_layers_beyond_the_model_and_backward_weights_are_left_out(tmp_path: Path) -> None:
    def with_backward(tensors: dict[str, torch.Tensor]) -> None:
        tensors["blk.0.ffn_gate_bwd_exps.0.numa.0.weight"] = torch.zeros(7, dtype=torch.int8)

    cases = [Case("INT8", 1, 1, 64, 64, layer=layer) for layer in (0, 1)]
    merged = write_merged(tmp_path / "merged", *cases, change=with_backward, num_hidden_layers=1)
    reader = KtFolder(merged, "AMXINT8")
    assert reader.layers == [0]
    assert_holds(reader, cases[0])

    def with_backward_file(files: dict[str, bytes]) -> None:
        files["_layer_0/_numa_0/INT8_gate_bwd_0_4096Byte_quant_.kt"] = bytes(4096)
        files["_layer_0/_numa_0/notes.txt"] = b"not of the converter"

    tree = write_tree(tmp_path / "tree", cases[0], change=with_backward_file)
    assert_holds(KtFolder(tree, "AMXINT8"), cases[0])


def test_a_tree_of_both_methods_gives_the_one_asked_for(tmp_path: Path) -> None:
    cases = [Case(method, 1, 1, 128, 128) for method in kt_files.METHODS]
    folder = write_tree(tmp_path, *cases)
    for case in cases:
        assert_holds(KtFolder(folder, method_of(case)), case)


def test_a_config_beside_a_tree_is_used(tmp_path: Path) -> None:
    folder = write_tree(tmp_path, SMALL)
    (folder / "config.json").write_text(json.dumps(config_of(SMALL, model_type="test_moe")))
    sizes = KtFolder(folder, "AMXINT8").sizes
    assert (sizes.model_type, sizes.top_k) == ("test_moe", 1)
    (folder / "config.json").write_text(json.dumps(config_of(SMALL, moe_intermediate_size=256)))
    with pytest.raises(ValueError, match="intermediate size 128 in 2 NUMA parts, but config.json says 64 and 256"):
        KtFolder(folder, "AMXINT8")


def test_other_folders_are_not_taken_for_one(tmp_path: Path) -> None:
    assert not is_kt_folder(tmp_path)
    save_file({"model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert not is_kt_folder(tmp_path)
    with pytest.raises(ValueError, match="holds no experts of AMXINT4 or AMXINT8; convert the original"):
        KtFolder(tmp_path, "AMXINT4")


# What is wrong.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("asked", ["AMXINT4", "FP8"])
def test_another_method_is_refused_by_name(tmp_path: Path, form: str, asked: str) -> None:
    folder = write(form, tmp_path, SMALL)
    with pytest.raises(
        ValueError, match=rf"converted for method AMXINT8, but method {asked} was asked for; give --kt-"
    ):
        KtFolder(folder, asked)


@pytest.mark.parametrize("quant", ["int4", "int8", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_it_is_not_converted_again(tmp_path: Path, form: str, quant: str, caplog: pytest.LogCaptureFixture) -> None:
    folder, output = write(form, tmp_path / "kt", SMALL), tmp_path / "o"
    assert main(["-i", str(folder), "--input-type", "auto", "-o", str(output), "--quant-method", quant]) == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder} holds experts that kt-kernel converted, which are not converted again; serve AMXINT4 and AMXINT8 as "
        f"they are, or give the original checkpoint."
    ]
    assert not output.exists()


@pytest.mark.parametrize("method", ["MOE_INT4", "MOE_INT8"])
def test_files_of_the_other_kernels_are_refused_by_name(tmp_path: Path, method: str) -> None:
    def rename(files: dict[str, bytes]) -> None:
        for name in list(files):
            files[name.replace("INT8", method)] = files.pop(name)

    folder = write_tree(tmp_path, SMALL, change=rename)
    assert is_kt_folder(folder)
    for asked in ("AMXINT8", method):
        with pytest.raises(ValueError, match=f"was converted for {method} .file _layer_0/_numa_0/{method}_down_0_"):
            KtFolder(folder, asked)


@pytest.mark.parametrize("method", ["MOE_INT4", "MOE_INT8"])
@pytest.mark.parametrize("form", FORMS)
def test_the_names_of_the_other_kernels_never_open_converted_experts(tmp_path: Path, form: str, method: str) -> None:
    case = next(case for case in CASES if method.endswith(case.method))
    folder = write(form, tmp_path, case)
    assert open_source(folder, get_method(method_of(case))).layouts(case.layer)
    words = {
        "tree": f"was converted for method {method_of(case)}, but method {method} was asked for; give --kt-method",
        "merged": f"what it converts for {method} is in an order of bytes that kt_kernel does not read; give the orig",
    }
    with pytest.raises(ValueError, match=words[form]):
        open_source(folder, get_method(method))


def test_awq_of_the_converter_is_refused_by_name(tmp_path: Path) -> None:
    names = ("weight", "scale", "qzeros")
    tensors = {f"blk.0.ffn_up_exps.0.{name}": torch.zeros(8) for name in names}
    save_file(tensors, tmp_path / "model.safetensors")
    assert is_kt_folder(tmp_path)
    with pytest.raises(ValueError, match="converted from AWQ .tensor blk.0.ffn_up_exps.0.*give the AWQ checkpoint"):
        KtFolder(tmp_path, "AMXINT4")


UP = "_layer_0/_numa_1/INT8_up_2_"
TREE_FAULTS: dict[str, tuple[Callable[[dict[str, bytes]], object], str]] = {
    "a file is missing": (
        lambda files: files.pop(f"{UP}256Byte_scale_.kt"),
        "lacks the scale of up of expert 2 in layer 0, NUMA part 1 of 2",
    ),
    "a part is missing": (
        lambda files: [files.pop(name) for name in list(files) if "_layer_1/_numa_1" in name],
        "lacks the weight of gate of expert 0 in layer 1, NUMA part 1 of 2",
    ),
    "a part is too many": (
        lambda files: files.update({name.replace("_numa_1", "_numa_2"): b"" for name in files if "_layer_1" in name}),
        "_layer_1/_numa_2/INT8_.*but the model has 3 experts and the first layer 2 NUMA parts",
    ),
    "an expert is missing": (
        lambda files: [files.pop(name) for name in list(files) if "_layer_1" in name and "_2_" in name],
        "lacks the weight of gate of expert 2 in layer 1, NUMA part 0 of 2",
    ),
    "two files for one": (
        lambda files: files.update({f"{UP}8192Byte_quant_.kt": bytes(8192)}),
        "weight of up of expert 2 in layer 0 twice .*take the one of an earlier conversion away",
    ),
    "cut off": (
        lambda files: files.update({f"{UP}4096Byte_quant_.kt": bytes(4000)}),
        "_numa_1/INT8_up_2_4096Byte_quant_.kt has 4000 bytes, not the 4096 of its name",
    ),
    "of another size": (
        lambda files: files.update({f"{UP}2048Byte_quant_.kt": files.pop(f"{UP}4096Byte_quant_.kt")[:2048]}),
        "INT8_up_2_2048Byte_quant_.kt of .* has 2048 bytes, but INT8 of hidden size 64 and .* means 4096",
    ),
    "scales of another size": (
        lambda files: files.update({f"{UP}512Byte_scale_.kt": files.pop(f"{UP}256Byte_scale_.kt") * 2}),
        "INT8_up_2_512Byte_scale_.kt of .* has 512 bytes, .* means 256",
    ),
    "a first weight of another size": (
        lambda files: [
            files.update({name.replace("4096", "6000"): bytes(6000)}) or files.pop(name)
            for name in list(files)
            if "_layer_0/_numa_0/INT8_gate_0_4096" in name
        ],
        r"has 6000 bytes, which are no 4 or 8 bits for each of \[64, 64\] weights",
    ),
    "an unknown file": (
        lambda files: files.update({"_layer_0/_numa_0/INT4_up_0_8Byte_mins_.kt": b""}),
        "has a file _layer_0/_numa_0/INT4_up_0_8Byte_mins_.kt, which is none of AMXINT4 or AMXINT8",
    ),
}


@pytest.mark.parametrize("fault", TREE_FAULTS)
def test_a_wrong_tree_is_refused(tmp_path: Path, fault: str) -> None:
    change, message = TREE_FAULTS[fault]
    folder = write_tree(tmp_path, SMALL, SMALL._replace(layer=1), change=change)
    with pytest.raises(ValueError, match=message):
        KtFolder(folder, "AMXINT8").check_layer(0)


NAME = "blk.0.ffn_down_exps.1.numa.1"
MERGED_FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "a tensor is missing": (
        lambda tensors: tensors.pop(f"{NAME}.scale"),
        "lacks the scale of down of expert 1 in layer 0, NUMA part 1 of 2",
    ),
    "an expert is too many": (
        lambda tensors: tensors.update({f"{NAME}.scale".replace("exps.1", "exps.3"): torch.zeros(64)}),
        "has blk.0.ffn_down_exps.3.numa.1.scale, but the model has 3 experts",
    ),
    "of another type": (
        lambda tensors: tensors.update({f"{NAME}.scale": torch.zeros(64, dtype=torch.float16)}),
        f"tensor {NAME}.scale of .* has type F16 and shape .64., where one row of F32 is meant",
    ),
    "of two dimensions": (
        lambda tensors: tensors.update({f"{NAME}.weight": tensors[f"{NAME}.weight"].reshape(64, 64)}),
        f"tensor {NAME}.weight of .* has type I8 and shape .64, 64., where one row of I8 or U8 is meant",
    ),
    "of another size": (
        lambda tensors: tensors.update({f"{NAME}.weight": tensors[f"{NAME}.weight"][:64].clone()}),
        f"{NAME}.weight of .* has 64 bytes, but INT8 of hidden size 64 .* means 4096",
    ),
}


@pytest.mark.parametrize("fault", MERGED_FAULTS)
def test_wrong_tensors_are_refused(tmp_path: Path, fault: str) -> None:
    change, message = MERGED_FAULTS[fault]
    folder = write_merged(tmp_path, SMALL, change=change)
    with pytest.raises(ValueError, match=message):
        KtFolder(folder, "AMXINT8").check_layer(0)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = write_merged(tmp_path, SMALL)
    save_file(merged_tensors(SMALL), folder / "model-00001-of-PLACEHOLDER.safetensors")
    with pytest.raises(ValueError, match="model-00001-of-00002.safetensors and model-00001-of-PLACEHOLDER.safetensors"):
        KtFolder(folder, "AMXINT8")


def test_parts_the_byte_order_cannot_have_are_refused(tmp_path: Path) -> None:
    def rows_of_32(files: dict[str, bytes]) -> None:
        files.clear()
        for projection, rows in (("gate", 32), ("up", 32), ("down", 64)):
            start = f"_layer_0/_numa_0/INT8_{projection}_0_"
            files |= {f"{start}2048Byte_quant_.kt": bytes(2048), f"{start}{4 * rows}Byte_scale_.kt": bytes(4 * rows)}

    folder = write_tree(tmp_path, SMALL, change=rows_of_32)
    with pytest.raises(ValueError, match="parts of 32 intermediate and 64 hidden columns.* only in multiples of 64"):
        KtFolder(folder, "AMXINT8")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_scale_that_cannot_be_is_refused_with_its_name(tmp_path: Path, form: str, value: float) -> None:
    folder = write(form, tmp_path, SMALL)
    if form == "tree":
        path = folder / f"{UP}256Byte_scale_.kt"
        scales = np.frombuffer(path.read_bytes(), np.float32).copy()
        scales[63] = value
        path.write_bytes(scales.tobytes())
    else:
        tensors = merged_tensors(SMALL)
        tensors["blk.0.ffn_up_exps.2.numa.1.scale"][63] = value
        save_file(tensors, folder / "model-00001-of-00002.safetensors")
    reader = KtFolder(folder, "AMXINT8")
    reader.check_layer(0)
    reader.source(0, 1, "up")
    with pytest.raises(ValueError, match="up_(exps.)?2.* has a scale that is negative, infinite or NaN"):
        reader.source(0, 2, "up")


def test_a_file_that_goes_away_is_named(tmp_path: Path) -> None:
    reader = KtFolder(write_tree(tmp_path, SMALL), "AMXINT8")
    (tmp_path / f"{UP}4096Byte_quant_.kt").unlink()
    with pytest.raises(ValueError, match="INT8_up_2_4096Byte_quant_.kt is gone"):
        reader.check_layer(0)
    with pytest.raises(ValueError, match="INT8_up_2_4096Byte_quant_.kt cannot be mapped"):
        reader.source(0, 2, "up")
