"""Tiny MoE checkpoints with random weights and a byte-level tokenizer, written by the tests themselves.

The initialisation std is 0.02, and down of the experts four times that, so that the experts are a large part of the
output: rounding alone then moves log-probabilities by about 0.002 nats, a dropped expert by ten times as much.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCAB_SIZE = 320
INIT_STD = 0.02
EXPERT_DOWN_STD = 0.08
ROUTER_STD = 0.1  # far enough apart that the router's choice seldom hangs on a rounding


@dataclass(frozen=True)
class TinyModel:
    """A model class of SGLang, small enough to serve in seconds."""

    name: str
    architecture: str
    model_type: str
    num_experts: int = 8
    top_k: int = 2
    hidden_size: int = 256
    intermediate_size: int = 128
    num_layers: int = 3
    extra: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """Return the contents of config.json."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "torch_dtype": "bfloat16",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": INIT_STD,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.intermediate_size,
            "norm_topk_prob": True,
            "bos_token_id": 256,
            "eos_token_id": 257,
            "use_cache": True,
            **self.extra,
        }

    def expert_names(self, layer: int, expert: int) -> tuple[str, str, str]:
        """Return the names of gate, up and down of one expert."""
        if self.model_type == "mixtral":
            prefix, names = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.", ("w1", "w3", "w2")
        else:
            prefix, names = f"model.layers.{layer}.mlp.experts.{expert}.", ("gate_proj", "up_proj", "down_proj")
        return tuple(f"{prefix}{name}.weight" for name in names)  # type: ignore[return-value]

    @property
    def moe_layers(self) -> range:
        """Indices of the layers that have experts."""
        return range(self.extra.get("first_k_dense_replace", 0), self.num_layers)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of every tensor; vectors are norms."""
        hidden = self.hidden_size
        yield "model.embed_tokens.weight", (VOCAB_SIZE, hidden)
        yield "lm_head.weight", (VOCAB_SIZE, hidden)
        yield "model.norm.weight", (hidden,)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (hidden,)
            yield prefix + "post_attention_layernorm.weight", (hidden,)
            for name, shape in self._attention_shapes().items():
                yield f"{prefix}self_attn.{name}.weight", shape
            if layer not in self.moe_layers:
                yield from _ffn_shapes(prefix + "mlp.", hidden, self.extra["intermediate_size"])
                continue
            router = "block_sparse_moe.gate" if self.model_type == "mixtral" else "mlp.gate"
            yield f"{prefix}{router}.weight", (self.num_experts, hidden)
            if shared := self.extra.get("n_shared_experts"):
                yield from _ffn_shapes(prefix + "mlp.shared_experts.", hidden, shared * self.intermediate_size)
            if shared_size := self.extra.get("shared_expert_intermediate_size"):
                yield from _ffn_shapes(prefix + "mlp.shared_expert.", hidden, shared_size)
                yield f"{prefix}mlp.shared_expert_gate.weight", (1, hidden)
            for expert in range(self.num_experts):
                gate, up, down = self.expert_names(layer, expert)
                yield gate, (self.intermediate_size, hidden)
                yield up, (self.intermediate_size, hidden)
                yield down, (hidden, self.intermediate_size)

    def _attention_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden = self.hidden_size
        if self.model_type == "deepseek_v2":
            return {
                "q_proj": (8 * (32 + 16), hidden),
                "kv_a_proj_with_mqa": (64 + 16, hidden),
                "kv_a_layernorm": (64,),
                "kv_b_proj": (8 * (32 + 32), 64),
                "o_proj": (hidden, 8 * 32),
            }
        shapes: dict[str, tuple[int, ...]] = {
            "q_proj": (256, hidden),
            "k_proj": (128, hidden),
            "v_proj": (128, hidden),
            "o_proj": (hidden, 256),
        }
        if self.model_type == "qwen3_moe":
            shapes |= {"q_norm": (32,), "k_norm": (32,)}
        return shapes


def _ffn_shapes(prefix: str, hidden: int, intermediate: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield prefix + "gate_proj.weight", (intermediate, hidden)
    yield prefix + "up_proj.weight", (intermediate, hidden)
    yield prefix + "down_proj.weight", (hidden, intermediate)


QWEN3_MOE = TinyModel(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    extra={"num_experts": 8, "decoder_sparse_step": 1, "mlp_only_layers": [], "intermediate_size": 512},
)
QWEN3_MOE_40 = TinyModel(
    name="qwen3_moe_40",
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    num_experts=40,
    top_k=4,
    num_layers=2,
    extra={"num_experts": 40, "decoder_sparse_step": 1, "mlp_only_layers": [], "intermediate_size": 512},
)
DEEPSEEK_V2 = TinyModel(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    num_layers=4,
    extra={
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "intermediate_size": 512,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "routed_scaling_factor": 2.5,
        "q_lora_rank": None,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "num_key_value_heads": 8,
        "head_dim": 16,
        "rope_scaling": {
            "type": "yarn",
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
)
QWEN2_MOE = TinyModel(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    extra={
        "num_experts": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "intermediate_size": 512,
        "shared_expert_intermediate_size": 192,
        "qkv_bias": False,
    },
)
MIXTRAL = TinyModel(
    name="mixtral",
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    extra={"num_local_experts": 8, "intermediate_size": 128, "sliding_window": None},
)


def random_tensors(model: TinyModel, *, seed: int = 0) -> dict[str, Tensor]:
    """Return every tensor of `model` in bf16: normal, norms 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in model.shapes():
        if len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            std = ROUTER_STD if name.endswith((".gate.weight", ".shared_expert_gate.weight")) else INIT_STD
            if (".experts." in name or ".shared_expert." in name) and shape[0] == model.hidden_size:
                std = EXPERT_DOWN_STD
            tensors[name] = (torch.randn(shape, generator=generator) * std).to(torch.bfloat16)
    return tensors


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose tokens are the 256 bytes and three special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=2048
    )
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    fast.save_pretrained(folder)


def write_model(folder: Path, model: TinyModel, *, tensors: dict[str, Tensor] | None = None) -> Path:
    """Write `model` as a Hugging Face checkpoint and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config(), indent=1))
    save_file(tensors or random_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)
    return folder


def swap_experts(model: TinyModel, tensors: dict[str, Tensor], first: int, second: int) -> dict[str, Tensor]:
    """Return `tensors` with two experts exchanged in every layer (their router rows stay)."""
    changed = dict(tensors)
    for layer in model.moe_layers:
        names = zip(model.expert_names(layer, first), model.expert_names(layer, second), strict=True)
        for a, b in names:
            changed[a], changed[b] = tensors[b].clone(), tensors[a].clone()
    return changed


def dequantized(model: TinyModel, tensors: dict[str, Tensor], method: str) -> dict[str, Tensor]:
    """Return `tensors` with every expert quantized as `method` does and dequantized to bf16."""
    from kt_kernel.methods import METHODS

    layout, ops = METHODS[method].layout, torch.ops.kt_kernel
    changed = dict(tensors)
    for layer in model.moe_layers:
        for expert in range(model.num_experts):
            gate, up, down = model.expert_names(layer, expert)
            packed, _ = ops.quantize_pack_w13(tensors[gate], tensors[up], layout)
            pair = ops.dequantize_w13(packed, layout, model.intermediate_size, model.hidden_size)
            changed[gate], changed[up] = (tensor.bfloat16() for tensor in pair)
            packed, _ = ops.quantize_pack(tensors[down], layout)
            changed[down] = ops.dequantize(packed, layout, model.hidden_size, model.intermediate_size).bfloat16()
    return changed


def drop_expert(model: TinyModel, tensors: dict[str, Tensor], expert: int) -> dict[str, Tensor]:
    """Return `tensors` with one expert computing zero in every layer."""
    changed = dict(tensors)
    for layer in model.moe_layers:
        down = model.expert_names(layer, expert)[2]
        changed[down] = torch.zeros_like(tensors[down])
    return changed


def zeroed(tensors: dict[str, Tensor], ending: str) -> dict[str, Tensor]:
    """Return `tensors` with every one whose name has this ending 0."""
    return {name: torch.zeros_like(tensor) if name.endswith(ending) else tensor for name, tensor in tensors.items()}
