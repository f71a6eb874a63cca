"""The SGLang platform ``kt_cpu``: stock SGLang on a host without a GPU, with torch's own attention."""

from __future__ import annotations

from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from kt_kernel.integrations.sglang import memory

DEFAULT_RUNNING_REQUESTS = 32  # SGLang's own default of 2048 would size the KV pool for 2048 full contexts
DEFAULT_MEM_FRACTION = 0.9  # of the pool's share, see kv_pool.py; SGLang's heuristic is about GPU memory


class KtCpuPlatform(SRTPlatform):
    """Answers of the host to SGLang's questions about its device.

    Selected with ``SGLANG_PLATFORM=kt_cpu``, which ``prepare_environment`` of this package sets where there is no
    device. Methods without a docstring are described in SGLang's ``SRTPlatform``.
    """

    _enum = PlatformEnum.OOT
    device_name = "kt_cpu"
    device_type = "cpu"

    def get_device(self, device_id=0):
        return "cpu"

    def set_device(self, device):
        pass

    def get_device_name(self, device_id=0):
        return "cpu"

    def get_device_capability(self, device_id=0):
        return None

    def get_device_total_memory(self, device_id=0):
        return memory.usable_memory()[1]

    def get_current_memory_usage(self, device=None):
        available, total = memory.usable_memory()
        return float(total - available)

    def get_available_memory(self, device_id=0):
        return memory.usable_memory()

    def get_torch_distributed_backend_str(self):
        return "gloo"

    def get_default_attention_backend(self):
        return "torch_native"

    def apply_server_args_defaults(self, server_args):
        """Fill in what the user left open."""
        if server_args.sampling_backend is None:
            server_args.sampling_backend = "pytorch"
        if server_args.mem_fraction_static is None:
            server_args.mem_fraction_static = DEFAULT_MEM_FRACTION
        if server_args.max_running_requests is None:
            server_args.max_running_requests = DEFAULT_RUNNING_REQUESTS

    def get_mha_kv_pool_cls(self):
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_mla_kv_pool_cls(self):
        from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

        class Pool(MLATokenToKVPool):
            """SGLang passes out-of-tree platforms an argument that its own class does not take."""

            def __init__(self, *args, index_head_dim=None, **kwargs):
                super().__init__(*args, **kwargs)

        return Pool

    def get_paged_allocator_cls(self):
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

        return PagedTokenToKVPoolAllocator
