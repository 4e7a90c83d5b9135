"""The part of a merge that needs torch: computing a run, chunk by chunk. Loaded by the first worker that
needs it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from blockmerge.anatomy import component_of, is_position_ids, is_schedule
from blockmerge.checkpoints import FLOAT_DTYPES, Checkpoint, Reader, TensorInfo, View
from blockmerge.errors import RecipeError, shown
from blockmerge.merging.planning.decisions import SHARED_CHANNELS
from blockmerge.merging.planning.plan import Plan, PlannedFile, Run, Whole, Work, size_of
from blockmerge.merging.planning.request import MergeRequest
from blockmerge.methods import Method
from blockmerge.methods.arithmetic import round_into, wide_dtype
from blockmerge.methods.elementwise import cast, clip
from blockmerge.streaming import TorchThreads, aligned_buffer
from blockmerge.streaming.tensors import all_finite, tensor_view

Nonfinite = tuple[int, int, Callable[[int, int], bool]]
"""The output bytes [start, stop) of a chunk that is not finite, and a function that tells it of a part of
them.
"""

_SCAN_BYTES = 4 << 20


class Kernel:
    """One worker's means to compute: the method, the device, and a buffer for each operand.

    On a GPU each worker has a stream and page-locked buffers of its own: while one reads, another's data is
    on its way there, a third's is computed with and a fourth's is on its way back. What the device holds is a
    chunk for each worker.
    """

    def __init__(
        self, plan: Plan, file: PlannedFile, device: str, chunk_bytes: int, gathered: object = None
    ) -> None:
        self._plan, self._file = plan, file
        self._computation = Computation(plan.recipe, plan.resolved.numbers, gathered)
        self._check = not plan.recipe.allow_nonfinite
        self._clip = plan.recipe.clip
        self._device = torch.device(device)
        on_gpu = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._chunk_bytes = chunk_bytes
        self._buffers: dict[object, memoryview] = {}

    def compute(
        self, run: Run, low: int, target: memoryview, reader: Callable[[int], Reader]
    ) -> Iterator[Nonfinite]:
        """Fill `target`, the output's bytes from `low` on, with a run's result; yield the chunks that are not
        finite.

        Raises RecipeError, with the first tensor it was about, when a method of the user's own fails.
        """
        size = size_of(run.dtype)
        first = (low - run.start) // size
        count = len(target) // size
        step = self._step(run, size, count)
        for at in range(0, count, step):
            elements = min(step, count - at)
            part = target[at * size : (at + elements) * size]
            inputs = [
                self._read(run, place, first + at, elements, part, reader)
                for place in range(len(run.operands))
            ]
            out = tensor_view(part, run.dtype, elements)
            try:
                finite = self._compute_one(inputs, run, first + at, out)
            except RecipeError as error:
                raise RecipeError(f"{error} (at {shown(self._ldm_at(low + at * size))})") from error
            except RuntimeError as error:
                if self._device.type == "cpu":
                    raise
                why = shown(str(error).splitlines()[0], 200)
                raise RecipeError(
                    f"{self._device} cannot do this merge: {why} (fewer threads, or the device cpu, can)"
                ) from error
            if not finite:
                start = low + at * size
                yield start, start + len(part), _part_is_finite(out, start, size)

    def _ldm_at(self, offset: int) -> str:
        """The LDM name of the tensor at an offset of the output."""
        name, _ = next(self._file.tensors_between(offset, offset + 1))
        return self._plan.decision_of(name).ldm

    def _step(self, run: Run, size: int, count: int) -> int:
        """How many elements are computed at once."""
        if run.grain > 1 and not (run.work and run.work.whole and run.work.whole.rows):
            return max(1, count)
        widest = max(size, *(size_of(operand.dtype) for operand in run.operands))
        return max(run.grain, self._chunk_bytes // widest // run.grain * run.grain)

    def _read(
        self,
        run: Run,
        place: int,
        first: int,
        elements: int,
        part: memoryview,
        reader: Callable[[int], Reader],
    ) -> torch.Tensor:
        """An operand's values for these elements of the output, or the whole tensor they are computed
        from.
        """
        operand = run.operands[place]
        whole = run.work.whole if run.work else None
        if whole is not None and not whole.rows:
            first, elements = 0, TensorInfo(operand.dtype, whole.shapes[place], 0).elements
        nbytes = elements * size_of(operand.dtype)
        # A is read straight into the output, where the result then takes its place: less memory to go
        # through.
        in_place = (
            place == 0
            and operand.dtype == run.dtype
            and whole is None
            and not self._clip
            and self._stream is None
        )
        buffer = part if in_place else self._buffer(place, nbytes)
        reader(operand.source).read_into(operand.offset + first * size_of(operand.dtype), buffer)
        values = tensor_view(buffer, operand.dtype, elements) if elements else torch.empty(0)
        if whole is None:
            return values
        return values.view(whole.shapes[place] if not whole.rows else (-1, *whole.shapes[place][1:]))

    def _buffer(self, place: object, nbytes: int) -> memoryview:
        held = self._buffers.get(place)
        if held is None or len(held) < nbytes:
            if self._stream is None:
                held = aligned_buffer(nbytes)
            else:
                held = memoryview(torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy())
            self._buffers[place] = held
        return held[:nbytes]

    def _compute_one(self, inputs: list[torch.Tensor], run: Run, first: int, out: torch.Tensor) -> bool:
        """Write the result into `out`, which is on the CPU, and say whether it is finite (or need not be)."""
        position = run.position + first
        if self._stream is None:
            self._computation.run(inputs, run.work, position, out)
            return not self._check or all_finite(out)
        with torch.cuda.stream(self._stream):
            there = [tensor.to(self._device, non_blocking=True) for tensor in inputs]
            result = torch.empty_like(out, device=self._device)
            self._computation.run(there, run.work, position, result)
            locked = tensor_view(self._buffer("out", out.nbytes), run.dtype, len(out))
            locked.copy_(result, non_blocking=True)
            finite = not self._check or all_finite(result)
        self._stream.synchronize()
        out.copy_(locked)
        return finite


class Computation:
    """What a recipe does to one stretch of tensors, wherever they are: cast, method, clip, change; rounded
    once.
    """

    def __init__(self, recipe: MergeRequest, numbers: Mapping[str, Any], gathered: object = None) -> None:
        self._method = recipe.merge_method
        self._clip = recipe.clip
        self._numbers = dict(numbers)
        if self._method.random:
            del self._numbers["seed"]
        if self._method.locality == "model":
            self._numbers["gathered"] = gathered

    def run(self, inputs: list[torch.Tensor], work: Work | None, position: int, out: torch.Tensor) -> None:
        """Write the result for flat `inputs` (in their shape for a `whole`) into `out`, which is flat.

        `position` is that of the first element in its tensor.
        """
        if work is None:
            cast(*inputs, out=out)
        elif work.whole is None:
            self._merge(inputs, work, position, out)
        else:
            self._merge_whole(inputs, work, work.whole, position, out)

    def _merge(self, inputs: list[torch.Tensor], work: Work, position: int, out: torch.Tensor) -> None:
        extra = dict(self._numbers)
        if "beta" in self._method.weights:
            extra["beta"] = work.beta
        if work.key is not None:
            extra.update(key=work.key, position=position)
        self._method.function(*inputs, alpha=work.alpha, out=out, **extra)
        if self._clip and len(inputs) > 1:
            clip(*(tensor.reshape(-1) for tensor in inputs[:2]), out=out.view(-1))

    def _merge_whole(
        self, inputs: list[torch.Tensor], work: Work, whole: Whole, position: int, out: torch.Tensor
    ) -> None:
        wide = inputs[whole.wider] if whole.wider is not None else None
        if wide is not None:
            inputs = [tensor[:, :SHARED_CHANNELS].contiguous() for tensor in inputs]
        shape, origin = inputs[0].shape, whole.origin
        as_it_is = wide is None and work.change is None and origin.parts == 1 and not origin.transposed
        # Rounded only at the end: what is changed afterwards is not rounded before.
        dtype = wide_dtype(*inputs, out) if work.change is not None else out.dtype
        result = out.view(shape) if as_it_is else torch.empty(shape, dtype=dtype, device=out.device)
        if work.alpha is None:
            cast(inputs[0], out=result)
        elif self._method.locality == "element":
            self._merge([tensor.reshape(-1) for tensor in inputs], work, position, result.view(-1))
        else:
            self._merge(inputs, work, position, result)
        if wide is not None:
            result = torch.cat([result, wide[:, SHARED_CHANNELS:].to(dtype)], dim=1)
        if work.change is not None:
            result *= work.change.scale
            if work.change.shift is not None:
                result += torch.tensor(work.change.shift, dtype=dtype).to(out.device, non_blocking=True)
        if as_it_is:
            return
        if origin.parts > 1:
            result = result.chunk(origin.parts)[origin.part]
        if origin.transposed and result.dim() == 2:
            result = result.T
        round_into(out.view(result.shape), result)


class Statistics:
    """The first pass of a method that looks at the whole model: the figures of every tensor that all models
    have, VAE aside.
    """

    def __init__(self, plan: Plan) -> None:
        self._method = plan.recipe.merge_method
        self._views = list(plan.decided.ldm.values())
        self.names = looked_at(self._views)
        self.total = sum(self._views[0].tensors[name].nbytes for name in self.names)
        self.torch_threads = TorchThreads()
        self._found: list[Any] = []
        self._lock = threading.Lock()

    @contextmanager
    def worker(self) -> Iterator[Callable[[str], int]]:
        """A worker of the pool: looks at one tensor after the other."""
        self.torch_threads.single_here()
        with ExitStack() as stack:
            readers = [stack.enter_context(view.checkpoint.reader()) for view in self._views]

            def look_at(name: str) -> int:
                figures = self._method.statistics(
                    *map(_read_tensor, readers, (view.tensors[name] for view in self._views))
                )
                with self._lock:
                    self._found.append(figures)
                return self._views[0].tensors[name].nbytes

            yield look_at

    def gathered(self) -> object:
        """What the method gets of it."""
        return self._method.gather(self._found)


def looked_at(views: Sequence[View]) -> list[str]:
    """The tensors that methods look at which look at whole models: floats of one shape in all of them, VAE
    and EMA aside.

    Markers, which hold nothing, are left out.
    """
    first, *others = (view.tensors for view in views)
    return [
        name
        for name, info in first.items()
        if info.elements
        and component_of(name) not in ("vae", "ema")
        and not is_schedule(name)
        and not is_position_ids(name)
        and all(name in other and other[name].shape == info.shape for other in others)
        and all(tensors[name].dtype in FLOAT_DTYPES for tensors in (first, *others))
    ]


def _read_tensor(reader: Reader, info: TensorInfo) -> torch.Tensor:
    buffer = aligned_buffer(info.nbytes)
    reader.read_into(info.offset, buffer)
    return tensor_view(buffer, info.dtype, info.elements).view(info.shape)


def choose_device(device: str, method: Method) -> str:
    """Return the device that `device` means. Raises RecipeError.

    "auto" is the GPU, where there is one, for the methods that compute enough to be worth the way there and
    back.
    """
    if device == "auto":
        heavy = method.locality != "element" or method.random
        return "cuda" if heavy and torch.cuda.is_available() else "cpu"
    if device != "cpu" and re.fullmatch(r"cuda(:\d{1,3})?", device) is None:
        raise RecipeError(f"unknown device '{shown(device)}': cpu, cuda, cuda:N or auto")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        # torch says "not compiled with CUDA" with an AssertionError
        raise RecipeError(f"device {device} cannot be used: {shown(str(error).splitlines()[0])}") from error
    return device


def holds_nonfinite(checkpoint: Checkpoint, info: TensorInfo) -> bool:
    """Whether a tensor of a checkpoint holds NaN or infinity; reads it through once."""
    size = size_of(info.dtype)
    step = _SCAN_BYTES // size
    buffer = aligned_buffer(step * size)
    with checkpoint.reader() as reader:
        for at in range(0, info.elements, step):
            elements = min(step, info.elements - at)
            reader.read_into(info.offset + at * size, buffer[: elements * size])
            if not all_finite(tensor_view(buffer, info.dtype, elements)):
                return True
    return False


def _part_is_finite(out: torch.Tensor, start: int, size: int) -> Callable[[int, int], bool]:
    return lambda low, high: all_finite(out[(low - start) // size : (high - start) // size])
