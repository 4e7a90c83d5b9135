"""Sweep a preset's strength on a U-Net that is in use, and write the file of the strength that was liked
best.

    python examples/sweep_a_preset.py [FOLDER]

Makes its own thin models and needs diffusers; with real ones, the U-Net is a pipeline's:
`LiveMerge(pipe.unet, a, b)`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

import blockmerge
from blockmerge.demo import write_pair

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "blockmerge-example")
folder.mkdir(exist_ok=True)
a, b, best = (folder / f"{name}.safetensors" for name in ("a", "b", "best"))
write_pair(a, b, "sd1", dtypes=("F32", "F32"), overwrite=True)

# Stands for pipe.unet: the demo's widths instead of Stable Diffusion 1.5's.
widths = {
    "block_out_channels": (8, 16, 32, 32),
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
}
unet = UNet2DConditionModel(sample_size=8, **widths)
own = unet.conv_in.weight.clone()


def image() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latent, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 77, 24, generator=generator)
    with torch.no_grad():
        sample: torch.Tensor = unet(latent, timestep=500, encoder_hidden_states=text).sample
    return sample


preset = blockmerge.load_preset("high_res")  # once: it is in a file
with blockmerge.LiveMerge(unet, a, b) as live:
    plain = image()
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        live.apply(weights=preset.scale(strength))
        change = (image() - plain).norm() / plain.norm()
        print(f"high_res at {strength:.2f} changes the output by {change:.1%}")

    # One block more, all others as they are; then the whole model, text encoder and VAE too, with these
    # weights.
    live.apply(weights={"OUT05": 0.7}, keep=True)
    blockmerge.merge(a, b, weights=live.weights, output=best, overwrite=True)
    merged = blockmerge.open_checkpoint(best).read(
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    )
    same = merged == unet.down_blocks[0].resnets[0].conv1.weight.detach().numpy().tobytes()
    print(f"{best.name} has {'the same' if same else 'other'} bits as the live U-Net")

print(f"given back: {bool(unet.conv_in.weight.equal(own))}")
