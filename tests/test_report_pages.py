"""HTML reports as a real browser lays them out: wide and narrow, light and dark, and on paper."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from blockmerge.anatomy import register, unregister
from blockmerge.comparing import SimilarityMatrix
from blockmerge.rendering.html_page import explanation_html, matrix_html, similarity_html
from tests.browser import CHROMIUM, Browser
from tests.report_results import ROWS, a_matrix, a_similarity, an_explanation, names_of, rowed

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

PAGES = {
    "matrix of 2": lambda: matrix_html(a_matrix(2)),
    "matrix of 20": lambda: matrix_html(a_matrix(20, "weights")),
    "matrix of 60": lambda: matrix_html(a_matrix(60)),
    "similarity": lambda: similarity_html(a_similarity(4)),
    "similarity of 20": lambda: similarity_html(a_similarity(20, "weights", common_base="c.safetensors")),
    "similarity by 60 blocks": lambda: similarity_html(a_similarity(3, "weights", ROWS)),
    "explanation": lambda: explanation_html(an_explanation()),
    "explanation of four": lambda: explanation_html(an_explanation(3, lowest=-1.0)),
    "explanation by 60 blocks": lambda: explanation_html(an_explanation(1, ROWS, "rowed", lowest=-0.5)),
    "no explanation": lambda: explanation_html(an_explanation(is_merge=False)),
}
SCREENS = [(1280, False), (1280, True), (400, False), (400, True)]
PAPER = 960  # pixels between the margins of Letter on its side, which is narrower than A4


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The files of all pages."""
    folder = tmp_path_factory.mktemp("pages")
    register(rowed())
    try:
        for name, page in PAGES.items():
            (folder / f"{name}.html").write_text(page(), encoding="utf-8")
    finally:
        unregister("rowed")
    return folder


CUT_OFF = """(() => {
  const found = [], slack = 1.5;
  const inside = (a, b) => a.left >= b.left - slack && a.right <= b.right + slack
    && a.top >= b.top - slack && a.bottom <= b.bottom + slack;
  const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (words.nextNode()) {
    const text = words.currentNode, range = document.createRange();
    if (!text.data.trim()) continue;
    range.selectNodeContents(text);
    const own = text.parentElement.closest('svg, th, td, li, p, h1, h2, .weight, footer');
    const around = own.getBoundingClientRect();
    for (const box of range.getClientRects())
      if (box.width && !inside(box, around)) found.push('out of its place: ' + text.data);
    for (let outer = own.parentElement; outer; outer = outer.parentElement) {
      const flow = getComputedStyle(outer).overflowX;
      if (['hidden', 'clip'].includes(flow) && outer.scrollWidth > outer.clientWidth)
        found.push('clipped: ' + text.data);
    }
  }
  const page = document.documentElement;
  if (page.scrollWidth > page.clientWidth) found.push('the page scrolls sideways: ' + page.scrollWidth);
  return found;
})()"""

OUT_OF_REACH = """(() => {
  const found = [];
  for (const table of document.querySelectorAll('.scroll table')) {
    const view = table.closest('.scroll');
    if (!view.clientWidth) continue;
    const [first, ...others] = table.tHead.rows[table.tHead.rows.length - 1].cells;
    for (const column of others) {
      view.scrollLeft = 0;
      view.scrollLeft = column.getBoundingClientRect().left - first.getBoundingClientRect().right;
      const [a, b, frame] = [first, column, view].map((one) => one.getBoundingClientRect());
      if (Math.abs(a.left - frame.left) > 1.5) found.push('the first column went away: ' + column.innerText);
      if (b.left < a.right - 1.5 || b.right > frame.right + 1.5) found.push(column.innerText || column.title);
    }
    view.scrollLeft = 0;
  }
  return found;
})()"""

BROKEN_NAMES = """[...document.querySelectorAll('.heats tbody th')].filter((name) =>
  name.offsetHeight > 2.5 * parseFloat(getComputedStyle(name).fontSize)).map((name) => name.innerText)"""

FAINT = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true}), known = {};
  canvas.canvas.width = canvas.canvas.height = 1;
  const light = (colour) => known[colour] ??= (() => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [red, green, blue, alpha] = canvas.getImageData(0, 0, 1, 1).data;
    const part = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    return alpha < 255 ? null : 0.2126 * part(red) + 0.7152 * part(green) + 0.0722 * part(blue);
  })();
  let worst = [99, ''];
  const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (words.nextNode()) {
    const text = words.currentNode, parent = text.parentElement;
    if (!text.data.trim() || parent.tagName === 'title') continue;
    const style = getComputedStyle(parent);
    let ground = null;
    for (let one = parent; one && ground === null; one = one.parentElement)
      ground = light(getComputedStyle(one).backgroundColor);
    const [low, high] = [light(parent.closest('svg') ? style.fill : style.color), ground].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < worst[0]) worst = [contrast, text.data];
  }
  return worst;
})()"""


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_cut_off_and_every_column_can_be_reached(browser, pages, page):
    browser.set(*SCREENS[0][:1])
    browser.open(pages / f"{page}.html")
    for width, dark in SCREENS:
        browser.set(width, dark=dark)
        assert browser.ask("matchMedia('(prefers-color-scheme: dark)').matches") is dark
        assert browser.ask(CUT_OFF) == [], width
        assert browser.ask(OUT_OF_REACH) == [], width
        if width == 1280:
            assert browser.ask(BROKEN_NAMES) == []
        contrast, text = browser.ask(FAINT)
        assert contrast >= 4.5, (text, width, dark)  # WCAG 2.2, 1.4.3 (AA)


@pytest.mark.parametrize("page", PAGES)
def test_all_of_a_page_is_on_paper(browser, pages, page):
    """Without what scrolls on a screen, and in letters that can be read, whatever colours the user prefers."""
    browser.set(PAPER, media="print", dark=True)
    browser.open(pages / f"{page}.html")
    assert browser.ask(CUT_OFF) == []
    assert (
        browser.ask(
            "[...document.querySelectorAll('.scroll')].filter(a => a.scrollWidth > a.clientWidth + 1).length"
        )
        == 0
    )
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    sizes = "[...document.querySelectorAll('td, th, li, p')].filter(a => a.offsetWidth && a.innerText.trim())"
    assert browser.ask(f"Math.min(...{sizes}.map(a => parseFloat(getComputedStyle(a).fontSize)))") > 7
    assert browser.ask(FAINT)[0] >= 4.5


@pytest.mark.parametrize(("page", "most"), [("matrix of 2", 1), ("matrix of 20", 2), ("matrix of 60", 6)])
def test_pages_of_paper(browser, pages, page, most):
    """A matrix of 20 is on one page, and one of 60 on four; the list of the models is on its own."""
    browser.open(pages / f"{page}.html")
    paper = browser.paper()
    assert len(re.findall(rb"/Type /Page\b", paper)) <= most
    for width, height in re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", paper):
        assert float(width) > float(height)


CELLS = """[...document.querySelectorAll('#matrix tbody tr')].map((row) => {
  const columns = [...document.querySelectorAll('#matrix .names-row th')];
  return [...row.cells].slice(1).map((cell, n) => [row.cells[0].title, columns[n + 1].title, cell.innerText]);
}).flat()"""


@pytest.mark.parametrize("count", [2, 20, 60])
def test_every_number_is_where_its_names_are(browser, tmp_path, count):
    result = a_matrix(count)
    (tmp_path / "page.html").write_text(matrix_html(result), encoding="utf-8")
    browser.set(1280)
    browser.open(tmp_path / "page.html")
    place = {name: number for number, name in enumerate(result.names)}
    cells = browser.ask(CELLS)
    assert len(cells) == (count - len(result.errors)) ** 2
    for row, column, text in cells:
        value = result.similarity[place[row]][place[column]]
        assert float(text) == pytest.approx(value, abs=0.0501 if count > 8 else 0.00501)
    order = list(dict.fromkeys(row for row, _, _ in cells))
    listed = browser.ask("[...document.querySelectorAll('.models li')].map(a => a.innerText.split(' – ')[0])")
    assert listed == order
    families = [place[name] % 4 for name in order]
    assert len([1 for one, other in pairwise(families) if one != other]) < 4
    said = browser.ask("document.body.innerText")
    assert all(f"\n{why}\n" in said for why in result.errors.values())


def test_the_tree_meets_the_columns(browser, pages):
    """Each leaf ends above the middle of its column."""
    browser.set(1280)
    browser.open(pages / "matrix of 20.html")
    middles = browser.ask(
        "[...document.querySelectorAll('#matrix .names-row th')].slice(1)"
        ".map(a => a.getBoundingClientRect()).map(a => (a.left + a.right) / 2)"
    )
    leaves = browser.ask(
        "(() => { const svg = document.querySelector('#matrix .tree svg'), found = [];"
        "const box = svg.getBoundingClientRect(), wide = svg.viewBox.baseVal.width;"
        "for (const path of svg.querySelectorAll('path')) {"
        "  const [, x, y, across, down] = path.getAttribute('d').match(/M(\\S+) (\\S+)V\\S+H(\\S+)V(\\S+)/).map(Number);"
        "  for (const [a, b] of [[x, y], [across, down]]) if (b === 1) found.push(box.left + box.width * a / wide);"
        "} return found.sort((a, b) => a - b); })()"
    )
    assert leaves == pytest.approx(middles, abs=1)


def test_minus_1_has_a_bar(browser, pages):
    browser.set(1280)
    browser.open(pages / "explanation of four.html")
    bars = browser.ask(
        "[...document.querySelectorAll('.u .weight')].map(a => { const [track, bar] ="
        "[...a.querySelectorAll('.track, .bar')].map(b => b.getBoundingClientRect());"
        "return [a.querySelector('.figure').innerText,"
        "(bar.left - track.left) / track.width, (bar.right - track.left) / track.width]; })"
    )
    assert len(bars) == 3 * 26
    for text, begins, ends in bars:
        weight = 0.0 if text == "?" else float(text)
        expected = sorted([0.5, 0.5 + weight / 2])
        assert [begins, ends] == pytest.approx(expected, abs=0.01)
    assert {"-1", "1", "?"} <= {text for text, _, _ in bars}


def test_every_candidate_is_listed_with_what_was_found(browser, pages):
    browser.set(1280)
    browser.open(pages / "explanation.html")
    rows = browser.ask(
        "[...document.querySelectorAll('#candidates tbody tr')].map(a => [...a.cells].map(b => b.innerText.trim()))"
    )
    assert sorted(row[0] for row in rows) == sorted(names_of(9))
    found = {row[0]: row[1:] for row in rows}
    names = names_of(9)
    assert found[names[0]][0] == "parent, the base"
    assert found[names[1]][0] == "parent"
    shares = [n / 25 for n in range(1, 26) if n != 3]
    assert float(found[names[1]][1]) == pytest.approx(sum(shares) / len(shares), abs=1e-4)
    assert found[names[1]][2] == "0.04 to 1"
    assert found[names[0]][2] == "0 to 0.96"
    assert found[names[2]] == ["not needed", "–", "–", "3.000%"]
    assert found[names[7]][0].startswith("not looked at further")
    assert found[names[8]][0] == f"left out: {names[8]} is SDXL"


def test_the_curves_are_where_the_values_are(browser, pages):
    """Six curves with a legend, the others in grey; a bar for each block where there is one."""
    browser.set(1280)
    browser.open(pages / "similarity of 20.html")
    assert browser.ask("document.querySelectorAll('.chart path.curve').length") == 20
    assert (
        browser.ask("[...document.querySelectorAll('.legend li')].map(a => a.innerText.trim())")[-1]
        == "14 others"
    )
    assert browser.ask("document.querySelectorAll('.legend li').length") == 7
    assert browser.ask("document.querySelectorAll('.chart .point').length") == 6 * 26
    browser.open(pages / "explanation by 60 blocks.html")
    heights = browser.ask(
        "[...document.querySelectorAll('.chart .bars')].map(a => a.getBBox()).map(a => [a.y, a.y + a.height])"
    )
    assert len(heights) == len(ROWS) - 1
    (zero,) = browser.ask("[...document.querySelectorAll('.chart .zero')].map(a => a.getBBox().y)")
    top = heights[-1][0]
    weights = [-0.5 + 1.5 * n / 59 for n in range(60) if n != 3]
    for (upper, lower), weight in zip(heights, weights, strict=True):
        expected = sorted([zero, zero - weight * (zero - top)])
        assert [upper, lower] == pytest.approx(expected, abs=0.2)


def test_models_of_which_none_could_be_compared(browser, tmp_path):
    nothing = SimilarityMatrix("weights", None, ("a", "b"), ((None, None),) * 2, {"a": "no", "b": "no"})
    (tmp_path / "page.html").write_text(matrix_html(nothing), encoding="utf-8")
    browser.open(tmp_path / "page.html")
    assert browser.ask("document.querySelectorAll('table').length") == 0
    assert "b: no" in browser.ask("document.body.innerText")


def test_the_arms_of_the_u_keep_their_sides_where_blocks_are_missing(browser, tmp_path):
    """A file of few tensors: inputs on the left, outputs on the right, the outermost at the top."""
    blocks = ["BASE", "IN00", "IN04", "M00", "OUT03", "OUT07", "OUT09", "OUT11"]
    (tmp_path / "page.html").write_text(explanation_html(an_explanation(1, blocks)), encoding="utf-8")
    browser.set(1280)
    browser.open(tmp_path / "page.html")
    cells = browser.ask(
        "[...document.querySelectorAll('.u .weight')].map(a => [a.querySelector('b').innerText,"
        "a.getBoundingClientRect().left, a.getBoundingClientRect().top])"
    )
    at = {block: (left, top) for block, left, top in cells}
    assert at["IN00"][0] == at["IN04"][0] < at["OUT11"][0]
    assert len({at[block][0] for block in blocks[4:]}) == 1
    tops = [at[block][1] for block in ("OUT11", "OUT09", "OUT07", "OUT03", "M00")]
    assert tops == sorted(set(tops))
    assert at["IN00"][1] == tops[0]
