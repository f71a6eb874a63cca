"""The MoE layers of one model in the order of a pass: which layer hands what it defers to which.

A layer that defers leaves a share of its output to its successor: the layer with the next larger ``layer_idx`` of the
same model, whatever dense layers lie between. The last layer has none and never defers. Layers are linked at the first
forward of any of them, when all of the model exist, and again when one has got new weights or is gone.

Nothing that SGLang passes names a model, so it is told from the order of construction. A wrapper belongs to the model
of the wrapper made before it if both have the same weight path, sizes, method and engine, its ``layer_idx`` is larger
and no layer of that model has run yet; otherwise it begins another model. So

- a draft model is one of its own: its weight path or sizes differ, or its layers begin at 0 again;
- two instances of one checkpoint, made one after the other, are two models;
- layers made in descending order are a model each, and none of them defers: the error is on the safe side;
- a pipeline stage has its own process, hence its own layers; its last layer does not defer.

Two instances of one checkpoint whose layers are made by turns cannot be told apart; make each under :func:`one_model`.

The passes of a model must follow one another: two batches that walk through the layers at the same time would get each
other's shares, so SGLang's two-batch overlap is refused.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch

from kt_kernel import _ext

logger = logging.getLogger("kt_kernel")


class Member(Protocol):
    """What a chain reads of its layers, which are ``KTMoEWrapper`` objects."""

    layer_idx: int
    weight_path: str | None
    method: str
    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    moe_intermediate_size: int
    max_deferred_experts_per_token: int
    moe: Any  # CpuExperts, None without weights
    cpu_infer: Any


class LayerChain:
    """The wrappers of one model. Holds them weakly; each holds its chain."""

    def __init__(self) -> None:
        self.linked = False
        self._begun = False
        self._members: list[weakref.ref[Member]] = []
        self._last_idx = -1
        self._announced = False

    def takes(self, wrapper: Member) -> bool:
        """Whether `wrapper` may be the next layer of this model."""
        return not self._begun and wrapper.layer_idx > self._last_idx

    def add(self, wrapper: Member) -> None:
        """Append the next layer of the model."""
        self._members.append(weakref.ref(wrapper, self._forget))
        self._last_idx = wrapper.layer_idx
        self.linked = False

    def change(self) -> None:
        """Have the layers linked anew at the next forward: one of them has got other weights."""
        self.linked = False

    def link(self) -> None:
        """Link the layers that have weights; nothing if none of them may defer.

        Waits for the forwards that are queued. A share that is on its way is lost, so weights are changed between
        passes.
        """
        with _lock:
            if self.linked:
                return
            self.linked = self._begun = True  # before: a change meanwhile asks for another link
            found = [wrapper for wrapper in (member() for member in self._members) if wrapper is not None]
            ready = [(wrapper, wrapper.moe) for wrapper in found if wrapper.moe is not None]
            limits = [wrapper.max_deferred_experts_per_token for wrapper, _ in ready]
            if not any(limits):
                return
            try:
                _ext.link_layers([experts.layer for _, experts in ready], limits)
            except BaseException:
                self.linked = False
                raise
            self._announce(ready[0][0], len(ready), max(limits))

    def _forget(self, _member: object) -> None:
        self.linked = False

    def _announce(self, wrapper: Member, num_layers: int, limit: int) -> None:
        if self._announced:
            return
        self._announced = True
        text = (
            f"deferral: of {wrapper.num_experts_per_tok} experts a token, up to {limit} are added one MoE layer later, "
            f"in {num_layers - 1} of {num_layers} layers"
        )
        if not torch.cuda.is_available():
            text += "; without a GPU to work beside it costs accuracy and saves no time"
        logger.warning("%s", text)


_lock = threading.RLock()
_latest: weakref.WeakValueDictionary[tuple, LayerChain] = weakref.WeakValueDictionary()
_given: ContextVar[LayerChain | None] = ContextVar("kt_kernel_model", default=None)


@contextmanager
def one_model() -> Iterator[None]:
    """Make the wrappers constructed in this block the layers of one model, apart from all others.

    Their ``layer_idx`` must ascend; a wrapper whose ``layer_idx`` does not is a ``ValueError``.
    """
    token = _given.set(LayerChain())
    try:
        yield
    finally:
        _given.reset(token)


def join(wrapper: Member) -> LayerChain:
    """Return the chain of the model that a newly made wrapper belongs to, with the wrapper in it."""
    with _lock:
        chain = _given.get()
        if chain is None:
            key = (
                wrapper.weight_path,
                wrapper.method,
                wrapper.num_experts,
                wrapper.num_experts_per_tok,
                wrapper.hidden_size,
                wrapper.moe_intermediate_size,
                id(wrapper.cpu_infer),
            )
            chain = _latest.get(key)
            if chain is None or not chain.takes(wrapper):
                chain = _latest[key] = LayerChain()
        elif not chain.takes(wrapper):
            raise ValueError(
                f"layer {wrapper.layer_idx} is made out of order; the layers of one model are made in ascending order, "
                f"before its first forward."
            )
        chain.add(wrapper)
        return chain
