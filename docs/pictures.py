"""Makes the pictures in docs/pictures anew, from thin models that it makes itself: `make pictures`.

What the terminal shows is written as SVG by rich; the report is photographed in a Chromium without a window.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from io import StringIO
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI

import blockmerge
from blockmerge.demo import write_pair
from blockmerge.rendering.html_page import explanation_html
from blockmerge.rendering.terminal import print_merge

PICTURES = Path(__file__).with_name("pictures")

# As rich has it, but without the fonts that a browser would fetch from elsewhere.
SVG = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


def main() -> None:
    """Write all pictures."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_pair(Path("a.safetensors"), Path("b.safetensors"), "sd1")
        write_pair(Path("other.safetensors"), Path("c.safetensors"), "sd1", seed=1)
        merged = blockmerge.merge(
            "a.safetensors", "b.safetensors", preset="high_res", output="merged.safetensors"
        )
        merged = replace(merged, output=Path("merged.safetensors"))
        console = Console(record=True, width=80, file=StringIO(), markup=False, highlight=False)
        print_merge(console, merged)
        command = "blockmerge a.safetensors b.safetensors --preset high_res"
        console.save_svg(
            str(PICTURES / "merge.svg"), title=command, theme=MONOKAI, code_format=SVG, unique_id="m"
        )
        found = blockmerge.explain("merged.safetensors", ["a.safetensors", "b.safetensors", "c.safetensors"])
        photograph(explanation_html(found), PICTURES / "report.png", height=900)


def photograph(page: str, picture: Path, height: int, width: int = 1000) -> None:
    """Show an HTML page in a browser and write what is to be seen as a PNG."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("make pictures needs Chromium")
    Path("page.html").write_text(page, encoding="utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
    size = f"--window-size={width},{height}"
    command = [browser, *options, size, f"--screenshot={picture}", Path("page.html").resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)  # noqa: S603


if __name__ == "__main__":
    main()
