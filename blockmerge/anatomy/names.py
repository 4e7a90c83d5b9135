"""What a tensor's name says: its component, its canonical form, and whether it is one of the special few."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from blockmerge.anatomy.layouts import LAYOUTS, layout

UNET_PREFIX = "model.diffusion_model."
DIFFUSERS_UNET_PREFIX = "unet/"
EMA_PREFIX = "model_ema."

COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "vae", "ema", "other")
"""The components a tensor can belong to. Only SDXL has a second text encoder."""

TITLES = {
    "unet": "U-Net", "text_encoder": "text encoder", "text_encoder_2": "second text encoder", "vae": "VAE",
    "ema": "EMA copy",
}  # fmt: skip
"""What messages call components."""

_COMPONENT_PREFIXES = (
    (UNET_PREFIX, "unet"),
    ("unet/", "unet"),
    ("vae/", "vae"),
    ("text_encoder/", "text_encoder"),
    ("text_encoder_2/", "text_encoder_2"),
    ("first_stage_model.", "vae"),
    ("cond_stage_model.", "text_encoder"),
    ("conditioner.embedders.0.", "text_encoder"),
    ("conditioner.embedders.1.", "text_encoder_2"),
    (EMA_PREFIX, "ema"),
)
VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
"""How the names of a VAE begin, after the prefix that they have in a whole model."""

_VAE_PREFIX = re.compile(r"first_stage_model\.|vae[./]")
_BARE_UNET = re.compile(r"(?:input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.")
_DIFFUSERS_UNET = re.compile(
    r"(?:down_blocks|mid_block|up_blocks|conv_in|conv_norm_out|conv_out|time_embedding|add_embedding)\."
)
_DOTTED = re.compile(r"(unet|vae|text_encoder|text_encoder_2)\.")
_BARE_TEXT_MODEL = re.compile(r"(text_encoder/|text_encoder_2/)(?=(?:embeddings|encoder|final_layer_norm)\.)")
_OLD_VAE_ATTENTION = re.compile(
    r"(vae/(?:encoder|decoder)\.mid_block\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)"
)
_NEW_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_REMEMBERED = (
    1 << 13
)  # names: the models of a merge have the same ones, and each is asked about several times
_SCHEDULE = re.compile(
    r"betas|alphas_cumprod(_prev)?|sqrt_\w+|log_one_minus_\w+|posterior_\w+|logvar|(denoiser\.)?(sigmas|log_sigmas)"
)
_MARKER = re.compile(r"v_pred|ztsnr|edm_vpred\..+")
_TRAINING = (".loss.", ".model_ema.")  # beside the weights of a component, under its prefix
_NAI_TEXT_ENCODER = re.compile(
    r"(cond_stage_model\.transformer\.|conditioner\.embedders\.0\.transformer\.)(?=(?:embeddings|encoder|final_layer_norm)\.)"
)


@lru_cache(_REMEMBERED)
def component_of(name: str) -> str:
    """Return the component (one of COMPONENTS) that a tensor belongs to, from its name."""
    for prefix, component in _COMPONENT_PREFIXES:
        if name.startswith(prefix):
            return component
    return "unet" if _BARE_UNET.match(name) or _DIFFUSERS_UNET.match(name) else "other"


@lru_cache(_REMEMBERED)
def canonical_name(name: str) -> str:
    """Return the one spelling of a tensor's name in its naming: LDM's full name, or diffusers' as
    `component/name`.

    LDM: U-Nets without `model.diffusion_model.` get it, and SD1 text encoders in NovelAI's form get the
    `text_model.` that every loader accepts. diffusers: U-Nets alone get `unet/`, `unet.…` (whole models as
    one dict) becomes `unet/…`, text encoders as transformers 5 writes them get `text_model.`, and the VAE's
    attention its present names.
    """
    if _BARE_UNET.match(name):
        return UNET_PREFIX + name
    if _DIFFUSERS_UNET.match(name):
        return DIFFUSERS_UNET_PREFIX + name
    name = _DOTTED.sub(r"\1/", name, count=1)
    if "/" in name:
        name = _BARE_TEXT_MODEL.sub(r"\1text_model.", name, count=1)
        return _OLD_VAE_ATTENTION.sub(lambda match: match[1] + _NEW_VAE_ATTENTION[match[2]], name, count=1)
    return _NAI_TEXT_ENCODER.sub(r"\1text_model.", name, count=1)


def lone_component(names: Iterable[str]) -> tuple[str, str, int] | None:
    """Return (component, naming, number of its tensors) for a VAE or text encoders alone, None with a U-Net
    or without either.
    """
    known = list(names)
    components = {component_of(canonical_name(name)) for name in known}
    if components & {"unet", "ema"}:
        return None
    vae = [short for name in known if (short := _VAE_PREFIX.sub("", name, count=1)).startswith(VAE_PARTS)]
    text = [
        name
        for name in known
        if component_of(canonical_name(name)).startswith("text_encoder") or name.startswith("text_model.")
    ]
    if "decoder.conv_in.weight" in vae and not text:
        diffusers = any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in vae)
        return "vae", "diffusers" if diffusers else "ldm", len(vae)
    if text and "vae" not in components:
        diffusers = all(canonical_name(name).startswith(("text_encoder", "text_model.")) for name in text)
        return "text_encoder", "diffusers" if diffusers else "ldm", len(text)
    return None


def is_schedule(name: str) -> bool:
    """Whether a tensor is a noise schedule or a training log: never blended, since it is no weight."""
    return _SCHEDULE.fullmatch(name) is not None


def is_prediction_marker(name: str) -> bool:
    """Whether a tensor only marks what the model predicts (`v_pred`, `ztsnr`, `edm_vpred.…`)."""
    return _MARKER.fullmatch(name) is not None


def is_leftover(name: str, variant: str) -> bool:
    """Whether no loader of a model of that variant needs a tensor of LDM naming: schedules, losses, optimizer
    states, ….

    EMA copies are another matter, and so are the further components of a diffusers folder, which its
    model_index.json names.
    """
    if any(part in name for part in _TRAINING):
        return True
    needed = (
        is_prediction_marker(name) or "/" in name or (variant == "depth" and name.startswith("depth_model."))
    )
    return component_of(name) == "other" and not needed


def is_position_ids(name: str) -> bool:
    """Whether a tensor holds a text encoder's position numbers, which must be 0, 1, 2, …"""
    return name.endswith("embeddings.position_ids")


def plain_names_of_ema(names: Iterable[str]) -> dict[str, str]:
    """Return {EMA name: plain U-Net name} for those of `names` that are EMA copies of known U-Net tensors.

    EMA names have lost their dots, so the way back needs the list of all U-Net names; it is the same for all
    families, since no two names are alike without dots.
    """
    ema = [name for name in names if name.startswith(EMA_PREFIX + "diffusion_model")]
    if not ema:
        return {}
    plain = {
        f"{EMA_PREFIX}diffusion_model{name.removeprefix(UNET_PREFIX).replace('.', '')}": name
        for family in LAYOUTS
        for name in layout(family)
        if name.startswith(UNET_PREFIX)
    }
    return {name: plain[name] for name in ema if name in plain}
