"""Merge two models from Python: a preset, changed weights, and state dicts in memory.

    python examples/merge_from_python.py [FOLDER]

Makes its own thin models; with real ones, only the paths differ.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import load_file

import blockmerge
from blockmerge.demo import write_pair

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "blockmerge-example")
folder.mkdir(exist_ok=True)
a, b = folder / "a.safetensors", folder / "b.safetensors"
write_pair(a, b, "sd1", overwrite=True)

# A preset, into a file. The result says what was done.
result = blockmerge.merge(a, b, preset="high_res", output=folder / "detail.safetensors", overwrite=True)
counts = result.tensors
print(
    f"{result.output.name}: {counts.computed} tensors computed, {counts.from_a} from A, {counts.from_b} from "
    "B"
)

# Half way between two presets, with the text encoder left alone.
high, low = blockmerge.load_preset("high_res"), blockmerge.load_preset("low_res")
between = high.interpolate(low, 0.5).replace({"BASE": None})
blockmerge.merge(a, b, weights=between, output=folder / "between.safetensors", overwrite=True)

# In memory, on whatever device the tensors are; the same bits as the file has.
merged = blockmerge.merge_state_dicts(load_file(a), load_file(b), preset="high_res")
same = all(merged[name].equal(tensor) for name, tensor in load_file(folder / "detail.safetensors").items())
print(f"in memory: {len(merged)} tensors, {'the same' if same else 'not the same'} as in the file")

name = "model.diffusion_model.input_blocks.4.1.proj_in.weight"
print(f"{name} is in {blockmerge.block_of(name)}, which took {result.weights['IN04']} of B")
