"""A family that no one has: two blocks beside BASE, own names, rows that change places.

A folder of three files is all that a family is; `registered` adds it for as long as a test needs it.
"""

from __future__ import annotations

from contextlib import contextmanager

from blockmerge.anatomy import Family, register, unregister
from blockmerge.demo import make_state_dicts

NAME = "toy"

DESCRIPTION = """
title = "Toy Transformer"
called = "Toy"
architecture = "toy-v1"

[blocks]
left = ["L00"]
middle = []
right = ["L01"]

[variants]
base = 4
inpainting = 9

[signs.ldm]
first = "embed.weight"
first_axes = 2
numbered = "layers"
highest = 1
told = "it has {count} layers"

[signs.diffusers]
first = "pos_embed.proj.weight"
first_axes = 2
numbered = "blocks"
highest = 1
told = "it has {count} blocks"

[names.roots]
ldm = ["embed", "layers", "final"]
diffusers = ["pos_embed", "blocks", "norm_out", "proj_out"]

[names.prefixes.ldm]
"model.diffusion_model." = "unet"
"toy_text." = "text_encoder"

[names.prefixes.diffusers]
"unet/" = "unet"
"text_encoder/" = "text_encoder"

[[renaming]]
ldm = "model.diffusion_model."
diffusers = "unet/"
rule = "table"

[[renaming]]
ldm = "toy_text."
diffusers = "text_encoder/"
rule = "same"

[unlisted.ldm]
"layers.#." = ["L", 0, 1]
"embed." = ["L00"]
"final." = ["L01"]

[unlisted.diffusers]
"blocks.#." = ["L", 0, 1]
"pos_embed." = ["L00"]
"norm_out." = ["L01"]
"proj_out." = ["L01"]

[configs]
image_size = { epsilon = 64 }
parts = ["scheduler", "text_encoder", "unet"]
settings = {}
pipelines = { base = "ToyPipeline" }
noise = {}
scheduler.epsilon = { _class_name = "ToyScheduler" }

[configs.components.unet]
maker = "as_described"
class = ["diffusers", "ToyTransformer2DModel"]
settings = { in_channels = 4 }

[configs.components.text_encoder]
maker = "as_described"
class = ["transformers", "ToyTextModel"]
"""

LAYOUT = """\
name	shape	block	component
model.diffusion_model.embed.bias	16	L00	unet
model.diffusion_model.embed.weight	16x4	L00	unet
model.diffusion_model.final.modulation.bias	32	L01	unet
model.diffusion_model.final.modulation.weight	32x16	L01	unet
model.diffusion_model.final.out.weight	4x16	L01	unet
model.diffusion_model.layers.0.norm.weight	16	L00	unet
model.diffusion_model.layers.0.out.weight	16x24	L00	unet
model.diffusion_model.layers.0.qkv.bias	40	L00	unet
model.diffusion_model.layers.0.qkv.weight	40x16	L00	unet
model.diffusion_model.layers.1.norm.weight	16	L01	unet
model.diffusion_model.layers.1.out.weight	16x24	L01	unet
model.diffusion_model.layers.1.qkv.bias	40	L01	unet
model.diffusion_model.layers.1.qkv.weight	40x16	L01	unet
toy_text.embed.weight	10x8	BASE	text_encoder
toy_text.norm.bias	8	BASE	text_encoder
"""

RENAMING = """\
original	diffusers	rows
embed.weight	pos_embed.proj.weight	=
embed.bias	pos_embed.proj.bias	=
layers.#.norm.weight	blocks.#.norm1.weight	=
layers.#.out.weight	blocks.#.attn.to_out.weight	=
layers.#.qkv.weight	blocks.#.attn.to_q.weight	0:24 of 40
layers.#.qkv.weight	blocks.#.attn.to_k.weight	24:32 of 40
layers.#.qkv.weight	blocks.#.attn.to_v.weight	32:40 of 40
layers.#.qkv.bias	blocks.#.attn.to_q.bias	0:3 of 5
layers.#.qkv.bias	blocks.#.attn.to_k.bias	3:4 of 5
layers.#.qkv.bias	blocks.#.attn.to_v.bias	4:5 of 5
final.modulation.weight	norm_out.linear.weight	1:2 0:1 of 2
final.modulation.bias	norm_out.linear.bias	16:32 0:16 of 32
final.out.weight	proj_out.weight	=
"""
"""q|k|v are three fifths, a fifth and a fifth; shift|scale in the original is scale|shift in diffusers."""

FILES = {"family.toml": DESCRIPTION, "layout.tsv": LAYOUT, "renaming.tsv": RENAMING}


def write(folder):
    """Write the family's folder into `folder`; returns its path."""
    home = folder / NAME
    home.mkdir()
    for name, text in FILES.items():
        (home / name).write_text(text)
    return home


@contextmanager
def registered(folder):
    """The family, known to blockmerge until the end of the block; its folder is written into `folder`."""
    family = Family.read(write(folder))
    register(family)
    try:
        yield family
    finally:
        unregister(NAME)


def make_pair(seed=0):
    """Models A and B as state dicts, while the family is registered."""
    return make_state_dicts(NAME, seed=seed)
