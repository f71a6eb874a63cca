"""The activations between gate, up and down of an expert: names, limits, and the formulas in torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS = ("silu", "silu_then_limit", "gelu", "gelu_tanh")


@dataclass(frozen=True)
class Activation:
    """How an expert combines the rows of gate and up: ``act(gate, up)``.

    ======================  ================================================================================
    silu                    ``silu(gate) * up``
    silu, limit             ``silu(min(gate, limit)) * clamp(up, -limit, limit)``
    silu, alpha (, limit)   ``g * sigmoid(alpha * g) * (clamp(up, -limit, limit) + 1)``, g = min(gate, limit)
    silu_then_limit         ``min(silu(gate), limit) * clamp(up, -limit, limit)``
    gelu, gelu_tanh         ``gelu(gate) * up``, by the error function and by tanh
    ======================  ================================================================================

    Attributes
    ----------
    name : str
        One of :data:`ACTIVATIONS`.
    limit, alpha : float
        0: none.

    Raises
    ------
    ValueError
        Another name, a value below 0 or NaN, one that the name has no use for or does not do without.
    """

    name: str = "silu"
    limit: float = 0.0
    alpha: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            raise ValueError(f"activation {self.name!r} is unknown; it must be one of {', '.join(ACTIVATIONS)}.")
        for field in ("limit", "alpha"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"swiglu_{field} is {value!r}; it must be finite and at least 0, where 0 is none.")
        if self.name.startswith("gelu") and self.limit:
            raise ValueError(f"activation {self.name} has no limit, but swiglu_limit is {self.limit}.")
        if self.name != "silu" and self.alpha:
            raise ValueError(f"activation {self.name} has no alpha, but swiglu_alpha is {self.alpha}.")
        if self.name == "silu_then_limit" and not self.limit:
            raise ValueError("activation silu_then_limit needs a swiglu_limit above 0.")

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return ``act(gate, up)`` in torch, elementwise, in the tensors' dtype."""
        if self.name.startswith("gelu"):
            return functional.gelu(gate, approximate="tanh" if self.name == "gelu_tanh" else "none") * up
        if self.name == "silu_then_limit":
            return functional.silu(gate).clamp(max=self.limit) * up.clamp(-self.limit, self.limit)
        if self.limit:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.alpha:
            return gate * torch.sigmoid(gate * self.alpha) * (up + 1)
        return functional.silu(gate) * up


SILU = Activation()
