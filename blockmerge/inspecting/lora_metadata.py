"""What people look for in a LoRA's metadata: words that trigger it, the model it is for, who made it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

TRIGGER_WORDS = "trigger_words"

_TAGS = "ss_tag_frequency"
_MOST_TAGS = 20
_LOOKED_FOR = (
    "modelspec.title",
    "modelspec.author",
    "modelspec.trigger_phrase",
    "modelspec.usage_hint",
    "modelspec.description",
    "modelspec.license",
    "modelspec.date",
    "modelspec.architecture",
    "modelspec.resolution",
    "modelspec.merged_from",
    "ss_output_name",
    "ss_base_model_version",
    "ss_sd_model_name",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_resolution",
    "ss_clip_skip",
    "ss_num_train_images",
    "ss_steps",
    "ss_training_comment",
)
"""The keys that count, in the order in which they are shown; trainers write a hundred."""


def looked_for(metadata: Mapping[str, str]) -> tuple[dict[str, Any], str | None]:
    """Return what people look for first, under its own keys, and what is wrong with it.

    >>> looked_for({"ss_tag_frequency": '{"10_cat": {"cat": 30, "sofa": 4}}', "ss_epoch": "3"})
    ({'trigger_words': {'cat': 30, 'sofa': 4}}, None)

    ``"trigger_words"`` are the most frequent tags of what it was trained on: {tag: how often}. The empty
    values that trainers write, ``""`` and ``"None"``, are left out.
    """
    found: dict[str, Any] = {}
    fault = None
    if _TAGS in metadata:
        tags = _tags(metadata[_TAGS])
        if tags is None:
            fault = f"{_TAGS} in its metadata cannot be read: it is not a JSON object of tags"
        elif tags:
            found[TRIGGER_WORDS] = tags
    found.update((key, metadata[key]) for key in _LOOKED_FOR if metadata.get(key) not in (None, "", "None"))
    return found, fault


def _tags(text: str) -> dict[str, int] | None:
    """{tag: how often} of the most frequent, from {folder: {tag: how often}}; None where it is not that."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or not all(isinstance(tags, dict) for tags in said.values()):
        return None
    counts: Counter[str] = Counter()
    for tags in said.values():
        for tag, count in tags.items():
            if isinstance(count, bool) or not isinstance(count, (int, float)) or not abs(count) < 1e15:
                return None
            counts[tag.strip()] += int(count)
    return dict(counts.most_common(_MOST_TAGS))
