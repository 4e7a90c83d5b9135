"""The documentation can be read and used: short sentences, links that lead somewhere, commands that run."""

from __future__ import annotations

import re
from urllib.parse import unquote

import pytest

from tests.pages import PAGES, ROOT, Page, all_commands, help_texts, newest_changes, sentences, words

MOST_WORDS = 30
CHANGES = ROOT / "CHANGELOG.md"


def read(path):
    text = path.read_text(encoding="utf-8")
    return Page.of(newest_changes(text) if path == CHANGES else text)


def too_long(found):
    return "\n".join(f"  {count} words: {one}" for one in found if (count := words(one)) > MOST_WORDS)


@pytest.mark.parametrize("path", [*PAGES, CHANGES], ids=lambda path: path.name)
def test_no_sentence_is_long(path):
    long = too_long(read(path).sentences)
    assert not long, f"{path.relative_to(ROOT)} has sentences of more than {MOST_WORDS} words:\n{long}"


@pytest.mark.parametrize(
    ("path", "command"), [pytest.param(*one, id=" ".join(one[0])) for one in all_commands()]
)
def test_no_sentence_of_a_help_text_is_long(path, command):
    long = too_long(one for text in help_texts(command) for one in sentences(text))
    assert not long, (
        f"blockmerge {' '.join(path)} --help has sentences of more than {MOST_WORDS} words:\n{long}"
    )


def test_what_a_sentence_is():
    page = Page.of(
        "# Four words are here\n\n"
        "`a b c.safetensors` is 1.5 GB, e.g. [a link to it](x.md). *Read it!* (It is\nshort.) blockmerge – it = 2.\n\n"
        "```sh\nnot counted. Not at all.\n```\n\n"
        "- an item\n- another, see `a.b`\n\n| one | two three |\n| --- | --- |\n| x. Y | z |\n"
    )
    assert [words(one) for one in page.sentences] == [4, 9, 2, 3, 3, 2, 3, 1, 2, 1, 1, 1]


@pytest.mark.parametrize("path", [*PAGES, CHANGES], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    broken = []
    for link in Page.of(path.read_text(encoding="utf-8")).links:
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = unquote(link).partition("#")
        file = path.parent / target if target else path
        if not file.exists() or (anchor and anchor not in Page.of(file.read_text(encoding="utf-8")).anchors):
            broken.append(link)
    assert not broken, f"{path.relative_to(ROOT)} has links that lead nowhere: {broken}"


def test_pictures_are_made_by_the_project_and_shown():
    script, makefile = (ROOT / "docs" / "pictures.py").read_text(), (ROOT / "Makefile").read_text()
    assert "docs/pictures.py" in makefile
    for picture in (ROOT / "docs" / "pictures").iterdir():
        assert f'"{picture.name}"' in script, f"{picture.name} is not written by docs/pictures.py"
        shown = [page for page in PAGES if f"pictures/{picture.name})" in page.read_text(encoding="utf-8")]
        assert shown, f"no page shows {picture.name}"
        if picture.suffix == ".svg":
            assert "url(http" not in picture.read_text(encoding="utf-8")
