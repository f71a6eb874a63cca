"""What test_amx.py runs in processes of their own, for a process asks for tiles once: prints one JSON object.

``python amx_process.py PART [FILE]``, under LD_PRELOAD of the interpreter and KT_FORCE_ISA.
"""

from __future__ import annotations

import ctypes
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from checkpoints import Experts, random_experts
from torch import Tensor

from kt_kernel import KTMoEWrapper, _ext
from kt_kernel.bench.kernels import FORMATS
from kt_kernel.config import EngineConfig, MoEConfig
from kt_kernel.environment import wrong_values
from kt_kernel.experts import CpuExperts, get_engine
from kt_kernel.methods import FLOAT_METHODS

E, K, H, INNER = 4, 2, 192, 160
# AMXINT4 in groups of two products and with one scale a row
WIDE = {"int4 in groups of 128": "int4g128_n64k8_r512_v1", "int4 by row": "int4_n64k8_r512_v1"}
TOKENS = (60, 1)
ROWS = (1, 5, 16, 17, 33, 64)
PRODUCTS = ("tdpbusd", "tdpbsud", "tdpbssd", "tdpbuud", "tdpbf16ps")


class Interpreter:
    """The counters of tests/amx/interpreter.h, all 0 where real instructions run."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self.emulating = bool(library.kt_amx_is_emulating())
        self._counter = library.kt_amx_counter
        self._counter.restype = ctypes.c_uint64
        self._counter.argtypes = [ctypes.c_char_p]

    def counts(self, *names: str) -> list[int]:
        return [self._counter(name.encode()) for name in names]

    @contextmanager
    def counting(self, *names: str) -> Iterator[dict[str, int]]:
        """What the block adds to the counters, those of zero left out: known at its end."""
        found: dict[str, int] = {}
        before = self.counts(*names)
        yield found
        pairs = zip(names, before, self.counts(*names), strict=True)
        found |= {name: after - first for name, first, after in pairs if after != first}


def weights_of_a_layer() -> Experts:
    return random_experts(E, H, INNER)


def batch(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of 60 tokens experts 0 to 3 get 60, 37, 20 and 3 rows: two blocks of 32, one of 16 behind 32, and no tiles."""
    generator = torch.Generator().manual_seed(tokens)
    second = torch.tensor([1] * 37 + [2] * 20 + [3] * 3)[:tokens]
    ids = torch.stack((torch.zeros_like(second), second), dim=1)
    return torch.randn(tokens, H, generator=generator), ids, torch.rand(tokens, K, generator=generator) + 0.1


@dataclass
class Layer:
    """A loaded layer: its forward, its kernels."""

    forward: Callable[..., Tensor]
    explain: str


def load(name: str, layer_idx: int) -> Layer:
    """A method in a KTMoEWrapper, or a layout no method has."""
    sizes = {"num_experts": E, "hidden_size": H}
    weights = weights_of_a_layer()
    if name in FLOAT_METHODS:
        wrapper = KTMoEWrapper(
            layer_idx, num_experts_per_tok=K, moe_intermediate_size=INNER, cpuinfer_threads=2, threadpool_count=1,
            method=name, **sizes,
        )  # fmt: skip
        wrapper.load_weights_from_tensors(*weights)
        return Layer(wrapper.forward, wrapper.moe.explain)
    config = MoEConfig(layer_idx=layer_idx, top_k=K, intermediate_size=INNER, **sizes)
    experts = CpuExperts(config, layouts=(WIDE[name],) * 2, engine=get_engine(EngineConfig.resolve(2, 1, None)))
    experts.load_experts(range(E), *map(list, weights))
    return Layer(experts.forward, experts.explain)


def layers(amx: Interpreter, file: str) -> dict:
    """Every method and layout twice: outputs into a file, counts, and what was logged."""
    log: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(f"{record.levelname}: {record.getMessage()}")  # type: ignore[method-assign]
    logging.getLogger("kt_kernel").addHandler(handler)
    logging.getLogger("kt_kernel").setLevel(logging.INFO)
    found, outputs = {}, {}
    for name in (*FLOAT_METHODS, *WIDE):
        first, second = load(name, 0), load(name, 1)
        products = {}
        for tokens in TOKENS:
            with amx.counting(*PRODUCTS) as products[tokens]:
                outputs[name, tokens] = first.forward(*batch(tokens))
            assert torch.equal(second.forward(*batch(tokens)), outputs[name, tokens])
        found[name] = {"explain": first.explain, "products": products}
    torch.save(outputs, file)
    configs, releases = amx.counts("configs", "releases")
    return {"layers": found, "log": log, "configs": configs, "releases": releases}


def bench(amx: Interpreter) -> list[dict]:
    """Every row of the table between two calls of the one in tiles: all right, and configurations of the last call."""
    found = []
    for format_name, layout in FORMATS.items():
        bench = _ext.KernelBench(layout, 320, max(ROWS), 1 << 20)
        (tiles,) = [name for name in bench.kernels if "_amx" in name]
        for m in ROWS:
            for other in bench.kernels:
                right = [bench.matches(name, m) for name in (tiles, other)]
                with amx.counting("configs", "releases") as last:
                    right.append(bench.matches(tiles, m))
                found.append({"format": format_name, "m": m, "other": other, "right": all(right), **last})
    return found


def oracle(_amx: Interpreter) -> list[dict]:
    """The row in tiles and oneDNN's on the same panel and activations, in turns: how far apart, in units of the bound.

    int8: 0 for the same bits, else infinite. bf16: either is within k roundings of the exact sum's magnitude.
    """
    from test_onednn_row import make_problem, multiply  # lists kernels, which refusal() must not

    rows = {row["name"]: row for row in _ext.list_kernels() if row["op"] == "gemm"}
    found = []
    for weight in ("int8", "bf16"):
        (tiles,) = [row for name, row in rows.items() if row["weight"] == weight and "_amx" in name]
        (onednn,) = [row for name, row in rows.items() if row["weight"] == weight and row["source"] == "onednn"]
        for m in ROWS:
            for k in (64, 576, 2048):
                problem = make_problem(weight, m, k, gather=m % 2 == 1, seed=m + k)
                ours, theirs = (multiply(row, problem) for row in (tiles, onednn))
                if weight == "int8":
                    apart = 0 if torch.equal(ours.view(torch.int32), theirs.view(torch.int32)) else torch.inf
                else:
                    a = problem.a[:m] if problem.row_idx is None else problem.a[problem.row_idx.long()]
                    bound = 2 * k * 2.0**-23 * (a.double().abs() @ problem.w.double().abs().T)
                    apart = ((ours.double() - theirs.double()).abs() / bound).max().item()
                found.append({"weight": weight, "m": m, "k": k, "apart": apart})
    return found


def refusal(_amx: Interpreter) -> dict:
    """What a layer says here, and which variables are called wrong."""
    try:
        load("BF16", 0)
    except (RuntimeError, ValueError) as error:
        return {"error": str(error), "wrong": wrong_values()}
    return {"error": None, "wrong": wrong_values()}


PARTS = {part.__name__: part for part in (layers, bench, oracle, refusal)}

if __name__ == "__main__":
    interpreter = Interpreter()
    result = PARTS[sys.argv[1]](interpreter, *sys.argv[2:])
    products = sum(interpreter.counts(*PRODUCTS))
    print(json.dumps({"emulating": interpreter.emulating, "products": products, "result": result}))
