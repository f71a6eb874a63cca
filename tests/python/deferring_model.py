"""A model in Hugging Face transformers whose experts are deferring KTMoEWrappers: what a deferring server must say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kt_kernel import KTMoEWrapper, layer_chain
from kt_kernel.integrations.torchvision_repair import repair_torchvision


class DeferringExperts(nn.Module):
    """The experts of one layer: those of the CPU may defer, those of the device are bf16 and on time."""

    def __init__(self, layer_idx: int, config: Any, folder: Path, *, method: str, on_gpu: int, deferred: int) -> None:
        super().__init__()
        arguments = {
            "layer_idx": layer_idx,
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "hidden_size": config.hidden_size,
            "moe_intermediate_size": config.moe_intermediate_size,
            "cpuinfer_threads": 2,
            "threadpool_count": 1,
            "weight_path": str(folder),
        }
        self.on_cpu = KTMoEWrapper(
            **arguments, method=method, num_gpu_experts=on_gpu, max_deferred_experts_per_token=deferred
        )
        self.on_cpu.load_weights()
        self.on_device = None
        if on_gpu:
            elsewhere = torch.arange(config.num_experts) >= on_gpu
            with layer_chain.one_model():  # no layer of the chain of those that defer
                self.on_device = KTMoEWrapper(**arguments, method="BF16", gpu_experts_mask=elsewhere)
            self.on_device.load_weights()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the routed experts: ``[num_tokens, hidden_size]``."""
        inputs = (hidden_states, top_k_index, top_k_weights.float())
        output = self.on_cpu.forward(*inputs)
        return output if self.on_device is None else output + self.on_device.forward(*inputs)


def load(folder: Path, *, method: str, on_gpu: int = 0, deferred: int = 0) -> nn.Module:
    """Return the model of `folder` in bf16."""
    repair_torchvision()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with layer_chain.one_model():
        for layer_idx, layer in enumerate(model.model.layers):
            layer.mlp.experts = DeferringExperts(
                layer_idx, model.config, folder, method=method, on_gpu=on_gpu, deferred=deferred
            )
    return model


@torch.no_grad()
def logprobs(model: nn.Module, ids: Sequence[int]) -> list[float]:
    """Log-probability of each id but the first, computed in one pass."""
    tokens = torch.tensor([list(ids)])
    scores = model(tokens).logits[0, :-1].float().log_softmax(-1)
    return scores.gather(1, tokens[0, 1:, None]).flatten().tolist()


@torch.no_grad()
def decoded_logprobs(model: nn.Module, prompt: Sequence[int], continuation: Sequence[int]) -> list[float]:
    """Log-probability of each id of the continuation: the prompt in one pass, then one token a pass."""
    answer = model(torch.tensor([list(prompt)]), use_cache=True)
    found = []
    for token in continuation:
        found.append(float(answer.logits[0, -1].float().log_softmax(-1)[token]))
        answer = model(torch.tensor([[token]]), past_key_values=answer.past_key_values, use_cache=True)
    return found
