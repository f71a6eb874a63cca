"""Which experts live on the GPU: masks, and the expert-location file that puts the most used experts first.

``python -m kt_kernel.placement`` makes that file from recorded counts.
"""

from kt_kernel.placement.masks import STRATEGIES, generate_gpu_experts_masks, strategy_masks

__all__ = ["STRATEGIES", "generate_gpu_experts_masks", "strategy_masks"]
