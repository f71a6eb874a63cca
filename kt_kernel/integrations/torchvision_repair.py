"""A torchvision that imports beside a CPU build of torch."""

from __future__ import annotations

import importlib
import sys

import torch

TORCHVISION_OPS = ("nms", "qnms")

_declarations: list[torch.library.Library] = []  # the operators exist as long as these objects do


def repair_torchvision() -> None:
    """Make ``import torchvision`` work where its C++ library does not fit this torch.

    PyPI's torchvision is a CUDA build: beside a CPU torch its library does not load, and the import then fails on
    operators that were never declared. Declaring them is enough: SGLang and transformers import torchvision, and call
    none of them for text models.
    """
    try:
        importlib.import_module("torchvision")
        return
    except ImportError:
        return  # not installed: whoever needs it says so
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _declarations.append(torch.library.Library("torchvision", "DEF"))
    for op in TORCHVISION_OPS:
        _declarations[-1].define(op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")
