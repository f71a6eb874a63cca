"""Whether a system computes the layer: its output beside fp32 on its own weights, and beside ours.

A product keeps the relative rms error of its weights w and of its activations a: sqrt(w^2 + a^2). Of
``down(silu(gate x) * (up x))`` with gate x of variance 1, an error of gate x comes through SiLU 1.03 times as large, so
with x for the activations before the first products and h for those before the last one

    error^2 = 2.07 (w^2 + x^2) + w^2 + h^2

w, x and h are not taken from a table: w is that of the weights the system says it has, x and h are those of rounding
the activations at hand as the format does. w itself must be what so many bits explain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .catalog import BATCH, BF16_ACTIVATIONS, ROW, Format
from .layer_data import Batch, LayerData, to_bf16, to_float

# E[silu'(z)^2] / E[silu(z)^2] for a standard normal z is 1.07; one more for up.
GATE_AND_UP = 2.07
# The estimate takes errors as independent; x meets gate and up alike.
MARGIN = 1.5
# Rounding of the output and of the intermediate values to bf16, as CHECK_BOUND of the layer bench has it.
FLOOR = 2 / 256

# Most relative rms error of normal weights in so many bits, and a quarter more: bf16 is exact; e4m3 has steps of 1/8 of
# a power of two, 1/8 / 12^0.5 / 1.33 = 0.027; 4 bits with one scale a row of 2048 have 3.7 / 7 / 12^0.5 = 0.15.
WEIGHT_BOUND = {16: 1e-3, 8: 0.034, 4: 0.19}

Weights = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Checked:
    """Output of a system with its errors: found and allowed, and what its format costs against fp32."""

    output: np.ndarray
    weight_error: float
    weight_bound: float
    own_error: float
    own_bound: float
    expected_error: float

    @property
    def fault(self) -> str | None:
        """What is wrong, or None: its weights are not the layer's, or it does not compute what they say."""
        if not self.weight_error <= self.weight_bound:
            return (
                f"has weights that differ by {self.weight_error:.4f} from the layer's, more than the "
                f"{self.weight_bound:.4f} that its bits explain."
            )
        if not self.own_error <= self.own_bound:
            return (
                f"differs by {self.own_error:.4f} from fp32 on its own weights, more than the {self.own_bound:.4f} "
                f"that its activations explain."
            )
        return None


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative rms error; NaN counts as infinite."""
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    return error if math.isfinite(error) else math.inf


def forward(weights: Weights, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """fp32 output ``[T, H]`` and the intermediate rows ``[T, k, I]`` of the layer."""
    gate, up, down = weights
    hidden = to_float(batch.hidden)
    rows = np.zeros((*batch.ids.shape, gate.shape[1]), np.float32)
    output = np.zeros(hidden.shape, np.float32)
    for token, experts in enumerate(batch.ids):
        for slot, expert in enumerate(experts):
            kind = expert % len(gate)
            z = gate[kind] @ hidden[token]
            rows[token, slot] = z / (1 + np.exp(-z)) * (up[kind] @ hidden[token])
            output[token] += batch.weights[token, slot] * (down[kind] @ rows[token, slot])
    return output, rows


def rounding_error(values: np.ndarray, scheme: int) -> float:
    """Relative rms error of rounding activations ``[rows, n]`` as a format does (see `catalog`)."""
    if scheme == BF16_ACTIVATIONS:
        return relative_error(to_float(to_bf16(values)), values)
    if scheme == BATCH:
        blocks = values.reshape(1, -1)
    elif scheme == ROW:
        blocks = values
    else:
        blocks = values[:, : values.shape[1] // scheme * scheme].reshape(-1, scheme)
    scale = np.abs(blocks).max(1, keepdims=True) / 127
    return relative_error(np.rint(blocks / scale) * scale, blocks)


def check(kind: Format, output: np.ndarray, weights: Weights, data: LayerData, batch: Batch) -> Checked:
    """Errors of a system's output.

    Parameters
    ----------
    kind : Format
        How it rounds activations.
    output : ndarray
        ``[T, H]``, fp32.
    weights : tuple of ndarray
        gate, up and down of the different experts as the system holds them, fp32.
    data, batch : LayerData, Batch
        The layer and the forward.
    """
    expected, rows = forward(weights, batch)
    originals = [to_float(np.array(matrix)) for matrix in (data.gate, data.up, data.down)]
    w = max(relative_error(*pair) for pair in zip(weights, originals, strict=True))
    x = rounding_error(to_float(batch.hidden), kind.activations)
    h = rounding_error(rows.reshape(-1, rows.shape[-1]), kind.activations)
    activations = math.sqrt(GATE_AND_UP * x**2 + h**2)
    return Checked(
        output=output,
        weight_error=w,
        weight_bound=WEIGHT_BOUND[kind.bits],
        own_error=relative_error(output, expected),
        own_bound=MARGIN * activations + FLOOR,
        expected_error=math.sqrt((GATE_AND_UP + 1) * w**2 + activations**2),
    )


def against_ours(peer: Checked, ours: Checked) -> tuple[float, float]:
    """Relative difference of two systems on the same weights, and the most their formats explain."""
    bound = MARGIN * math.hypot(peer.expected_error, ours.expected_error) + FLOOR
    return relative_error(peer.output, ours.output), bound
