"""Our own layer, one for each format: int8, int4 in groups of 32, bf16."""

from __future__ import annotations

import numpy as np
import torch

from kt_kernel import __version__, _ext, ops
from kt_kernel.bench.layer import load_layer
from kt_kernel.bench.shapes import Shape
from kt_kernel.config import EngineConfig
from kt_kernel.experts import CpuExperts, get_engine
from kt_kernel.methods import get_method

from .layer_data import Batch, LayerData

PEAK_MILLISECONDS = 5


def as_bf16(bits: np.ndarray) -> torch.Tensor:
    """A bf16 tensor of its bits."""
    return torch.from_numpy(np.array(bits)).view(torch.bfloat16)


class System:
    """One :class:`CpuExperts` a format; see `worker.SystemProtocol`."""

    def __init__(self, data: LayerData, threads: int) -> None:
        self.data = data
        self.engine = get_engine(EngineConfig.resolve(threads))
        self.layers: dict[str, CpuExperts] = {}
        self.version = f"{__version__} {_ext.cpu_features()['tier']}"

    def load(self, name: str) -> float:
        """Quantize and pack every expert."""
        sizes = self.data.sizes
        shape = Shape(sizes.hidden_size, sizes.intermediate_size, sizes.num_experts, sizes.top_k)
        kinds = [tuple(map(as_bf16, self.data.of_expert(kind))) for kind in range(sizes.kinds)]
        experts = load_layer(shape, get_method(name).layout, self.engine, kinds)
        self.layers[name] = experts
        experts.layer.probe_read()  # first touch of the scratch, frequency, page tables
        return experts.bytes / sizes.num_experts

    def dequantized(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The packed bytes as fp32."""
        sizes, layer = self.data.sizes, self.layers[name]
        found = []
        for kind in range(sizes.kinds):
            w13, w2 = layer.export_packed(kind)
            layout, inter, hidden = layer.layouts[0], sizes.intermediate_size, sizes.hidden_size
            gate_up = torch.ops.kt_kernel.dequantize_w13(w13, layout, inter, hidden)
            down = torch.ops.kt_kernel.dequantize(w2, layout, hidden, inter)
            found.append([matrix.numpy() for matrix in (*gate_up, down)])
        gate, up, down = (np.stack(matrices) for matrices in zip(*found, strict=True))
        return gate, up, down

    def prepare(self, name: str, batch: Batch):
        """One call of `ops.moe_forward`."""
        arguments = as_bf16(batch.hidden), torch.from_numpy(batch.ids), torch.from_numpy(batch.weights)
        handle = self.layers[name].layer.handle
        outputs: list[torch.Tensor] = []

        def forward() -> None:
            outputs[:] = [ops.moe_forward(*arguments, None, handle)]

        return forward, lambda: outputs[0].float().numpy()

    def calibrate(self, name: str) -> dict[str, float]:
        """Read bandwidth over the format's own bytes, and the register peak of its products."""
        layer = self.layers[name].layer
        return {"read": layer.probe_read(), "peak": layer.probe_peak(milliseconds=PEAK_MILLISECONDS)}
