"""What is wrong with a file's metadata and with where its data lies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from blockmerge.anatomy import FAMILIES
from blockmerge.checkpoints import SafetensorsFile, faulty_metadata
from blockmerge.dtypes import itemsize
from blockmerge.errors import counted, listing, shown
from blockmerge.inspecting.problems import Problem

_ALIGNMENT = 8


def check_metadata(metadata: Mapping[str, str], family: str | None) -> Iterator[Problem]:
    """Look for what other programs stumble over, and for what its maker would not have published."""
    faults = faulty_metadata(metadata, family)
    if "architecture" in faults and family is not None:
        yield Problem.of(
            "metadata_architecture",
            f"modelspec.architecture says '{shown(metadata['modelspec.architecture'])}', but the tensors are "
            f"those of {FAMILIES[family].architecture}: programs that believe it load the model wrongly",
        )
    if broken := faults.get("json"):
        yield Problem.of("metadata_json", f"{listing(broken)} should be JSON and cannot be read as that")
    if leaking := faults.get("paths"):
        yield Problem.of(
            "metadata_paths",
            f"{len(leaking)} of the metadata's entries name folders "
            f"of the computer that wrote the file ({listing(leaking)})",
        )


def check_file(file: SafetensorsFile) -> Iterator[Problem]:
    """Look at what the header says of the file itself."""
    askew = [name for name, info in file.tensors.items() if info.offset % (itemsize(info.dtype) or 1)]
    if askew or file.data_start % _ALIGNMENT:
        where = f"the data begins at byte {file.data_start}"
        if askew:
            what = f"{counted(len(askew), 'tensor')} lie at offsets unfit for their dtype ({where})"
        else:
            what = f"{where}, which is not a multiple of {_ALIGNMENT}"
        yield Problem.of("unaligned_data", f"{what}: some readers are slow on that", askew)
    if "format" not in file.metadata:
        yield Problem.of(
            "no_format",
            'the metadata has no "format": transformers 4 refuses such files as parts of a diffusers folder',
        )
