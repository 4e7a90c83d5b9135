"""Results of comparisons as reports may have to show them, made up: of any size, without a model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from blockmerge.anatomy import FAMILIES
from blockmerge.comparing import Comparison, Differences, SimilarityMatrix, SimilarityResult
from blockmerge.explaining import Explanation
from blockmerge.explaining.explanation import BlockOrigin

BLOCKS = FAMILIES["sd1"].blocks
ROWS = ("BASE", "IN", *(f"D{n:02}" for n in range(19)), *(f"S{n:02}" for n in range(38)), "OUT")
WORDS = ("anime", "photo", "toon", "pastel", "realDream", "velvetAurora", "ink", "UltraPortraitMix")
ENDS = ("", "-final", "-inpainting-merged-by-somebody-with-patience")


def rowed():
    """A family whose blocks have no arms."""
    return replace(
        FAMILIES["sd1"], name="rowed", title="Toy Rows", called="Rows", blocks=ROWS, arms=None, carried={}
    )


def names_of(count):
    return tuple(
        f"sd15_{WORDS[n % len(WORDS)]}_v{n + 1}{ENDS[n % len(ENDS)]}-fp16.safetensors" for n in range(count)
    )


def a_matrix(count, method="attention", families=4):
    """Models of a few families, in no order: those of one are the most alike. The last but one of many is
    none.
    """
    numbers = np.random.default_rng(count)
    where = numbers.normal(size=(families, 8))[np.arange(count) % families]
    where = where + 0.1 * numbers.normal(size=(count, 8))
    apart = np.linalg.norm(where[:, None] - where[None], axis=2)
    alike = 100 - 8 * apart if method == "attention" else 1 - 0.01 * apart
    rows = ((alike + alike.T) / 2).tolist()
    names, errors = names_of(count), {}
    if count > 4:
        bad = count - 2
        errors[names[bad]] = f"{names[bad]} is a LoRA, and not a model"
        for n in range(count):
            rows[bad][n] = rows[n][bad] = None
    return SimilarityMatrix(
        method, 114514 if method == "attention" else None, names, tuple(map(tuple, rows)), errors
    )


def a_similarity(count, method="attention", blocks=BLOCKS, *, common_base=None):
    """References of which each is a little less like the base; differences that point both ways."""
    numbers = np.random.default_rng(count)

    def differences(cosine, n):
        return Differences(
            cosine, (2 * (1 - cosine)) ** 0.5, 0.0123 * n, -1.0 + 2.0 * (n % 5) / 4 if common_base else None
        )

    references = []
    for n, name in enumerate(names_of(count)):
        level, walk = 1 - 0.001 * n, 1e-4 * numbers.random(len(blocks))
        cosines = dict(zip(blocks, (level - walk).tolist(), strict=True))
        if method == "attention":
            parts = {block: 100 * cosine for block, cosine in cosines.items()}
            references.append(Comparison(name, f"{n:08x}", 100 * level, parts))
            continue
        of_blocks = {block: differences(cosine, n) for block, cosine in cosines.items()}
        components = {"unet": differences(level, n), "vae": differences(1.0, n)}
        references.append(
            Comparison(name, f"{n:08x}", level, cosines, differences(level, n), of_blocks, components)
        )
    references.append(Comparison("a_base.safetensors", error="a_base.safetensors is SDXL, but mine is SD1"))
    return SimilarityResult(
        method, None, "mine.safetensors", "abcdef12", "sd1", tuple(references), common_base,
        notes=("the VAE is not compared",),
    )  # fmt: skip


def an_explanation(others=1, blocks=BLOCKS, family="sd1", *, lowest=0.0, is_merge=True):
    """A merge of `others` + 1 of seven candidates, with weights from `lowest` to 1; two more were not used."""
    names = names_of(9)
    parents = names[: others + 1]
    origins = {}
    for place, block in enumerate(blocks):
        share = place / (len(blocks) - 1)
        weights = dict.fromkeys(parents[1:], lowest + (1 - lowest) * share)
        known = place != 3
        origins[block] = BlockOrigin(
            weights if known else dict.fromkeys(weights), 0.0004, 0.00012, known, place != 5
        )
    method = {1: "weighted_sum", 2: "triple_sum"}.get(others, "linear")
    return Explanation(
        merge="my_merge-of.many things_v2.safetensors",
        family=family,
        candidates=names[:7],
        base=names[0],
        method=method if is_merge else None,
        exact=is_merge,
        preset=None,
        parents=parents if is_merge else (),
        blocks=origins,
        components={"vae": BlockOrigin(dict.fromkeys(parents[1:], 0.0), 0.001, 0.0, True, True)},
        verdict=f"my_merge-of.many things_v2.safetensors is a merge of {', '.join(parents)}.",
        notes=("the text encoder is not from these",),
        left_out={names[8]: f"{names[8]} is SDXL"},
        screened=(names[7],),
        differences={name: 0.01 * n for n, name in enumerate(names[:7], 1)},
    )
