"""What a file is that holds no U-Net of a known family, told from its tensors' names: one table.

Names are looked at with `0` for every number in them, so that a model has some hundred instead of thousands.
What changes a model, or is used beside one, comes first, for it has names of what it is made for. Then come
families that are merged by the numbered lists in their names, whose files may hold text encoders and a VAE;
then these, and all else.

The families' signs are those that their loaders look for, the adapters' those that trainers write.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from blockmerge.anatomy.families import FAMILIES, remembered

_LORA = (
    ", not a model: bake puts it into one (blockmerge bake MODEL LORA -o OUT), and lora inspect shows what "
    "is in it (blockmerge lora inspect LORA)"
)
_BESIDE = ", not a model: it is used beside one, so give the model itself"
_ADAPTER = ", not a model: it changes one, in a form that is not read"
_BY_LISTS = ", whose names hold no numbered list of blocks"
_PART = ", only a part of a model: give a whole model"
_ENCODER = ", only a part of a model, and its names hold no numbered list of blocks"
_OTHER = ", not a diffusion model"
_MERGED_BY_LISTS = (_BY_LISTS, _ENCODER, _OTHER)

_NUMBER = re.compile(r"(?<=[._])\d+(?=[._]|$)|^\d+(?=\.)")
_MOST_NAMES = 10_000
"""Different names that are looked at; no model has as many, once numbers are 0."""

_AT = r"(?:^|[./])"
"""Where a name begins, whatever stands before it: `model.diffusion_model.`, `transformer/`, `net.`, …"""


@dataclass(frozen=True)
class Kind:
    """What messages call it, what they say after that, and the patterns that names must match, each one."""

    what: str
    then: str
    signs: tuple[str, ...]

    @property
    def is_mergeable(self) -> bool:
        """Whether it is merged by the numbered lists of blocks in its names, where it has such."""
        return self.then in _MERGED_BY_LISTS

    @property
    def is_sure(self) -> bool:
        """Whether it is surely no model of a known family, though their names may be alike."""
        return self.then in (_BY_LISTS, _BESIDE, _LORA, _ADAPTER) and self is not _UNKNOWN

    def fits(self, names: str) -> bool:
        """Whether `names`, one a line, are those of this kind."""
        return all(re.search(sign, names, re.MULTILINE) for sign in self.signs)


def _kind(what: str, then: str, *signs: str) -> Kind:
    return Kind(what, then, signs)


_MISTAKEN = (
    _kind("a ControlNet", _BESIDE, r"^(unet/)?controlnet_cond_embedding\."),
    _kind(
        "Stable Video Diffusion",
        _BY_LISTS,
        r"(input|down)_blocks\.0\..*\b(time_stack|temporal_transformer_blocks)\.",
    ),
    _kind("AnimateDiff", _BY_LISTS, r"\.motion_modules\.", r"^(unet/)?conv_in\.weight$"),
    _kind("a video model (ModelScope)", _BY_LISTS, rf"{_AT}transformer_in\.", r"\.temp_convs\."),
    _kind("Kolors", _BY_LISTS, rf"{_AT}encoder_hid_proj\.weight$", rf"{_AT}add_embedding\.linear_0\."),
)
"""What has all the names by which U-Nets are known, and more."""

_HINTS = ("controlnet_cond_embedding", "time_stack", "temporal_", "temp_convs", "motion_", "encoder_hid_proj")
"""A part of the names of each of these, which is looked for first: every model is asked about."""

_KOALA = _kind("KOALA", _BY_LISTS)

_UNKNOWN = _kind(
    "a diffusion model of an unknown family",
    _BY_LISTS,
    rf"{_AT}\w*(blocks|layers)\.0\.",
    r"\bt_embedder\.|\b(time|timestep)(_\w+)?_?(embed\w*|proj\w*|in)\.",
    r"\b(\w+_embedder|patch_embed\w*|img_in|proj_in|conv_in|\w+_proj\w*)\.",
)

_KINDS = (
    # -- LoRAs and their relatives ---------------------------------------------------------------------------
    _kind("a Control-LoRA", _BESIDE, r"^lora_controlnet$"),
    _kind("a LoRA (LoKr, LyCORIS)", _LORA, r"\.lokr_(w[12](_[ab])?|t2)$"),
    _kind("a LoRA (LoHa, LyCORIS)", _LORA, r"\.hada_(w[12]_[ab]|t[12])$"),
    _kind("a LoRA (OFT)", _LORA, r"\.oft_(blocks|diag|R(\..+)?)$"),
    _kind("a LoRA (IA3, LyCORIS)", _LORA, r"\.on_input$"),
    _kind("a LoRA (GLoRA, LyCORIS)", _LORA, r"\.a1\.weight$", r"\.b1\.weight$"),
    _kind("a LoRA (DoRA)", _LORA, r"\.(dora_scale|lora_magnitude_vector)"),
    _kind("a LoRA (kohya's names)", _LORA, r"\.lora_(down|up|mid)\.weight$"),
    _kind("a LoRA (PEFT's names)", _LORA, r"[._]lora_(embedding_)?[AB](\.\w+)?(\.weight)?$"),
    _kind(
        "a LoRA (diffusers' names)",
        _LORA,
        r"[._]lora\d?(_linear_layer)?\.(down|up)\.weight$",
    ),
    _kind("a LoRA (cloneofsimo's names)", _LORA, r"^(unet|text_encoder):\d+:(up|down)"),
    _kind("a LoRA (of whole differences, LyCORIS)", _LORA, r"\.(diff|diff_b|w_norm|b_norm|set_weight)$"),
    _kind(
        "a LoRA or another adapter",
        _ADAPTER,
        r"\.(ia3_l|vera_lambda_[bd]|hra_u|fourierft_spectrum|gsoft_[LR]|lora_(U|S|Vt)|lora_[ab]\.weight"
        r"|lora[AB]\.weight|lora\.[AB]|ln_tuning_layers\.weight)$",
    ),
    # -- what else is used beside a model --------------------------------------------------------------------
    _kind("a textual inversion (an embedding)", _BESIDE, r"^(emb_params|string_to_param)(\.|$)"),
    _kind("a textual inversion (an embedding)", _BESIDE, r"\A((clip_[lgh]|t5\w*)(\n|\Z))+\Z"),
    _kind("a textual inversion (an embedding)", _BESIDE, r"\A(<[^>\n]+>(_\d+)?(\n|\Z))+\Z"),
    _kind("a hypernetwork", _BESIDE, r"^0\.0\.linear"),
    _kind("an IP-Adapter", _BESIDE, r"^(image_proj(_model)?|ip_adapter(_proj_model)?)\.|\.to_[kv]_ip\."),
    _kind("a ControlNet (ControlNet-LLLite)", _BESIDE, r"^lllite_"),
    _kind("a ControlNet", _BESIDE, r"^control_model\."),
    _kind(
        "a ControlNet",
        _BESIDE,
        rf"{_AT}(controlnet_(blocks|down_blocks|mid_block|x_embedder|pos_embed)|input_hint_block|zero_convs)\.",
    ),
    _kind(
        "a ControlNet",
        _BESIDE,
        rf"{_AT}(control_layers|control_all_x_embedder|after_proj_list|out_projectors)\.|^controlnet\.",
    ),
    _kind(
        "an adapter (IP-Adapter or PuLID)",
        _BESIDE,
        r"ip_adapter_(double|single)_stream|\.ip_[kv]\.weight$|^pulid_(ca|encoder)\.|^style_embedding$"
        r"|^transformer_layes\.|^id_encoder\.",
    ),
    _kind("a T2I-adapter", _BESIDE, r"^(adapter\.)?body\.0\.(block1|in_conv|resnets)\."),
    _kind("a motion module (AnimateDiff)", _BESIDE, r"\.motion_modules\.0\."),
    # -- families, in the order in which one is told from the next -------------------------------------------
    _kind(
        "HunyuanVideo",
        _BY_LISTS,
        rf"{_AT}(txt_in\.individual_token_refiner|context_embedder\.token_refiner)\.",
    ),
    _kind("Flux.2", _BY_LISTS, rf"{_AT}double_stream_modulation_img\."),
    _kind("Hunyuan3D", _BY_LISTS, rf"{_AT}latent_in\.", rf"{_AT}double_blocks\.0\."),
    _kind("Flux.3", _BY_LISTS, rf"{_AT}early_stream_modulations\."),
    _kind("AuraFlow", _BY_LISTS, rf"{_AT}(double_layers\.0\.attn\.w1q|joint_transformer_blocks\.0\.attn)\."),
    _kind("Wan", _BY_LISTS, rf"{_AT}head\.modulation$"),
    _kind("Wan", _BY_LISTS, rf"{_AT}condition_embedder\.time_proj\.", rf"{_AT}scale_shift_table$"),
    _kind("OmniGen2", _BY_LISTS, rf"{_AT}ref_image_refiner\.0\."),
    _kind("Qwen-Image", _BY_LISTS, rf"{_AT}txt_norm\.weight$", rf"{_AT}transformer_blocks\.0\.img_mod\."),
    _kind("Qwen-Image", _BY_LISTS, rf"{_AT}txt_in\.text_norm\.weight$"),
    _kind("Krea 2", _BY_LISTS, rf"{_AT}(txtfusion|text_fusion)\.projector\."),
    _kind("HunyuanDiT", _BY_LISTS, rf"{_AT}(mlp_t5\.0|time_extra_emb)\."),
    _kind("Sana", _BY_LISTS, rf"{_AT}transformer_blocks\.0\.ff\.conv_inverted\."),
    _kind("PixArt", _BY_LISTS, rf"{_AT}t_block\.0\.weight$"),
    _kind("PixArt", _BY_LISTS, rf"{_AT}adaln_single\.emb\.timestep_embedder\.", rf"{_AT}pos_embed\.proj\."),
    _kind("LTX-Video", _BY_LISTS, rf"{_AT}adaln_single\.emb\.timestep_embedder\."),
    _kind(
        "LTX-Video", _BY_LISTS, rf"{_AT}time_embed\.emb\.timestep_embedder\.", rf"{_AT}caption_projection\."
    ),
    _kind("Mochi", _BY_LISTS, rf"{_AT}(t5_y_embedder|t5_yproj|time_embed\.pooler)\."),
    _kind("CogView", _BY_LISTS, rf"{_AT}patch_embed\.text_proj\.", rf"{_AT}time_condition_embed\."),
    _kind("CogVideoX", _BY_LISTS, rf"{_AT}patch_embed\.text_proj\."),
    _kind("Stable Cascade", _BY_LISTS, rf"{_AT}(clf\.0\.weight$|clip_(txt_|txt_pooled_|img_)?mapper\.)"),
    _kind("HiDream", _BY_LISTS, rf"{_AT}caption_projection\.0\.linear\."),
    _kind("Kandinsky", _BY_LISTS, rf"{_AT}visual_embeddings\.in_layer\."),
    _kind("Stable Audio", _BY_LISTS, rf"{_AT}(to_(cond|timestep)_embed\.0|cross_attention_proj\.0)\."),
    # -- parts -----------------------------------------------------------------------------------------------
    _kind("a tiny VAE (TAESD)", _PART, r"^((taesd_)?(en|de)coder\.(layers\.)?)?0\.conv\.0\.weight$"),
    _kind("a VAE of another family (as Wan's)", _PART, r"(en|de)coder\.(.+\.)?gamma$"),
    _kind("a VAE of another family (for videos)", _PART, r"(en|de)coder\.conv_in\.conv\.weight$"),
    _kind("a VAE of another family (for videos)", _PART, r"decoder\..*\b(time_stack|temporal_res_block)\."),
    _kind("a VAE (Stable Cascade)", _PART, r"^vquantizer\."),
    _kind("a CLIP (text and vision)", _ENCODER, r"^text_model\.", r"^vision_model\."),
    _kind("a CLIP (text and vision)", _ENCODER, r"^transformer\.resblocks\.0\.", r"^visual\."),
    _kind("a vision encoder (CLIP)", _ENCODER, r"^(vision_model|visual|image_encoder\.vision_model)\."),
    _kind("a vision encoder (CLIP)", _ENCODER, r"^embeddings\.patch_embedding\."),
    _kind("a text encoder (T5)", _ENCODER, r"^(encoder\.)?block\.0\.layer\.0\.SelfAttention\."),
    _kind("a text encoder (OpenCLIP)", _ENCODER, r"^(text\.|model\.)?transformer\.resblocks\.0\."),
    _kind(
        "a text encoder (CLIP)",
        _ENCODER,
        r"^embeddings\.token_embedding\.",
        r"^encoder\.layers\.0\.self_attn\.",
    ),
    # -- other models ----------------------------------------------------------------------------------------
    _kind(
        "an upscaler (ESRGAN)",
        _OTHER,
        r"^(params(_ema)?\.|module\.|generator\.)?"
        r"(conv_first\.|RRDB_trunk\.|body\.0\.rdb1\.|model\.0\.sub\.0\.|before_RG\.)",
    ),
    _kind("an upscaler (Real-ESRGAN)", _OTHER, r"\A((params(_ema)?\.)?body\.0\.(weight|bias)(\n|\Z))+\Z"),
    _kind("a face restorer (GFPGAN)", _OTHER, r"^(params(_ema)?\.)?stylegan_decoder\."),
    _kind("a face restorer (CodeFormer)", _OTHER, r"^(params(_ema)?\.)?ft_layers\.0\."),
    _kind("a segmentation model (SAM)", _OTHER, r"^(model\.)?image_encoder\.(patch_embed|trunk)\."),
    _kind("a vision model (DINOv2)", _OTHER, rf"{_AT}blocks\.0\.ls1\.gamma$"),
    _kind(
        "a language model",
        _OTHER,
        r"^(model\.|language_model\.)*layers\.0\.(self_attn|mlp|linear_attn|block_sparse_moe)\.|^blk\.0\.attn_"
        r"|^(transformer\.)?h\.0\.(attn|self_attention)\.|^gpt_neox\.layers\.0\.|^layers\.0\.attention\.w[qkvo]\.|^lm_head\.weight$",
    ),
    _kind("a language model (BERT)", _OTHER, rf"{_AT}encoder\.layer\.0\.attention\.self\."),
    _kind("a speech or language model", _OTHER, r"^(model\.)?decoder\.layers\.0\.encoder_attn\."),
)

_MOST_EMBEDDINGS = 8
_EMBEDDING_WIDTHS = (768, 1024, 1280)


def other_kind(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Say what tensors of these names are, or None: what stands after the file's name, and what to do.

    >>> other_kind({"emb_params": (8, 768)})
    'is a textual inversion (an embedding), not a model: it is used beside one, so give the model itself'
    """
    if (found := kind_of(shapes)) is not None:
        return _said(found)
    if not shapes:
        return "holds no diffusion model, nor any other tensor"
    # As diffusers saves them, under the word itself: the only kind that is told by a width.
    if len(shapes) <= _MOST_EMBEDDINGS and all(
        "." not in name and len(shape) in (1, 2) and shape[-1] in _EMBEDDING_WIDTHS
        for name, shape in shapes.items()
    ):
        return f"is a textual inversion (an embedding){_BESIDE}"
    return None


def mistaken_for_a_unet(names: Collection[str]) -> str | None:
    """As `other_kind`, of what has all the names by which U-Nets are known without being one."""
    text = "\n".join(names)
    found = _first(_MISTAKEN, names) if any(hint in text for hint in _HINTS) else None
    return None if found is None else _said(found)


def kind_of(names: Collection[str]) -> Kind | None:
    """The kind of file that has such names, of those that are not models of known families."""
    return _KOALA if _is_koala(names) else _first((*_MISTAKEN, *_KINDS, *_relatives(), _UNKNOWN), names)


@remembered(None)
def _relatives() -> tuple[Kind, ...]:
    """Models of other families that look like those of known ones."""
    families = FAMILIES.values()
    return tuple(
        _kind(what, _BY_LISTS, *(_AT + sign for sign in signs))
        for family in families
        for what, signs in family.relatives.items()
    )


def _is_koala(names: Collection[str]) -> bool:
    """SDXL with one resnet in each unit, so that its second unit already goes down a level."""
    text = "\n".join(names)
    if "label_emb." not in text and "add_embedding." not in text:
        return False
    has_two = re.search(r"^(unet[./])?down_blocks\.\d\.resnets\.1\.", text, re.MULTILINE)
    has_one = re.search(r"^(unet[./])?down_blocks\.0\.downsamplers\.0\.", text, re.MULTILINE) and not has_two
    return bool(has_one) or "input_blocks.2.0.op." in text


def _first(kinds: tuple[Kind, ...], names: Collection[str]) -> Kind | None:
    text = "\n".join(islice(_without_numbers(names), _MOST_NAMES))
    return next((kind for kind in kinds if kind.fits(text)), None)


def _said(kind: Kind) -> str:
    return f"is {kind.what}{kind.then}"


def _without_numbers(names: Collection[str]) -> Iterator[str]:
    """Each name once, with 0 for its numbers."""
    seen: set[str] = set()
    for name in names:
        short = _NUMBER.sub("0", name)
        if short not in seen:
            seen.add(short)
            yield short
