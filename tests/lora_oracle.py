"""LoRAs of every kind that is baked, and what each changes: worked out in float64 from the papers' formulas,
without any of blockmerge's code.

A LoRA is {Place: {part: tensor}} here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from tests import oracle

NO_BIAS = ""
RANK = 3


@dataclass(frozen=True)
class Place:
    """A module by kohya's name, and the tensor that is its own weight, or a third or the transpose of it."""

    module: str
    weight: str
    bias: str
    block: str
    third: int | None = None
    is_transposed: bool = False

    def of(self, tensor):
        """The module's own weight or bias in a tensor, as a view."""
        if self.third is not None:
            size = len(tensor) // 3
            tensor = tensor[self.third * size : (self.third + 1) * size]
        return tensor.T if self.is_transposed else tensor


def place(module, stem, block, bias=".bias"):
    """The usual one: a layer with a weight and a bias of its own."""
    return Place(module, f"{stem}.weight", bias and stem + bias, block)


def third(module, stem, number):
    """One of OpenCLIP's q, k and v."""
    return Place(module, f"{stem}.in_proj_weight", f"{stem}.in_proj_bias", "BASE", third=number)


# -- the kinds -----------------------------------------------------------------------------------------------


class Factors:
    """Random factors for a weight of a shape."""

    def __init__(self, shape, seed=0, dtype=torch.float16):
        self.rows, self.inputs, *self.kernel = shape
        self.columns = self.inputs * prod(self.kernel)
        self.ones = [1] * len(self.kernel)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def new(self, *shape):
        return (torch.randn(shape, generator=self.generator) * 0.4).to(self.dtype)

    def lora(self, rank=RANK):
        return {
            "lora_up.weight": self.new(self.rows, rank, *self.ones),
            "lora_down.weight": self.new(rank, self.inputs, *self.kernel),
        }

    def flat_lora(self):
        """As some write that of a convolution of one place, and of matrices with more axes than they need."""
        ones = [] if self.kernel else [1, 1]
        return {
            "lora_up.weight": self.new(self.rows, RANK, *ones),
            "lora_down.weight": self.new(RANK, self.inputs, *ones),
        }

    def biased_lora(self):
        parts = self.lora()
        return {
            "lora_B.weight": parts["lora_up.weight"],
            "lora_A.weight": parts["lora_down.weight"],
            "lora_B.bias": self.new(self.rows),
        }

    def tucker(self):
        return {
            "lora_up.weight": self.new(self.rows, RANK, *self.ones),
            "lora_mid.weight": self.new(RANK, RANK, *self.kernel),
            "lora_down.weight": self.new(RANK, self.inputs, *self.ones),
        }

    def loha(self):
        return {
            "hada_w1_a": self.new(self.rows, RANK),
            "hada_w1_b": self.new(RANK, self.columns),
            "hada_w2_a": self.new(self.rows, RANK),
            "hada_w2_b": self.new(RANK, self.columns),
        }

    def loha_tucker(self):
        return {
            f"hada_{name}": self.new(RANK, *shape)
            for number in "12"
            for name, shape in (
                (f"t{number}", (RANK, *self.kernel)),
                (f"w{number}_a", (self.rows,)),
                (f"w{number}_b", (self.inputs,)),
            )
        }

    def lokr(self, first, second):
        """Of a weight [2·c, 2·d, …]."""
        c, d = self.rows // 2, self.inputs // 2
        firsts = {
            "whole": {"lokr_w1": self.new(2, 2)},
            "product": {"lokr_w1_a": self.new(2, 1), "lokr_w1_b": self.new(1, 2)},
        }
        seconds = {
            "whole": {"lokr_w2": self.new(c, d, *self.kernel)},
            "product": {
                "lokr_w2_a": self.new(c, RANK),
                "lokr_w2_b": self.new(RANK, d * prod(self.kernel)),
            },
            "tucker": {
                "lokr_t2": self.new(RANK, RANK, *self.kernel),
                "lokr_w2_a": self.new(RANK, c),
                "lokr_w2_b": self.new(RANK, d),
            },
        }
        return {**firsts[first], **seconds[second]}

    def full(self):
        return {"diff": self.new(self.rows, self.inputs, *self.kernel)}

    def full_biased(self):
        return {**self.full(), "diff_b": self.new(self.rows)}

    def dora(self, kind="lora", by="rows"):
        """Any low-rank kind with magnitudes for each row, or for each input."""
        count = self.rows if by == "rows" else self.inputs
        shape = (count, 1, *self.ones) if by == "rows" else (1, count, *self.ones)
        return {**KINDS[kind](self), "dora_scale": self.new(*shape).abs() + 0.5}

    def pefts_dora(self):
        parts = self.lora()
        return {
            "lora_A.weight": parts["lora_down.weight"],
            "lora_B.weight": parts["lora_up.weight"],
            "lora_magnitude_vector": self.new(self.rows).abs() + 0.5,
        }

    def glora(self):
        return {
            "a1.weight": self.new(self.inputs, RANK),
            "a2.weight": self.new(RANK, self.inputs),
            "b1.weight": self.new(self.rows, RANK),
            "b2.weight": self.new(RANK, self.columns),
        }

    def ia3(self, on_input):
        count = self.inputs if on_input else self.rows
        return {"weight": self.new(count), "on_input": torch.tensor(on_input)}

    def oft(self, stages=None, limit=None, rescaled=False):
        """Blocks of four rows."""
        blocks = self.new(*([] if stages is None else [stages]), self.rows // 4, 4, 4)
        parts = {"oft_blocks": blocks}
        if limit is not None:
            parts["alpha"] = torch.tensor(limit)
        return {**parts, "rescale": self.new(self.rows, 1, *self.ones)} if rescaled else parts

    def old_oft(self):
        turned, _ = torch.linalg.qr(self.new(self.rows // 4, 4, 4).float())
        return {"oft_diag": turned.to(self.dtype)}


KINDS = {
    "lora": Factors.lora,
    "flat lora": Factors.flat_lora,
    "lora with a bias": Factors.biased_lora,
    "tucker": Factors.tucker,
    "loha": Factors.loha,
    "loha tucker": Factors.loha_tucker,
    **{
        f"lokr {first}, {second}": lambda factors, first=first, second=second: factors.lokr(first, second)
        for first in ("whole", "product")
        for second in ("whole", "product", "tucker")
    },
    "full": Factors.full,
    "full with a bias": Factors.full_biased,
    "dora": Factors.dora,
    "dora by inputs": lambda factors: factors.dora(by="inputs"),
    "dora of loha": lambda factors: factors.dora("loha"),
    "dora of lokr": lambda factors: factors.dora("lokr whole, product", by="inputs"),
    "dora of tucker": lambda factors: factors.dora("tucker"),
    "dora by peft": Factors.pefts_dora,
    "glora": Factors.glora,
    "ia3": lambda factors: factors.ia3(on_input=False),
    "ia3 on input": lambda factors: factors.ia3(on_input=True),
    "oft": Factors.oft,
    "oft with a limit": lambda factors: factors.oft(limit=0.03, rescaled=True),
    "oft, old": Factors.old_oft,
    "boft": lambda factors: factors.oft(stages=2),
}


def fits(kind, place, shape):
    """Whether there is such a module for a weight of a shape."""
    kernel = prod(shape[2:])
    if "tucker" in kind:
        return kernel > 1
    return (kind != "flat lora" or kernel == 1) and (not kind.endswith("bias") or place.bias != NO_BIAS)


def parts_of(kind, shape, alpha=None, **options):
    """Parts of a module of that kind for a weight of a shape; `alpha` is a tensor, for kinds that have one."""
    parts = KINDS[kind](Factors(shape, **options))
    has_none = kind.startswith(("full", "ia3", "oft", "boft"))
    return parts if alpha is None or has_none else {**parts, "alpha": alpha}


def written(lora):
    """A LoRA as it stands in a file."""
    return {
        f"{place.module}.{part}": tensor for place, parts in lora.items() for part, tensor in parts.items()
    }


# -- what they change ----------------------------------------------------------------------------------------


def change_of(parts, weight):
    """W(1) − W for a weight W, in float64; None where the parts say nothing of it."""
    t = {name: tensor.double() for name, tensor in parts.items()}
    if "dora_scale" in t or "lora_magnitude_vector" in t:
        whole = weight + added(parts, weight.shape)
        is_by_input = "dora_scale" in t and t["dora_scale"].shape[0] == 1
        magnitude = t["dora_scale"] if "dora_scale" in t else t["lora_magnitude_vector"]
        norms = whole.transpose(0, 1).flatten(1).norm(dim=1) if is_by_input else whole.flatten(1).norm(dim=1)
        sides = [1, -1] if is_by_input else [-1, 1]
        scales = (magnitude.flatten() / norms).view(*sides, *[1] * (whole.dim() - 2))
        return whole * scales - weight
    if "a1.weight" in t:
        mixed = torch.einsum("oi...,ij->oj...", weight, t["a1.weight"] @ t["a2.weight"])
        return _factor(t) * (mixed + (t["b1.weight"] @ t["b2.weight"]).view(weight.shape))
    if "on_input" in t:
        sides = [1, -1] if t["on_input"] else [-1, 1]
        return weight * t["weight"].view(*sides, *[1] * (weight.dim() - 2))
    if "oft_blocks" in t or "oft_diag" in t:
        return _turned(t, weight.flatten(1)).view(weight.shape) - weight
    return added(parts, weight.shape)


def _turned(t, rows):
    if "oft_diag" in t:
        return _by_blocks(t["oft_diag"].transpose(1, 2), rows)
    skew = t["oft_blocks"] - t["oft_blocks"].transpose(-1, -2)
    if "alpha" in t and skew.norm() > t["alpha"] * len(rows):
        skew = skew / skew.norm() * t["alpha"] * len(rows)
    size = skew.shape[-1]
    unit = torch.eye(size).double()
    rotations = (unit + skew) @ (unit - skew).inverse()
    if rotations.dim() == 3:
        rows = _by_blocks(rotations.transpose(1, 2), rows)
    else:
        for stage, rotation in enumerate(rotations):
            # Rows 2^stage·b/2 apart are next to each other, are turned, and go back.
            apart = 2**stage * size // 2
            order = torch.arange(len(rows)).view(-1, 2, apart).transpose(1, 2).flatten()
            rows = _by_blocks(rotation, rows[order])[order.argsort()]
    return rows * t["rescale"].view(-1, 1) if "rescale" in t else rows


def _by_blocks(rotations, rows):
    return torch.cat(
        [one @ part for one, part in zip(rotations, rows.split(rotations.shape[-1]), strict=True)]
    )


def added(parts, shape):
    """What is added at strength 1 whatever the weight is, in float64."""
    t = {name: tensor.double() for name, tensor in parts.items()}
    if "diff" in t or "w_norm" in t:
        return (t["diff"] if "diff" in t else t["w_norm"]).view(shape)
    if "hada_w1_a" in t:
        halves = [_half_of_loha(t, number) for number in "12"]
        return (_factor(t) * halves[0].view(shape) * halves[1].view(shape)).view(shape)
    if "lokr_w1" in t or "lokr_w1_a" in t:
        first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
        second = _second_of_lokr(t).reshape(shape[0] // len(first), shape[1] // first.shape[1], *shape[2:])
        first = first.view(*first.shape, *[1] * (second.dim() - 2))
        return _factor(t) * torch.kron(first, second.contiguous())
    if _down(t) is None:
        return None
    up, down = _up(t).flatten(1), _down(t)
    if "lora_mid.weight" in t:
        down = torch.einsum("nmkl,mi->nikl", t["lora_mid.weight"], down.flatten(1))
    return _factor(t) * (up @ down.flatten(1)).view(shape)


def bias_change(parts, bias):
    """What is added to a bias at strength 1, in float64, or None."""
    t = {name: tensor.double() for name, tensor in parts.items()}
    if "lora_B.bias" in t:
        return _factor(t) * t["lora_B.bias"]
    return t.get("diff_b", t.get("b_norm"))


def _factor(t):
    rank = next((len(t[part]) for part in _RANKS if part in t), None)
    alpha = t.get("alpha")
    return 1.0 if alpha is None or rank is None or alpha == 0 else (alpha / rank).item()


_RANKS = ("lora_down.weight", "lora_A.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "b2.weight")


def _up(t):
    return t["lora_up.weight"] if "lora_up.weight" in t else t["lora_B.weight"]


def _down(t):
    return t.get("lora_down.weight", t.get("lora_A.weight"))


def _half_of_loha(t, number):
    a, b = t[f"hada_w{number}_a"], t[f"hada_w{number}_b"]
    core = t.get(f"hada_t{number}")
    return a @ b if core is None else torch.einsum("ijkl,io,jn->onkl", core, a, b)


def _second_of_lokr(t):
    if "lokr_w2" in t:
        return t["lokr_w2"]
    a, b = t["lokr_w2_a"], t["lokr_w2_b"]
    return torch.einsum("ijkl,io,jn->onkl", t["lokr_t2"], a, b) if "lokr_t2" in t else a @ b


def baked(model, loras):
    """({name: value in float64}, {name: the size of what was summed}) of a model with LoRAs.

    `loras` are (LoRA, strength), where a strength is a number, or {block: number}.
    """
    values = {name: tensor.double() for name, tensor in model.items()}
    sizes = {name: tensor.abs() for name, tensor in values.items()}
    for lora, strength in loras:
        for where, parts in lora.items():
            by = strength[where.block] if isinstance(strength, dict) else strength
            for name, what in ((where.weight, change_of), (where.bias, bias_change)):
                if name == NO_BIAS or by == 0:
                    continue
                own, size = (where.of(one[name]) for one in (values, sizes))
                if own.dim() > 1:
                    own, size = (one[:, : _inputs(parts, own)] for one in (own, size))
                if (change := what(parts, own)) is not None:
                    size += abs(by) * _size(parts, own, change)
                    own += by * change
    return values, sizes


def _size(parts, own, change):
    """The size of what is summed for a change."""
    if _OF_WEIGHT & parts.keys():
        return 16 * (own.abs().max() + change.abs().max())
    if own.dim() == 1:
        return change.abs()
    return added({part: tensor.abs() for part, tensor in parts.items()}, own.shape).abs()


_OF_WEIGHT = {"dora_scale", "lora_magnitude_vector", "a1.weight", "on_input", "oft_blocks", "oft_diag"}


def _inputs(parts, own):
    """How many of the input channels of a weight the parts are for."""
    t = {name: tensor.double() for name, tensor in parts.items()}
    kernel = prod(own.shape[2:])
    if "diff" in t:
        return t["diff"].shape[1]
    if "hada_w1_b" in t:
        return t["hada_w1_b"].shape[1] // (1 if "hada_t1" in t else kernel)
    if "lokr_w1" in t or "lokr_w1_a" in t:
        second = t["lokr_w2"].flatten(1) if "lokr_w2" in t else t["lokr_w2_b"]
        first = t["lokr_w1" if "lokr_w1" in t else "lokr_w1_b"]
        return first.shape[1] * second.shape[1] // (1 if "lokr_t2" in t else kernel)
    return own.shape[1] if _down(t) is None else _down(t).shape[1]


def assert_baked(out, model, loras, dtype=None):
    """Hold a baked state dict against a model and LoRAs: bit for bit where they change nothing, else within
    the rounding to its dtype. `dtype` is the output's, by default the model's.
    """
    values, sizes = baked(model, loras)
    assert out.keys() == model.keys()
    changed = set()
    for name, tensor in out.items():
        before = (
            model[name] if dtype is None or not model[name].is_floating_point() else model[name].to(dtype)
        )
        assert (tensor.dtype, tensor.shape) == (before.dtype, before.shape), name
        same = values[name] == model[name].double()
        assert torch.equal(tensor[same], before[same]), name
        if not same.all():
            changed.add(name)
            sums = 2.0**-50 if tensor.dtype == torch.float32 else 2.0**-20
            allowed = oracle.step_at(values[name], tensor.dtype) / 2 + sums * sizes[name]
            error = (tensor.double() - values[name]).abs()
            assert (error <= allowed).all(), (name, (error / allowed).max())
    return changed
