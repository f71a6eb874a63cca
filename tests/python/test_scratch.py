"""The estimate of an engine's buffers against what the buffers of a real forward are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kt_kernel import _ext
from kt_kernel.config import MoEConfig
from kt_kernel.experts import CpuExperts, scratch_bytes
from kt_kernel.integrations.sglang import checks
from kt_kernel.methods import FLOAT_METHODS

EXPERTS, THREADS = 32, 2
HUGE_PAGE = 2 << 20
BATCHES = [1, 200, 1025, 4500]  # 32768 rows are 1024 tokens of 32 experts


def check_batches(layout: str, config: MoEConfig, batches: list[int]) -> None:
    """Compare the estimate with a new engine's buffers after each of these batches."""
    engine = _ext.Engine(num_threads=THREADS, num_nodes=1)
    experts = CpuExperts(config, layouts=(layout, layout), engine=engine)
    gate = torch.full((config.intermediate_size, config.hidden_size), 0.01, dtype=torch.bfloat16)
    down = gate.t().contiguous()
    experts.load_experts(list(range(EXPERTS)), *([weight] * EXPERTS for weight in (gate, gate, down)))
    for i, tokens in enumerate(batches):
        ids = torch.arange(config.top_k).repeat(tokens, 1)
        hidden = torch.ones(tokens, config.hidden_size, dtype=torch.bfloat16)
        experts.forward(hidden, ids, torch.ones(tokens, config.top_k))
        estimate = scratch_bytes(
            [(layout, layout)],
            num_experts=EXPERTS,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_tokens=max(batches[: i + 1]),
            top_k=config.top_k,
            num_threads=THREADS,
        )
        found = engine.scratch_bytes
        # few tokens leave shared buffers unused, which are estimated at a huge page each: of codes, and of packed rows
        unused = 4 if _ext.packed_value_bytes(layout) else 2
        assert found <= estimate <= max(1.5 * found, found + unused * HUGE_PAGE), (tokens, found, estimate)
    experts.close()


@pytest.mark.parametrize("top_k", [1, 32])
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(64, 32), (144, 528)])
@pytest.mark.parametrize("method", FLOAT_METHODS)
def test_buffers_are_no_larger_than_estimated(
    method: str, hidden_size: int, intermediate_size: int, top_k: int
) -> None:
    config = MoEConfig(
        layer_idx=0, num_experts=EXPERTS, top_k=top_k, hidden_size=hidden_size, intermediate_size=intermediate_size
    )
    for batches in (BATCHES, BATCHES[:1:-1]):
        check_batches(FLOAT_METHODS[method].layout, config, batches)


def test_two_layouts_share_the_largest_of_each_buffer() -> None:
    sizes = {
        "num_experts": 128, "hidden_size": 2048, "intermediate_size": 768, "num_tokens": 4096, "top_k": 8,
        "num_threads": 4,
    }  # fmt: skip
    int4, bf16 = ((FLOAT_METHODS[name].layout,) * 2 for name in ("AMXINT4", "BF16"))
    both = scratch_bytes([int4, bf16], **sizes)
    one = [scratch_bytes([layout], **sizes) for layout in (int4, bf16)]
    assert max(one) <= both < sum(one)


@pytest.mark.parametrize(("chunk", "tokens"), [(8192, 8192), (2048, 2048), (64, 1024), (-1, 16384), (None, 16384)])
def test_a_forward_is_as_large_as_its_chunk(chunk: int | None, tokens: int) -> None:
    args = SimpleNamespace(
        chunked_prefill_size=chunk, max_prefill_tokens=16384, kt_num_gpu_experts=0, kt_cpuinfer=2, dp_size=4,
        enable_dp_attention=False,
    )  # fmt: skip
    assert checks.batch_tokens(args) == tokens
    assert checks.batch_tokens(SimpleNamespace(**{**vars(args), "enable_dp_attention": True})) == 4 * tokens
    source = checks.ExpertSource(Path(), ((FLOAT_METHODS["AMXINT8"].layout,) * 2,) * 58, 256, 7168, 2048)
    found = checks.forward_bytes(args, source, num_tokens=tokens, top_k=8)
    # DeepSeek-V3: 32768 rows x 2048 in fp32 and int8, 4096 tokens x 7168 in int8, each an eighth more; with AMX these
    # rows in both sizes once more, each expert's in whole tiles
    now = min(tokens, 4096)
    in_tiles = (8 * now + 256 * 16) * (7168 + 2048) * _ext.packed_value_bytes(source.layouts[0][0])
    buffers = 9 / 8 * (now * (8 * 2048 * 5 + 7168) + in_tiles)
    assert buffers < found - 4 * tokens * 7168 < 1.1 * buffers
