"""What expert tensors are called in every supported model family: the only file with their names.

A name is a base, a layer, a block, a projection and a part: ``model.layers.3.`` ``mlp.experts.7.`` ``gate_proj.``
``weight_scale``. Layers that only draft tokens have another base (``mtp.``) or a number beyond the model's.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_BASE = re.compile(
    r"(?:(?:model|language_model\.model|model\.language_model|thinker\.model)\.)?layers\.(0|[1-9]\d*)\.", re.ASCII
)
_LONG = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_SHORT = {"w1": "gate", "w3": "up", "w2": "down"}
_FUSED = {"gate_up_proj": "gate_up", "down_proj": "down"}

# Block after the layer, names of the projections in it. {} is the expert; without it one tensor holds all experts.
STYLES: tuple[tuple[str, dict[str, str]], ...] = (
    ("mlp.experts.{}.", _LONG),  # DeepSeek-V2 and V3, Qwen2, Qwen3, Qwen3-Next, GLM, Kimi-K2, OLMoE, Ernie
    ("block_sparse_moe.experts.{}.", _SHORT),  # Mixtral, MiniMax, Kimi-Linear, Phi-3.5
    ("ffn.experts.{}.", _SHORT),  # DeepSeek-V4
    ("mlp.experts.{}.", _SHORT),
    ("experts.{}.", _SHORT),  # Mistral
    ("feed_forward.experts.{}.", _LONG),  # quantized Llama4, Jamba
    ("feed_forward.experts.{}.", _SHORT),  # LFM2
    ("mlp.experts.", _FUSED),  # Qwen3.5, Qwen3-VL, GPT-OSS, what transformers 5 saves
    ("feed_forward.experts.", _FUSED),  # Llama4
    ("block_sparse_moe.experts.", _FUSED),
    ("block_sparse_moe.", {"input_linear": "gate_up", "output_linear": "down"}),  # Granite
)
# Parts that only GPT-OSS's tensors for all experts have: its rows are gate 0, up 0, gate 1, up 1, ...
_INTERLEAVED_PARTS = {"blocks", "bias"}


class ExpertTensor(NamedTuple):
    """What a tensor is: `expert` is None for one of all experts, `part` what follows the projection's name."""

    layer: int
    expert: int | None
    projection: str
    part: str


def _pattern(block: str, projections: dict[str, str]) -> re.Pattern[str]:
    begin = re.escape(block).replace(r"\{\}", r"(?P<expert>0|[1-9]\d*)")
    # tensors of all experts are no modules: their parts follow an underscore, and the weight may have no name
    rest = r"\.(?P<part>\w+)" if "{}" in block else r"(?:[._](?P<part>\w+))?"
    return re.compile(f"{begin}(?P<projection>{'|'.join(projections)}){rest}$", re.ASCII)


_PATTERNS = [(_pattern(block, projections), projections) for block, projections in STYLES]


def parse_name(name: str) -> ExpertTensor | None:
    """Which part of which expert a tensor is, by its name; None: no tensor of an expert."""
    base = _BASE.match(name)
    if base is None:
        return None
    for pattern, projections in _PATTERNS:
        match = pattern.match(name, base.end())
        if match:
            expert = match.groupdict().get("expert")
            return ExpertTensor(
                int(base[1]),
                None if expert is None else int(expert),
                projections[match["projection"]],
                match["part"] or "weight",
            )
    return None


def is_interleaved(parts: set[str]) -> bool:
    """Whether rows of gate and up alternate in a tensor of both, told by the parts it has."""
    return bool(_INTERLEAVED_PARTS & parts)


def known_names() -> str:
    """The styles in words, for messages."""
    names = (f"...{block.format('N')}{next(iter(projections))}" for block, projections in STYLES)
    return ", ".join(dict.fromkeys(names))
