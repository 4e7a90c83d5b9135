"""The README as a package index shows it: with links that lead somewhere from there, too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)\[([^\]]+)\]\((?![a-z]+:|#)([^)\s]+)\)")


def for_index(readme: str, repository: str | None) -> str:
    """Return the README with its links and pictures as those of the repository. Without one, links become
    plain text, and pictures are left out.

    >>> text = "![a U](docs/u.svg) See [the docs](docs/cli.md)."
    >>> for_index(text, "https://example.org/me")
    '![a U](https://example.org/me/raw/HEAD/docs/u.svg) See [the docs](https://example.org/me/blob/HEAD/docs/cli.md).'
    >>> for_index(text, None)
    ' See the docs.'
    """

    def there(link: re.Match[str]) -> str:
        mark, text, path = link.groups()
        if repository is None:
            return "" if mark else text
        return f"{mark}[{text}]({repository.rstrip('/')}/{'raw' if mark else 'blob'}/HEAD/{path})"

    return _LINK.sub(there, readme)


class ReadmeForIndex(MetadataHookInterface):
    """Gives the package its long description; `Repository` in `[project.urls]` says where files are."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the long description."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        readme = for_index(text, metadata.get("urls", {}).get("Repository"))
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}
