"""The components of a model, and what messages call them."""

from __future__ import annotations

COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "text_encoder_3", "vae", "ema", "other")
"""The components a tensor can belong to. ``"unet"`` is the diffusion model, as programs call it whatever it
is; results call it what its family does (`Family.core`).
"""

TITLES = {
    "unet": "U-Net", "text_encoder": "text encoder", "text_encoder_2": "second text encoder",
    "text_encoder_3": "third text encoder", "vae": "VAE", "ema": "EMA copy",
}  # fmt: skip
"""What messages call components."""
