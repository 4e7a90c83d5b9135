"""The tensors of a module, by what stands after its name: one table, whatever program wrote it."""

from __future__ import annotations

from collections.abc import Mapping

EMBEDDINGS = "bundle_emb."
"""How the names of embeddings begin that travel along with an adapter."""

_ANY = "*"
_MOST_WORDS = 3

SUFFIXES: Mapping[str, str] = {
    # -- LoRA, LoCon: kohya, PEFT, diffusers before PEFT -----------------------------------------------------
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_up.bias": "up_bias",
    "lora_mid.weight": "mid",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "up_bias",
    "lora_A.*.weight": "down",  # with the adapter's name, as "default"
    "lora_B.*.weight": "up",
    "lora_B.*.bias": "up_bias",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora.up.bias": "up_bias",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_linear_layer.up.bias": "up_bias",
    "down.weight": "down",  # of attention processors: `to_q_lora` belongs to the module's name
    "up.weight": "up",
    "alpha": "alpha",
    # -- DoRA ------------------------------------------------------------------------------------------------
    "dora_scale": "dora_scale",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.*": "magnitude",
    "lora_magnitude_vector.*.weight": "magnitude",
    # -- LyCORIS ---------------------------------------------------------------------------------------------
    **{part: part for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{part: part for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b")},
    **{part: part for part in ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
    **{part: part for part in ("diff", "diff_b", "w_norm", "b_norm")},
    **{f"{part}.weight": part for part in ("a1", "a2", "b1", "b2", "bm")},
    "weight": "ia3_weight",
    "on_input": "on_input",
    **{part: part for part in ("oft_blocks", "oft_diag", "rescale")},
    # -- known, and not read ---------------------------------------------------------------------------------
    "oft_R.weight": "oft_R",
    "oft_R.*.weight": "oft_R",
    "oft_R.scaled_oft": "oft_R",
    **{part: part for part in ("bias_indices", "bias_values", "bias_size", "scale", "set_weight")},
}
"""{what stands after a module's name: what it is}, where ``*`` stands for one word."""

NOT_READ: Mapping[str, str] = {
    "oft_R": "OFT on the input side (OneTrainer, PEFT)",
    "bias_indices": "a sparse bias (LyCORIS' extraction)",
    "bias_values": "a sparse bias (LyCORIS' extraction)",
    "bias_size": "a sparse bias (LyCORIS' extraction)",
    "scale": "a scale in place of alpha",
    "set_weight": "a weight in place of the model's (ComfyUI)",
    "bm": "GLoRA with a kernel of its own",
}
"""What is known, and cannot be computed: what messages call it."""

NOT_TELLING = frozenset(("ia3_weight", "scale"))
"""Parts that other files than adapters have as well."""


def part_of(name: str) -> tuple[str, str] | None:
    """Return (module, what it is of it) for a tensor's name; None where that is nothing of an adapter's.

    >>> part_of("unet.mid_block.attentions.0.proj_in.lora_A.default.weight")
    ('unet.mid_block.attentions.0.proj_in', 'down')
    """
    module, *words = name.rsplit(".", _MOST_WORDS)
    if len(words) < _MOST_WORDS:
        module, words = "", [module, *words]
    for count in range(min(len(words), _MOST_WORDS), 0, -1):
        before, last = words[: len(words) - count], words[len(words) - count :]
        part = SUFFIXES.get(".".join(last))
        if part is None and count > 1:
            part = SUFFIXES.get(".".join((last[0], _ANY, *last[2:])))
        stem = ".".join(([module] if module else []) + before)
        if part is not None and stem:
            return stem, part
    return None
