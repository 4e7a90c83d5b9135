"""Reports: JSON with the promised keys, CSV, tables at a fixed width, and HTML pages read back in a real
browser.
"""

from __future__ import annotations

import csv
import html.parser
import io
import json
import re
import shutil

import pytest
from rich.console import Console
from safetensors.torch import load_file

import blockmerge
from blockmerge.checkpoints import StateDict
from blockmerge.cli.main import run
from blockmerge.rendering.comparison import print_explanation, print_matrix, print_similarity
from blockmerge.rendering.csv_text import explanation_csv, matrix_csv, similarity_csv
from blockmerge.rendering.html_page import explanation_html, matrix_html, similarity_html
from blockmerge.rendering.json_text import explanation_json, matrix_json, similarity_json
from tests.browser import CHROMIUM, Browser

HOSTILE = "<script>alert(1)</script>.safetensors"


@pytest.fixture(scope="module")
def models(pairs, tmp_path_factory):
    """A folder with a, b and their high_res merge; and b as a state dict, to be given a hostile name."""
    folder = tmp_path_factory.mktemp("models")
    for path in pairs():
        shutil.copy(path, folder)
    blockmerge.merge(*pairs(), preset="high_res", output=folder / "m.safetensors")
    return folder, load_file(pairs()[1])


def hostile_checkpoint(state):
    # Not a file, since "/" cannot be part of a file's name (though "</script>" can be of a folder and a
    # file).
    return StateDict(state, HOSTILE)


def similarity_of(models, method="attention", **options):
    folder, state = models
    references = [folder / "a.safetensors", hostile_checkpoint(state), folder / "nope.safetensors"]
    return blockmerge.similarity(folder / "m.safetensors", references, method, **options)


def explanation_of(models, **options):
    folder, state = models
    return blockmerge.explain(
        folder / "m.safetensors", [folder / "a.safetensors", hostile_checkpoint(state)], **options
    )


def drawn(draw, width=100, **options):
    out = io.StringIO()
    draw(Console(file=out, width=width, markup=False, highlight=False, emoji=False, **options))
    return out.getvalue()


def test_json_of_attention(models):
    found = json.loads(similarity_json(similarity_of(models)))
    assert (found["method"], found["seed"], found["base"]["name"]) == ("attention", 114514, "m.safetensors")
    assert re.fullmatch("[0-9a-f]{8}", found["base"]["hash"])
    best, second, failed = found["references"]
    assert {"name", "hash", "similarity", "parts", "error"} <= best.keys()
    assert list(best["parts"]) == [f"OUT{n:02}" for n in range(3, 11)]
    assert best["similarity"] == pytest.approx(sum(best["parts"].values()) / 8)
    assert (second["name"], second["hash"]) == (HOSTILE, None)
    assert (failed["similarity"], failed["parts"]) == (None, {})
    assert "no such file" in failed["error"]


def test_json_of_weights(models):
    found = json.loads(
        similarity_json(similarity_of(models, "weights", common_base=models[0] / "a.safetensors"))
    )
    assert (found["seed"], found["common_base"]) == (None, "a.safetensors")
    best = found["references"][0]
    for key in ("relative_difference", "max_difference", "difference_similarity"):
        assert best[f"{key}_parts"].keys() == best["parts"].keys()
        assert key in best
    assert set(best["components"]) == {"unet", "text_encoder", "vae"}


def test_json_of_a_matrix(models):
    found = json.loads(matrix_json(blockmerge.similarity_matrix(models[0])))
    assert found["names"] == ["a.safetensors", "b.safetensors", "m.safetensors"]
    assert len(found["similarity"]) == 3


def test_json_of_an_explanation(models):
    found = json.loads(explanation_json(explanation_of(models)))
    assert (found["merge"], found["base"], found["method"], found["preset"]) == (
        "m.safetensors",
        "a.safetensors",
        "weighted_sum",
        "high_res",
    )
    assert found["exact"] is True
    assert found["candidates"] == found["parents"] == ["a.safetensors", HOSTILE]
    assert found["blocks"]["IN04"]["weights"] == {HOSTILE: 0.67}
    assert {"weights", "uncertainty", "residual", "determined"} <= found["blocks"]["IN04"].keys()
    assert "tensors" not in found
    assert len(json.loads(explanation_json(explanation_of(models, tensors=True)))["tensors"]) > 1000


def test_csv(models):
    rows = list(csv.DictReader(io.StringIO(similarity_csv(similarity_of(models)))))
    assert [row["part"] for row in rows[:2]] == ["total", "OUT03"]
    assert float(rows[0]["similarity"]) == similarity_of(models).references[0].similarity
    weights = list(csv.DictReader(io.StringIO(similarity_csv(similarity_of(models, "weights")))))
    assert {"BASE", "IN04", "vae"} <= {row["part"] for row in weights}
    assert (
        matrix_csv(blockmerge.similarity_matrix(models[0])).splitlines()[0]
        == ",a.safetensors,b.safetensors,m.safetensors"
    )
    blocks = {
        row["name"]: row for row in csv.DictReader(io.StringIO(explanation_csv(explanation_of(models))))
    }
    assert blocks["IN04"][HOSTILE] == "0.67"


def test_a_name_that_is_a_formula_stays_a_name(models):
    state = models[1]
    report = blockmerge.similarity(state, [StateDict(state, "=cmd|' /C calc'!A0")])
    assert similarity_csv(report).splitlines()[1].startswith("\"'=cmd|") or similarity_csv(
        report
    ).splitlines()[1].startswith("'=cmd|")


def test_narrow_terminals_lose_nothing(models):
    """Every number that a wide terminal shows is there in a narrow one, whole."""
    folder, state = models
    many = [StateDict(state, f"a model with a rather long name {number}.safetensors") for number in range(8)]
    weights, attention = (
        blockmerge.similarity(folder / "m.safetensors", many, "weights"),
        similarity_of(models),
    )
    explanation, matrix = explanation_of(models), blockmerge.similarity_matrix(many, "weights")
    pictures = (
        lambda console: print_similarity(console, weights, blocks=True),
        lambda console: print_similarity(console, attention, blocks=True),
        lambda console: print_explanation(console, explanation),
        lambda console: print_matrix(console, matrix),
    )
    for picture in pictures:
        words = sorted(re.findall(r"[0-9]+\.[0-9]+%?|IN04|OUT04", drawn(picture, 400)))
        assert len(words) > 3
        for width in (40, 60, 100):
            assert sorted(re.findall(r"[0-9]+\.[0-9]+%?|IN04|OUT04", drawn(picture, width))) == words, width


def test_the_heat_map_has_colours_only_where_a_terminal_has_them(models):
    report = similarity_of(models)
    plain = drawn(lambda console: print_similarity(console, report, blocks=True))
    coloured = drawn(
        lambda console: print_similarity(console, report, blocks=True),
        force_terminal=True,
        color_system="truecolor",
    )
    assert "\x1b[" not in plain
    assert "48;2;" in coloured


def test_the_command_writes_what_its_ending_says(models, tmp_path, capsys):
    folder, _ = models
    for ending, begins in (
        ("html", "<!DOCTYPE html>"),
        ("json", "{"),
        ("csv", "reference,"),
        ("txt", "base  "),
    ):
        target = tmp_path / f"report.{ending}"
        assert (
            run(
                [
                    "similarity",
                    str(folder / "m.safetensors"),
                    str(folder / "a.safetensors"),
                    "-o",
                    str(target),
                ]
            )
            == 0
        )
        out, err = capsys.readouterr()
        assert (out, err) == ("", f"wrote {target}\n")
        assert target.read_text().startswith(begins)
    assert (
        run(["similarity", str(folder / "m.safetensors"), str(folder), "-o", str(tmp_path / "report.html")])
        == 1
    )
    assert "exists" in capsys.readouterr().err
    assert (
        run(
            [
                "explain",
                str(folder / "m.safetensors"),
                str(folder),
                "-o",
                str(tmp_path / "report.html"),
                "--overwrite",
            ]
        )
        == 0
    )
    assert "high_res" in (tmp_path / "report.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"report.{e}" for e in ("csv", "html", "json", "txt")
    ]


PAGES = {
    "attention": lambda models: similarity_html(similarity_of(models)),
    "weights": lambda models: similarity_html(
        similarity_of(models, "weights", common_base=models[0] / "a.safetensors")
    ),
    "matrix": lambda models: matrix_html(
        blockmerge.similarity_matrix([models[0] / "a.safetensors", hostile_checkpoint(models[1])])
    ),
    "explain": lambda models: explanation_html(explanation_of(models)),
}


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_self_contained_and_harmless(models, page):
    text = PAGES[page](models)
    assert "<script" not in text.lower()
    assert "&lt;script&gt;alert(1)" in text
    assert not re.search(r"(src|href|@import|url\()\s*=?", text)

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert tag != "script"
            assert not any(name.startswith("on") for name, _ in attributes)

    Reader().feed(text)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize("page", PAGES)
def test_pages_in_a_browser(models, tmp_path, page, browser):
    """What the browser made of the page, after layout: the figures are there, and nothing ran."""
    (tmp_path / "page.html").write_text(PAGES[page](models), encoding="utf-8")
    browser.set(1280)
    browser.open(tmp_path / "page.html")
    assert browser.ask("document.querySelectorAll('script').length") == 0
    assert HOSTILE in browser.ask("document.body.innerText")
    rows = browser.ask(
        "[...document.querySelectorAll('tr')].map(a => [...a.cells].map(b => b.innerText.trim()))"
    )
    of = {row[0]: row[1:] for row in rows}
    if page == "attention":
        for number, one in enumerate(similarity_of(models).references[:2]):
            assert of[f"{number + 1} {one.name}"] == [
                one.hash or "",
                f"{one.similarity:.2f}",
            ]
            assert of["OUT07"][number] == f"{one.parts['OUT07']:.2f}"
        assert "no such file" in of["nope.safetensors"][-1]
    elif page == "weights":
        (first, *_) = similarity_of(models, "weights", common_base=models[0] / "a.safetensors").references
        assert of[f"1 {first.name}"][1] == f"{first.total.cosine:.6f}"
        assert of["IN04"][0] == f"{first.blocks['IN04'].cosine:.6f}"
    elif page == "matrix":
        ((_, value), _) = blockmerge.similarity_matrix(
            [models[0] / "a.safetensors", hostile_checkpoint(models[1])]
        ).similarity
        assert [row[1:] for row in rows[-2:]] == [["100", f"{value:.2f}"], [f"{value:.2f}", "100"]]
    else:
        assert of["IN04"][0] == "0.67"
        (bar,) = browser.ask(
            "[...document.querySelectorAll('.weight')].filter(a => a.innerText.startsWith('IN04'))"
            ".map(a => ['.bar', '.track'].map(b => a.querySelector(b).getBoundingClientRect().width))"
        )
        assert bar[0] / bar[1] == pytest.approx(0.67, abs=0.005)
