"""HybridMoE in a plain PyTorch program: what it computes, what it saves, and what it refuses."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import kt_files
import pytest
import torch
from checkpoints import Experts, random_experts, write_checkpoint
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from gguf_files import random_biases, random_layer, sizes_of, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_checkpoints import QUANTIZERS, quantized_layer, single_names, write_folder
from reference import BOUNDS, moe_reference, relative_error
from wrapper_cases import INNER, METHOD_NAMES, E, H, K, batch
from wrapper_cases import make as make_wrapper

from kt_kernel import HybridMoE
from kt_kernel.activations import Activation
from kt_kernel.config import EngineConfig, MoEConfig
from kt_kernel.converter import ConvertOptions, convert
from kt_kernel.device_experts import DeviceWeights, by_every_expert, by_expert, by_pair
from kt_kernel.methods import get_method

ENGINE = EngineConfig(num_threads=2, num_nodes=1)


@pytest.fixture(scope="module")
def experts() -> Experts:
    return random_experts(E, H, INNER)


def make(experts: Experts, **options) -> HybridMoE:
    gate_up = torch.cat((experts.gate, experts.up), dim=1)
    return HybridMoE.from_tensors(gate_up, experts.down, top_k=K, engine=ENGINE, **options)


# --- numbers ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("on_device", [0, 3, E])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_the_layer_equals_the_torch_moe(experts: Experts, method: str, on_device: int, dtype: torch.dtype) -> None:
    module = make(experts, method=method, num_gpu_experts=on_device)
    hidden, ids, weights = batch(33, dtype=dtype)
    ids[3] = -1
    ids[4, 0] = -1
    output = module(hidden, ids, weights)
    assert output.dtype == dtype and output.shape == hidden.shape
    assert torch.equal(output[3], torch.zeros_like(output[3]))
    # the device's share is bf16 products with bf16 between them: the bound of BF16 holds for it
    assert relative_error(output, moe_reference(hidden, ids, weights, *experts)) < BOUNDS[method]
    rows = module.wrapper.moe.counters()["rows"]
    assert rows == int(((ids >= on_device)).sum()), "the CPU computes its own experts and no others"


@settings(max_examples=20, deadline=None)
@given(
    mask=st.lists(st.booleans(), min_size=1, max_size=7),
    tokens=st.integers(0, 9),
    hidden=st.integers(1, 6).map(lambda n: 16 * n),
    inter=st.integers(1, 6).map(lambda n: 16 * n),
    data=st.data(),
)
def test_any_placement_equals_the_torch_moe(mask, tokens, hidden, inter, data) -> None:
    num_experts = len(mask)
    top_k = data.draw(st.integers(1, num_experts))
    seed = data.draw(st.integers(0, 1000))
    weights = random_experts(num_experts, hidden, inter, seed=seed)
    module = HybridMoE.from_tensors(
        (weights.gate, weights.up), weights.down, top_k=top_k, gpu_experts_mask=torch.tensor(mask), engine=ENGINE
    )
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator)
    ids = torch.randint(-1, num_experts, (tokens, top_k), generator=generator, dtype=torch.int32)
    scales = torch.rand(tokens, top_k, generator=generator)
    output = module(x, ids, scales)
    wanted = moe_reference(x, ids, scales, *weights)
    assert (output.double() - wanted).norm() <= 4 * BOUNDS["BF16"] * wanted.norm() + 1e-6


def test_leading_dimensions_are_kept(experts: Experts) -> None:
    module = make(experts, num_gpu_experts=2)
    hidden, ids, weights = batch(6)
    output = module(hidden.view(2, 3, H), ids, weights)
    assert output.shape == (2, 3, H)
    assert torch.equal(output.view(6, H), module(hidden, ids, weights))


@pytest.mark.parametrize("form", [by_pair, by_every_expert])
def test_forms_of_the_device_part_agree(experts: Experts, form) -> None:
    """Forms for CUDA (no shape depends on the routing) against the one of the CPU: sums in another order only."""
    gate_up = torch.cat((experts.gate, experts.up), dim=1).float()
    hidden, row, weights = batch(7, dtype=torch.float32)
    row[2] = -1
    row[3, 1] = -1
    row[4] = 5  # one expert twice in a row
    biases = torch.randn(E, 2 * INNER), torch.randn(E, H)
    own = DeviceWeights(gate_up, experts.down.float(), *biases, Activation("silu", 0.5, 1.702))
    arguments = (hidden, row, weights, own)
    # 1e-5: H + I products of normal values, each rounded at 2^-24
    torch.testing.assert_close(form(*arguments), by_expert(*arguments), rtol=1e-5, atol=1e-6)


def test_forms_keep_an_infinite_absent_expert_out(experts: Experts) -> None:
    gate_up = torch.cat((experts.gate, experts.up), dim=1).float()
    gate_up[0] = torch.inf
    hidden, row, weights = batch(4, dtype=torch.float32)
    row[row == 0] = -1
    for form in (by_expert, by_pair, by_every_expert):
        assert form(hidden, row, weights, DeviceWeights(gate_up, experts.down.float())).isfinite().all(), form


# --- from files ---


@pytest.mark.parametrize("converted", [False, True])
def test_a_path_gives_the_same_layer(tmp_path: Path, experts: Experts, converted: bool) -> None:
    folder = write_checkpoint(tmp_path / "model", {1: experts})
    method = "AMXINT8" if converted else "BF16"
    if converted:
        convert(ConvertOptions(str(folder), tmp_path / "packed", get_method(method)))
        folder = tmp_path / "packed"
    module = HybridMoE.from_path(folder, 1, method=method, num_gpu_experts=3, engine=ENGINE)
    assert module.config == MoEConfig(1, E, K, H, INNER)
    hidden, ids, weights = batch(9)
    output = module(hidden, ids, weights)
    assert relative_error(output, moe_reference(hidden, ids, weights, *experts)) < BOUNDS[method]
    if not converted:
        assert torch.equal(output, make(experts, num_gpu_experts=3)(hidden, ids, weights))
    with pytest.raises(ValueError, match="layer 0"):
        HybridMoE.from_path(folder, 0, method=method, engine=ENGINE)
    if converted:
        with pytest.raises(ValueError, match=r"was converted for method AMXINT8, .*; pass method=\"AMXINT8\"") as error:
            HybridMoE.from_path(folder, 1, method="BF16", engine=ENGINE)
        assert "--" not in str(error.value)
        assert HybridMoE.from_path(folder, 1, engine=ENGINE).wrapper.method == method


def gguf_file(folder: Path) -> tuple[Path, list[torch.Tensor], list[torch.Tensor]]:
    """A GGUF file of layer 1, and what it means: weights and biases of gate, up and down of all experts."""
    layer = random_layer("Q8_0", num_experts=E, hidden=H, inter=INNER)
    biases = random_biases(layer, "F32")
    path = write_gguf(folder / "model.gguf", {1: layer}, sizes_of(E, H, INNER, 2), biases={1: biases})
    weights = [dequantize(rows, GGMLQuantizationType[kind]) for kind, rows in layer.values()]
    vectors = [rows.view("f4") for _, rows in biases.values()]
    return path, list(map(torch.from_numpy, weights)), list(map(torch.from_numpy, vectors))


@pytest.mark.parametrize("on_device", [0, 3])
@pytest.mark.parametrize("method", ["LLAMAFILE", "AMXINT8", "BF16"])
def test_a_gguf_file_gives_the_same_layer(tmp_path: Path, method: str, on_device: int) -> None:
    path, weights, biases = gguf_file(tmp_path)
    options = {"method": method, "num_gpu_experts": on_device, "engine": ENGINE}
    with pytest.raises(ValueError, match="model.gguf has no config.json, which would name the activation .*pass activ"):
        HybridMoE.from_path(path, 1, **options)
    act = Activation("silu", 7.0, 1.702)
    module = HybridMoE.from_path(path, 1, activation=act, **options)
    assert module.config == MoEConfig(1, E, K, H, INNER, act)
    hidden, ids, shares = batch(9)
    wanted = moe_reference(hidden, ids, shares, *weights, act=act, biases=tuple(biases))
    assert relative_error(module(hidden, ids, shares), wanted) < BOUNDS["BF16" if method == "BF16" else "AMXINT8"]
    with pytest.raises(ValueError, match="no experts in layer 0"):
        HybridMoE.from_path(path, 0, activation=act, **options)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_act": "gelu"}))
    assert HybridMoE.from_path(tmp_path, 1, **options).config.activation == Activation("gelu")


def kt_tree(folder: Path) -> Path:
    """Experts that kt-kernel converted for two NUMA nodes, without the config.json of the model."""
    for name, contents in kt_files.tree_files(kt_files.Case("INT8", 2, E, H, 128)).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(contents)
    return folder


def test_a_kt_tree_gives_the_same_layer(tmp_path: Path) -> None:
    folder = kt_tree(tmp_path)
    options = {"method": "AMXINT8", "engine": ENGINE}
    with pytest.raises(ValueError, match="does not say how many experts a token is sent to; pass top_k"):
        HybridMoE.from_path(folder, 0, activation=Activation(), **options)
    with pytest.raises(ValueError, match="has no config.json"):
        HybridMoE.from_path(folder, 0, top_k=K, **options)
    options |= {"top_k": K, "activation": Activation()}
    module = HybridMoE.from_path(folder, 0, **options)
    assert module.config == MoEConfig(0, E, K, H, 128)
    wrapper = make_wrapper("AMXINT8", layer_idx=0, moe_intermediate_size=128, weight_path=str(folder))
    wrapper.load_weights()
    inputs = batch(9)
    found = module(*inputs)
    assert torch.equal(found, wrapper.forward(*inputs))
    mixed = HybridMoE.from_path(folder, 0, num_gpu_experts=3, **options)(*inputs)
    assert relative_error(mixed, found) < BOUNDS["AMXINT8"]


def test_experts_converted_from_gguf_say_their_sizes(tmp_path: Path) -> None:
    layer = random_layer("Q8_0", num_experts=E, hidden=H, inter=INNER)
    path = write_gguf(tmp_path / "model.gguf", {1: layer}, sizes_of(E, H, INNER, 2))
    convert(ConvertOptions(str(path), tmp_path / "packed", get_method("AMXINT8")))
    module = HybridMoE.from_path(tmp_path / "packed", 1, activation=Activation(), engine=ENGINE)
    assert module.config == MoEConfig(1, E, K, H, INNER) and module.wrapper.method == "AMXINT8"
    wanted = HybridMoE.from_path(path, 1, method="AMXINT8", activation=Activation(), engine=ENGINE)
    assert torch.equal(module(*batch(9)), wanted(*batch(9)))


# --- state ---


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("on_device", [0, 3, E])
def test_a_state_dict_makes_the_same_layer(tmp_path: Path, experts: Experts, method: str, on_device: int) -> None:
    parent = torch.nn.Sequential(make(experts, method=method, num_gpu_experts=on_device))
    torch.save(parent.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = torch.nn.Sequential(
        HybridMoE(MoEConfig(0, E, K, H, INNER), method=method, num_gpu_experts=on_device, engine=ENGINE)
    )
    with pytest.raises(RuntimeError, match="layer 0 has no weights yet; make it with from_tensors"):
        other[0](*batch(1))
    assert other.load_state_dict(state).missing_keys == []
    assert torch.equal(other[0](*batch(5)), parent[0](*batch(5)))


@pytest.mark.parametrize("on_device", [0, 3])
@pytest.mark.parametrize("method", ["FP8", "RAWINT4", "AMXINT8"])
def test_a_state_dict_of_the_codes_of_files_makes_the_same_layer(tmp_path: Path, method: str, on_device: int) -> None:
    options = {"method": method, "num_gpu_experts": on_device, "engine": ENGINE}
    if method == "AMXINT8":  # two NUMA parts: w2 has a layout of its own
        parent = HybridMoE.from_path(kt_tree(tmp_path), 0, top_k=K, activation=Activation(), **options)
        assert parent.wrapper.moe.layouts[0] != parent.wrapper.moe.layouts[1]
    else:
        quantizer = QUANTIZERS[method.lower()]
        tensors = single_names(quantized_layer(quantizer.make, E, H, INNER))
        parent = HybridMoE.from_path(
            write_folder(tmp_path, tensors, quantizer.config, sizes=(E, H, INNER)), 0, **options
        )
    state = parent.state_dict()
    other = HybridMoE(parent.config, **options)
    assert other.load_state_dict(state).missing_keys == []
    assert other.wrapper.moe.layouts == parent.wrapper.moe.layouts
    assert torch.equal(other(*batch(5)), parent(*batch(5)))
    key = next(key for key in state if key.endswith(".w13"))
    for wrong in {"FP8", "AMXINT4"} - {method}:
        words = rf"(?s)Missing .*cpu_experts.(fp8f|int4g32_).*Unexpected .*{key}"
        with pytest.raises(RuntimeError, match=words) as error:
            HybridMoE(parent.config, **(options | {"method": wrong})).load_state_dict(state)
        assert key.removesuffix(".w13") not in str(error.value).split("Unexpected")[0]
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"cpu_experts.odd.w13\""):
        other.load_state_dict(state | {"cpu_experts.odd.w13": state[key]})


def test_a_state_dict_of_another_layer_is_refused(experts: Experts) -> None:
    module = make(experts, num_gpu_experts=3)
    state = module.state_dict()
    config = MoEConfig(0, E, K, H, INNER)
    other = HybridMoE(config, method="AMXINT8", num_gpu_experts=3, engine=ENGINE)
    with pytest.raises(RuntimeError, match=r"cpu_experts.int8_n64k4_r512_v1.w13"):
        other.load_state_dict(state)
    mask = torch.tensor([True] * 2 + [False] * 5 + [True])
    other = HybridMoE(config, gpu_experts_mask=mask, engine=ENGINE)
    with pytest.raises(RuntimeError, match="gpu_experts_mask differs from the module's; make the module with the mask"):
        other.load_state_dict(state)
    broken = dict(state)
    name = next(key for key in broken if key.endswith(".w2"))
    broken[name] = broken[name][:, :-64]
    with pytest.raises(RuntimeError, match="cannot be loaded: w2 is"):
        module.load_state_dict(broken)


def test_it_is_neither_copied_nor_pickled(experts: Experts, tmp_path: Path) -> None:
    module = make(experts)
    with pytest.raises(TypeError, match="cannot be copied: its experts live in the library; make another"):
        copy.deepcopy(module)
    with pytest.raises(TypeError, match="cannot be pickled: its experts live in the library; save its state_dict"):
        torch.save(module, tmp_path / "module.pt")


# --- autograd and torch.compile ---


def test_it_is_for_inference_only(experts: Experts) -> None:
    module = make(experts, num_gpu_experts=3)
    hidden, ids, weights = batch(4, dtype=torch.float32)
    plain = module(hidden, ids, weights)
    hidden.requires_grad_()
    output = module(hidden, ids, weights)
    assert torch.equal(output.detach(), plain)
    with pytest.raises(RuntimeError, match=r"no gradient; run the model under torch.no_grad\(\)"):
        output.sum().backward()
    with torch.no_grad():
        assert not module(hidden, ids, weights).requires_grad
    module.train()
    with pytest.raises(RuntimeError, match=r"cannot be trained; call eval\(\) on the model"):
        module(hidden, ids, weights)


@pytest.mark.parametrize("on_device", [0, 3])
def test_it_compiles_into_one_graph(experts: Experts, on_device: int) -> None:
    module = make(experts, num_gpu_experts=on_device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 3, 1):
        arguments = batch(tokens, seed=tokens)
        with torch.no_grad():
            assert torch.equal(compiled(*arguments), module(*arguments))


def test_the_operator_passes_opcheck(experts: Experts) -> None:
    gate_up = torch.cat((experts.gate, experts.up), dim=1)
    hidden, ids, weights = batch(4)
    torch.library.opcheck(
        torch.ops.kt_kernel.device_experts.default, (hidden, ids, weights, gate_up, experts.down, torch.arange(E))
    )


def test_a_module_of_many_layers_runs(experts: Experts) -> None:
    """Submitted and fetched in order, each layer on the last one's output."""
    layers = [make(random_experts(E, H, INNER, seed=seed), num_gpu_experts=seed, layer_idx=seed) for seed in range(3)]
    hidden, ids, weights = batch(5, dtype=torch.float32)
    wanted = hidden.double()
    for seed, layer in enumerate(layers):
        hidden = hidden + layer(hidden, ids, weights)
        wanted = wanted + moe_reference(wanted, ids, weights, *random_experts(E, H, INNER, seed=seed))
    assert relative_error(hidden, wanted) < 3 * BOUNDS["BF16"]


# --- refusals ---


def test_wrong_inputs_are_refused_and_leave_it_usable(experts: Experts) -> None:
    module = make(experts, num_gpu_experts=3)
    hidden, ids, weights = batch(4)
    good = module(hidden, ids, weights)
    with pytest.raises(ValueError, match=rf"hidden_states has shape \[4, 16\]; its last dimension must be {H}"):
        module(hidden[:, :16], ids, weights)
    with pytest.raises(ValueError, match=r"topk_ids has shape \[3, 2\]; it must be \[4, 2\]"):
        module(hidden, ids[:3], weights)
    for wrong in (E, -2):
        bad = ids.clone()
        bad[1, 1] = wrong
        with pytest.raises((ValueError, RuntimeError), match=rf"{wrong}.*expert ids are"):
            module(hidden, bad, weights)
    with pytest.raises(ValueError, match="hidden_states is on meta and the module's device experts are on cpu"):
        module(hidden.to("meta"), ids, weights)
    assert torch.equal(module(hidden, ids, weights), good)


def test_wrong_weights_are_refused(experts: Experts) -> None:
    gate_up = torch.cat((experts.gate, experts.up), dim=1)
    with pytest.raises(ValueError, match=r"gate_up has shape \[8, 191, 192\]; it must be"):
        HybridMoE.from_tensors(gate_up[:, 1:], experts.down, top_k=K)
    with pytest.raises(ValueError, match=r"down_proj has shape \[8, 192, 95\]"):
        HybridMoE.from_tensors(gate_up, experts.down[:, :, 1:], top_k=K)
    with pytest.raises(ValueError, match="top_k is 9, above num_experts = 8"):
        HybridMoE.from_tensors(gate_up, experts.down, top_k=9)
    with pytest.raises(ValueError, match="method 'NOPE' is unknown"):
        HybridMoE.from_tensors(gate_up, experts.down, top_k=K, method="NOPE")
    with pytest.raises(ValueError, match=r"gpu_experts_mask is torch.bool of shape \[3\]"):
        HybridMoE.from_tensors(gate_up, experts.down, top_k=K, gpu_experts_mask=torch.ones(3, dtype=torch.bool))


def test_it_is_imported_when_it_is_asked_for() -> None:
    program = (
        "import sys, kt_kernel\n"
        "assert 'kt_kernel.hybrid_moe' not in sys.modules\n"
        "assert kt_kernel.HybridMoE.__name__ == 'HybridMoE' and 'HybridMoE' in kt_kernel.__all__\n"
        "assert not hasattr(kt_kernel, 'Nothing')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
