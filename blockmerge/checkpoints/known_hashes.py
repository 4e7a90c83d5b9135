"""SHA-256s of model files that were hashed before, kept in the user's cache folder: hashing reads it all."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from blockmerge.checkpoints.checkpoint import Checkpoint
from blockmerge.checkpoints.hub import shown_path
from blockmerge.checkpoints.identity import identity_of
from blockmerge.errors import CheckpointError, reason

_MOST = 2000
"""Files that are remembered; those that were remembered first are forgotten first."""
_LARGEST = 1 << 20  # bytes of the cache
_STEP = 1 << 22


def sha256_of(checkpoint: Checkpoint) -> str | None:
    """Return the SHA-256 of a checkpoint that is one file, from the cache where its size, time and identity
    are those of then; None for all that is not one file.

    Raises CheckpointError when it cannot be read.
    """
    if len(checkpoint.files) != 1:
        return None
    [path] = checkpoint.files
    try:
        status = path.stat()
        identity = identity_of(checkpoint)
        key = f"{status.st_size}-{status.st_mtime_ns}-{identity.digest if identity else ''}"
        known = _read()
        if key in known:
            return known[key]
        found = hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(_STEP):
                found.update(part)
    except OSError as error:
        raise CheckpointError(f"cannot read {shown_path(path)}: {reason(error)}") from error
    _write({**known, key: found.hexdigest()})
    return found.hexdigest()


def cache_file() -> Path:
    """Where the cache is: in `$XDG_CACHE_HOME`, `~/.cache`, `~/Library/Caches` or `%LOCALAPPDATA%`."""
    if sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "blockmerge" / "hashes.json"


def _read() -> dict[str, str]:
    """What is known; nothing where the cache is broken, or there is none."""
    try:
        with cache_file().open("rb") as file:
            found = json.loads(file.read(_LARGEST))
    except (OSError, ValueError, RecursionError, RuntimeError):
        return {}
    is_good = isinstance(found, dict) and all(
        isinstance(one, str) and len(one) == 64 for one in found.values()
    )
    return found if is_good else {}


def _write(known: dict[str, str]) -> None:
    """Replace the cache at once. It only saves time, so that no merge fails for it."""
    kept = dict(list(known.items())[-_MOST:])
    with suppress(OSError, RuntimeError):
        target = cache_file()
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".hashes-")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(kept, file)
            os.replace(name, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
