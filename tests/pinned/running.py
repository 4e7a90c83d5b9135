"""One case: run it, and say what it wrote in a few hashes, each of something that can change by itself."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

import blockmerge
from tests.pinned.cases import Case
from tests.pinned.inputs import Inputs, Source

TABLE = Path(__file__).with_name("outputs.json")

_RECIPE = "blockmerge.recipe"  # it holds the version, and the models' names


class Written(NamedTuple):
    """A tensor of an output: the file it is in, its name, dtype and shape, and the SHA-256 of its bytes."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


def machine() -> dict[str, str]:
    """What bits depend on: another torch, or another kind of processor, may round the last bit otherwise."""
    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}


def run(case: Case, inputs: Inputs, home: Path, threads: int = 2) -> dict[str, object]:
    """Run a case in a new folder, which is removed again. Returns its line of the table."""
    home.mkdir()
    try:
        # Sums depend on them in memory.
        with _torch_threads(threads if case.call in ("merge", "convert") else 1):
            return _run(case, inputs, home, threads)
    except blockmerge.BlockmergeError as error:
        return {"error": type(error).__name__}
    finally:
        shutil.rmtree(home)


def _run(case: Case, inputs: Inputs, home: Path, threads: int) -> dict[str, object]:
    if case.call == "dicts":
        merged = blockmerge.merge_state_dicts(*map(inputs.tensors, case.sources), **case.options)
        return record(map(_in_memory, merged.items()))
    if case.call == "live":
        return record(map(_in_memory, _merged_live(case, inputs).items()))
    options = {
        name: inputs.given(value) if isinstance(value, Source) else value
        for name, value in case.options.items()
    }
    output = home / {"file": "out.safetensors", "folder": "out"}[options.pop("output")]
    sources = map(inputs.given, case.sources)
    if case.call == "convert":
        blockmerge.convert(*sources, output, threads=threads, **options)
    else:
        blockmerge.merge(*sources, output=output, threads=threads, **options)
    return record_of_output(output)


def _merged_live(case: Case, inputs: Inputs) -> dict[str, torch.Tensor]:
    """The parameters of a module after one merge, or after several."""
    options = dict(case.options)
    module = _module_of(
        inputs.tensors(options.pop("module")), channels_last=options.pop("channels_last", False)
    )
    applied = options.pop("apply")
    with blockmerge.LiveMerge(module, *map(inputs.given, case.sources), **options) as live:
        for weights in applied:
            live.apply(**weights)
        return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def _module_of(tensors: dict[str, torch.Tensor], *, channels_last: bool) -> torch.nn.Module:
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():  # position_ids, which are no parameters
            continue
        *path, last = name.split(".")
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, torch.nn.Module())
            at = at._modules[part]
        layout = torch.channels_last if channels_last and tensor.dim() == 4 else torch.contiguous_format
        at.register_parameter(last, torch.nn.Parameter(tensor.clone(memory_format=layout)))
    return root


@contextmanager
def _torch_threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- what was written ----------------------------------------------------------------------------------------


def record_of_output(output: Path) -> dict[str, object]:
    """The line of a file or folder."""
    found = [output] if output.is_file() else sorted(path for path in output.rglob("*") if path.is_file())
    weights = [path for path in found if path.suffix == ".safetensors"]
    tensors: list[Written] = []
    metadata = {}
    for path in weights:
        name = path.relative_to(output.parent).as_posix()
        of_file, metadata[name] = _read(path, name)
        tensors += of_file
    small = {
        path.relative_to(output).as_posix(): _sha256(path.read_bytes())
        for path in found
        if path not in weights
    }
    said = {
        name: [pair for pair in of_file.items() if pair[0] != _RECIPE] for name, of_file in metadata.items()
    }
    return {**record(tensors), "metadata": _hash(said), **({"files": _hash(small)} if small else {})}


def record(tensors: Iterable[Written]) -> dict[str, object]:
    """The line of tensors alone. Only `names` depends on the order, so that a hash tells what has changed."""
    tensors = list(tensors)
    by_name = sorted(tensors)
    return {
        "tensors": len(tensors),
        "names": _hash([(tensor.file, tensor.name) for tensor in tensors]),
        "shapes": _hash([(tensor.name, tensor.dtype, tensor.shape) for tensor in by_name]),
        "bytes": _hash([(tensor.name, tensor.sha256) for tensor in by_name]),
    }


def _read(path: Path, name: str) -> tuple[list[Written], dict[str, str]]:
    """What a .safetensors file holds, in the order of its offsets, read by hand."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {})
    placed = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    tensors = []
    for tensor, info in placed:
        begin, end = info["data_offsets"]
        sha256 = _sha256(data[start + begin : start + end])
        tensors.append(Written(name, tensor, info["dtype"], tuple(info["shape"]), sha256))
    return tensors, metadata


def _in_memory(item: tuple[str, torch.Tensor]) -> Written:
    name, tensor = item
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return Written("", name, str(tensor.dtype), tuple(tensor.shape), _sha256(data))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _hash(value: object) -> str:
    """The first 16 digits of the SHA-256 of a value as JSON: enough, since no one attacks the table."""
    return _sha256(json.dumps(value).encode())[:16]


# -- what has changed ----------------------------------------------------------------------------------------

WHAT = {
    "error": "whether it is refused",
    "tensors": "how many tensors there are",
    "names": "names or their order",
    "shapes": "dtypes or shapes",
    "bytes": "the tensors' bytes",
    "metadata": "the metadata",
    "files": "the small files of the folder",
}


def changes(found: dict[str, object], pinned: dict[str, object], *, same_machine: bool) -> list[str]:
    """What differs between two lines, in words; the bytes only where bits can be compared."""
    keys = [
        key for key in WHAT if key != "bytes" or same_machine or "bytes" not in found.keys() & pinned.keys()
    ]
    return [
        f"{WHAT[key]}: {found.get(key)}, not {pinned.get(key)}"
        for key in keys
        if found.get(key) != pinned.get(key)
    ]
