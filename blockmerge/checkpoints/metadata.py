"""What in a file's metadata misleads the programs that read it, or tells more than its maker would have
published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from blockmerge.anatomy import FAMILIES

_JSON_KEYS = ("sd_merge_recipe", "sd_merge_models", "blockmerge.recipe")

_LOCAL_PATH = re.compile(
    r"(?<![A-Za-z0-9])[A-Za-z]:[\\/]+\w"  # C:\models; https:// has letters before its last one
    r"|(?:^|(?<=[\s\"'=:,;(\[])|(?<=file://))"
    r"/(?:home|Users|root|mnt|media|Volumes|content|workspace|kaggle|notebooks|tmp|var|opt|srv|data|storage)/\w"
    r"|(?:^|(?<=[\s\"'=]))\\{2,4}\w[\w.-]*\\{1,2}\w"  # \\server\share
)


def faulty_metadata(metadata: Mapping[str, str], family: str | None) -> dict[str, list[str]]:
    """Return the keys to leave out, by what is wrong with them.

    ``"architecture"``: it names another family than the tensors are of; ``"json"``: should be JSON and is
    not; ``"paths"``: holds the path of a folder on the computer that wrote the file. What is not wrong at all
    is not in the result.
    """
    expected = FAMILIES[family].architecture if family is not None else None
    claimed = metadata.get("modelspec.architecture")
    found = {
        "architecture": ["modelspec.architecture"]
        if expected and claimed and not claimed.startswith(expected)
        else [],
        "json": [key for key in _JSON_KEYS if key in metadata and not _is_json(metadata[key])],
        "paths": [key for key, value in metadata.items() if _LOCAL_PATH.search(value)],
    }
    return {fault: keys for fault, keys in found.items() if keys}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
