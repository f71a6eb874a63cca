"""Asynchronous "device" tensors on the streams of the test double of the CUDA driver.

Inside ``with AsyncDevice(library) as device:`` an operation that takes a device tensor is an operation of the current
fake stream, as on a GPU: its outputs are device tensors, allocated at once, with shapes from meta tensors and bytes
that mean nothing, and filled in when the stream gets there. So Python that was written for a GPU, SGLang's included,
runs against real asynchrony on a host without one. Device tensors are CPU tensors that :meth:`AsyncDevice.tensor` or
an operation made; all others are host memory. ``torch.cuda``'s streams, events and synchronization are the double's.

=========================  ===========================================================================================
an operation that          does
=========================  ===========================================================================================
takes no device tensor     runs at once, on the host
returns a view             runs at once, it touches no bytes
returns new tensors        returns them unfilled; the stream computes them
changes tensors            returns; the stream changes them, and they count as device tensors
returns no tensor          waits for the device first: ``item()``, ``torch.equal``; so do ``tolist``, ``cpu``, ``numpy``
is one of kt_kernel's      runs at once: it enqueues by itself; its tensors are kept until the device is idle
=========================  ===========================================================================================

Inside :meth:`AsyncDevice.capture` operations become nodes of a graph, with the tensors they had; they run when the
graph is replayed. Whatever would have to wait for the device fails there, as it does on a GPU.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
CAPTURE_GLOBAL, CAPTURE_RELAXED = 0, 2
NOT_READY = 600


class Driver:
    """The double's library: driver calls that raise on an error, and its control functions.

    ``driver.cuStreamCreate(...)`` raises RuntimeError for any result but 0; ``driver.control.fake_cuda_...`` does not.
    """

    def __init__(self, library: str | Path) -> None:
        self.control = ctypes.CDLL(str(library))
        for name in ("fake_cuda_calls", "fake_cuda_pending", "fake_cuda_host_bytes"):
            getattr(self.control, name).restype = ctypes.c_uint64
        self.control.fake_cuda_report.restype = ctypes.c_size_t
        self.control.fake_cuda_report.argtypes = [ctypes.c_char_p, ctypes.c_size_t]

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self.control, name)

        def call(*args: Any) -> None:
            result = function(*args)
            if result:
                text = ctypes.c_char_p()
                self.control.cuGetErrorName(result, ctypes.byref(text))
                raise RuntimeError(f"{name} failed: {(text.value or b'?').decode()} ({result})\n{self.report()}")

        return call

    def report(self) -> str:
        """Return what the double has found: violations, a deadlock; one a line."""
        text = ctypes.create_string_buffer(self.control.fake_cuda_report(None, 0) + 1)
        self.control.fake_cuda_report(text, len(text))
        return text.value.decode()


class FakeEvent:
    """Takes the place of ``torch.cuda.Event``."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._driver = AsyncDevice.current().driver
        self._event = ctypes.c_void_p()
        self._driver.cuEventCreate(ctypes.byref(self._event), 2)

    def record(self, stream: FakeStream | None = None) -> None:
        self._driver.cuEventRecord(self._event, (stream or AsyncDevice.current().stream).handle)

    def wait(self, stream: FakeStream | None = None) -> None:
        self._driver.cuStreamWaitEvent((stream or AsyncDevice.current().stream).handle, self._event, 0)

    def query(self) -> bool:
        return self._driver.control.cuEventQuery(self._event) != NOT_READY

    def synchronize(self) -> None:
        self._driver.cuEventSynchronize(self._event)


class FakeStream:
    """Takes the place of ``torch.cuda.Stream``."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self._driver = AsyncDevice.current().driver
        self.handle = ctypes.c_void_p()
        self.device = device
        self._driver.cuStreamCreate(ctypes.byref(self.handle), 1)
        self.cuda_stream = int(self.handle.value or 0)

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = event or FakeEvent()
        event.record(self)
        return event

    def wait_event(self, event: FakeEvent) -> None:
        event.wait(self)

    def wait_stream(self, other: FakeStream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self._driver.cuStreamSynchronize(self.handle)
        AsyncDevice.current().raise_errors()

    def query(self) -> bool:
        return self._driver.control.cuStreamQuery(self.handle) != NOT_READY

    def pause(self) -> None:
        """Start no further operation until :meth:`resume`."""
        self._driver.control.fake_cuda_pause(self.handle)

    def resume(self) -> None:
        self._driver.control.fake_cuda_resume(self.handle)


class FakeGraph:
    """A captured graph; it keeps what its operations refer to."""

    def __init__(self, device: AsyncDevice) -> None:
        self._device = device
        self._executable = ctypes.c_void_p()
        self.kept: list[Any] = []

    def instantiate(self, graph: ctypes.c_void_p) -> None:
        driver = self._device.driver
        driver.cuGraphInstantiateWithFlags(ctypes.byref(self._executable), graph, ctypes.c_uint64(0))
        driver.cuGraphDestroy(graph)

    def replay(self) -> None:
        """Launch on the current stream."""
        self._device.driver.cuGraphLaunch(self._executable, self._device.stream.handle)


class AsyncDevice(TorchDispatchMode):
    """The mode, with ``torch.cuda`` patched. One at a time; its thread makes all calls.

    Parameters
    ----------
    library : str or Path
        ``libfake_cuda.so``; the same file as ``KT_CUDA_DRIVER`` names.
    seed, max_delay_us : int
        Random delays before operations; 0: none.
    """

    _current: AsyncDevice | None = None

    def __init__(self, library: str | Path, *, seed: int = 0, max_delay_us: int = 0) -> None:
        super().__init__()
        self.driver = Driver(library)
        self.errors: list[BaseException] = []
        self.operations: list[str] = []  # names of what was enqueued, for tests that ask
        self._seed, self._max_delay_us = seed, max_delay_us
        self._work: dict[int, tuple[Callable[[], None], bool]] = {}
        self._keys = itertools.count(1)
        self._callback = _CALLBACK(self._run)
        self._kept: list[Any] = []
        self._capture: FakeGraph | None = None
        self._device: dict[int, StorageWeakRef] = {}  # a weak reference keeps the address from being used again
        self._streams: list[FakeStream] = []
        self._patches = ExitStack()
        self._thread = threading.get_ident()

    @classmethod
    def current(cls) -> AsyncDevice:
        if cls._current is None:
            raise RuntimeError("no AsyncDevice is active; enter one first.")
        return cls._current

    @property
    def stream(self) -> FakeStream:
        """The current stream."""
        return self._streams[-1]

    # --- context ---

    def __enter__(self) -> AsyncDevice:
        driver = self.driver
        driver.control.fake_cuda_restore_defaults()
        driver.cuInit(0)
        context = ctypes.c_void_p()
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
        driver.cuCtxSetCurrent(context)
        driver.control.fake_cuda_set_delays(ctypes.c_uint64(self._seed), self._max_delay_us)
        AsyncDevice._current = self
        self._streams = [FakeStream()]
        patch = self._patches.enter_context
        patch(mock.patch.object(torch.cuda, "current_stream", lambda device=None: self.stream))
        patch(mock.patch.object(torch.cuda, "stream", self.on))
        patch(mock.patch.object(torch.cuda, "synchronize", lambda device=None: self.synchronize()))
        patch(mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: self._capture is not None))
        patch(mock.patch.object(torch.cuda, "Stream", FakeStream))
        patch(mock.patch.object(torch.cuda, "Event", FakeEvent))
        for name in ("tolist", "numpy", "cpu"):
            patch(mock.patch.object(Tensor, name, self._after_waiting(getattr(Tensor, name))))
        # compiled code would run on the host, past the mode
        torch.compiler.set_stance("force_eager")
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.compiler.set_stance("default")
        try:
            # without an answer to what went wrong: the test has it
            self.driver.control.cuCtxSynchronize()
        finally:
            self._patches.close()
            self._kept.clear()
            AsyncDevice._current = None
        if exception[0] is None:
            self.raise_errors()

    @contextmanager
    def on(self, stream: FakeStream | None) -> Iterator[FakeStream]:
        """Make a stream the current one; ``torch.cuda.stream``."""
        self._streams.append(stream or self.stream)
        try:
            yield self.stream
        finally:
            self._streams.pop()

    @contextmanager
    def capture(self, mode: int = CAPTURE_GLOBAL) -> Iterator[FakeGraph]:
        """Capture on a stream of its own, as ``torch.cuda.graph`` does; the graph can be replayed afterwards."""
        graph = FakeGraph(self)
        stream = FakeStream()
        self._capture = graph
        captured = ctypes.c_void_p()
        try:
            with self.on(stream):
                self.driver.cuStreamBeginCapture_v2(stream.handle, mode)
                try:
                    yield graph
                finally:
                    result = self.driver.control.cuStreamEndCapture(stream.handle, ctypes.byref(captured))
        finally:
            self._capture = None
        if result:
            raise RuntimeError(f"the capture failed ({result})\n{self.driver.report()}")
        graph.instantiate(captured)

    # --- the host's side ---

    def tensor(self, values: Tensor) -> Tensor:
        """Return a device tensor with the values of a host tensor."""
        with _disable_current_modes():
            return self._adopt(values.clone())

    def peek(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor's bytes as they are now, whatever the streams have still to do."""
        with _disable_current_modes():
            return tensor.clone()

    def synchronize(self) -> None:
        """Wait for all streams; raise what went wrong in an operation."""
        self.driver.cuCtxSynchronize()
        if self._capture is None:
            self._kept.clear()
            self._device = {key: value for key, value in self._device.items() if not value.expired()}
        self.raise_errors()

    def raise_errors(self) -> None:
        if self.errors:
            error, self.errors = self.errors[0], []
            raise RuntimeError(f"an operation on the device failed: {error!r}") from error

    def _adopt(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._device.setdefault(storage._cdata, StorageWeakRef(storage))
        return tensor

    def _on_device(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._device

    def _after_waiting(self, original: Callable) -> Callable:
        def waiting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            # a stream's own operations read what is there
            if threading.get_ident() == self._thread and tensor.device.type == "cpu" and self._on_device(tensor):
                self.synchronize()
            return original(tensor, *args, **kwargs)

        return waiting

    # --- the device's side ---

    def launch(self, work: Callable[[], None]) -> None:
        """Enqueue a kernel on the current stream."""
        key = next(self._keys)
        self._work[key] = (work, self._capture is not None)
        self.driver.fake_cuda_launch(self.stream.handle, self._callback, ctypes.c_void_p(key))

    def _run(self, key: int) -> None:
        work, captured = self._work[key]
        if not captured:
            del self._work[key]
        try:
            with torch.inference_mode():
                work()
        except BaseException as error:
            # reported at the next synchronization, as a GPU does
            self.errors.append(error)

    def _keep(self, values: Any) -> None:
        (self._kept if self._capture is None else self._capture.kept).append(values)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(self._on_device(leaf) for leaf in leaves):
            return func(*args, **kwargs)
        if func.namespace == "kt_kernel":
            result = tree_map_only(Tensor, self._adopt, func(*args, **kwargs))
            self._keep((args, kwargs, result))
            return result
        schema = func._schema
        name = schema.name.removeprefix("aten::")
        returned = [value.alias_info for value in schema.returns]
        if name.startswith(("empty", "new_empty")) or any(alias and not alias.is_write for alias in returned):
            return tree_map_only(Tensor, self._adopt, func(*args, **kwargs))
        if name == "record_stream":
            self._keep(args)
            return None
        changed = [argument.name for argument in schema.arguments if argument.alias_info]
        if changed and name not in ("resize_", "set_"):
            return self._change(func, schema, args, kwargs)
        if not changed and schema.returns and all("Tensor" in str(value.type) for value in schema.returns):
            return self._compute(func, args, kwargs)
        self.synchronize()
        return func(*args, **kwargs)

    def _change(self, func: Any, schema: Any, args: Any, kwargs: Any) -> Any:
        self.operations.append(schema.name)
        self.launch(lambda: func(*args, **kwargs))
        by_name = dict(zip([argument.name for argument in schema.arguments], args, strict=False)) | kwargs
        names = {}
        for argument in schema.arguments:
            if argument.alias_info:
                tree_map_only(Tensor, self._adopt, by_name.get(argument.name))
                for alias in argument.alias_info.before_set:
                    names[alias] = argument.name
        results = [by_name[names[next(iter(value.alias_info.before_set))]] for value in schema.returns]
        return None if not results else results[0] if len(results) == 1 else tuple(results)

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        def meta(tensor: Tensor) -> Tensor:
            return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")

        self.operations.append(func._schema.name)
        shapes_args, shapes_kwargs = tree_map_only(Tensor, meta, (args, kwargs))
        if any(argument.name == "device" for argument in func._schema.arguments):
            shapes_kwargs = {**shapes_kwargs, "device": torch.device("meta")}
        if shapes_kwargs.get("pin_memory"):
            shapes_kwargs = {**shapes_kwargs, "pin_memory": False}
        shapes = func(*shapes_args, **shapes_kwargs)

        def real(tensor: Tensor) -> Tensor:
            made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
            if made.numel():
                made.untyped_storage().fill_(0x7F)
            return self._adopt(made)

        outputs = tree_map_only(Tensor, real, shapes)

        def work() -> None:
            results = func(*args, **kwargs)
            for output, result in zip(tree_leaves(outputs), tree_leaves(results), strict=True):
                output.copy_(result)

        self.launch(work)
        return outputs
