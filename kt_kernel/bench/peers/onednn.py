"""oneDNN's matmul as torch ships it, weights reordered once: u8 x s8 with a scale a column, and bf16.

oneDNN compiles a kernel for each number of rows; those that a routing can bring are compiled before the measurement.
The int8 activations have one scale for the whole batch: the operator takes no more.
"""

from __future__ import annotations

import numpy as np
import torch

from .layer_data import Batch, LayerData, to_float
from .torch_mm import System as EagerLayer

INT8 = "u8s8"


def quantize_columns(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes ``[N, K]`` and fp32 scales ``[N]``: symmetric, one scale a row of the weight."""
    scale = weight.abs().amax(1) / 127
    return (weight / scale.unsqueeze(1)).round().to(torch.int8), scale


def quantize_batch(rows: torch.Tensor) -> tuple[torch.Tensor, float]:
    """uint8 codes with zero point 128 and their scale."""
    scale = max(float(rows.abs().max()) / 127, 1e-20)
    return rows.float().mul_(1 / scale).add_(128).round_().to(torch.uint8), scale


class System(EagerLayer):
    """The eager layer with oneDNN's products; see `worker.SystemProtocol`."""

    def __init__(self, data: LayerData, threads: int) -> None:
        super().__init__(data, threads)
        self.packed: dict[str, list[tuple]] = {}
        self.name = ""
        self.version = f"in torch {torch.__version__}"

    def load(self, name: str) -> float:
        """Reorder the weights of each expert as oneDNN wants them."""
        self.name = name
        self.packed[name] = [
            tuple(self.reorder(torch.from_numpy(np.array(matrix)).view(torch.bfloat16)) for matrix in matrices)
            for matrices in (self.data.of_expert(expert) for expert in range(self.data.sizes.num_experts))
        ]
        self.compile_kernels()
        return self.data.sizes.expert_weights * (1.0 if name == INT8 else 2.0)

    def reorder(self, weight: torch.Tensor):
        """One matrix ``[N, K]`` bf16 in the format being loaded."""
        if self.name != INT8:
            return torch.ops.mkldnn._reorder_linear_weight(weight, None)
        codes, scale = quantize_columns(weight.float())
        zero_points = torch.zeros(len(scale), dtype=torch.int32)
        return torch.ops.onednn.qlinear_prepack(codes, None), scale, zero_points

    def compile_kernels(self) -> None:
        """Every row count up to twice the mean of the largest batch (four standard deviations and more)."""
        sizes = self.data.sizes
        mean = sizes.max_tokens * sizes.top_k / sizes.num_experts
        for rows in range(1, min(int(2 * mean) + 8, sizes.max_tokens) + 1):
            self.product(torch.ones(rows, sizes.hidden_size, dtype=torch.bfloat16), 0, 0)
            self.product(torch.ones(rows, sizes.intermediate_size, dtype=torch.bfloat16), 0, 2)

    def dequantized(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes times scales."""
        if name != INT8:
            return super().dequantized(name)
        found = []
        for bits in (self.data.gate, self.data.up, self.data.down):
            parts = [quantize_columns(torch.from_numpy(to_float(matrix))) for matrix in bits]
            found.append(np.stack([(codes * scale.unsqueeze(1)).numpy() for codes, scale in parts]))
        return found[0], found[1], found[2]

    def product(self, rows: torch.Tensor, expert: int, matrix: int) -> torch.Tensor:
        """Rows times one of gate, up and down; bf16."""
        packed = self.packed[self.name][expert][matrix]
        if self.name != INT8:
            return torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
        codes, scale = quantize_batch(rows)
        return torch.ops.onednn.qlinear_pointwise(
            codes, scale, 128, *packed, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )

    def prepare(self, name: str, batch: Batch):
        """As the eager layer, in one of the formats."""
        forward, output = super().prepare(name, batch)

        def forward_as() -> None:
            self.name = name
            forward()

        return forward_as, output
