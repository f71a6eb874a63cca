"""The gated shared expert of Qwen2-MoE on a host without a GPU, where SGLang would launch a Triton kernel."""

from __future__ import annotations

from torch import Tensor


def add_gated_shared_expert(
    hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor, final_hidden_states: Tensor
) -> None:
    """Add the shared expert, scaled by its gate, to the routed experts' output in place.

    ``final[t] += sigmoid(hidden[t] @ gate_weight) * shared[t]``

    Parameters
    ----------
    hidden_states, shared_output, final_hidden_states : Tensor
        ``[num_tokens, hidden_size]``, any float type, CPU.
    gate_weight : Tensor
        ``[hidden_size]``.

    Notes
    -----
    The sum is taken in fp32 and rounded once, as the Triton kernel of SGLang does.
    """
    gate = (hidden_states.float() @ gate_weight.float()).sigmoid_().unsqueeze_(1)
    final_hidden_states.copy_(final_hidden_states.float().addcmul_(gate, shared_output.float()))
