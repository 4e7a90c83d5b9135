"""Makes the pictures in docs/pictures anew, from thin models that it makes itself: `make pictures`.

What the terminal shows is written as SVG by rich; reports are photographed in a Chromium without a window.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import torch
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge.demo import make_state_dicts, write_pair
from blockmerge.rendering.html_page import explanation_html, matrix_html
from blockmerge.rendering.terminal import print_merge

PICTURES = Path(__file__).with_name("pictures")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# As rich has it, but without the fonts that a browser would fetch from elsewhere.
SVG = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)

StateDict = dict[str, torch.Tensor]


def main() -> None:
    """Write all pictures."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        picture_merge()
        picture_reports()


def picture_merge() -> None:
    """What a merge prints."""
    write_pair("a.safetensors", "b.safetensors")
    result = blockmerge.merge(
        "a.safetensors", "b.safetensors", preset="high_res", output="a+b-high_res.safetensors"
    )
    result = replace(result, output=Path(result.output.name))
    command = "blockmerge a.safetensors b.safetensors --preset high_res"
    draw("merge.svg", command, lambda console: print_merge(console, result))


def picture_reports() -> None:
    """Which of twenty fine-tunes are alike, and which of them a merge is made of."""
    base, _ = make_state_dicts()
    models = Path("models")
    models.mkdir()
    for seed, kind in enumerate(("photo", "anime", "pastel", "toon")):
        family = tuned(base, 0.1, seed)
        for number in range(1, 6):
            model = tuned(family, 0.02 + 0.01 * number, 10 * seed + number)
            save_file(
                {name: one.half() for name, one in model.items()}, models / f"{kind}_v{number}.safetensors"
            )
    photograph(matrix_html(blockmerge.similarity_matrix(models)), "matrix.png", height=1080)
    pair = models / "anime_v1.safetensors", models / "photo_v2.safetensors"
    blockmerge.merge(*pair, preset="high_res", output="merged.safetensors")
    save_file(
        load_file("merged.safetensors"), "mystery.safetensors"
    )  # without the recipe, which tells it all
    found = blockmerge.explain(
        "mystery.safetensors", sorted(models.glob("[!pt]*")) + sorted(models.glob("ph*"))
    )
    photograph(explanation_html(found), "explain.png", height=1010)


def tuned(model: StateDict, difference: float, seed: int) -> StateDict:
    """Return a model with noise of `difference` times the size of each weight."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: one + difference * one.std(correction=0) * torch.randn(one.shape, generator=generator)
        for name, one in model.items()
        if one.is_floating_point()
    }


def draw(name: str, title: str, show: Callable[[Console], None]) -> None:
    """Write what `show` prints as an SVG."""
    console = Console(record=True, width=80, file=StringIO(), markup=False, highlight=False)
    show(console)
    picture = console.export_svg(title=title, theme=MONOKAI, code_format=SVG, unique_id="terminal")
    (PICTURES / name).write_text(picture, encoding="utf-8")


def photograph(page: str, name: str, height: int, width: int = 1080) -> None:
    """Show an HTML page in a browser and write what is to be seen as a PNG."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("make pictures needs Chromium")
    Path("page.html").write_text(page, encoding="utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
    where = f"--window-size={width},{height}", f"--screenshot={PICTURES / name}"
    command = [browser, *options, *where, Path("page.html").resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)  # noqa: S603


if __name__ == "__main__":
    main()
