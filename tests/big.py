"""A pair of models large enough to be caught midway: few tensors, many bytes."""

from __future__ import annotations

import json
import os


def write_big(path, value, megabytes=256):
    """A U-Net of sd1's signs whose one large tensor makes up the size; written without torch or
    blockmerge.
    """
    side = megabytes * 1_000_000 // 2 // 1000
    shapes = {
        "model.diffusion_model.input_blocks.0.0.weight": [8, 4, 3, 3],
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": [8, 8, 1, 1],
        "model.diffusion_model.input_blocks.11.0.in_layers.0.weight": [1],
        "model.diffusion_model.middle_block.0.in_layers.2.weight": [side, 1000],
        "model.diffusion_model.out.2.bias": [1],
    }
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2
        for extent in shape:
            size *= extent
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    block = value * (1 << 20)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while offset > 0:
            offset -= file.write(block[:offset])
    return os.path.getsize(path)
