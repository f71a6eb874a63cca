"""SGLang's real ``KTEPWrapperMethod`` on a machine without SGLang.

``scripts/gpu_check.sh --pack`` carries one file of stock SGLang along, ``kt_ep_wrapper.py``, of 0.5.18 or 0.5.23. It is
run as it is; the few small things it imports are stand-ins made here, named ``sglang...`` because that is what it
imports. None stands for what it uses only to read flags.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

CARRIED = Path(__file__).resolve().parents[2] / ".gpu" / "kt_ep_wrapper.py"


class _Dispatch(NamedTuple):
    hidden_states: Any
    hidden_states_scale: Any
    topk_output: Any


class _TopK(NamedTuple):
    topk_weights: Any
    topk_ids: Any
    router_logits: Any


class _Combine(NamedTuple):
    hidden_states: Any


class _Method:
    """Takes the place of ``FusedMoEMethodBase``."""


class _Checker:
    @staticmethod
    def format_is_bypassed(_output: Any) -> bool:
        return False


def _module(name: str, **attributes: Any) -> None:
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    for key, value in attributes.items():
        setattr(sys.modules[name], key, value)


def ensure_sglang() -> str:
    """Make ``sglang.srt.layers.moe.kt_ep_wrapper`` importable; return where it comes from.

    Raises
    ------
    RuntimeError
        Neither SGLang nor the carried file is there.
    """
    if importlib.util.find_spec("sglang") is not None:
        return "the installed SGLang"
    if not CARRIED.is_file():
        raise RuntimeError(f"{CARRIED} is missing; run scripts/gpu_check.sh --pack where SGLang is installed.")
    _module("sglang.srt.layers.quantization.base_config", FusedMoEMethodBase=_Method)
    _module("sglang.srt.arg_groups.overrides", model_config_of=None)
    _module("sglang.srt.runtime_context", get_exec=None, get_parallel=None, get_schedule=None)
    _module("sglang.srt.utils", get_compiler_backend=lambda: "inductor")
    _module("sglang.srt.layers.moe.token_dispatcher", StandardCombineInput=_Combine)
    _module("sglang.srt.layers.moe.token_dispatcher.standard", StandardDispatchOutput=_Dispatch)
    _module("sglang.srt.layers.moe.topk", StandardTopKOutput=_TopK, TopKOutputChecker=_Checker)
    name = "sglang.srt.layers.moe.kt_ep_wrapper"
    spec = importlib.util.spec_from_file_location(name, CARRIED)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.modules["sglang.srt.layers.moe"].kt_ep_wrapper = module  # type: ignore[attr-defined]
    spec.loader.exec_module(module)
    return f"{CARRIED.name} of stock SGLang, with stand-ins for what it imports"
