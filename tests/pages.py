"""The documentation's pages, read with a Markdown parser: their sentences, links, headings and commands."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from pathlib import Path

import click
from markdown_it import MarkdownIt

from blockmerge.cli.main import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELLS = ("sh", "bash", "console")

_MARKDOWN = MarkdownIt("commonmark").enable("table")
_RUNS = re.compile(r"blockmerge .*\w\.(safetensors|ckpt|toml|json)\b|(make|python|pytest) .*")
_SHORT = r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)(?<!\bcf)"
_END = re.compile(rf"{_SHORT}[.!?][\"')\]”]*\s+|\n")


@dataclass(frozen=True)
class Page:
    """A page's texts: paragraphs, list items, headings and table cells, with inline code as one word."""

    texts: list[str]
    links: list[str]
    anchors: set[str]
    code: list[str]
    """Inline code."""
    commands: list[str]
    """Lines of shell blocks, and inline code that names a file, in their order."""

    @classmethod
    def of(cls, text):
        page = cls([], [], set(), [], [])
        tokens = _MARKDOWN.parse(text)
        for before, token in zip([None, *tokens], tokens, strict=False):
            if token.type == "fence" and token.info in SHELLS:
                page.commands.extend(_lines(token.content))
            elif token.type == "inline":
                page.texts.append("".join(map(_plain, token.children)))
                page.links.extend(one.attrGet("href") for one in token.children if one.type == "link_open")
                code = [one.content for one in token.children if one.type == "code_inline"]
                page.code.extend(code)
                page.commands.extend(one for one in code if _RUNS.match(one))
                if before.type == "heading_open":
                    page.anchors.add(_anchor(token.children))
        return page

    @property
    def sentences(self):
        return [one for text in self.texts for one in sentences(text)]


def _lines(text):
    """The commands of a shell block, with continued lines joined."""
    lines = (line.strip().removeprefix("$ ") for line in text.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _plain(token):
    match token.type:
        case "code_inline":
            return "`" + re.sub(r"\s", "·", token.content.strip()).replace(".", "·") + "`"
        case "softbreak":
            return " "
        case "hardbreak":
            return "\n"
        case _:
            return token.content


def _anchor(children):
    """What GitHub makes of a heading: small letters, no punctuation, hyphens for spaces."""
    text = "".join(child.content for child in children)
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


def sentences(text):
    """Split at ends of sentences and of lines."""
    return [one for one in _END.split(text) if one.strip()]


def words(sentence):
    """How many words a sentence has: what has a letter or a digit in it."""
    return sum(any(map(str.isalnum, word)) for word in sentence.split())


def newest_changes(text):
    """The changelog's section that is written at present."""
    return "## " + text.split("\n## ")[1]


def all_commands(group=cli, path=()):
    """Yield every command with the words that call it."""
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from all_commands(command, (*path, name))


def help_texts(command):
    """What a command says of itself and its options, without its examples."""
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if not paragraph.startswith("\b"):
            yield paragraph.replace("\n", " ")
    yield from (one.help for one in command.params if isinstance(one, click.Option) and one.help)


def help_examples(command):
    """The commands that a command's help gives as examples."""
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("\b"):
            yield from (line.strip() for line in paragraph.splitlines()[1:])
