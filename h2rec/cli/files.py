"""Files that commands write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def check_writable(path: Path, force: bool) -> None:
    """Refuses, before any work is done, to overwrite a file without ``--force``."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected the name of a file")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; --force overwrites it")


def write_vectors(vectors: np.ndarray, path: Path) -> None:
    """Writes ``.npy``, whole or not at all."""
    import numpy as np

    from h2rec.training.files import replacing

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, vectors, allow_pickle=False)
