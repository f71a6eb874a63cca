"""A tiny model in every format: what the files mean, what is kept of them, and what the layer computes.

The truth is the dequantized twin that scripts/write_formats.py makes from the codes before it packs them, and a numpy
decoder of what the reader finds in the files (format_oracles.py): neither has anything of csrc/.

Bounds on the relative error of a layer (see reference.py), in whose terms u = 2^-8:

bf16 activations   2^-6, as there for BF16: the twin's weights are rounded to bf16 once more, which is u / 2 in a matrix
                   at most, about u / 4 on average, and is covered by the x that is bf16 already and so counts once.
int8 in blocks     the largest of 128 normal values is about 2.7 sigma, so a step is 2.7 / 127 sigma and its error
                   2.7 / 127 / sqrt(12) = 0.006 sigma; x is seen by gate and up, so twice: 0.012. The intermediate, a
                   product of two nearly normal values, has its largest at about 6 sigma: 0.014. With bf16 output
                   sqrt(0.012^2 + 0.014^2) + u = 0.022.
int8 a row         (what kt-kernel converted, where one scale is for the whole row) as there for AMXINT8.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import format_models
import gguf_files
import models
import pytest
import torch
from format_models import FORMS, MODEL, Form, Pair, expert_stacks
from format_oracles import decode
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from models import TinyModel
from reference import BOUNDS, moe_reference, relative_error
from torch import Tensor

from kt_kernel import KTMoEWrapper
from kt_kernel.checkpoint import PROJECTIONS, open_checkpoint
from kt_kernel.methods import get_method, weight_dtype_of

BLOCK_BOUND = 0.022
BOUND_OF = dict.fromkeys(("bf16", "fp8", "fp8f"), BOUNDS["BF16"]) | {"int8": BOUNDS["AMXINT8"]}
IDS = [form.name for form in FORMS]
# All but what kt-kernel converted, which is of one method.
DECODED = [form for form in FORMS if not form.name.startswith("AMX")]
LAYER = 1
# Where SGLang places experts: id p computes the model's expert MAPPING[p].
MAPPING = torch.roll(torch.arange(MODEL.num_experts), 3)
# Parts of converted files are multiples of 128 columns.
WIDE = dataclasses.replace(MODEL, intermediate_size=512)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("source"), MODEL)


@pytest.fixture(scope="module")
def wide_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("wide"), WIDE)


@pytest.fixture(scope="module")
def pairs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Each format, written when it is first asked for."""

    class Written(dict):
        def __missing__(self, name: str) -> Pair:
            self[name] = format_models.write_pair(source, tmp_path_factory.mktemp("format"), name)
            return self[name]

    return Written()


def wrapper_of(path: Path, method: str, model: TinyModel = MODEL, *, pools: int | None = 1) -> KTMoEWrapper:
    """The layer with its experts placed by MAPPING."""
    wrapper = KTMoEWrapper(
        layer_idx=LAYER,
        num_experts=model.num_experts,
        num_experts_per_tok=model.top_k,
        hidden_size=model.hidden_size,
        moe_intermediate_size=model.intermediate_size,
        cpuinfer_threads=2,
        threadpool_count=pools,
        weight_path=str(path),
        method=method,
    )
    wrapper.load_weights(MAPPING)
    return wrapper


def batch(wrapper: KTMoEWrapper, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, ids and weights of a forward."""
    config, generator = wrapper.config, torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, config.hidden_size, generator=generator).bfloat16()
    ids = torch.rand(tokens, config.num_experts, generator=generator).argsort(dim=1)[:, : config.top_k].contiguous()
    return hidden, ids, torch.rand(tokens, config.top_k, generator=generator) + 0.1


def error_of(wrapper: KTMoEWrapper, experts: tuple[Tensor, ...], tokens: int = 24) -> float:
    """Relative error of a forward against the experts of a model: gate, up and down."""
    inputs = batch(wrapper, tokens)
    wanted = moe_reference(*inputs, *(stack[MAPPING] for stack in experts))
    return relative_error(wrapper.forward(*inputs, None), wanted)


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_the_files_mean_the_twin(pairs: dict[str, Pair], form: Form) -> None:
    """Reader and numpy decoder: what csrc/ does not touch."""
    pair = pairs[form.name]
    checkpoint = open_checkpoint(pair.folder, form.method)
    for layer in MODEL.moe_layers:
        checkpoint.check_layer(layer)
        for projection, matrices in zip(PROJECTIONS, expert_stacks(pair.twin, layer), strict=True):
            for expert in (0, MODEL.num_experts - 1):
                expected = matrices[expert]
                kind, parts = checkpoint.source(layer, expert, projection)
                found = torch.from_numpy(decode(kind, parts, *expected.shape))
                if form.is_exact:
                    assert torch.equal(found, expected.float())
                # NVFP4 multiplies its two scales first in one of the two: a last bit of fp32, and so of bf16 at times
                torch.testing.assert_close(
                    found.bfloat16(), expected, rtol=2**-7 if form.name == "NVFP4" else 0, atol=0
                )


@pytest.mark.parametrize("tokens", [1, 24])
@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_a_layer_computes_what_its_twin_does(pairs: dict[str, Pair], source: Path, form: Form, tokens: int) -> None:
    pair = pairs[form.name]
    wrapper = wrapper_of(pair.folder, form.method)
    kept = tuple(weight_dtype_of(layout) for layout in wrapper.moe.layouts)
    assert kept == form.kept
    bound = BOUND_OF.get(kept[0], BLOCK_BOUND)
    error = error_of(wrapper, expert_stacks(pair.twin, LAYER), tokens)
    print(f"{form.name}: {error:.4f} of {bound:.4f}")
    assert error < bound
    if tokens > 1 and form.name != "LLAMAFILE:BF16":
        # what the format rounded away is seen: these are its own codes
        assert error_of(wrapper, expert_stacks(source, LAYER), tokens) > error


@pytest.mark.parametrize("method", ["BF16", "AMXINT8"])
@pytest.mark.parametrize("form", DECODED, ids=[form.name for form in DECODED])
def test_a_method_for_floats_takes_every_checkpoint(pairs: dict[str, Pair], form: Form, method: str) -> None:
    pair = pairs[form.name]
    wrapper = wrapper_of(pair.folder, method)
    assert wrapper.moe.layouts == (get_method(method).layout,) * 2
    assert error_of(wrapper, expert_stacks(pair.twin, LAYER)) < BOUNDS[method]


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("method", ["AMXINT8", "AMXINT4"])
def test_files_for_any_number_of_nodes_serve_any_number_of_pools(
    wide_source: Path, tmp_path: Path, method: str, parts: int
) -> None:
    """Of pools there are as many as were asked for, up to the nodes of the machine; tests/cpp has several on any."""
    pair = format_models.write_pair(wide_source, tmp_path, f"{method}:{parts}")
    alone = wrapper_of(pair.folder, method, WIDE)
    assert error_of(alone, expert_stacks(pair.twin, LAYER)) < BOUNDS["AMXINT8"]
    inputs = batch(alone, 24)
    for pools in (None, 2):
        several = wrapper_of(pair.folder, method, WIDE, pools=pools)
        assert torch.equal(several.forward(*inputs, None), alone.forward(*inputs, None)), f"{pools} pools"


# Types of gate, up and down, hidden and intermediate size, weight formats of w13 and w2. Sizes that are no multiple of
# 64 where the blocks allow it; where gate and up are of two types, no layout holds both.
GGUF_LAYERS = (
    *(
        (kind, 160, 96, (kept, kept))
        for kind, kept in (
            ("Q4_0", "int4h"), ("Q4_1", "int4m"), ("Q5_0", "int5h"), ("Q5_1", "int5m"), ("Q8_0", "int8h"),
            ("IQ4_NL", "iq4h"), ("MXFP4", "fp4"), ("BF16", "bf16"), ("F16", "bf16"), ("F32", "bf16"),
        )
    ),
    *(
        (kind, 512, 256, (kept, kept))
        for kind, kept in (
            ("Q2_K", "int2km"), ("Q3_K", "int3k"), ("Q4_K", "int4km"), ("Q5_K", "int5km"), ("Q6_K", "int6k"),
            ("IQ4_XS", "iq4k"),
        )
    ),
    (("Q2_K", "Q2_K", "IQ4_NL"), 256, 96, ("int2km", "iq4h")),
    (("Q4_K", "Q6_K", "Q8_0"), 256, 160, ("bf16", "int8h")),
)  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 24])
@pytest.mark.parametrize(("types", "hidden", "inter", "kept"), GGUF_LAYERS)
def test_a_layer_of_every_type_of_gguf(
    tmp_path: Path, types: str | tuple[str, str, str], hidden: int, inter: int, kept: tuple[str, str], tokens: int
) -> None:
    """Random codes; what they mean is said by the gguf package."""
    model = dataclasses.replace(MODEL, hidden_size=hidden, intermediate_size=inter)
    layer = gguf_files.random_layer(types, num_experts=model.num_experts, hidden=hidden, inter=inter)
    sizes = gguf_files.sizes_of(model.num_experts, hidden, inter, LAYER + 1)
    wrapper = wrapper_of(gguf_files.write_gguf(tmp_path / "x.gguf", {LAYER: layer}, sizes), "LLAMAFILE", model)
    assert tuple(weight_dtype_of(layout) for layout in wrapper.moe.layouts) == kept
    stacks = (torch.from_numpy(dequantize(rows, GGMLQuantizationType[kind])) for kind, rows in layer.values())
    bound = max(BOUND_OF.get(name, BLOCK_BOUND) for name in kept)
    error = error_of(wrapper, tuple(stacks), tokens)
    print(f"{types}: {error:.4f} of {bound:.4f}")
    assert error < bound
