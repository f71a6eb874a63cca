"""Quantized checkpoints in layers and in converted folders: the codes of the files, or their values quantized by us."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from checkpoints import layer_tensors, random_experts, write_checkpoint
from quantized_checkpoints import QUANTIZERS, Matrix, quantized_layer, single_names, write_folder
from reference import BOUNDS, moe_reference, relative_error
from wrapper_cases import INNER, E, H, K, batch, loaded, make

from kt_kernel import HybridMoE
from kt_kernel.checkpoint import Checkpoint, expert_weights
from kt_kernel.convert_command import main
from kt_kernel.integrations.sglang.checks import expert_source
from kt_kernel.loader import open_source
from kt_kernel.methods import FLOAT_METHODS, get_method, weight_dtype_of
from kt_kernel.packed_folder import PackedFolder, read_manifest

LAYER = 3
SIZES = E, H, INNER
# What packed weights add to the rounding of activations (reference.py) is nothing: the codes are the files'. int8
# activations in blocks of 128 are finer than the rows that BOUNDS has; fp8 has bf16 activations and, in the rows of
# many tokens, weights rounded to bf16.
BOUND = 0.033
FORMATS = {
    "fp8": "fp8f", "fp8_bf16_scales": "fp8f", "fp8_exponents": "fp8f", "fp8_blocks_of_64": "fp8f",
    "fp8_compressed_blocks": "fp8f", "fp8_modelopt_blocks": "fp8f", "fp8_channel": "fp8f", "fp8_rows": "fp8f",
    "fp8_tensor": "fp8f", "mxfp8": "fp8", "mxfp8_modelopt": "fp8", "rawint4": "int4", "rawint4_sorted": "int4",
    "rawint4_bytes": "int4h", "rawint4_g96": "int4f", "gptq": "int4h", "gptq_asymmetric": "int4z", "gptq_v2": "int4z",
    "gptq_sorted": "int4h", "gptq_zeros_of_v2": "int4h", "auto_round": "int4h", "awq": "int4z",
    "mxfp4": "fp4", "mxfp4_compressed": "fp4", "nvfp4": "fp4c", "nvfp4_compressed": "fp4c",
}  # fmt: skip


def quantized_folder(folder: Path, name: str, *, layer: int = LAYER) -> tuple[Path, list[dict[str, Matrix]]]:
    quantizer = QUANTIZERS[name]
    experts = quantized_layer(quantizer.make, *SIZES)
    tensors = single_names(experts, prefix=f"model.layers.{layer}.")
    return write_folder(folder, tensors, quantizer.config, num_layers=layer + 1, sizes=SIZES), experts


def values_of(experts: list[dict[str, Matrix]]) -> list[torch.Tensor]:
    """gate, up and down of all experts, fp32."""
    return [torch.stack([matrices[name].values for matrices in experts]) for name in ("gate", "up", "down")]


def from_folder(folder: Path, method: str, **changes):
    wrapper = make(method, weight_path=str(folder), **changes)
    wrapper.load_weights()
    return wrapper


@pytest.mark.parametrize("name", QUANTIZERS)
def test_values_are_those_of_the_form(tmp_path: Path, name: str) -> None:
    folder, experts = quantized_folder(tmp_path, name)
    checkpoint = Checkpoint(folder)
    checkpoint.check_layer(LAYER)
    for expert, matrices in enumerate(experts):
        for found, matrix in zip(expert_weights(checkpoint, LAYER, expert), matrices.values(), strict=True):
            # a product of two scales may be rounded before it meets the code, or after
            torch.testing.assert_close(found, matrix.values, rtol=2**-22, atol=0)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_layer_keeps_the_codes_of_the_files(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    folder, experts = quantized_folder(tmp_path, name)
    caplog.set_level("INFO", "kt_kernel.loader")
    mapping = torch.roll(torch.arange(E), 3)
    wrapper = make(QUANTIZERS[name].method, weight_path=str(folder))
    wrapper.load_weights(mapping)
    assert f"kept as they are for {QUANTIZERS[name].method}" in caplog.text
    formats = {weight_dtype_of(layout) for layout in wrapper.moe.layouts}
    assert formats == {FORMATS[name]}
    assert formats <= set(get_method(QUANTIZERS[name].method).formats)
    values = [stack[mapping] for stack in values_of(experts)]
    for tokens in (1, 5, 40):
        hidden, ids, weights = batch(tokens)
        wanted = moe_reference(hidden, ids, weights, *values)
        assert relative_error(wrapper.forward(hidden, ids, weights), wanted) < BOUND
    w13, w2 = wrapper.moe.export_packed(0)
    ops = torch.ops.kt_kernel
    packed = (
        *ops.dequantize_w13(w13, wrapper.moe.layouts[0], INNER, H),
        ops.dequantize(w2, wrapper.moe.layouts[1], H, INNER),
    )
    for found, stack in zip(packed, values, strict=True):
        torch.testing.assert_close(found, stack[0], rtol=2**-22, atol=0)


@pytest.mark.parametrize("method", FLOAT_METHODS)
@pytest.mark.parametrize("name", ["fp8", "fp8_channel", "mxfp8", "rawint4", "gptq", "awq", "mxfp4", "nvfp4"])
def test_any_form_is_quantized_by_the_other_methods(tmp_path: Path, name: str, method: str) -> None:
    folder, experts = quantized_folder(tmp_path, name)
    wrapper = from_folder(folder, method)
    checkpoint = Checkpoint(folder)
    weights = [expert_weights(checkpoint, LAYER, expert) for expert in range(E)]
    from_values = loaded([torch.stack(stack) for stack in zip(*weights, strict=True)], method)
    assert wrapper.moe.layouts == (get_method(method).layout,) * 2
    for expert in range(E):
        pairs = zip(wrapper.moe.export_packed(expert), from_values.moe.export_packed(expert), strict=True)
        assert all(torch.equal(found, wanted) for found, wanted in pairs)


@pytest.mark.parametrize(("alias", "method"), [("MOE_INT4", "AMXINT4"), ("MOE_INT8", "AMXINT8")])
def test_other_names_of_methods_compute_the_same(tmp_path: Path, alias: str, method: str) -> None:
    folder, _ = quantized_folder(tmp_path, "fp8")
    inputs = batch(9)
    assert torch.equal(from_folder(folder, alias).forward(*inputs), from_folder(folder, method).forward(*inputs))


def test_layers_left_unquantized_are_bf16_beside_kept_codes(tmp_path: Path) -> None:
    quantizer = QUANTIZERS["fp8"]
    plain, experts = random_experts(*SIZES), quantized_layer(quantizer.make, *SIZES)
    tensors = layer_tensors(0, plain) | single_names(experts, prefix="model.layers.1.")
    write_folder(tmp_path, tensors, quantizer.config, num_layers=2, sizes=SIZES)
    source = open_source(tmp_path, get_method("FP8"))
    assert [weight_dtype_of(source.layouts(layer)[0]) for layer in (0, 1)] == ["bf16", "fp8f"]
    inputs = batch(9)
    wrapper = from_folder(tmp_path, "FP8", layer_idx=0)
    assert torch.equal(wrapper.forward(*inputs), loaded(plain, "BF16").forward(*inputs))


@pytest.mark.parametrize("method", ["FP8", *FLOAT_METHODS])
def test_damage_in_any_layer_is_found_before_the_first_is_packed(tmp_path: Path, method: str) -> None:
    quantizer = QUANTIZERS["fp8"]
    experts = quantized_layer(quantizer.make, *SIZES)
    tensors = {}
    for layer in range(3):
        tensors |= single_names(experts, prefix=f"model.layers.{layer}.")
    name = "model.layers.2.mlp.experts.5.down_proj.weight"
    tensors[name] = tensors[name][:-1].clone()
    write_folder(tmp_path, tensors, quantizer.config, num_layers=3, sizes=SIZES)
    with pytest.raises(ValueError, match=rf"--kt-weight-path: tensor {name} has shape \[{H - 1}, {INNER}\]"):
        expert_source(str(tmp_path), method)


@pytest.mark.parametrize("method", ["GPTQ_INT4", *FLOAT_METHODS])
def test_a_stored_zero_point_of_15_is_refused_before_anything_is_packed(
    tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    quantizer = QUANTIZERS["gptq_asymmetric"]
    experts = quantized_layer(quantizer.make, *SIZES)
    tensors = {}
    for layer in range(2):
        tensors |= single_names(experts, prefix=f"model.layers.{layer}.")
    name = f"model.layers.1.mlp.experts.{E - 1}.down_proj.qzeros"
    tensors[name] = tensors[name].clone()
    tensors[name][0, 1] |= 0xF0
    write_folder(tmp_path / "source", tensors, quantizer.config, num_layers=2, sizes=SIZES)
    sentence = rf"tensor {name} of \S+ stores zero point 15, .* checkpoint_format gptq_v2\.$"
    with pytest.raises(ValueError, match=sentence):
        expert_source(str(tmp_path / "source"), method)
    arguments = ["-i", str(tmp_path / "source"), "--input-type", "gptq", "-o", str(tmp_path / "o")]
    assert main([*arguments, "--quant-method", "int8"]) == 1
    assert re.search(sentence, caplog.records[-1].getMessage())
    assert not list((tmp_path / "o").glob("*.safetensors"))


def with_zeros_in(experts: list[dict[str, Matrix]], expert: int, projection: str) -> None:
    """Give one matrix of symmetric GPTQ experts zero points."""
    n, k = experts[expert][projection].values.shape
    asymmetric = QUANTIZERS["gptq_asymmetric"].make(n, k, torch.Generator().manual_seed(3))
    experts[expert][projection] = asymmetric


def write_experts(folder: Path, name: str, experts: list[dict[str, Matrix]]) -> Path:
    tensors = single_names(experts, prefix=f"model.layers.{LAYER}.")
    return write_folder(folder, tensors, QUANTIZERS[name].config, num_layers=LAYER + 1, sizes=SIZES)


@pytest.mark.parametrize("place", [(0, "gate"), (0, "up"), (E - 1, "up"), (E - 1, "down")])
def test_zero_points_of_any_expert_decide_for_its_layer(tmp_path: Path, place: tuple[int, str]) -> None:
    experts = quantized_layer(QUANTIZERS["gptq"].make, *SIZES)
    with_zeros_in(experts, *place)
    wrapper = from_folder(write_experts(tmp_path, "gptq", experts), "GPTQ_INT4")
    kept = [weight_dtype_of(layout) for layout in wrapper.moe.layouts]
    assert kept == (["int4h", "int4z"] if place[1] == "down" else ["int4z", "int4h"])
    hidden, ids, weights = batch(40)
    wanted = moe_reference(hidden, ids, weights, *values_of(experts))
    assert relative_error(wrapper.forward(hidden, ids, weights), wanted) < BOUND


@pytest.mark.parametrize(("name", "dtype"), [("awq", torch.bfloat16), ("gptq", torch.float32)])
def test_a_scale_of_any_expert_that_no_layout_holds_is_refused_before_loading(
    tmp_path: Path, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = quantized_layer(QUANTIZERS[name].make, *SIZES)
    for matrices in experts:
        for matrix in matrices.values():
            matrix.tensors["scales"] = matrix.tensors["scales"].to(dtype).bfloat16().half().to(dtype)
    if name == "gptq":
        with_zeros_in(experts, 0, "down")
    experts[E - 2]["down"].tensors["scales"][1, 3] = 1e-9
    write_experts(tmp_path, name, experts)
    monkeypatch.setattr("kt_kernel.experts.CpuExperts.load_sources", lambda *args, **kwargs: pytest.fail("packed"))
    sentence = (
        rf"{E - 2}.down_proj.qweight of \S+ cannot be kept as it is: {name} weights with zero "
        r"points keep fp16 scales, and the \w+ scale \S+ of row 3 is no number of fp16; choose a method that quantizes"
    )
    with pytest.raises(ValueError, match=sentence):
        from_folder(tmp_path, QUANTIZERS[name].method)
    with pytest.raises(ValueError, match=sentence):
        open_source(tmp_path, get_method(QUANTIZERS[name].method)).layouts(LAYER)


def test_tensors_are_not_for_methods_that_keep_codes() -> None:
    with pytest.raises(ValueError, match="method AWQ keeps the codes of quantized files and makes none"):
        loaded(random_experts(*SIZES), "AWQ")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_values_that_bf16_does_not_have_are_counted(
    tmp_path: Path, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    experts = random_experts(*SIZES, dtype=dtype)
    experts.up.copy_(experts.up.bfloat16())  # these are exact
    write_checkpoint(tmp_path, {LAYER: experts})
    with caplog.at_level(logging.WARNING, "kt_kernel.loader"):
        from_folder(tmp_path, "BF16")
    changed = sum(int((stack.bfloat16().to(dtype) != stack).sum()) for stack in experts)
    total = sum(stack.numel() for stack in experts)
    lines = [record.getMessage() for record in caplog.records if "bf16" in record.getMessage()]
    if dtype == torch.bfloat16:
        assert not lines
    else:
        name = str(dtype).removeprefix("torch.")
        assert lines == [
            f"{tmp_path} holds {name} weights; {changed} of {total} ({100 * changed / total:.1f} %) have no equal in "
            f"bf16 and were rounded to it"
        ]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "kt_kernel.loader"):
        from_folder(tmp_path, "AMXINT8")
    assert not caplog.records


# --- the converter ---


def convert(source: Path, output: Path, input_type: str, *flags: str) -> int:
    return main(["-i", str(source), "--input-type", input_type, "-o", str(output), *flags])


@pytest.mark.parametrize("quant", ["int8", "int4", "bf16", "moe_int4"])
@pytest.mark.parametrize("name", ["fp8", "fp8_channel", "mxfp8", "rawint4", "gptq", "awq", "mxfp4", "nvfp4"])
def test_any_form_is_converted(tmp_path: Path, name: str, quant: str) -> None:
    folder, _ = quantized_folder(tmp_path / "in", name, layer=0)
    input_type = QUANTIZERS[name].input_type
    assert convert(folder, tmp_path / "o", input_type, "--quant-method", quant) == 0
    assert read_manifest(tmp_path / "o")["input_type"] == input_type
    checkpoint = Checkpoint(folder)
    packed, layout = PackedFolder(tmp_path / "o"), read_manifest(tmp_path / "o")["layout"]
    for expert in range(E):
        gate, up, down = expert_weights(checkpoint, 0, expert)
        w13, w2 = packed.expert(0, expert)
        assert torch.equal(w13, torch.ops.kt_kernel.quantize_pack_w13(gate, up, layout)[0])
        assert torch.equal(w2, torch.ops.kt_kernel.quantize_pack(down, layout)[0])


def test_the_input_type_must_be_that_of_the_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, _ = quantized_folder(tmp_path / "in", "awq", layer=0)
    for wrong in ("bf16", "fp8", "int4", "gptq", "gguf"):
        assert convert(folder, tmp_path / "o", wrong) == 1
        assert f"--input-type is {wrong}, but the experts of {folder} are awq; give --input-type awq" in caplog.text
        assert not (tmp_path / "o").exists()
    assert convert(folder, tmp_path / "o", "auto") == 0
    assert read_manifest(tmp_path / "o")["input_type"] == "awq"


def test_a_wrong_scale_ends_a_conversion(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quantizer = QUANTIZERS["nvfp4"]
    tensors = single_names(quantized_layer(quantizer.make, *SIZES))
    tensors["model.layers.0.mlp.experts.5.down_proj.weight_scale_2"].fill_(float("nan"))
    write_folder(tmp_path / "in", tensors, quantizer.config, sizes=SIZES)
    assert convert(tmp_path / "in", tmp_path / "o", "nvfp4") == 1
    assert "experts.5.down_proj.weight has a weight_scale_2 of nan, which is no scale" in caplog.text


def test_biases_are_not_converted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = layer_tensors(0, random_experts(*SIZES))
    for expert in range(E):
        for projection, size in (("gate", INNER), ("up", INNER), ("down", H)):
            tensors[f"model.layers.0.mlp.experts.{expert}.{projection}_proj.bias"] = torch.ones(size)
    write_folder(tmp_path / "in", tensors, {}, sizes=SIZES)
    assert convert(tmp_path / "in", tmp_path / "o", "bf16") == 1
    assert "experts with biases, which converted folders do not hold" in caplog.text
    assert json.loads((tmp_path / "in/config.json").read_text())["num_experts"] == E


def with_biases(tensors: dict[str, torch.Tensor], layer: int, biases: tuple[torch.Tensor, ...]) -> dict:
    names = {
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.bias": stack[expert].clone()
        for projection, stack in zip(("gate", "up", "down"), biases, strict=True)
        for expert in range(E)
    }
    return tensors | names


def test_biases_of_zeros_are_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quantizer = QUANTIZERS["gptq"]
    tensors = single_names(quantized_layer(quantizer.make, *SIZES))
    zeros = tuple(torch.zeros(E, size, dtype=torch.float16) for size in (INNER, INNER, H))
    outputs = []
    for name, given in (("without", tensors), ("with", with_biases(tensors, 0, zeros))):
        folder = write_folder(tmp_path / name, given, quantizer.config, sizes=SIZES)
        assert open_source(folder, get_method("GPTQ_INT4")).biases(0, 1) is None
        assert not HybridMoE.from_path(folder, 0, method="GPTQ_INT4").has_biases
        assert convert(folder, tmp_path / f"{name}-converted", "gptq") == 0
        packed = PackedFolder(tmp_path / f"{name}-converted")
        outputs.append([tensor for expert in range(E) for tensor in packed.expert(0, expert)])
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
    zeros[1][E - 1, 7] = 1
    folder = write_folder(tmp_path / "one", with_biases(tensors, 0, zeros), quantizer.config, sizes=SIZES)
    assert convert(folder, tmp_path / "o", "gptq") == 1
    assert "experts with biases, which converted folders do not hold" in caplog.text


@pytest.mark.parametrize("on_device", [None, 0, 6])
def test_a_bias_of_some_experts_is_added_to_theirs(tmp_path: Path, on_device: int | None) -> None:
    plain = random_experts(*SIZES)
    biases = tuple(torch.zeros(E, size) for size in (INNER, INNER, H))
    for expert in (2, 7):
        for stack in biases:
            stack[expert] = torch.randn(stack.shape[1], generator=torch.Generator().manual_seed(expert))
    folder = write_folder(tmp_path, with_biases(layer_tensors(0, plain), 0, biases), {}, sizes=SIZES)
    hidden, ids, weights = batch(9)
    wanted = moe_reference(hidden, ids, weights, *plain, biases=biases)
    if on_device is None:
        found = from_folder(folder, "BF16", layer_idx=0).forward(hidden, ids, weights)
    else:
        found = HybridMoE.from_path(folder, 0, num_gpu_experts=on_device)(hidden, ids, weights)
    assert relative_error(found, wanted) < BOUNDS["BF16"]


def test_parts_that_no_form_reads_may_be_missing(tmp_path: Path) -> None:
    quantizer = QUANTIZERS["nvfp4"]
    tensors = single_names(quantized_layer(quantizer.make, *SIZES))
    del tensors["model.layers.0.mlp.experts.5.up_proj.input_scale"]
    folder = write_folder(tmp_path / "some", tensors, quantizer.config, sizes=SIZES)
    all_of_them, _ = quantized_folder(tmp_path / "all", "nvfp4", layer=0)
    wrappers = [from_folder(path, "NVFP4", layer_idx=0) for path in (folder, all_of_them)]
    assert torch.equal(*(wrapper.forward(*batch(9)) for wrapper in wrappers))


def test_biases_are_added(tmp_path: Path) -> None:
    plain = random_experts(*SIZES)
    tensors, biases = layer_tensors(LAYER, plain), {}
    generator = torch.Generator().manual_seed(5)
    for projection, size in (("gate", INNER), ("up", INNER), ("down", H)):
        biases[projection] = torch.randn((E, size), generator=generator) * 0.1
        for expert in range(E):
            name = f"model.layers.{LAYER}.mlp.experts.{expert}.{projection}_proj.bias"
            tensors[name] = biases[projection][expert].clone()
    write_folder(tmp_path, tensors, {}, num_layers=LAYER + 1, sizes=SIZES)
    hidden, ids, weights = batch(7)
    # A bias is one more column of weights beside an input of 1, for gate and up; down's is a constant for each expert.
    ones = torch.cat((hidden, torch.ones(7, 1)), 1)
    gate, up = (
        torch.cat((stack, biases[name][:, :, None]), 2) for stack, name in ((plain.gate, "gate"), (plain.up, "up"))
    )
    inner = moe_reference(ones, ids, weights, gate, up, torch.cat((plain.down, torch.zeros(E, 1, INNER)), 1))[:, :H]
    wanted = inner + torch.einsum("tk,tkh->th", weights.double(), biases["down"].double()[ids])
    found = from_folder(tmp_path, "BF16").forward(hidden, ids, weights)
    assert relative_error(found, wanted) < 2**-6
    assert ids.shape[1] == K
