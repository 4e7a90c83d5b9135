"""What a comparison found, as plain data; drawing it is `rendering`'s job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Differences:
    """How the weights of B differ from those of A, over some set of tensors.

    `cosine` is Σab / √(Σa²·Σb²), 1 where both are all zeros and 0 where one is. `relative_difference` is ‖b −
    a‖ / ‖a‖, None where only a is all zeros. `max_difference` is the largest |b − a|. `difference_cosine` is
    the cosine of a − c and b − c for a common base c, None where none was given or a or b is c.
    """

    cosine: float
    relative_difference: float | None
    max_difference: float
    difference_cosine: float | None = None


@dataclass(frozen=True)
class Comparison:
    """One reference beside the base.

    With an `error`, one line about why there is no number, all else is empty. `similarity` and `parts` are
    percent for the method ``"attention"`` (parts: the output blocks looked at) and cosines for ``"weights"``
    (parts: all blocks, BASE being everything outside the U-Net). `total`, `blocks` and `components` are for
    ``"weights"`` only. `hash` is the old (AutoV1) hash, None for what is no file. `notes` tell what could not
    be compared.
    """

    name: str
    hash: str | None = None
    similarity: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    total: Differences | None = None
    blocks: Mapping[str, Differences] = field(default_factory=dict)
    components: Mapping[str, Differences] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: str | None = None

    def differences(self, *, common_base: bool) -> dict[str, Any]:
        """What is told beside, as plain data, of weights that were compared."""
        kinds = {"relative_difference": "relative_difference", "max_difference": "max_difference"}
        if common_base:
            kinds["difference_similarity"] = "difference_cosine"
        fields: dict[str, Any] = {}
        for key, attribute in kinds.items():
            fields[key] = None if self.total is None else getattr(self.total, attribute)
            fields[f"{key}_parts"] = {
                block: getattr(found, attribute) for block, found in self.blocks.items()
            }
        fields["components"] = {
            component: {
                "similarity": found.cosine,
                **{key: getattr(found, attribute) for key, attribute in kinds.items()},
            }
            for component, found in self.components.items()
        }
        return fields


@dataclass(frozen=True)
class SimilarityResult:
    """How alike a base and its references are.

    - `method`: ``"attention"`` (percent) or ``"weights"`` (cosines).
    - `seed`: that of the attention's input. None for ``"weights"``.
    - `base`, `base_hash`, `family`: the base's name, old hash (AutoV1) and family.
    - `references`: one entry each, the most alike first and those with an `error` last. An entry has `name`,
      `hash`, `similarity`, `parts` ({block: number}), `notes` and `error`. For ``"weights"``, `total`,
      `blocks` and `components` have all differences.
    - `common_base`: the name of the model that differences were taken from, or None.
    - `notes`: sentences for the user.
    """

    method: str
    seed: int | None
    base: str
    base_hash: str | None
    family: str
    references: tuple[Comparison, ...]
    common_base: str | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, ready for JSON. The keys are those of `docs/json.md`."""
        return {
            "method": self.method,
            "seed": self.seed,
            "family": self.family,
            "base": {"name": self.base, "hash": self.base_hash},
            "common_base": self.common_base,
            "references": [self._reference(one) for one in self.references],
            "notes": self.notes,
        }

    def _reference(self, one: Comparison) -> dict[str, Any]:
        more = one.differences(common_base=self.common_base is not None) if self.method == "weights" else {}
        return {
            "name": one.name,
            "hash": one.hash,
            "similarity": one.similarity,
            "parts": dict(one.parts),
            **more,
            "notes": one.notes,
            "error": one.error,
        }

    @property
    def failed(self) -> tuple[Comparison, ...]:
        """The references that could not be compared."""
        return tuple(reference for reference in self.references if reference.error is not None)


@dataclass(frozen=True)
class SimilarityMatrix:
    """How alike all models are to each other.

    - `names`: the models, in the order of rows and columns.
    - `similarity`: a row for each model, in percent or as cosines. None where two cannot be compared.
    - `errors`: {name: one line about why a model could not be compared}.
    - `method`, `seed`, `notes`: as for `SimilarityResult`.
    """

    method: str
    seed: int | None
    names: tuple[str, ...]
    similarity: tuple[tuple[float | None, ...], ...]
    errors: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, ready for JSON. The keys are those of `docs/json.md`."""
        return asdict(self)
