"""Files that commands write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def check_writable(path: Path, force: bool) -> None:
    """Refuses, before any work is done, to overwrite a file without ``--force``, and what cannot be written."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected the name of a file")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; --force overwrites it")
    check_folder_of(path)


def check_folder_of(path: Path) -> None:
    """Refuses, before any work is done, what cannot be written where it is to be."""
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: no permission to write into {folder}")


def write_vectors(vectors: np.ndarray, path: Path) -> None:
    """Writes ``.npy``, whole or not at all."""
    import numpy as np

    from h2rec._files import replacing

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, vectors, allow_pickle=False)
