"""Writes docs/python.md from the docstrings of the public names: `make docs`."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import blockmerge
from blockmerge import errors

_HEAD = """# The Python API

Written by `make docs` from the docstrings. All names are those of `blockmerge`; `import blockmerge` loads no
torch.

Merge two files into a third:

```python
import blockmerge

result = blockmerge.merge("a.safetensors", "b.safetensors", preset="high_res", output="merged.safetensors")
print(result.tensors.computed, *result.notes, sep="\\n")
```

Merge what is in memory already, on a GPU or not:

```python
merged = blockmerge.merge_state_dicts(unet_a.state_dict(), unet_b.state_dict(), weights=0.5)
unet_a.load_state_dict(merged)
```

Find out what a file was made from:

```python
origin = blockmerge.explain("merged.safetensors", ["a.safetensors", "b.safetensors", "c.safetensors"])
print(origin.verdict)
```

[examples/](../examples/merge_from_python.py) has longer ones. Words such as block and LDM names are in the
[glossary](glossary.md).
"""

SUBJECTS = {
    "Merge": ["merge", "merge_state_dicts", "bake", "convert", "MergeResult"],
    "Recipes": ["Recipe", "Merge", "Plan", "again", "verify", "Verification"],
    "LoRAs": [
        "Lora", "merge_loras", "extract_lora", "resize_lora", "LoraResult", "convert_lora", "LoraConversion",
        "inspect_lora", "LoraInspection", "lora_similarity", "LoraSimilarity",
    ],
    "Compare": ["similarity", "SimilarityResult", "similarity_matrix", "SimilarityMatrix"],
    "Explain": ["explain", "Explanation"],
    "Inspect and check": ["inspect", "Inspection", "check", "CheckResult", "open_checkpoint", "Checkpoint"],
    "Merge live": ["LiveMerge"],
    "Weights and presets": ["BlockWeights", "load_preset", "preset_names", "list_presets", "PresetInfo"],
    "Methods": ["merge_method", "list_methods", "MethodInfo", "NumberInfo"],
    "Families and blocks": ["list_families", "FamilyInfo", "block_of"],
    "Kinds of arguments": [
        "CheckpointLike", "LoraLike", "WeightsLike", "RulesLike", "AdjustLike", "MethodLike", "PathLike",
        "DtypeLike", "Progress",
    ],
    "Errors": errors.__all__,
}  # fmt: skip
"""The headings of the page, and the public names under each."""

_PACKAGE = Path(blockmerge.__file__).parent
_WIDTH = 100
_INSIDE = {
    "Checkpoint.checksummed", "Checkpoint.reader", "Lora.as_it_is", "Lora.of", "Lora.open", "Recipe.computed",
    "Recipe.named", "Recipe.of",
}  # fmt: skip
"""Members without an underscore that other rooms use, and users do not."""


def reference() -> str:
    """Return the text of docs/python.md."""
    return _HEAD + "".join(f"\n## {subject}\n{''.join(_section(subject))}" for subject in SUBJECTS)


def _section(subject: str) -> Iterator[str]:
    if subject == "Errors":
        yield f"\n{_markdown(errors.__doc__)}\n"
    for name in SUBJECTS[subject]:
        yield f"\n### {name}\n"
        thing = getattr(blockmerge, name)
        if alias := _alias(name):
            definition, docstring = alias
            yield f"\n{_fence(f'{name} = {definition}')}\n\n{_markdown(docstring)}\n"
        elif subject == "Errors":
            yield f"\n{_markdown(thing.__doc__)}\n"
        else:
            yield f"\n{_fence(_call(name, thing))}\n\n{_markdown(thing.__doc__)}\n"
            yield from _members(thing) if isinstance(thing, type) else ()


def _members(owner: type) -> Iterator[str]:
    """The methods and properties of a class that are for users, in the order of its code."""
    for name, member in vars(owner).items():
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        is_public = not name.startswith("_") and f"{owner.__name__}.{name}" not in _INSIDE
        if is_public and inspect.isfunction(function) and function.__doc__:
            is_property = isinstance(member, property)
            said = f"{name}: {function.__annotations__['return']}" if is_property else _call(name, function)
            yield f"\n#### {owner.__name__}.{name}\n\n{_fence(said)}\n\n{_markdown(function.__doc__)}\n"


def _call(name: str, thing: Callable[..., Any] | type) -> str:
    """How a function is called, or a class made, as its source has it: the same on every system."""
    node = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    returns = ""
    if isinstance(node, ast.ClassDef):
        init = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
        parts = _parameters(init[0].args) if init else _fields(node)
    else:
        assert isinstance(node, ast.FunctionDef)
        parts = _parameters(node.args)
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{name}({', '.join(parts)}){returns}"
    if len(line) <= _WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"


def _parameters(arguments: ast.arguments) -> list[str]:
    positional = [one for one in (*arguments.posonlyargs, *arguments.args) if one.arg not in ("self", "cls")]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    parts = [_parameter(*pair) for pair in zip(positional, defaults, strict=True)]
    if arguments.vararg:
        parts.append(f"*{_parameter(arguments.vararg)}")
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += map(_parameter, arguments.kwonlyargs, arguments.kw_defaults)
    return parts + [f"**{_parameter(one)}" for one in [arguments.kwarg] if one]


def _fields(node: ast.ClassDef) -> list[str]:
    """A dataclass's fields; those of others say nothing to a user."""
    if not node.decorator_list:
        return []
    fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
    return [f"{ast.unparse(one.target)}: {ast.unparse(one.annotation)}" for one in fields]


def _parameter(one: ast.arg, default: ast.expr | None = None) -> str:
    said = one.arg if one.annotation is None else f"{one.arg}: {ast.unparse(one.annotation)}"
    return said if default is None else f"{said} = {ast.unparse(default)}".replace("'", '"')


@cache
def _aliases() -> dict[str, tuple[str, str]]:
    """{name: (what it stands for, its docstring)} of all names that stand for something else."""
    found = {}
    for path in _PACKAGE.rglob("*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        for one, after in itertools.pairwise(body):
            match one, after:
                case ast.Assign([ast.Name(name)], value), ast.Expr(ast.Constant(str(docstring))):
                    found[name] = ast.unparse(value).replace("'", ""), docstring
    return found


def _alias(name: str) -> tuple[str, str] | None:
    return _aliases().get(name)


def _fence(code: str) -> str:
    return f"```python\n{code}\n```"


def _markdown(docstring: str | None) -> str:
    """A docstring as Markdown: examples and drawings become blocks of code."""
    assert docstring is not None
    paragraphs = []
    for paragraph in re.split(r"\n\n(?! )", inspect.cleandoc(docstring).replace("::\n\n", "::\n")):
        if paragraph.startswith(">>>"):
            paragraphs.append(_fence("\n".join(_example(paragraph))))
        elif paragraph.startswith("::\n"):
            paragraphs.append(f"```text\n{inspect.cleandoc(paragraph.removeprefix('::'))}\n```")
        else:
            paragraphs.append(paragraph.replace("``", "`"))
    return "\n\n".join(paragraphs)


def _example(paragraph: str) -> Iterator[str]:
    """An example as code, with what it prints as comments."""
    for line in paragraph.splitlines():
        code = re.sub(r"\s*# doctest: \S+$", "", line)
        if not line.startswith((">>>", "...")):
            yield f"# {line}"
        elif code not in ("...", ">>>"):
            yield code[4:]


if __name__ == "__main__":
    Path(__file__).with_name("python.md").write_text(reference(), encoding="utf-8")
