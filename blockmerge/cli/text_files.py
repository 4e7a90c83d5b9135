"""Files that commands write beside models: whole or not at all."""

from __future__ import annotations

from pathlib import Path


def write_file(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Write a file at what `check_output` returned. Raises OutputError."""
    from blockmerge.checkpoints import AtomicFile
    from blockmerge.errors import OutputError, reason, shown

    with AtomicFile(path, len(data), overwrite=overwrite) as file:
        try:
            file.path.write_bytes(data)
        except OSError as error:
            raise OutputError(f"cannot write {shown(path)}: {reason(error)}") from error
        file.commit()
