"""What is wrong with a file's metadata and with where its data lies."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

from blockmerge.checkpoints import SafetensorsFile, itemsize
from blockmerge.errors import counted, listing, shown
from blockmerge.inspecting.problems import Problem

_ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2", "sdxl": "stable-diffusion-xl-v1"}
"""How the names of ModelSpec's architectures begin (https://github.com/Stability-AI/ModelSpec)."""

_JSON_KEYS = ("sd_merge_recipe", "sd_merge_models", "blockmerge.recipe")

_LOCAL_PATH = re.compile(
    r"(?<![A-Za-z0-9])[A-Za-z]:[\\/]+\w"  # C:\models; https:// has letters before its last one
    r"|(?:^|(?<=[\s\"'=:,;(\[])|(?<=file://))"
    r"/(?:home|Users|root|mnt|media|Volumes|content|workspace|kaggle|notebooks|tmp|var|opt|srv|data|storage)/\w"
    r"|(?:^|(?<=[\s\"'=]))\\{2,4}\w[\w.-]*\\{1,2}\w"  # \\server\share
)
_ALIGNMENT = 8


def check_metadata(metadata: Mapping[str, str], family: str | None) -> Iterator[Problem]:
    """Look for what other programs stumble over, and for what its maker would not have published."""
    expected = _ARCHITECTURES.get(family or "")
    claimed = metadata.get("modelspec.architecture")
    if expected and claimed and not claimed.startswith(expected):
        yield Problem.of(
            "metadata_architecture",
            f"modelspec.architecture says '{shown(claimed)}', but the tensors are those of {expected}: programs that believe it "
            "load the model wrongly",
        )
    if broken := [key for key in _JSON_KEYS if key in metadata and not _is_json(metadata[key])]:
        yield Problem.of("metadata_json", f"{listing(broken)} should be JSON and cannot be read as that")
    if leaking := [key for key, value in metadata.items() if _LOCAL_PATH.search(value)]:
        yield Problem.of(
            "metadata_paths", f"{len(leaking)} of the metadata's entries "
            f"name folders of the computer that wrote the file ({listing(leaking)})"
        )  # fmt: skip


def check_file(file: SafetensorsFile) -> Iterator[Problem]:
    """Look at what the header says of the file itself."""
    askew = [name for name, info in file.tensors.items() if info.offset % (itemsize(info.dtype) or 1)]
    if askew or file.data_start % _ALIGNMENT:
        where = f"the data begins at byte {file.data_start}"
        yield Problem.of(
            "unaligned_data",
            f"{counted(len(askew), 'tensor')} lie at offsets unfit for their dtype ({where}): some readers are slow on that"
            if askew
            else f"{where}, which is no multiple of {_ALIGNMENT}: some readers are slow on that",
            askew,
        )
    if "format" not in file.metadata:
        yield Problem.of(
            "no_format", 'the metadata has no "format": transformers 4 refuses such files as parts of a diffusers folder'
        )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
