"""Quantized checkpoints: every name, every form, what they are recognized as, and every way they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import test_kt_folder as kt_cases
import torch
from checkpoints import BASES, STYLES, config_of, layer_tensors, random_experts
from gguf_files import random_layer, sizes_of, write_gguf
from quantized_checkpoints import (
    GROUP,
    QUANTIZERS,
    Matrix,
    as_bytes,
    fp8_block,
    fp8_row,
    fused_names,
    mxfp4,
    quantized_layer,
    single_names,
    write_folder,
)
from safetensors.torch import save_file

from kt_kernel.checkpoint import Checkpoint, expert_weights
from kt_kernel.checkpoint.names import ExpertTensor, is_interleaved, parse_name
from kt_kernel.loader import open_source
from kt_kernel.methods import ALIASES, FLOAT_METHODS, METHODS, get_method, method_of, source_kind, weight_dtype_of

# Two blocks of 128 columns, the second ragged, and one ragged block of rows.
SIZES = E, H, INNER = 2, 192, 96


def assert_matrix(checkpoint: Checkpoint, expert: int, projection: str, wanted: Matrix, layer: int = 0) -> None:
    source, parts = checkpoint.source(layer, expert, projection)
    assert source == wanted.source
    assert len(parts) == len(wanted.parts)
    for found, part in zip(parts, wanted.parts, strict=True):
        assert found.dtype == part.dtype and found.shape == part.shape
        assert torch.equal(as_bytes(found), as_bytes(part))


def assert_layer(checkpoint: Checkpoint, experts: list[dict[str, Matrix]], layer: int = 0) -> None:
    checkpoint.check_layer(layer)
    for expert, matrices in enumerate(experts):
        for projection, matrix in matrices.items():
            assert_matrix(checkpoint, expert, projection, matrix, layer)
    checkpoint.close()


# --- names ---


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (
            "model.layers.3.mlp.experts.17.gate_proj.weight_scale_inv",
            (3, 17, "gate", "weight_scale_inv"),
        ),  # DeepSeek-V3
        ("model.layers.3.mlp.experts.0.down_proj.weight", (3, 0, "down", "weight")),  # Qwen3, GLM, OLMoE
        (
            "language_model.model.layers.1.mlp.experts.9.up_proj.weight_packed",
            (1, 9, "up", "weight_packed"),
        ),  # Kimi-K2.5
        ("model.layers.0.block_sparse_moe.experts.7.w1.weight", (0, 7, "gate", "weight")),  # Mixtral
        (
            "model.layers.5.block_sparse_moe.experts.7.w2.weight_scale_inv",
            (5, 7, "down", "weight_scale_inv"),
        ),  # MiniMax
        ("layers.2.ffn.experts.4.w3.scale", (2, 4, "up", "scale")),  # DeepSeek-V4
        ("layers.2.experts.4.w3.weight", (2, 4, "up", "weight")),  # Mistral
        ("model.layers.2.feed_forward.experts.4.up_proj.weight", (2, 4, "up", "weight")),  # Jamba
        ("model.language_model.layers.0.mlp.experts.gate_up_proj", (0, None, "gate_up", "weight")),  # Qwen3.5
        ("model.language_model.layers.0.mlp.experts.down_proj_scale_inv", (0, None, "down", "scale_inv")),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", (0, None, "gate_up", "blocks")),  # GPT-OSS
        ("model.layers.0.mlp.experts.down_proj_bias", (0, None, "down", "bias")),
        ("language_model.model.layers.1.feed_forward.experts.down_proj", (1, None, "down", "weight")),  # Llama4
        (
            "language_model.model.layers.1.feed_forward.experts.gate_up_proj_weight_scale_2",
            (1, None, "gate_up", "weight_scale_2"),
        ),
        ("model.layers.1.block_sparse_moe.input_linear.weight", (1, None, "gate_up", "weight")),  # Granite
        ("model.layers.1.block_sparse_moe.output_linear.weight", (1, None, "down", "weight")),
        ("thinker.model.layers.1.mlp.experts.2.gate_proj.weight", (1, 2, "gate", "weight")),  # Qwen3-Omni
        ("model.layers.1.mlp.shared_experts.gate_proj.weight", None),
        ("model.layers.1.mlp.shared_expert.gate_proj.weight", None),
        ("model.layers.1.mlp.gate_proj.weight", None),
        ("model.layers.1.mlp.gate.weight", None),
        ("model.layers.1.block_sparse_moe.router.layer.weight", None),
        ("mtp.layers.0.mlp.experts.0.gate_proj.weight", None),  # drafts tokens
        ("model.layers.01.mlp.experts.0.gate_proj.weight", None),
        ("model.layers.1.mlp.experts.00.gate_proj.weight", None),
        ("model.layers.1.mlp.experts.-1.gate_proj.weight", None),
        ("model.layers.1\u0661.mlp.experts.0.gate_proj.weight", None),
        ("model.layers.1.mlp.experts.0.gate_proj.weight.more", None),
        ("model.layers.1.mlp.experts.gate_up_projector", None),
    ],
)
def test_names_of_model_families(name: str, found: tuple | None) -> None:
    assert parse_name(name) == (None if found is None else ExpertTensor(*found))


def test_rows_alternate_in_one_family() -> None:
    assert is_interleaved({"blocks", "scales"}) and is_interleaved({"weight", "bias"})
    assert not is_interleaved({"weight", "scale_inv"})


def test_granite_is_read(tmp_path: Path) -> None:
    experts = random_experts(E, H, INNER)
    tensors = {
        "model.layers.0.block_sparse_moe.input_linear.weight": torch.cat((experts.gate, experts.up), 1),
        "model.layers.0.block_sparse_moe.output_linear.weight": experts.down,
    }
    checkpoint = Checkpoint(write_folder(tmp_path, tensors, {}, sizes=SIZES))
    checkpoint.check_layer(0)
    for expert in range(E):
        for projection, wanted in zip(("gate", "up", "down"), experts, strict=True):
            assert torch.equal(checkpoint.source(0, expert, projection)[1][0], wanted[expert])


# --- forms ---


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_form_is_recognized(tmp_path: Path, name: str) -> None:
    quantizer = QUANTIZERS[name]
    experts = quantized_layer(quantizer.make, *SIZES)
    checkpoint = Checkpoint(write_folder(tmp_path, single_names(experts), quantizer.config, sizes=SIZES))
    assert_layer(checkpoint, experts)
    source = experts[0]["gate"].source
    own = method_of(source_kind(source))
    assert own and own.name == quantizer.method
    used = [t for matrix in experts[0].values() for part, t in matrix.tensors.items()]
    assert checkpoint.expert_bytes(0) == sum(tensor.nbytes for tensor in used)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["fp8", "rawint4", "gptq", "mxfp4", "nvfp4"])
def test_every_form_is_read_under_every_name(tmp_path: Path, name: str, style: str, base: str) -> None:
    quantizer = QUANTIZERS[name]
    layers = {layer: quantized_layer(quantizer.make, *SIZES, seed=layer) for layer in (1, 2)}
    tensors = {}
    for layer, experts in layers.items():
        tensors |= single_names(experts, style=style, prefix=f"{base}.{layer}.")
    checkpoint = Checkpoint(write_folder(tmp_path, tensors, quantizer.config, num_layers=3, sizes=SIZES))
    assert checkpoint.layers == [1, 2]
    for layer, experts in layers.items():
        assert_layer(checkpoint, experts, layer)


def test_one_scale_is_of_a_block_where_the_config_says_so(tmp_path: Path) -> None:
    """A matrix no larger than a block has one scale, as one with a scale for all has."""
    sizes = (E, 64, 32)
    experts = quantized_layer(QUANTIZERS["fp8"].make, *sizes)
    for name, config in (("fp8_block128x128", QUANTIZERS["fp8"].config), ("fp8_row", {"quant_method": "fp8"})):
        checkpoint = Checkpoint(write_folder(tmp_path / name, single_names(experts), config, sizes=sizes))
        checkpoint.check_layer(0)
        assert checkpoint.source(0, 0, "gate")[0] == name


@pytest.mark.parametrize("place", ["text_config", "hf_quant_config.json", "quantize_config.json", "nothing"])
def test_the_config_is_found_where_tools_wrote_it(tmp_path: Path, place: str) -> None:
    name = {"hf_quant_config.json": "nvfp4", "quantize_config.json": "gptq_v2"}.get(place, "gptq_v2")
    quantizer = QUANTIZERS[name]
    experts = quantized_layer(quantizer.make, *SIZES)
    write_folder(tmp_path, single_names(experts), {}, sizes=SIZES)
    content = {key: value for key, value in quantizer.config.items() if key != "quant_method"}
    if place == "text_config":
        config = json.loads((tmp_path / "config.json").read_text())
        nested = {"text_config": {**config, "quantization_config": quantizer.config}, "hidden_size": 1}
        (tmp_path / "config.json").write_text(json.dumps(nested))
    elif place == "hf_quant_config.json":
        (tmp_path / place).write_text(json.dumps({"producer": {}, "quantization": content}))
    elif place == "quantize_config.json":
        (tmp_path / place).write_text(json.dumps(content))
    found = Checkpoint(tmp_path).source(0, 0, "gate")[0]
    # the tensors of both versions are the same; without a config it is the first
    assert found == ("gptq" if place == "nothing" else name)


def test_layers_left_unquantized_are_read_as_they_are(tmp_path: Path) -> None:
    quantizer = QUANTIZERS["fp8"]
    plain, experts = random_experts(E, H, INNER), quantized_layer(quantizer.make, *SIZES)
    tensors = layer_tensors(0, plain) | single_names(experts, prefix="model.layers.1.")
    config = {**quantizer.config, "modules_to_not_convert": ["model.layers.0.mlp.experts"]}
    checkpoint = Checkpoint(write_folder(tmp_path, tensors, config, num_layers=2, sizes=SIZES))
    assert checkpoint.typical_layer == 1
    assert "fp8" in checkpoint.describe()
    assert_layer(checkpoint, experts, 1)
    checkpoint.check_layer(0)
    source, parts = checkpoint.source(0, 1, "up")
    assert source == "bf16" and torch.equal(parts[0], plain.up[1])


def test_a_quantized_model_whose_experts_are_not_is_read(tmp_path: Path) -> None:
    """Also where the config names a method that is not read: the experts are what they are."""
    plain = random_experts(E, H, INNER, dtype=torch.float16)
    for method in ("fp8", "bitsandbytes"):
        folder = write_folder(tmp_path / method, layer_tensors(0, plain), {"quant_method": method}, sizes=SIZES)
        checkpoint = Checkpoint(folder)
        checkpoint.check_layer(0)
        assert checkpoint.source(0, 0, "down")[0] == "fp16"


# --- one tensor for all experts ---


def joined(projection: str, part: str) -> str:
    rest = "" if part == "weight" else f"_{part.removeprefix('weight_') if part.endswith('inv') else part}"
    return f"model.layers.0.mlp.experts.{projection}{rest}"


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("name", "block"), [("fp8", 32), ("fp8", 64), ("mxfp8", 0), ("nvfp4", 0), ("fp8_channel", 0), ("fp8_tensor", 0)]
)
def test_quantized_tensors_of_all_experts_are_cut(tmp_path: Path, name: str, block: int, swap: bool) -> None:
    quantizer = QUANTIZERS[name]
    make, config = quantizer.make, quantizer.config
    if block:  # 96 rows are three blocks of 32, and one and a half of 64
        make, config = fp8_block(torch.float32, "weight_scale_inv", block), {**config, "weight_block_size": [block] * 2}
    experts = quantized_layer(make, *SIZES)
    for matrices in experts:  # where one scale is for gate and up, it is the same
        for part in ("weight_scale", "weight_scale_2"):
            scale = matrices["gate"].tensors.get(part)
            if scale is not None and scale.numel() == 1:
                matrices["up"].tensors[part] = scale
                matrices["up"].parts[-1] = matrices["gate"].parts[-1]
    tensors = fused_names(experts, joined, swap=swap)
    if block == 64:
        # The blocks of a tensor of both do not end with gate: its own scales, and then each matrix's, are by rows.
        generator = torch.Generator().manual_seed(1)
        scale = torch.rand((E, -(-2 * INNER // block), H // block), generator=generator)
        tensors[joined("gate_up_proj", "weight_scale_inv")] = (scale.mT if swap else scale).contiguous()
        for expert, matrices in enumerate(experts):
            rows = scale[expert].repeat_interleave(block, 0)
            for projection, part in (("gate", rows[:INNER]), ("up", rows[INNER:])):
                matrices[projection].source = "fp8_block1x64"
                matrices[projection].parts[1] = part.contiguous()
    checkpoint = Checkpoint(write_folder(tmp_path, tensors, config, sizes=SIZES))
    assert_layer(checkpoint, experts)


def test_alternating_rows_are_cut(tmp_path: Path) -> None:
    """GPT-OSS: row 2 i is gate, row 2 i + 1 is up, bytes of a group of 32 in a dimension of their own."""
    experts = quantized_layer(mxfp4("blocks", "scales", torch.uint8, torch.uint8), *SIZES)
    tensors = fused_names(experts, lambda p, part: f"model.layers.0.mlp.experts.{p}_{part}", interleaved=True)
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            tensors[name] = tensor.unflatten(2, (-1, GROUP // 2))
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    checkpoint = Checkpoint(write_folder(tmp_path, tensors, config, sizes=SIZES))
    assert_layer(checkpoint, experts)
    assert checkpoint.biases(0, 1) is None
    first = tensors["model.layers.0.mlp.experts.gate_up_proj_blocks"][1, 3].flatten()
    assert torch.equal(checkpoint.source(0, 1, "up")[1][0][1], first)


@pytest.mark.parametrize("fused", [False, True])
def test_biases_are_read(tmp_path: Path, fused: bool) -> None:
    plain = random_experts(E, H, INNER)
    tensors = layer_tensors(0, plain, style="transposed" if fused else "long")
    biases = {"gate": torch.rand(E, INNER), "up": torch.rand(E, INNER), "down": torch.rand(E, H).bfloat16()}
    if fused:  # rows alternate where a tensor of all experts has a bias
        name = "model.layers.0.mlp.experts.gate_up_proj"
        tensors[name] = torch.stack((plain.gate, plain.up), 2).flatten(1, 2).mT.contiguous()
        tensors[name + "_bias"] = torch.stack((biases["gate"], biases["up"]), 2).flatten(1)
        tensors["model.layers.0.mlp.experts.down_proj_bias"] = biases["down"]
    else:
        for expert in range(E):
            for projection, stack in biases.items():
                tensors[f"model.layers.0.mlp.experts.{expert}.{projection}_proj.bias"] = stack[expert].clone()
    checkpoint = Checkpoint(write_folder(tmp_path, tensors, {}, sizes=SIZES))
    checkpoint.check_layer(0)
    for expert in range(E):
        for found, stack in zip(checkpoint.biases(0, expert), biases.values(), strict=True):
            assert torch.equal(found, stack[expert])
        for found, stack in zip(expert_weights(checkpoint, 0, expert), plain, strict=True):
            assert torch.equal(found, stack[expert])
    found = open_source(tmp_path, get_method("BF16")).biases(0, 1)
    assert all(torch.equal(bias, stack[1]) for bias, stack in zip(found, biases.values(), strict=True))


def test_scales_of_a_row_may_lie_either_way(tmp_path: Path) -> None:
    experts = quantized_layer(fp8_row(lambda n: (n, 1)), *SIZES)
    tensors = fused_names(experts, joined, swap=True)
    name = joined("down_proj", "weight_scale")
    tensors[name] = tensors[name].mT.contiguous()
    assert_layer(Checkpoint(write_folder(tmp_path, tensors, {"quant_method": "fp8"}, sizes=SIZES)), experts)


# --- refusals ---

NAME = "model.layers.0.mlp.experts.1.up_proj."


def without(end: str):
    """A change that takes all tensors whose names end so out of a folder."""

    def change(tensors: dict, config: dict) -> None:
        for name in [name for name in tensors if name.endswith(end)]:
            del tensors[name]

    return change


def with_tensor(part: str, *shape: int, dtype: torch.dtype = torch.float32, name: str = NAME):
    """A change that puts zeros in the place of a tensor of one expert."""
    return lambda tensors, config: tensors.update({name + part: torch.zeros(shape).to(dtype)})


def filled(part: str, value: float):
    return lambda tensors, config: tensors[NAME + part].fill_(value)


def reversed_order(tensors: dict, config: dict) -> None:
    tensors[NAME + "weight_g_idx"] = tensors[NAME + "weight_g_idx"].flip(0).contiguous()


def says(**values):
    return lambda tensors, config: config.update(values)


def says_of_weights(**values):
    return lambda tensors, config: config["config_groups"]["group_0"]["weights"].update(values)


def up_is_not_quantized(tensors: dict, config: dict) -> None:
    without("up_proj.weight_scale_inv")(tensors, config)
    for expert in range(E):
        with_tensor("weight", INNER, H, name=f"model.layers.0.mlp.experts.{expert}.up_proj.")(tensors, config)


FIRST = "model.layers.0.mlp.experts.0.gate_proj."
INT = torch.int32


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        # tensors that are not there, or there twice
        ("fp8", without("1.up_proj.weight_scale_inv"), "lacks weight_scale_inv of up of expert 1 in layer 0"),
        ("fp8", without("weight_scale_inv"), "lacks weight_scale_inv beside .*_proj.weight; fp8"),
        ("rawint4", without("weight_scale"), "lacks weight_scale beside .*weight_packed"),
        ("gptq", without("qzeros"), "lacks qzeros beside .*qweight; GPTQ int4 weights need it"),
        ("awq", without("1.up_proj.qweight"), "lacks qweight of up of expert 1"),
        ("nvfp4", without("weight_scale_2"), "lacks weight_scale_2 beside"),
        ("mxfp4", without(".scale"), "quantized in a way that kt_kernel does not read .weight I8"),
        ("fp8", with_tensor("weight", 1, name=NAME.removeprefix("model.")), "has two tensors for one weight"),
        ("fp8", with_tensor("bias", INNER), "has biases for up of layer 0 only"),
        ("fp8", with_tensor("down_proj", 1, name=NAME[:27]), "holds only .*down_proj.* of the experts of layer 0"),
        ("fp8", up_is_not_quantized, "a scale a block for gate and unquantized weights for up"),
        # of another type or shape
        ("fp8", with_tensor("weight", INNER, H, dtype=torch.float16), "weight has type F16; fp8 weights"),
        (
            "fp8",
            with_tensor("weight_scale_inv", 1, 2, dtype=torch.int64),
            "has type I64; .* F32 or BF16 or F8_E8M0 there",
        ),
        ("fp8", with_tensor("weight_scale_inv", 2, 2), r"_inv has shape \[2, 2\], but config.json .* means \[1, 2\]"),
        (
            "fp8",
            with_tensor("weight", INNER, H, dtype=torch.float8_e5m2, name=FIRST),
            "quantized in a way that kt_kernel does not read .weight F8_E5M2",
        ),
        ("rawint4", with_tensor("weight_packed", INNER, 48, dtype=INT), r"\[96, 48\], .* \[96, 24\] or \[96, 96\]"),
        ("gptq_sorted", with_tensor("g_idx", 5, dtype=INT), r"g_idx has shape \[5\], .* means \[192\]"),
        # with values they cannot have
        ("rawint4", with_tensor("weight_shape", 2, dtype=INT), r"weight_shape of \[0, 0\] but config.json means \[96"),
        ("gptq_sorted", filled("g_idx", 0), "order of activations .desc_act.*desc_act=false"),
        ("rawint4_sorted", filled("weight_g_idx", 0), "order of activations .*actorder: group.* actorder: weight"),
        ("rawint4_sorted", reversed_order, "up_proj.weight_packed has columns in the order of activations"),
        ("rawint4_sorted", with_tensor("weight_g_idx", 6, dtype=INT), r"weight_g_idx has shape \[6\], .* \[192\]"),
        ("nvfp4", filled("weight_scale_2", 0), "weight_scale_2 of 0, which is no scale"),
        ("nvfp4", filled("weight_scale_2", torch.inf), "weight_scale_2 of inf"),
        ("nvfp4_compressed", filled("weight_global_scale", torch.nan), "weight_global_scale of nan"),
        # a config that says what is not read, or something else than the tensors
        ("rawint4", with_tensor("weight_zero_point", 1, name=FIRST), "lacks weight_zero_point of gate of expert 1"),
        ("rawint4", says_of_weights(num_bits=8), "that has 8-bit weights"),
        ("rawint4", says(format="int-quantized"), "compressed-tensors int-quantized checkpoint, which"),
        ("rawint4", says_of_weights(group_size=64), "groups of 64 of 96 elements"),
        ("rawint4", says_of_weights(group_size=24), "groups of 24 of 192 elements"),
        ("rawint4", says_of_weights(group_size=96), r"weight_scale has shape .* means \[192, 1\]"),
        ("rawint4", says_of_weights(group_size="x"), "'x', which is no whole number"),
        ("rawint4", says_of_weights(group_size=0), "group_size .* is 0, which no weights have"),
        ("gptq", says(bits=8), "is a gptq checkpoint that has 8-bit weights"),
        ("gptq", says(bits=True), "True, which is no whole number"),
        ("gptq", says(checkpoint_format="marlin"), "gptq checkpoint that has checkpoint_format marlin"),
        ("gptq", says(quant_method="fp8"), "config.json of .* says fp8, but tensor .* is of GPTQ int4"),
        ("gptq", says(quant_method="quip"), "is a quip checkpoint, which kt_kernel does not read"),
        ("gptq", says(quant_method="awq"), r"qweight has shape \[12, 192\], .* means \[96, 24\]"),
        ("auto_round", says(packing_format="x"), "auto-round checkpoint that has packing_format x"),
        ("awq", says(version="gemv"), "awq checkpoint that has version gemv"),
        ("nvfp4", says(quant_algo="INT4_AWQ"), "is a modelopt INT4_AWQ checkpoint"),
        ("fp8", says(weight_block_size=[0, 128]), r"weight_block_size .* is \[0, 128\], which is no pair"),
        ("fp8", says(weight_block_size=128), "weight_block_size .* is 128, which is no pair"),
    ],
)
def test_a_wrong_checkpoint_is_refused_in_a_sentence(tmp_path: Path, name: str, change, words: str) -> None:
    experts = quantized_layer(QUANTIZERS[name].make, *SIZES)
    tensors, config = single_names(experts), json.loads(json.dumps(QUANTIZERS[name].config))
    change(tensors, config)
    folder = write_folder(tmp_path, tensors, config, sizes=SIZES)

    def read() -> None:
        checkpoint = Checkpoint(folder)
        checkpoint.check_layer(0)
        for expert in range(E):
            for projection in ("gate", "up", "down"):
                checkpoint.source(0, expert, projection)

    with pytest.raises(ValueError, match=words) as caught:
        read()
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_an_order_of_columns_that_was_never_set_is_theirs(tmp_path: Path) -> None:
    """compressed-tensors begins with -1, and reads an order that has it as columns in order."""
    experts = quantized_layer(QUANTIZERS["rawint4_sorted"].make, *SIZES)
    for matrix in (matrix for matrices in experts for matrix in matrices.values()):
        matrix.tensors["weight_g_idx"].fill_(-1)
    folder = write_folder(tmp_path, single_names(experts), QUANTIZERS["rawint4_sorted"].config, sizes=SIZES)
    assert_layer(Checkpoint(folder), experts)


def test_zero_points_beside_packed_int4_are_refused(tmp_path: Path) -> None:
    experts = quantized_layer(QUANTIZERS["rawint4"].make, *SIZES)
    for matrix in (matrix for matrices in experts for matrix in matrices.values()):
        matrix.tensors["weight_zero_point"] = torch.zeros(1, dtype=torch.int32)
    checkpoint = Checkpoint(write_folder(tmp_path, single_names(experts), QUANTIZERS["rawint4"].config, sizes=SIZES))
    with pytest.raises(
        ValueError, match="zero points, which kt_kernel does not read for compressed-tensors.*symmetric"
    ):
        checkpoint.check_layer(0)


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/etc/passwd", "a/../../b.safetensors", ""])
def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "model"
    experts = quantized_layer(QUANTIZERS["fp8"].make, *SIZES)
    tensors = single_names(experts)
    write_folder(folder, tensors, QUANTIZERS["fp8"].config, sizes=SIZES)
    save_file(tensors, tmp_path / "elsewhere.safetensors")
    weight_map = dict.fromkeys(tensors, "model.safetensors") | {NAME + "weight": file}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="which is not (in the folder|there)"):
        Checkpoint(folder)


@pytest.mark.parametrize("content", ['{"quantization_config": "fp8"}', '{"quantization_config": [1]}', "[" * 20000])
def test_a_hostile_config_is_refused(tmp_path: Path, content: str) -> None:
    write_folder(tmp_path, layer_tensors(0, random_experts(E, H, INNER)), {}, sizes=SIZES)
    if content.startswith("{"):
        content = json.dumps({**config_of(random_experts(E, H, INNER), 1), **json.loads(content)})
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="is no JSON|which is no JSON object"):
        Checkpoint(tmp_path)


# --- methods ---


def test_the_methods_are_those_of_the_flags() -> None:
    assert set(METHODS) == {
        "AMXINT8", "AMXINT4", "BF16", "FP8", "FP8_PERCHANNEL", "MXFP8", "RAWINT4", "GPTQ_INT4", "AWQ", "MXFP4", "NVFP4",
        "LLAMAFILE",
    }  # fmt: skip
    assert list(FLOAT_METHODS) == ["AMXINT8", "AMXINT4", "BF16"]
    assert {alias: get_method(alias).name for alias in ALIASES} == {"MOE_INT4": "AMXINT4", "MOE_INT8": "AMXINT8"}
    kinds = [kind for method in METHODS.values() for kind in method.sources]
    assert len(kinds) == len(set(kinds)), "one method keeps a kind"
    assert {source_kind(quantizer.make(32, 192, torch.Generator()).source) for quantizer in QUANTIZERS.values()} == (
        set(kinds) - {"gguf", "kt_int4", "kt_int8"}
    )
    assert method_of("bf16") is None
    assert [source_kind(name) for name in ("gguf:Q4_K", "kt_int8x2_rows", "fp16")] == ["gguf", "kt_int8", "fp16"]
    with pytest.raises(ValueError, match="SYCL_GPTQ_INT4 computes on Intel GPUs, .* use GPTQ_INT4"):
        get_method("SYCL_GPTQ_INT4")
    with pytest.raises(ValueError, match="method FP8 keeps the codes of quantized files.*AMXINT8, AMXINT4, BF16"):
        _ = METHODS["FP8"].layout


@pytest.mark.parametrize(
    ("layout", "methods"),
    [
        ("int8_n64k4_r512_v1", {"AMXINT8"}),
        ("int8_n64k4_v1", {"AMXINT8"}),
        ("int8fg64_n64k4_v1", {"AMXINT8"}),
        ("int4g128_n64k8_r512_v1", {"AMXINT4"}),
        ("int4g32_n64k8_v1", {"RAWINT4", "GPTQ_INT4"}),
        ("int4fg64_n64k8_v1", {"AMXINT4", "RAWINT4", "GPTQ_INT4"}),
        ("int4zg128_n64k8_v1", {"GPTQ_INT4", "AWQ"}),
        ("fp8fg128_n64k4_v1", {"FP8", "FP8_PERCHANNEL"}),
        ("int6kg16_n64k16_v1", {"LLAMAFILE"}),
        ("bf16_n64k2_v1", set(METHODS) - {"AMXINT8", "AMXINT4"}),
        ("odd", set()),
    ],
)
def test_a_method_has_some_layouts(layout: str, methods: set[str]) -> None:
    assert {name for name, method in METHODS.items() if method.can_have(layout)} == methods


@pytest.mark.parametrize(
    ("layout", "name"),
    [("int4g32_n64k8_r512_v1", "int4"), ("int4hg128_n64k8_v1", "int4h"), ("int6kg16_n64k16_v1", "int6k"),
     ("fp8fg128_n64k4_v1", "fp8f"), ("fp8f_n64k4_v1", "fp8f"), ("bf16_n64k2_v1", "bf16"), ("int4mg32_x", "int4m")],
)  # fmt: skip
def test_a_layout_begins_with_its_format(layout: str, name: str) -> None:
    assert weight_dtype_of(layout) == name


NOT_OF_GGUF = [method for method in METHODS if method not in (*FLOAT_METHODS, "LLAMAFILE")]


@pytest.mark.parametrize("method", NOT_OF_GGUF)
@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_methods_for_other_files_are_refused_with_that_of_gguf(tmp_path: Path, kind: str, method: str) -> None:
    write_gguf(tmp_path / "x.gguf", {0: random_layer(kind)}, sizes_of(2, 64, 32, 1))
    words = rf"^{tmp_path} holds GGUF weights \({kind}\), but method {method} is for other files; give --kt-method "
    with pytest.raises(ValueError, match=words + r"LLAMAFILE, AMXINT8, AMXINT4 or BF16\.$"):
        open_source(tmp_path, get_method(method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", kt_cases.FORMS)
def test_methods_for_other_files_are_refused_with_that_of_converted_ones(
    tmp_path: Path, form: str, method: str
) -> None:
    kt_cases.write(form, tmp_path, kt_cases.SMALL)
    if method == "AMXINT8":
        assert source_kind(open_source(tmp_path, get_method(method)).checkpoint.source(0, 0, "up")[0]) == "kt_int8"
        return
    words = f"^{tmp_path} was converted for method AMXINT8, but method {method} was asked for; "
    with pytest.raises(ValueError, match=words + r"give --kt-method AMXINT8 or another folder\.$"):
        open_source(tmp_path, get_method(method))


@pytest.mark.parametrize(
    ("name", "method", "words"),
    [
        ("fp8", "RAWINT4", "fp8 weights with a scale a block of 128 x 128, but method RAWINT4 .* --kt-method FP8,"),
        ("fp8_channel", "FP8", "holds fp8 weights with a scale a row, .* give --kt-method FP8_PERCHANNEL, "),
        ("rawint4", "GPTQ_INT4", "compressed-tensors int4 .*groups of 32, .* RAWINT4, AMXINT8, AMXINT4 or BF16"),
        ("awq", "LLAMAFILE", "AWQ int4 weights, groups of 32, .* --kt-method AWQ, "),
        ("mxfp4", "NVFP4", "MXFP4 weights, .* --kt-method MXFP4, "),
        (None, "FP8", r"unquantized weights \(BF16\), .* give --kt-method AMXINT8, AMXINT4 or BF16"),
    ],
)
def test_a_method_for_other_files_is_refused_with_theirs(
    tmp_path: Path, name: str | None, method: str, words: str
) -> None:
    if name is None:
        write_folder(tmp_path, layer_tensors(0, random_experts(E, H, INNER)), {}, sizes=SIZES)
    else:
        experts = quantized_layer(QUANTIZERS[name].make, *SIZES)
        write_folder(tmp_path, single_names(experts), QUANTIZERS[name].config, sizes=SIZES)
    with pytest.raises(ValueError, match=words):
        open_source(tmp_path, get_method(method))
