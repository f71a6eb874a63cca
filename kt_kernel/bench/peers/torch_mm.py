"""torch's own bf16 ``mm``: a matrix product for each matrix of each expert, weights as the checkpoint has them."""

from __future__ import annotations

import numpy as np
import torch

from .layer_data import Batch, LayerData, to_float


class System:
    """The layer as an eager model computes it; see `worker.SystemProtocol`."""

    def __init__(self, data: LayerData, threads: int) -> None:
        self.data = data
        torch.set_num_threads(threads)
        self.version = torch.__version__
        self.experts: list[tuple[torch.Tensor, ...]] = []

    def load(self, name: str) -> float:
        """Every expert has its own copy."""
        sizes = self.data.sizes
        self.experts = [
            tuple(torch.from_numpy(np.array(matrix)).view(torch.bfloat16) for matrix in self.data.of_expert(expert))
            for expert in range(sizes.num_experts)
        ]
        return 2.0 * sizes.expert_weights

    def dequantized(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """bf16 as it is."""
        return to_float(self.data.gate), to_float(self.data.up), to_float(self.data.down)

    def product(self, rows: torch.Tensor, expert: int, matrix: int) -> torch.Tensor:
        """Rows times one of gate, up and down."""
        return torch.mm(rows, self.experts[expert][matrix].t())

    def prepare(self, name: str, batch: Batch):
        """The rows of each expert gathered, its three products, and the weighted rows added in fp32."""
        hidden = torch.from_numpy(batch.hidden).view(torch.bfloat16)
        ids, weights = torch.from_numpy(batch.ids), torch.from_numpy(batch.weights)
        output = torch.zeros(hidden.shape)

        @torch.inference_mode()
        def forward() -> None:
            output.zero_()
            order = torch.argsort(ids.flatten(), stable=True)
            counts = torch.bincount(ids.flatten(), minlength=self.data.sizes.num_experts).tolist()
            tokens = torch.div(order, ids.shape[1], rounding_mode="floor")
            scales = weights.flatten()[order].unsqueeze(1)
            begin = 0
            for expert, count in enumerate(counts):
                if not count:
                    continue
                end = begin + count
                rows = hidden[tokens[begin:end]]
                gate, up = self.product(rows, expert, 0), self.product(rows, expert, 1)
                down = self.product(torch.nn.functional.silu(gate) * up, expert, 2)
                output.index_add_(0, tokens[begin:end], down.float() * scales[begin:end])
                begin = end

        return forward, output.numpy
