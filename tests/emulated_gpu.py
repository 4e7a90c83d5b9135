"""A GPU where there is none: tensors in ordinary memory that say they are on ``cuda:0``, under CUDA's rules.

>>> with EmulatedGpu() as gpu:  # doctest: +SKIP
...     merged = blockmerge.merge_state_dicts(*[{n: t.cuda() for n, t in model.items()} for model in models])
>>> assert not gpu.waits  # doctest: +SKIP

What is held to, in every thread that is started meanwhile:

- Tensors of several devices do not meet, but for single numbers from the processor's memory.
- What lets the processor wait for the device is noted in `waits`: reading a value, results whose shape
  depends on values, copies that are not asked to be ``non_blocking`` or whose memory is not page-locked.
- Copies to and from page-locked memory are late: until their stream is waited for, what they come from must
  not change, and where they go to holds rubbish.
- Memory that was made on one stream, and is used on another, must outlive that one's work, or be recorded.
- A new thread's current device is ``cuda:0``, whatever that of the thread that started it.

Values are computed by the processor, so they are not a GPU's: a sum has another order there.
"""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

_CPU = torch.device("cpu")
_RUBBISH = 0xA5

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

_FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}


_PLACES: dict[int, tuple[StorageWeakRef, torch.device, Stream]] = {}
"""Which memory is on which device, and of which stream: for good, as tables are kept from one merge to the next."""


class LateCopyError(AssertionError):
    """Memory was changed, read or freed while a copy was under way."""


class EmulatedGpu:
    """`devices` GPUs, from entering to leaving.

    `kind` is what they are called; ``"mps"`` has no float64. `lacks_float8` names operations that have no
    float8 there, as in torch 2.4: ``cat`` and others. `fails` are {what is asked for: the message of its
    failure}: ``"stream"``, ``"page-locked memory"``, ``"memory"``, the last for more than `most` bytes at once.
    """

    def __init__(self, devices=1, *, kind="cuda", lacks_float8=(), fails=None, most=None):
        self.devices, self.kind, self.most = devices, kind, most
        self.lacks_float8, self.fails = set(lacks_float8), fails or {}
        self.waits: list[str] = []
        self.launches: list[str] = []
        self.launched_bytes = Counter()
        self.used: set[torch.device] = set()
        self.emptied = 0
        self._lock = threading.RLock()
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
            "stream": self._on_stream,
            "current_stream": lambda device=None: self.stream(self.device(device or self.kind)),
            "default_stream": lambda device=None: self._defaults[self.device(device or self.kind).index],
            "synchronize": self.synchronize,
            "empty_cache": self._empty_cache,
        }
        self._stack.enter_context(mock.patch.object(threading.Thread, "run", run_with_gpu))
        if hasattr(getattr(torch, "accelerator", None), "empty_host_cache"):
            self._stack.enter_context(mock.patch.object(torch.accelerator, "empty_host_cache"))
        for name, function in cuda.items():
            self._stack.enter_context(mock.patch.object(torch.cuda, name, function))
        self._stack.enter_context(self.modes())
        return self

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                self.synchronize()
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

    def synchronize(self, device=None):
        with self._lock:
            for stream in self.streams:
                if device is None or stream.device == self.device(device):
                    stream.finish()

    def launched(self, name, device, result):
        """A function is started on a device."""
        self.launches.append(name)
        self.used.add(device)
        self.launched_bytes[name] += sum(
            one.nbytes for one in tree_leaves(result) if isinstance(one, torch.Tensor)
        )

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
        yield
        self._local.device = before

    def _new_stream(self, device=None):
        if "stream" in self.fails:
            raise RuntimeError(self.fails["stream"])
        return Stream(self, self.device(self.kind if device is None else device).index)

    @contextmanager
    def _on_stream(self, stream):
        streams = self._local.__dict__.setdefault("streams", {})
        before, device = streams.get(stream.device.index), self.current
        streams[stream.device.index], self._local.device = stream, stream.device.index
        yield
        streams[stream.device.index], self._local.device = before, device

    def _empty_cache(self):
        self.emptied += 1

    # -- what is where --------------------------------------------------------------------------------------

    def device_of(self, tensor):
        """The device that a tensor is on."""
        held = self._held(tensor)
        return held[1] if held else _CPU

    def made_on(self, tensor):
        """The stream that was the current one when a tensor's memory was asked for."""
        return self._held(tensor)[2]

    def put(self, tensor, device):
        """Say that a tensor's memory is on a device."""
        if device.type == "mps" and tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype, which the MPS framework lacks")
        with self._lock:
            storage = tensor.untyped_storage()
            if device.type == self.kind:
                if self.most is not None and storage.nbytes() > self.most:
                    raise torch.OutOfMemoryError(self.fails["memory"])
                place = StorageWeakRef(storage), device, self.stream(device)
                _PLACES[storage._cdata] = place
            else:
                _PLACES.pop(storage._cdata, None)
        return tensor

    def lock_pages(self, tensor):
        if "page-locked memory" in self.fails:
            raise RuntimeError(self.fails["page-locked memory"])
        begin = tensor.data_ptr()
        reference = StorageWeakRef(tensor.untyped_storage())
        with self._lock:
            self._locked = [one for one in self._locked if not one[2].expired()]
            self._locked.append((begin, begin + tensor.nbytes, reference))
        return tensor

    def is_locked(self, tensor):
        at = tensor.data_ptr()
        with self._lock:
            return any(begin <= at < end and not held.expired() for begin, end, held in self._locked)

    @property
    def locked_bytes(self):
        """Page-locked memory that is in use."""
        with self._lock:
            return sum(end - begin for begin, end, held in self._locked if not held.expired())

    def _held(self, tensor):
        try:
            key = tensor.untyped_storage()._cdata
        except NotImplementedError:  # a tensor without memory
            return None
        with self._lock:
            held = _PLACES.get(key)
            if held is not None and held[0].expired():
                del _PLACES[key]
                return None
            return held

    # -- copies ---------------------------------------------------------------------------------------------

    def copy(self, target, source, *, non_blocking=False):
        """Copy between devices, late where CUDA would be late."""
        with _disable_current_modes():
            return self._copy(target, source, non_blocking)

    def _copy(self, target, source, non_blocking):
        there, here = self.device_of(target), self.device_of(source)
        device = there if there.type == self.kind else here
        stream = self.stream(device)
        is_late = non_blocking and self.is_locked(source if there.type == self.kind else target)
        if there.type == here.type == self.kind:
            target.copy_(source)
        elif there.type == self.kind:
            target.copy_(source)
            if is_late:
                stream.add(_Sent(source))
            elif not non_blocking:
                self.waited("a copy to the device", stream)
        elif is_late:
            stream.add(_Fetched(target, source))
        else:
            self.waited("a copy from the device", stream)
            target.copy_(source)
        return target

    def moved(self, tensor, device, dtype, *, non_blocking=False, memory_format=torch.preserve_format):
        """A copy of a tensor on a device."""
        out = torch.empty_like(tensor, dtype=dtype, memory_format=memory_format)
        return self.copy(self.put(out, device), tensor, non_blocking=non_blocking)


class Stream(torch.Stream):
    """What has been asked of a device, in order. torch itself only looks at its class."""

    def __new__(cls, gpu, index):
        return super().__new__(cls, stream_id=len(gpu.streams), device_index=index, device_type=1)

    def __init__(self, gpu, index):
        self._gpu, self._device = gpu, torch.device(gpu.kind, index)
        self._copies, self._used = [], {}
        gpu.streams.append(self)

    @property
    def device(self):
        return self._device

    def add(self, copy):
        with self._gpu._lock:
            self._copies.append(copy)

    def use(self, tensor):
        """Note that work of this stream needs memory that was made on another."""
        if self._gpu.made_on(tensor) is not self:
            storage = tensor.untyped_storage()
            with self._gpu._lock:
                self._used.setdefault(storage._cdata, StorageWeakRef(storage))

    def record(self, tensor):
        with self._gpu._lock:
            self._used.pop(tensor.untyped_storage()._cdata, None)

    def finish(self):
        """All that was asked of it is done."""
        with self._gpu._lock:
            copies, self._copies = self._copies, []
            used, self._used = self._used, {}
        if any(one.expired() for one in used.values()):
            raise LateCopyError("memory was freed while another stream used it")
        for one in copies:
            one.finish()

    def synchronize(self):
        self.finish()

    def wait_stream(self, other):
        """What the other was asked for comes first; nothing here depends on it."""


class _Sent:
    """A copy to the device, under way."""

    def __init__(self, source):
        self._source, self._was = source, _bytes(source).clone()

    def finish(self):
        if not torch.equal(_bytes(self._source), self._was):
            raise LateCopyError("page-locked memory was changed while it was copied to the device")


class _Fetched:
    """A copy from the device, under way: its target holds rubbish."""

    def __init__(self, target, source):
        self._target = target
        self._values = torch.empty_like(target).copy_(source)
        _bytes(target).fill_(_RUBBISH)

    def finish(self):
        if not bool((_bytes(self._target) == _RUBBISH).all()):
            raise LateCopyError("page-locked memory was changed while it was copied from the device")
        self._target.copy_(self._values)


def _bytes(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor


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
            tensor.is_pinned: lambda one, device=None: gpu.is_locked(one),
            tensor.pin_memory: lambda one, device=None: gpu.lock_pages(one.clone()),
            tensor.record_stream: lambda one, stream: stream.record(one),
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
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        placed = [(one, gpu.device_of(one)) for one in given]
        there = [device for _, device in placed if device.type == gpu.kind]
        if name == "copy_" and there:
            # The same device: nothing but another operation.
            if placed[0][1] == placed[1][1]:
                gpu.launched(name, there[0], args[0])
                self._use(given, there[0])
                return function(*args, **kwargs)
            return gpu.copy(*args[:2], non_blocking=self._non_blocking(args, kwargs))
        if not there:
            return function(*args, **kwargs)
        device = there[0]
        if name == "record_stream":
            return None
        self._check_devices(name, placed, args, device)
        if name in gpu.lacks_float8 and any(one.dtype in _FLOAT8 for one in given):
            raise NotImplementedError(f"\"{name}_cuda\" not implemented for 'Float8'")
        self._use(given, device)
        if name in _WAITING or (name in ("index", "index_put_") and _by_truth(args[1])):
            gpu.waited(name, gpu.stream(device))
        result = function(*args, **kwargs)
        if not _is_view(function):
            gpu.launched(name, device, result)
        wanted = kwargs.get("device")
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and gpu.device_of(one) != device:
                gpu.put(one, device if wanted is None else gpu.device(wanted))
        return result

    def _non_blocking(self, args, kwargs):
        return bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking", False))

    def _use(self, tensors, device):
        stream = self.gpu.stream(device)
        for one in tensors:
            if self.gpu.device_of(one).type == self.gpu.kind:
                stream.use(one)

    def _check_devices(self, name, placed, args, device):
        """Single numbers, and places given to an index, may be in the processor's memory."""
        indices = tree_leaves(args[1]) if name in ("index", "index_put_") else []
        for tensor, where in placed:
            if where != device and tensor.dim() and not any(tensor is one for one in indices):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, "
                    f"{device} and {where}! ({name})"
                )


def _is_view(function):
    return any(one.alias_info is not None and not one.alias_info.is_write for one in function._schema.returns)


def _by_truth(indices):
    return any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in indices)
