#!/usr/bin/env python3
"""A test double of the server: the same flags and the same SGLang, but CPU experts that answer zeros at once.

Used by measure_server_overhead.py to find what everything but the experts costs; its answers are nonsense. The top
level runs again in each process that SGLang spawns, so the scheduler gets the same double.
"""

import sys

import torch

from kt_kernel import launch_server
from kt_kernel.wrapper import KTMoEWrapper


def _zeros(self, hidden_states, topk_ids, topk_weights, cuda_stream=None):
    return torch.zeros_like(hidden_states)


KTMoEWrapper.forward = _zeros
launch_server.repair_torchvision()

if __name__ == "__main__":
    launch_server.main(sys.argv[1:])
