"""A GPU where there is none: tensors in ordinary memory that say they are on ``cuda:0``, under CUDA's rules.

>>> with EmulatedGpu() as gpu:  # doctest: +SKIP
...     merged = blockmerge.merge_state_dicts(*[{n: t.cuda() for n, t in model.items()} for model in models])
>>> assert not gpu.waits  # doctest: +SKIP

What is held to, in every thread that is started meanwhile:

- Tensors of several devices do not meet, but for single numbers from the processor's memory.
- What lets the processor wait for the device is noted in `waits`: being asked to, reading a value, results
  whose shape depends on values, copies that are not asked to be ``non_blocking``, and of those that are, those
  that have to go through page-locked memory first: all that come back from the device, and on the way there
  those of more than 64 KB; indices in the processor's memory; emptying the cache.
- Copies to and from page-locked memory are late: until their stream is waited for, what they come from must
  not change, and where they go to holds rubbish; neither may be freed.
- What one stream writes, another may use only when it has waited for that, or the processor has.
- Memory that was made on one stream, and is used on another, must outlive that one's work, or be recorded.
- A new thread's current device is ``cuda:0``, and its streams are the default ones, whatever those of the
  thread that started it.
- Deterministic algorithms, where asked for, are not there for all operations.

Values are computed by the processor, so they are not a GPU's: a sum has another order there.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager
from functools import cache
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.emulated_streams import Event, Fetched, Place, Sent, Stream

_CPU = torch.device("cpu")
_STAGED_AT_ONCE = 64 << 10
"""Bytes that CUDA takes from any memory without waiting."""

_WAITING = {
    "_local_scalar_dense",
    "allclose",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
    "_unique2",
}
"""Operations that need a value on the processor."""

_MAKING = {"empty", "empty_like", "new_empty"}
"""Operations that ask for memory, and start nothing."""

_NOT_DETERMINISTIC = {"bincount", "cumsum", "histc", "kthvalue", "put_"}
_FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}
_OutOfMemoryError = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)  # of torch before 2.5

_PLACES: dict[int, Place] = {}
"""Which memory is on which device, and of which stream: for good, as tables are kept from one merge to the next."""


class EmulatedGpu:
    """`devices` GPUs, from entering to leaving.

    `kind` is what they are called; ``"mps"`` has no float64. `lacks_float8` names operations that have no
    float8 there, as in torch 2.4: ``cat`` and others. `fails` are {what is asked for: the message of its
    failure}: ``"stream"``, ``"page-locked memory"``, ``"copy"``, ``"a value"``, ``"an empty cache"``, ``"memory"``, the last
    for more than `most` bytes at once.
    """

    def __init__(self, devices=1, *, kind="cuda", lacks_float8=(), fails=None, most=None):
        self.devices, self.kind, self.most = devices, kind, most
        self.lacks_float8, self.fails = set(lacks_float8), {} if fails is None else fails
        self.waits: list[str] = []
        self.launches: list[str] = []
        self.launched_most: dict[torch.dtype, int] = {}
        self.used: set[torch.device] = set()
        self.emptied: list[tuple[int, int]] = []
        self.emptied_locked = 0
        self.lock = threading.RLock()
        self.locked_at_once: list[int] = []
        self._locked: list[tuple[int, int, StorageWeakRef]] = []
        self._local = threading.local()
        self.streams: list[Stream] = []
        self._defaults = [Stream(self, index) for index in range(devices)]

    def __enter__(self):
        self._stack = ExitStack()
        run = threading.Thread.run
        gpu = self

        def run_with_gpu(thread):
            with gpu.modes():
                run(thread)

        cuda = {
            "is_available": lambda: self.kind == "cuda",
            "device_count": lambda: self.devices,
            "current_device": lambda: self.current,
            "set_device": self._set_device,
            "device": self._on_device,
            "Stream": self._new_stream,
            "Event": lambda **_: Event(self),
            "stream": self._on_stream,
            "current_stream": lambda device=None: self.stream(self.device(device or self.kind)),
            "synchronize": self.synchronize,
            "empty_cache": self._empty_cache,
        }
        self._stack.enter_context(mock.patch.object(threading.Thread, "run", run_with_gpu))
        is_public = hasattr(getattr(torch, "accelerator", None), "empty_host_cache")
        where = (torch.accelerator, "empty_host_cache") if is_public else (torch._C, "_host_emptyCache")
        self._stack.enter_context(mock.patch.object(*where, self._empty_host_cache, create=True))
        for name, function in cuda.items():
            self._stack.enter_context(mock.patch.object(torch.cuda, name, function))
        self._stack.enter_context(self.modes())
        return self

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                self.finish()
        finally:
            self._stack.close()

    @contextmanager
    def modes(self):
        """The rules, in the calling thread."""
        with _Operations(self), _Functions(self):
            yield

    # -- devices and streams, as the calling thread has them ------------------------------------------------

    @property
    def current(self):
        return getattr(self._local, "device", 0)

    def device(self, device):
        """A device with its number. Raises RuntimeError for one that is not there."""
        device = torch.device(device)
        if device.type != self.kind:
            return device
        index = self.current if device.index is None else device.index
        if index >= self.devices:
            raise RuntimeError("CUDA error: invalid device ordinal\nCUDA kernel errors might be …")
        return torch.device(self.kind, index)

    def stream(self, device):
        return getattr(self._local, "streams", {}).get(device.index) or self._defaults[device.index]

    def fail(self, what):
        if what in self.fails:
            raise RuntimeError(self.fails[what])

    def finish(self):
        """Let all that was asked of it be done: a test's own way to wait."""
        for stream in self.streams:
            stream.finish()

    def synchronize(self, device=None):
        self.waits.append("synchronize")
        for stream in self.streams:
            if stream.device == self.device(self.kind if device is None else device):
                stream.finish()

    def launched(self, name, device, result):
        """A function is started on a device."""
        self.launches.append(name)
        self.used.add(device)
        for one in _tensors(result):
            self.launched_most[one.dtype] = max(one.numel(), self.launched_most.get(one.dtype, 0))

    def waited(self, why, stream):
        """The processor waits for a stream."""
        self.waits.append(why)
        stream.finish()

    def _set_device(self, device):
        self._local.device = device if isinstance(device, int) else self.device(device).index

    @contextmanager
    def _on_device(self, device):
        before = self.current
        self._set_device(device)
        try:
            yield
        finally:
            self._local.device = before

    def _new_stream(self, device=None):
        self.fail("stream")
        return Stream(self, self.device(self.kind if device is None else device).index)

    @contextmanager
    def _on_stream(self, stream):
        streams = self._local.__dict__.setdefault("streams", {})
        before, device = streams.get(stream.device.index), self.current
        streams[stream.device.index], self._local.device = stream, stream.device.index
        try:
            yield
        finally:
            streams[stream.device.index], self._local.device = before, device

    def _empty_cache(self):
        self.fail("an empty cache")
        self.waits.append("empty_cache")
        self.emptied.append((self.device_bytes, self.locked_bytes))

    def _empty_host_cache(self):
        self.emptied_locked += 1
        self.fail("an empty cache")

    # -- what is where --------------------------------------------------------------------------------------

    def device_of(self, tensor):
        """The device that a tensor is on."""
        place = self.place(tensor)
        return place.device if place else _CPU

    def put(self, tensor, device):
        """Say that a tensor's memory is on a device."""
        if device.type == "mps" and tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype, which the MPS framework lacks")
        with self.lock:
            storage = tensor.untyped_storage()
            if device.type == self.kind:
                if self.most is not None and storage.nbytes() > self.most:
                    raise _OutOfMemoryError(self.fails["memory"])
                _PLACES[storage._cdata] = Place(storage, device, self.stream(device))
            else:
                _PLACES.pop(storage._cdata, None)
        return tensor

    def lock_pages(self, tensor):
        self.fail("page-locked memory")
        self.locked_at_once.append(tensor.nbytes)
        begin = tensor.data_ptr()
        reference = StorageWeakRef(tensor.untyped_storage())
        with self.lock:
            self._locked = [one for one in self._locked if not one[2].expired()]
            self._locked.append((begin, begin + tensor.nbytes, reference))
        return tensor

    def locked(self, tensor):
        """The page-locked memory that a tensor is in, held weakly; None where it is elsewhere."""
        at = tensor.data_ptr()
        with self.lock:
            known = (held for begin, end, held in self._locked if begin <= at < end and not held.expired())
            return next(known, None)

    @property
    def locked_bytes(self):
        """Page-locked memory in use."""
        with self.lock:
            return sum(end - begin for begin, end, held in self._locked if not held.expired())

    @property
    def device_bytes(self):
        """Memory in use on the devices."""
        places = list(_PLACES.values())
        return sum(one.nbytes for one in places if one.made_on.gpu is self and not one.held.expired())

    def place(self, tensor):
        """Where a tensor's memory is, None for the processor's."""
        try:
            key = tensor.untyped_storage()._cdata
        except NotImplementedError:  # a tensor without memory
            return None
        place = _PLACES.get(key)
        if place is not None and place.held.expired():
            _PLACES.pop(key, None)
            return None
        return place

    # -- copies ---------------------------------------------------------------------------------------------

    def copy(self, target, source, *, non_blocking=False):
        """Copy between devices, late where CUDA would be late."""
        with _disable_current_modes():
            there, here = self.place(target), self.place(source)
            if here is None:
                self._send(target, there, source, non_blocking)
            elif there is None:
                self._fetch(target, source, here, non_blocking)
            else:  # on both devices' streams, as torch has it
                sends, gets = self.stream(here.device), self.stream(there.device)
                sends.wait_stream(gets)
                sends.use(here)
                sends.use(there)
                target.copy_(source)
                there.is_written(sends)
                gets.wait_stream(sends)
            return target

    def _send(self, target, there, source, non_blocking):
        self.fail("copy")
        stream, locked = self.stream(there.device), self.locked(source)
        stream.use(there)
        target.copy_(source)
        there.is_written(stream)
        if non_blocking and locked and source.is_contiguous():
            stream.add(Sent(source, locked))
        elif not non_blocking or source.nbytes > _STAGED_AT_ONCE:
            self.waited("a copy to the device", stream)

    def _fetch(self, target, source, here, non_blocking):
        self.fail("a value")
        stream, locked = self.stream(here.device), self.locked(target)
        stream.use(here)
        if non_blocking and locked and target.is_contiguous():
            stream.add(Fetched(target, source, locked))
        else:
            self.waited("a copy from the device", stream)
            target.copy_(source)

    def moved(self, tensor, device, dtype, *, non_blocking=False, memory_format=torch.preserve_format):
        """A copy of a tensor on a device."""
        out = torch.empty_like(tensor, dtype=dtype, memory_format=memory_format)
        return self.copy(self.put(out, device), tensor, non_blocking=non_blocking)


class _Functions(TorchFunctionMode):
    """What Python asks a tensor, and functions that say on which device they make one."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu
        tensor = torch.Tensor
        self.own = {
            tensor.device.__get__: self._device,
            tensor.is_cuda.__get__: lambda one: gpu.device_of(one).type == "cuda",
            tensor.is_cpu.__get__: lambda one: gpu.device_of(one).type == "cpu",
            tensor.get_device: lambda one: gpu.device_of(one).index,
            tensor.is_pinned: lambda one, device=None: gpu.locked(one) is not None,
            tensor.pin_memory: lambda one, device=None: gpu.lock_pages(one.clone()),
            tensor.record_stream: lambda one, stream: stream.record(gpu.place(one)),
            tensor.to: self._to,
            tensor.cuda: lambda one, device=None, non_blocking=False: self._to(
                one, device or "cuda", non_blocking
            ),
            tensor.cpu: lambda one: self._to(one, "cpu"),
            tensor.numpy: self._numpy,
            tensor.tolist: lambda one: self._to(one, "cpu").tolist(),
        }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in self.own:
            return self.own[function](*args, **kwargs)
        locks = kwargs.pop("pin_memory", False)
        if kwargs.get("device") is None:
            made = function(*args, **kwargs)
        else:
            device = self.gpu.device(kwargs["device"])
            made = function(*args, **{**kwargs, "device": device if device.type != self.gpu.kind else _CPU})
            if device.type == self.gpu.kind:
                self.gpu.put(made, device)
                if function in (torch.tensor, torch.as_tensor):
                    self.gpu.waited("a copy to the device", self.gpu.stream(device))
        return self.gpu.lock_pages(made) if locks else made

    def _device(self, tensor):
        held = self.gpu.device_of(tensor)
        return held if held.type == self.gpu.kind else torch.Tensor.device.__get__(tensor)

    def _numpy(self, tensor, **options):
        if self.gpu.device_of(tensor).type != "cpu":
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return torch.Tensor.numpy(tensor, **options)

    def _to(self, tensor, *given, copy=False, **named):
        device, dtype = named.get("device"), named.get("dtype")
        non_blocking, memory_format = named.get("non_blocking", False), named.get("memory_format")
        flags = []
        for one in [*given, *([named["other"]] if "other" in named else [])]:
            if isinstance(one, torch.Tensor):
                device, dtype = self.gpu.device_of(one), one.dtype
            elif isinstance(one, torch.dtype):
                dtype = one
            elif isinstance(one, bool):
                flags.append(one)
            else:
                device = torch.device(self.gpu.kind, one) if isinstance(one, int) else one
        non_blocking = flags[0] if flags else non_blocking
        copy = flags[1] if len(flags) > 1 else copy
        here = self.gpu.device_of(tensor)
        there = here if device is None else self.gpu.device(device)
        dtype = tensor.dtype if dtype is None else dtype
        if here == there:
            return tensor.to(dtype, copy=copy, memory_format=memory_format or torch.preserve_format)
        with torch.no_grad():
            return self.gpu.moved(
                tensor,
                there,
                dtype,
                non_blocking=non_blocking,
                memory_format=memory_format or torch.preserve_format,
            )


class _Operations(TorchDispatchMode):
    """What is computed, and where."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        gpu, name = self.gpu, function.overloadpacket.__name__
        placed = [(one, gpu.place(one)) for one in _tensors(args, kwargs)]
        there = [place for _, place in placed if place is not None]
        if not there:
            return function(*args, **kwargs)
        device = there[0].device
        if name == "copy_" and (
            placed[0][1] is None or placed[1][1] is None or placed[1][1].device != device
        ):
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            return gpu.copy(*args[:2], non_blocking=non_blocking)
        if name == "record_stream":
            return None
        self._check(name, placed, args, device)
        if name in _MAKING or _is_view(function):
            return self._put(function(*args, **kwargs), device, kwargs)
        stream = gpu.stream(device)
        for place in there:
            stream.use(place)
        if name in _WAITING or (name in ("index", "index_put_") and _waits_for_indices(args[1], gpu)):
            gpu.fail("a value")
            gpu.waited(name, stream)
        result = function(*args, **kwargs)
        for one in _written(function, args, kwargs):
            if (place := gpu.place(one)) is not None:
                place.is_written(stream)
        gpu.launched(name, device, result)
        return self._put(result, device, kwargs)

    def _put(self, result, device, kwargs):
        wanted = kwargs.get("device")
        for one in _tensors(result):
            if self.gpu.place(one) is None:
                self.gpu.put(one, device if wanted is None else self.gpu.device(wanted))
        return result

    def _check(self, name, placed, args, device):
        """Single numbers, and places given to an index, may be in the processor's memory."""
        indices = args[1] if name in ("index", "index_put_") else []
        for tensor, place in placed:
            where = _CPU if place is None else place.device
            if where != device and tensor.dim() and not any(tensor is one for one in indices):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, "
                    f"{device} and {where}! ({name})"
                )
        if name in self.gpu.lacks_float8 and any(one.dtype in _FLOAT8 for one, _ in placed):
            raise NotImplementedError(f"\"{name}_cuda\" not implemented for 'Float8'")
        if name in _NOT_DETERMINISTIC and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(f"{name}_cuda does not have a deterministic implementation")


def _tensors(*things):
    """The tensors in what a function is given or gives."""
    found = []
    for one in things:
        if isinstance(one, torch.Tensor):
            found.append(one)
        elif isinstance(one, (list, tuple, dict)):
            found += _tensors(*(one.values() if isinstance(one, dict) else one))
    return found


@cache
def _is_view(function):
    return any(one.alias_info is not None and not one.alias_info.is_write for one in function._schema.returns)


@cache
def _writes(function):
    """Which arguments a function writes to: their places and names."""
    schema = function._schema.arguments
    return [(n, one.name) for n, one in enumerate(schema) if one.alias_info and one.alias_info.is_write]


def _written(function, args, kwargs):
    """The tensors that a function writes to."""
    return _tensors(*(args[n] if n < len(args) else kwargs.get(name) for n, name in _writes(function)))


def _waits_for_indices(indices, gpu):
    """Whether how many there are depends on values, or they have to be brought to the device."""
    return any(
        isinstance(one, torch.Tensor) and (one.dtype == torch.bool or gpu.place(one) is None)
        for one in indices
    )
