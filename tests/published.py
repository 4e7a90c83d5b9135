"""Names and shapes of published transformers, from `layouts/transformers.txt`, and models of them: sparse files
of full size, and thin ones with values.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

from blockmerge.checkpoints import TensorInfo, encode_header

TABLE = Path(__file__).parent / "layouts" / "transformers.txt"

KNOWN = {
    # layout: (family, variant, blocks)
    "flux1_dev": ("flux1", "dev", 60),
    "flux1_schnell": ("flux1", "schnell", 60),
    "chroma": ("chroma", "base", 60),
    "sd3_medium": ("sd3", "medium", 27),
    "sd35_medium": ("sd3", "3.5-medium", 27),
    "sd35_large": ("sd3", "3.5-large", 41),
    "z_image": ("z_image", "base", 35),
    "lumina2": ("lumina2", "base", 31),
    "anima": ("anima", "base", 31),
    "cosmos_predict2_2b": ("cosmos_predict2", "base", 31),
}
UNKNOWN = {
    # layout: its lists of blocks
    "flux2_klein_4b": {"double_blocks": 5, "single_blocks": 20},
    "qwen_image": {"transformer_blocks": 60},
    "wan21_t2v_1_3b": {"blocks": 30},
    "wan21_t2v_1_3b.diffusers": {"blocks": 30},
    "krea2": {"blocks": 28, "txtfusion.layerwise_blocks": 2, "txtfusion.refiner_blocks": 2},
    "auraflow": {"double_layers": 4, "single_layers": 32},
    "auraflow.diffusers": {"joint_transformer_blocks": 4, "single_transformer_blocks": 32},
    "hunyuan_video": {"double_blocks": 20, "single_blocks": 40, "txt_in.individual_token_refiner.blocks": 2},
    "koala_1b_unet": {"input_blocks": 6, "middle_block": 3, "output_blocks": 6},
    "koala_700m_unet": {"input_blocks": 6, "output_blocks": 6},
}


@cache
def layouts() -> dict[str, dict[str, tuple[int, ...]]]:
    """{layout: {name: shape}}, without prefix."""
    found, own = {}, {}
    for line in TABLE.read_text().splitlines():
        if line.startswith("["):
            found[line.strip("[]")] = own = {}
        elif line and not line.startswith("#"):
            template, shape, *ranges = line.split(" ")
            for numbers in itertools.product(*map(_numbers, ranges)):
                name = template
                for number in numbers:
                    name = name.replace("#", str(number), 1)
                own[name] = tuple(map(int, shape.split("x")))
    return found


def _numbers(text):
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def write_sparse(path, shapes, dtype="BF16"):
    """Write a file with a header and nothing but a hole where its values would be."""
    tensors, offset = {}, 0
    for name, shape in shapes.items():
        tensors[name] = TensorInfo(dtype, tuple(shape), offset)
        offset += tensors[name].nbytes
    header = encode_header(tensors, {"format": "pt"}, 8)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + offset)
    return path


def thin(shapes, divisor=64, least=512):
    """The same with widths divided; small extents (channels, heads, patches) are kept."""
    return {
        name: tuple(
            extent // divisor if extent >= least and extent % divisor == 0 else extent for extent in shape
        )
        for name, shape in shapes.items()
    }
