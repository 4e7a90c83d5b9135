"""What a tensor's name says: its component, its canonical form, and whether it is one of the special few."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase, translate
from functools import lru_cache

from blockmerge.anatomy.families import FAMILIES, remembered
from blockmerge.anatomy.family import NAMINGS

UNET_PREFIX = "model.diffusion_model."
DIFFUSERS_UNET_PREFIX = "unet/"
EMA_PREFIX = "model_ema."

VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
"""How the names of a VAE begin, after the prefix that they have in a whole model."""

_VAE_PREFIX = re.compile(r"first_stage_model\.|vae[./]")
_NEW_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Names: the models of a merge have the same ones, and each is asked about several times.
_REMEMBERED = 1 << 13
_SCHEDULE = re.compile(
    r"betas|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|logvar|lvlb_weights|"
    r"posterior_(variance|log_variance_clipped|mean_coef[12])|"
    r"((model\.)?(denoiser|model_sampling)\.)?(sigmas|log_sigmas)"
)
# What training leaves behind, alone or beside the VAE's weights.
_TRAINING = re.compile(
    r"((first_stage_model|vae)[./])?(loss|loss_fn)\..+|.+\.model_ema\..+|"
    r"(optimizers?|optimizer_states|lr_schedulers?|callbacks)\..+|global_step|epoch"
)
# What training and compiling put into names, anywhere between the dots.
_WRAPPER = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_OUTER = (
    r"(?:(?:state_dict|model_state_dict|model|pipe|pipeline|network|net|sd_model|student|generator|ldm|params"
    r"|weights|checkpoint|ema_model)\.)+"
)
"""What saving a whole program puts before the names of its model."""
_TEXT_ENCODERS = {"clip_l": "text_encoder/", "clip_h": "text_encoder/", "clip_g": "text_encoder_2/"}
"""The text encoders of files that programs with all encoders under `text_encoders.` save."""
_TEXT_ENCODER = re.compile(
    rf"text_encoders\.({'|'.join(_TEXT_ENCODERS)})\.(?:(?:transformer|model)\.(?!resblocks))?"
)
_BARE_TEXT_MODEL = (
    r"(?=(?:embeddings|encoder\.layers|final_layer_norm)\.)"  # CLIP's: T5 has an `encoder.`, too
)
_OLD_VAE_ATTENTION = r"(?:encoder|decoder)\.mid_block\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)"


@dataclass(frozen=True)
class _Spellings:
    """What the names of all families say, as patterns: U-Nets without prefix, in LDM and in diffusers naming;
    components followed by a dot; text encoders without `text_model.`; the VAE's attention as it was called.
    """

    prefixes: tuple[tuple[str, str], ...]
    starts: tuple[str, ...]
    outer: re.Pattern[str]
    known: re.Pattern[str]
    bare_unet: re.Pattern[str]
    bare_diffusers_unet: re.Pattern[str]
    dotted: re.Pattern[str]
    bare_text_model: re.Pattern[str]
    old_vae_attention: re.Pattern[str]
    novelai_text_encoder: re.Pattern[str]


@remembered(None)
def _spellings() -> _Spellings:
    families = FAMILIES.values()
    renamings = [renaming for family in families for renaming in family.renamings]
    # A name alone does not tell a transformer's: `transformer.` stands in text encoders, too.
    folders = {
        prefix
        for family in families
        for prefix, component in family.prefixes.get("diffusers", {}).items()
        if component != "unet" or family.arms
    }
    texts = {renaming.diffusers for renaming in renamings if renaming.rule in ("clip", "open_clip")}
    vaes = {renaming.diffusers for renaming in renamings if renaming.rule == "vae"}
    clips = {renaming.ldm for renaming in renamings if renaming.rule == "clip"}
    prefixes = {item for f in families for named in f.prefixes.values() for item in named.items()}
    roots = {
        naming: _any_of(root for f in families for root in f.roots.get(naming, ())) for naming in NAMINGS
    }
    dotted = _any_of(folder.removesuffix("/") for folder in folders)
    known = [re.escape(prefix) for prefix, _ in prefixes if "/" not in prefix]
    inner = [
        *known,
        r"diffusion_model\.",
        "text_encoders\\.",
        *(f"{one}\\." for one in (dotted, *roots.values())),
    ]
    return _Spellings(
        tuple(prefixes),
        tuple(prefix for prefix, _ in prefixes),
        re.compile(rf"\A{_OUTER}(?={'|'.join(inner)})"),
        re.compile("|".join((*inner, EMA_PREFIX, *map(translate, _markers())))),
        re.compile(f"(?:(?:unet|diffusion_model)\\.)?(?={roots['ldm']}\\.)"),
        re.compile(f"{roots['diffusers']}\\."),
        re.compile(f"({dotted})\\."),
        re.compile(f"({_any_of(texts)}){_BARE_TEXT_MODEL}"),
        re.compile(f"({_any_of(vaes)}{_OLD_VAE_ATTENTION}"),
        re.compile(f"({_any_of(clips)}){_BARE_TEXT_MODEL}"),
    )


def _any_of(texts: Iterable[str]) -> str:
    return f"(?:{'|'.join(sorted(map(re.escape, set(texts))))})"


@remembered(_REMEMBERED)
def component_of(name: str) -> str:
    """Return the component (one of COMPONENTS) that a tensor belongs to, from its name in any spelling."""
    name = canonical_name(name)
    for prefix, component in _spellings().prefixes:
        if name.startswith(prefix):
            return component
    return "ema" if name.startswith(EMA_PREFIX) else "other"


@lru_cache(_REMEMBERED)
def without_wrappers(name: str) -> str:
    """Return a name without what training and compiling put into names, anywhere between the dots."""
    return _WRAPPER.sub("", name)


@remembered(_REMEMBERED)
def unwrapped_name(name: str) -> str:
    """Return a name without what training, compiling and saving whole programs put around it.

    >>> unwrapped_name("module.model.diffusion_model._orig_mod.out.2.bias")
    'model.diffusion_model.out.2.bias'

    Another spelling of the same model is not a wrapper: `text_encoders.clip_l.` stays. Nor is it one where
    what is left is not known.
    """
    spellings = _spellings()
    inner = without_wrappers(name)
    if not inner.startswith(spellings.starts):
        inner = spellings.outer.sub("", inner, count=1)
    # What nobody knows may be called so.
    return inner if inner == name or spellings.known.match(inner) or is_leftover(inner) else name


@remembered(_REMEMBERED)
def canonical_name(name: str) -> str:
    """Return the one spelling of a tensor's name in its naming: LDM's full name, or diffusers' as
    `component/name`.

    LDM: U-Nets without `model.diffusion_model.` get it, and SD1 text encoders in NovelAI's form get the
    `text_model.` that every loader accepts. diffusers: U-Nets alone get `unet/`, `unet.…` (whole models as
    one dict) becomes `unet/…`, text encoders as transformers 5 writes them get `text_model.`, and the VAE's
    attention its present names. `text_encoders.clip_l.…` and `vae.…`, as Forge and ComfyUI save whole models,
    become `text_encoder/…` and `vae/…`, whatever the names inside; wrappers are taken off.
    """
    spellings = _spellings()
    name = unwrapped_name(name)
    if not name.startswith(UNET_PREFIX) and (bare := spellings.bare_unet.match(name)):
        return UNET_PREFIX + name[bare.end() :]
    if spellings.bare_diffusers_unet.match(name):
        return DIFFUSERS_UNET_PREFIX + name
    name = _TEXT_ENCODER.sub(lambda match: _TEXT_ENCODERS[match[1]], name, count=1)
    name = spellings.dotted.sub(r"\1/", name, count=1)
    if "/" in name:
        name = spellings.bare_text_model.sub(r"\1text_model.", name, count=1)
        return spellings.old_vae_attention.sub(
            lambda match: match[1] + _NEW_VAE_ATTENTION[match[2]], name, count=1
        )
    return spellings.novelai_text_encoder.sub(r"\1text_model.", name, count=1)


def lone_component(names: Iterable[str]) -> tuple[str, str, int] | None:
    """Return (component, naming, number of its tensors) for a VAE or text encoders alone, None with a U-Net
    or without either.
    """
    known = list(map(unwrapped_name, names))
    components = set(map(component_of, known))
    if components & {"unet", "ema"}:
        return None
    vae = [short for name in known if (short := _VAE_PREFIX.sub("", name, count=1)).startswith(VAE_PARTS)]
    text = [
        name
        for name in known
        if component_of(name).startswith("text_encoder") or name.startswith("text_model.")
    ]
    if "decoder.conv_in.weight" in vae and not text:
        diffusers = any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in vae)
        return "vae", "diffusers" if diffusers else "ldm", len(vae)
    if text and "vae" not in components:
        diffusers = all(canonical_name(name).startswith(("text_encoder", "text_model.")) for name in text)
        return "text_encoder", "diffusers" if diffusers else "ldm", len(text)
    return None


def is_schedule(name: str) -> bool:
    """Whether a tensor is a noise schedule."""
    return _SCHEDULE.fullmatch(name) is not None


@remembered(_REMEMBERED)
def is_prediction_marker(name: str) -> bool:
    """Whether a tensor only marks what the model predicts (`v_pred`, `ztsnr`, `edm_vpred.…`)."""
    short = name.removeprefix(UNET_PREFIX)  # as some programs save it, and all take it
    return any(fnmatchcase(short, marker) for marker in _markers())


@remembered(None)
def _markers() -> frozenset[str]:
    return frozenset(marker for family in FAMILIES.values() for marker in family.markers)


def is_leftover(name: str) -> bool:
    """Whether a tensor is known to be needed by no loader: schedules, losses, optimizer states.

    What is merely unknown is none. EMA copies are another matter.
    """
    return is_schedule(name) or _TRAINING.fullmatch(name) is not None


def is_position_ids(name: str) -> bool:
    """Whether a tensor holds a text encoder's position numbers, which must be 0, 1, 2, …"""
    return name.endswith("embeddings.position_ids")


def plain_names_of_ema(names: Iterable[str]) -> dict[str, str]:
    """Return {EMA name: plain U-Net name} for those of `names` that are EMA copies of known U-Net tensors.

    EMA names have lost their dots, so the way back needs the list of all U-Net names; it is the same for all
    families, since no two names are alike without dots.
    """
    return {name: plain for name in names if (plain := plain_name_of_ema(name))}


def plain_name_of_ema(name: str) -> str | None:
    """Return the plain name of a U-Net tensor's EMA copy, None for any other name."""
    own = unwrapped_name(name)
    return _plain_of_ema().get(own) if own.startswith(EMA_PREFIX) else None


@remembered(None)
def _plain_of_ema() -> dict[str, str]:
    return {
        f"{EMA_PREFIX}diffusion_model{name.removeprefix(UNET_PREFIX).replace('.', '')}": name
        for family in FAMILIES.values()
        for name in family.layout
        if name.startswith(UNET_PREFIX)
    }
