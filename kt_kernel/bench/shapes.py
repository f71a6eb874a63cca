"""Sizes of the MoE layers people run, and how many experts fit the machine a bench runs on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kt_kernel.config import MoEConfig


@dataclass(frozen=True)
class Shape:
    """A MoE layer: hidden size, intermediate size of an expert, experts, experts a token; and how many a model has."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    num_layers: int = 1

    def config(self) -> MoEConfig:
        """Of one layer."""
        return MoEConfig(
            layer_idx=0,
            num_experts=self.num_experts,
            top_k=self.top_k,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
        )

    def cut_to(self, num_experts: int) -> Shape:
        """The same layer with fewer experts (never fewer than top_k)."""
        kept = max(min(num_experts, self.num_experts), self.top_k)
        return replace(self, num_experts=kept)


SHAPES: dict[str, Shape] = {
    "demo": Shape(576, 1536, 16, 4),
    "qwen3-30b": Shape(2048, 768, 128, 8, 48),
    "qwen3-next-80b": Shape(2048, 512, 512, 10, 48),
    "glm-4.5-air": Shape(4096, 1408, 128, 8, 45),
    "qwen3-235b": Shape(4096, 1536, 128, 8, 94),
    "minimax-m2": Shape(3072, 1536, 256, 8, 62),
    "dsv4-flash": Shape(4096, 2048, 256, 6, 43),
    "glm-4.6": Shape(5120, 1536, 160, 8, 89),
    "dsv3": Shape(7168, 2048, 256, 8, 58),
    "kimi-k2": Shape(7168, 2048, 384, 8, 60),
}
