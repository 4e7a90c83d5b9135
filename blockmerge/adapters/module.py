"""`Module`: one module of an adapter, with its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from blockmerge.adapters.alphas import Configs, numbers
from blockmerge.adapters.forms import LOOKING_AT_WEIGHTS, OF_BIASES, PRODUCTS
from blockmerge.adapters.shaping import Shaped
from blockmerge.adapters.targets import Shape, Target
from blockmerge.checkpoints import Checkpoint
from blockmerge.errors import CheckpointError, counted, listing, shown
from blockmerge.expressions import Stored

_LIMITED = "oft_unet_"
"""How sd-scripts' OFT begins, whose alpha is a limit even where it is 0."""


@dataclass(frozen=True)
class Module:
    """What one module of an adapter changes, and how.

    >>> module = adapter.modules[0]  # doctest: +SKIP
    >>> module.kind, module.target.block, module.rank, module.factor  # doctest: +SKIP
    ('lora', 'IN04', 32, 0.5)

    `name` is the file's own; `target` is None where no table knows it. `kind` is one of KINDS, and `form` the
    same but for DoRA, where it is the low-rank kind that the magnitudes are over. `parts` are {part: tensor},
    by the words of `forms.py`. `rank` is None where the kind has none. `factor`, which is alpha / rank, is
    what the product of the parts is multiplied by. `alpha` is the one that counts, which is the rank where
    none is stored, or 0; `stored_alpha` what the file says, None where it says nothing. Where there is no
    product, `alpha` is the limit of OFT, None without one. `on_input` is IA3's: whether it scales columns in
    place of rows.
    """

    name: str
    target: Target | None
    kind: str
    form: str
    parts: Mapping[str, Stored]
    rank: int | None = None
    alpha: float | None = None
    stored_alpha: float | None = None
    factor: float = 1.0
    on_input: bool = False
    columns: int | None = field(default=None, repr=False)

    @property
    def is_product(self) -> bool:
        """Whether its change is up·down; under DoRA, what the magnitudes are over."""
        return self.form in PRODUCTS

    @property
    def looks_at_weights(self) -> bool:
        """Whether its change depends on the weight, so that it is not known without the model."""
        return self.kind in LOOKING_AT_WEIGHTS

    @property
    def changes_weight(self) -> bool:
        """Whether it changes a weight, and not only a bias."""
        return not self.parts.keys() <= OF_BIASES.keys()

    @property
    def of_bias(self) -> Iterator[tuple[str, float, Stored]]:
        """Yield (part, factor, tensor) of what it adds to a bias at strength 1."""
        for part, with_factor in OF_BIASES.items():
            if part in self.parts:
                yield part, self.factor if with_factor else 1.0, self.parts[part]

    def inputs_of(self, shape: Shape) -> int:
        """The entries that it changes of the second axis of a weight of that shape, counted from the first.

        They are fewer than all in the first convolution of a model with more input channels.
        """
        if len(shape) < 2:
            return 1
        return shape[1] if self.columns is None else self.columns // prod(shape[2:])


Chosen = Mapping[str, tuple[Shaped, Target | None]]
"""{name of a module: its form, and what it changes}"""


def modules_of(
    checkpoint: Checkpoint, chosen: Chosen, name: str
) -> tuple[tuple[Module, ...], tuple[str, ...]]:
    """Return the modules of a file, and notes on their numbers, which are read here.

    Raises CheckpointError, calling the file `name`, for an alpha that is not a finite number and for settings
    that cannot be read.
    """
    tensors = {module: one.parts["alpha"] for module, (one, _) in chosen.items() if "alpha" in one.parts}
    alphas = dict(zip(tensors, numbers(tensors.values()), strict=True))
    if odd := [f"{module} has alpha {value}" for module, value in alphas.items() if not math.isfinite(value)]:
        raise CheckpointError(
            f"{shown(name)} has {counted(len(odd), 'module')} without a finite alpha to scale by "
            f"({listing(odd)}): download it again, or have its trainer save it anew"
        )
    configs = Configs.of(checkpoint, chosen)
    modules = tuple(_module(module, *one, alphas.get(module), configs) for module, one in chosen.items())
    return modules, tuple(_notes(modules, alphas, configs, name))


def _module(name: str, form: Shaped, target: Target | None, alpha: float | None, configs: Configs) -> Module:
    own, rank = form.form.kind, form.rank
    factor = 1.0
    stored = alpha
    if rank is not None:
        if alpha is None:
            stored, alpha = configs.alpha_of(name, rank) or (None, None)
        elif alpha == 0:
            alpha = None
        alpha = float(rank) if alpha is None else alpha
        factor = alpha / rank
    elif alpha == 0 and not name.startswith(_LIMITED):
        alpha = None
    if own == "lora" and _has_kernel(form, target):
        own = "locon"
    return Module(
        name=name,
        target=target,
        kind="dora" if "dora_scale" in form.parts else own,
        form=own,
        parts=form.parts,
        rank=rank,
        alpha=alpha if own != "lokr" or rank is not None else None,
        stored_alpha=stored,
        factor=factor,
        on_input=form.is_on_input,
        columns=form.columns,
    )


def _has_kernel(form: Shaped, target: Target | None) -> bool:
    """Whether it is for a convolution of more than one place."""
    return prod((target.shape if target is not None else form.parts["down"].shape)[2:]) > 1


def _notes(
    modules: Sequence[Module], alphas: Mapping[str, float], configs: Configs, name: str
) -> Iterator[str]:
    zeros = [one.name for one in modules if one.rank is not None and alphas.get(one.name) == 0]
    if zeros:
        count = counted(len(zeros), "module")
        yield f"{shown(name)} has alpha 0 in {count}: the rank is taken in its place, as trainers do"
    if configs.are_by_root:
        yield f"{shown(name)} is an rs-LoRA (use_rslora): alpha counts times the root of the rank"
    if configs.are_missing and not alphas:
        yield (
            f"{shown(name)} is as PEFT saves it, without the adapter_config.json that has its alpha: "
            "the rank is taken in its place"
        )
