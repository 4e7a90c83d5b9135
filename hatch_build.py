"""The README as a package index shows it: with links that lead somewhere from there, too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"\[([^\]]+)\]\((?![a-z]+:|#)([^)\s]+)\)")


def for_index(readme: str, repository: str | None) -> str:
    """Return the README with its links to files as links into the repository, or as plain text without one.

    >>> for_index("See [the docs](docs/cli.md).", "https://example.org/project")
    'See [the docs](https://example.org/project/blob/HEAD/docs/cli.md).'
    >>> for_index("See [the docs](docs/cli.md).", None)
    'See the docs.'
    """
    place = r"\1" if repository is None else rf"[\1]({repository.rstrip('/')}/blob/HEAD/\2)"
    return _LINK.sub(place, readme)


class ReadmeForIndex(MetadataHookInterface):
    """Gives the package its long description; `Repository` in `[project.urls]` says where files are."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the long description."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        readme = for_index(text, metadata.get("urls", {}).get("Repository"))
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}
