"""`Output`: what every kind of output tells, so that nothing else asks which kind it is."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Generic, Protocol, Self, TypeVar

from blockmerge.anatomy import Anatomy
from blockmerge.checkpoints import AtomicFolder, CheckpointLike, Model, check_output_folder


class NamedTensor(Protocol):
    """A tensor of the output, as far as its place is concerned.

    `name` is its name in the output, with the component before a ``/`` where there are components; `ldm` the
    LDM tensor that it is or is a part of; `dtype` is in safetensors' spelling.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def ldm(self) -> str: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102


Tensor = TypeVar("Tensor", bound=NamedTensor)


@dataclass(frozen=True)
class WeightFile(Generic[Tensor]):
    """A file of tensors: its path within the output, with ``/``, and {name in this file: tensor}, in order.

    The path of an output that is itself one file is empty.
    """

    path: str
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Layout(Generic[Tensor]):
    """Where everything of an output goes: tensors to weight files, and whole small files beside them.

    `notes` are texts for the user.
    """

    files: Sequence[WeightFile[Tensor]]
    small_files: Mapping[str, bytes] = field(default_factory=dict)
    notes: Sequence[str] = ()


class Reservation(Protocol):
    """Space for an output under way, as a context manager: without `commit` nothing remains of it."""

    swept: tuple[str, ...]
    """What was found of killed runs, and done with it."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...

    def path_of(self, name: str) -> Path:
        """Where one of the files lies meanwhile."""

    def commit(self) -> None:
        """Give the output its name, complete and safe on the disk. Raises OutputError."""


@dataclass(frozen=True)
class Wish:
    """What an output is chosen by: the path as given, the naming asked for (None: A's), A, and whether there
    will be more than a U-Net.
    """

    path: str
    naming: str | None
    a: Model
    is_whole: bool = False

    @property
    def is_folder(self) -> bool:
        """Whether the path can only be a folder."""
        return self.path.endswith(("/", os.sep)) or os.path.isdir(self.path)

    @property
    def from_folder(self) -> bool:
        """Whether A is of a whole model in diffusers' naming."""
        is_lone = self.a.alone is not None and not self.a.alone.is_part
        return self.a.anatomy.naming == "diffusers" and not (self.a.bare or is_lone)


class Output(ABC):
    """Where a merge goes, and everything that depends on what that is.

    >>> output = choose_output("merged.safetensors", a)  # doctest: +SKIP
    >>> laid_out = output.lay_out(tensors, models, anatomy)  # doctest: +SKIP
    >>> target = output.check(inputs, overwrite=False)  # doctest: +SKIP
    >>> with output.reserve(target, {"": 2_132_000_000}, overwrite=False) as reserved:  # doctest: +SKIP
    ...     write(reserved.path_of(""))
    ...     reserved.commit()

    `title` is what messages call the kind, `ending` how its names end, `is_default_of` the naming whose
    outputs it is when nobody names one, `has_configs` whether it has a place for configs and tokenizers.
    `naming` is the tensors', ``"ldm"`` or ``"diffusers"``. With `names_components`, every name begins with
    its component; without, a U-Net that is all there is may stand under its bare names.
    """

    title: ClassVar[str]
    ending: ClassVar[str]
    is_default_of: ClassVar[str] = ""
    has_configs: ClassVar[bool] = False
    names_components: ClassVar[bool] = False

    naming: str

    def __init__(self, wish: Wish, configs: CheckpointLike | None = None) -> None:
        self.path = wish.path
        self.configs = configs
        self.naming = self.naming_of(wish)

    @classmethod
    @abstractmethod
    def takes(cls, wish: Wish) -> bool:
        """Whether an output of that name is of this kind."""

    @abstractmethod
    def naming_of(self, wish: Wish) -> str:
        """The naming of the tensors. Raises OutputError for one that this kind cannot have."""

    @abstractmethod
    def lay_out(self, tensors: Sequence[Tensor], models: Sequence[Model], anatomy: Anatomy) -> Layout[Tensor]:
        """Distribute the tensors, and make what lies beside them.

        Raises IncompatibleModelsError when this kind cannot hold such a model, CheckpointError when small
        files cannot be read.
        """

    @abstractmethod
    def check(self, inputs: Iterable[Path], *, overwrite: bool = False) -> Path:
        """Return where the output will really lie, for files and folders that are read.

        Raises OutputError when it may not be written there, or must not be replaced.
        """

    @abstractmethod
    def reserve(
        self, target: Path, files: Mapping[str, int | bytes], *, overwrite: bool = False
    ) -> Reservation:
        """Reserve space at what `check` returned, for {path within the output: size, or whole contents}."""


class FolderOutput(Output):
    """What all outputs that are folders have in common."""

    ending = ""

    def check(self, inputs: Iterable[Path], *, overwrite: bool = False) -> Path:
        """As `check_output_folder` does."""
        return check_output_folder(self.path, inputs, overwrite=overwrite)

    def reserve(
        self, target: Path, files: Mapping[str, int | bytes], *, overwrite: bool = False
    ) -> AtomicFolder:
        """Reserve all files of the folder."""
        return AtomicFolder(target, files, overwrite=overwrite)
