"""What `check` can find: every code with its severity, and the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

Severity = Literal["error", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Kind:
    """How bad a problem is, and whether writing the model anew can repair it without asking for anything."""

    severity: Severity
    fixable: bool = False


KINDS: Mapping[str, Kind] = {
    # errors: it does not load, or its pictures are wrong
    "no_unet": Kind("error"),
    "broken_off": Kind("error"),
    "wrong_checksum": Kind("error"),
    "missing_tensors": Kind("error"),
    "wrong_shape": Kind("error"),
    "quantised_weights": Kind("error"),
    "integer_weights": Kind("error"),
    "broken_position_ids": Kind("error", fixable=True),
    "nan_or_infinity": Kind("error"),
    # warnings: it fails in some programs or settings, or is hardly what its maker wanted
    "missing_component": Kind("warning"),
    "unknown_tensors": Kind("warning"),
    "zero_weights": Kind("warning"),
    "overflows_fp16": Kind("warning"),
    "float64_weights": Kind("warning"),
    "leftover_nan": Kind("warning", fixable=True),
    "metadata_architecture": Kind("warning", fixable=True),
    "metadata_json": Kind("warning", fixable=True),
    "metadata_paths": Kind("warning", fixable=True),
    # notes: good to know
    "lora": Kind("note"),
    "component_alone": Kind("note"),
    "ema": Kind("note", fixable=True),
    "ema_only": Kind("note", fixable=True),
    "leftovers": Kind("note", fixable=True),
    "foreign_tensors": Kind("note"),
    "derivative": Kind("note"),
    "wrapped_names": Kind("note", fixable=True),
    "other_names": Kind("note", fixable=True),
    "two_names": Kind("note", fixable=True),
    "novelai_names": Kind("note", fixable=True),
    "float_position_ids": Kind("note", fixable=True),
    "mixed_dtypes": Kind("note"),
    "fp8_weights": Kind("note"),
    "scaled_fp8": Kind("note"),
    "prediction_marker": Kind("note"),
    "unaligned_data": Kind("note", fixable=True),
    "no_format": Kind("note", fixable=True),
}
"""Every code, described in `docs/check.md`. The codes are for programs and stay."""


@dataclass(frozen=True)
class Problem:
    """One thing that `check` found.

    `tensors` are all it concerns, under the file's own names (a missing one: under the name it should have);
    `bytes` is what they take, where that is the point.
    """

    code: str
    severity: Severity
    message: str
    tensors: tuple[str, ...]
    fixable: bool
    bytes: int | None = None

    @classmethod
    def of(cls, code: str, message: str, tensors: Iterable[str] = (), nbytes: int | None = None) -> Self:
        """A problem of one of the KINDS."""
        kind = KINDS[code]
        return cls(code, kind.severity, message, tuple(tensors), kind.fixable, nbytes)


@dataclass(frozen=True)
class CheckResult:
    """What `check` found, the worst first.

    - `name`: the file's name.
    - `family`, `variant`, `naming`: as for `Inspection`.
    - `problems`: each has `code`, `severity` (``"error"``, ``"warning"`` or ``"note"``), `message`,
      `tensors`, `fixable` and `bytes`.
    - `fixed`, `output`: the codes that a repaired copy no longer has, and where it is. Empty and None without
      one.
    - `notes`: sentences for the user.
    """

    name: str
    family: str | None
    variant: str | None
    naming: str | None
    problems: tuple[Problem, ...]
    fixed: tuple[str, ...] = ()
    output: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def faults(self) -> tuple[Problem, ...]:
        """The errors and warnings that were not fixed. Notes say nothing against a model."""
        return tuple(
            problem
            for problem in self.problems
            if problem.severity != "note" and problem.code not in self.fixed
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, ready for JSON. The keys are those of `docs/json.md`."""
        return asdict(self)
