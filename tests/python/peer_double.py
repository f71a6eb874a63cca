"""A test double of a peer, run by kt_kernel/bench/peers/worker.py: computes the layer in numpy.

``PEER_DOUBLE_FAULT`` makes it wrong or broken: "load", "run" raise; "die" ends the process in a forward, "hang" never
ends one; "weights" has others than the layer's and says so, "forward" computes with them and does not.
"""

from __future__ import annotations

import os
import time

import numpy as np
from peers import compare
from peers.layer_data import Batch, LayerData, to_float

FAULT = os.environ.get("PEER_DOUBLE_FAULT", "")


class System:
    def __init__(self, data: LayerData, threads: int) -> None:
        print("a library that prints to standard output")
        self.data, self.version, self.forwards = data, f"double, {threads} threads", 0
        self.weights = [to_float(np.array(matrix)) for matrix in (data.gate, data.up, data.down)]
        if FAULT in ("weights", "forward"):
            self.weights = [matrix * np.float32(1.1) for matrix in self.weights]

    def load(self, name: str) -> float:
        if FAULT == "load":
            raise MemoryError("there is no room")
        return 2.0 * self.data.sizes.expert_weights

    def dequantized(self, name: str):
        if FAULT == "forward":
            return [matrix / np.float32(1.1) for matrix in self.weights]
        return self.weights

    def prepare(self, name: str, batch: Batch):
        outputs = []

        def forward() -> None:
            self.forwards += 1
            if FAULT == "run" and self.forwards > 4:
                raise ValueError("the forward failed")
            if FAULT == "hang":
                time.sleep(3600)
            if FAULT == "die" and self.forwards > 4:
                os.abort()
            outputs[:] = [compare.forward(self.weights, batch)[0]]

        return forward, lambda: outputs[0]
