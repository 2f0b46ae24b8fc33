"""Files written whole or not at all, and what a full disk is called."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internals.start import UserError


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Where the disk is full or refuses, a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: could not be written ({error.strerror or error}); what was saved before is kept"
        ) from error


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: str | Path, value: Any) -> None:
    """Write atomically: the file has all of the old content or all of the new, whenever the power fails."""
    partial = Path(f"{path}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def sync_folder(folder: str | Path) -> None:
    """Make a rename in this folder outlive a power cut. Windows has no such call, and needs none."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
