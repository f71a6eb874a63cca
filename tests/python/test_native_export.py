"""Experts written back as the codes and scales of their files, cut for the ranks of a GPU group, as the fork has it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from quantized_checkpoints import fp8_block, fp8_row, mxfp4, mxfp8, pack_quantized
from torch import Tensor

from kt_kernel.config import EngineConfig, MoEConfig
from kt_kernel.experts import CpuExperts, get_engine

E, H, INNER = 2, 256, 512
SHAPES = {"gate": (INNER, H), "up": (INNER, H), "down": (H, INNER)}

SOURCES: dict[str, Callable] = {
    "RAWINT4": pack_quantized(32, torch.uint8, torch.bfloat16),
    "FP8": fp8_block(torch.float32, "weight_scale_inv"),
    "FP8_PERCHANNEL": fp8_row(lambda n: (n,)),
    "MXFP4": mxfp4("weight", "scale", torch.uint8, torch.uint8),
    "MXFP8": mxfp8("weight_scale_inv", torch.uint8),
}


def scale_in_a_buffer(method: str, scale: Tensor) -> Tensor:
    """A scale as SGLang's fork has it on a GPU: e8m0 beside E2M1 becomes bf16."""
    if method != "MXFP4":
        return scale.view(torch.uint8) if scale.dtype not in (torch.bfloat16, torch.float32) else scale
    return (scale.view(torch.uint8).to(torch.int32) - 127).float().exp2().bfloat16()


def columns(method: str, tensor: Tensor, ranks: int, rank: int) -> Tensor:
    """A rank's columns of down or its scales; one scale a row is every rank's."""
    return tensor if method == "FP8_PERCHANNEL" and tensor.dim() == 1 else tensor.chunk(ranks, dim=1)[rank]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", SOURCES)
def test_an_expert_comes_back_as_it_was_loaded(method: str, ranks: int) -> None:
    generator = torch.Generator().manual_seed(7)
    experts = [{name: SOURCES[method](*shape, generator) for name, shape in SHAPES.items()} for _ in range(E)]
    source = experts[0]["gate"].source
    layouts = tuple(
        torch.ops.kt_kernel.source_layout(experts[0][name].parts, source, *SHAPES[name]) for name in ("gate", "down")
    )
    config = MoEConfig(layer_idx=0, num_experts=E, top_k=1, hidden_size=H, intermediate_size=INNER)
    layer = CpuExperts(config, layouts=layouts, engine=get_engine(EngineConfig.resolve(2)))
    parts = {name: [part for expert in experts for part in expert[name].parts] for name in SHAPES}
    layer.load_sources(range(E), source, source, **parts)

    for e, matrices in enumerate(experts):
        weights, scales = ({name: matrices[name].parts[i].contiguous() for name in SHAPES} for i in range(2))
        weights = {name: tensor.view(torch.uint8) for name, tensor in weights.items()}
        scales = {name: scale_in_a_buffer(method, tensor) for name, tensor in scales.items()}
        wanted = [
            (
                torch.cat([kind["gate"].chunk(ranks)[r], kind["up"].chunk(ranks)[r]]).contiguous(),
                columns(method, kind["down"], ranks, r).contiguous(),
            )
            for kind in (weights, scales)
            for r in range(ranks)
        ]
        found = [tuple(torch.zeros_like(tensor) for tensor in pair) for pair in wanted]
        addresses = [[pair[i].data_ptr() for pair in found] for i in range(2)]
        w13, w2 = addresses
        layer.wait_written(layer.write_expert(e, w13[:ranks], w2[:ranks], w13[ranks:], w2[ranks:]))
        for have, want in zip(found, wanted, strict=True):
            for a, b in zip(have, want, strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_ranks_that_cut_a_block_are_refused() -> None:
    layouts = ("fp8fg128_n64k4_v1",) * 2
    config = MoEConfig(layer_idx=3, num_experts=1, top_k=1, hidden_size=H, intermediate_size=INNER)
    layer = CpuExperts(config, layouts=layouts, engine=get_engine(EngineConfig.resolve(2)))
    addresses = [[4096 * i for i in range(first, first + 8)] for first in (1 << 20, 1 << 21, 1 << 22, 1 << 23)]
    with pytest.raises(
        (ValueError, RuntimeError), match="512 in 8 ranks cuts a group or block of 128; use fewer ranks"
    ):
        layer.write_expert(0, *addresses)
