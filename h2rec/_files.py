"""Files that are whole or not there."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
from torch import Tensor


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says in an error which file could not be written."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        # torch.save fails once more, with a RuntimeError, when it closes a file that it could not write.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(cause, "strerror", None) or cause
        raise OSError(f"{path}: cannot be written: {reason}") from error


def partial(path: Path) -> Path:
    """The name in the same folder under which :func:`replacing` writes."""
    return path.with_name(f".{path.stem}.partial{path.suffix}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name in the same folder; what is written there takes the place of ``path`` at the end.

    The name is always the same: what a killed process left is written over, and does not pile up.

    Raises:
        OSError: it cannot be written.
    """
    temporary = partial(path)
    try:
        with writing(path):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """`replacing` for a folder: gives an empty temporary one, which takes the place of ``path`` at the end.

    If ``path`` is a link, of what it leads to.

    Raises:
        OSError: it cannot be written.
    """
    path = path.resolve() if path.is_symlink() else path
    temporary, old = (path.with_name(f".{path.name}.{state}") for state in ("partial", "old"))

    def put_back() -> None:
        if old.exists() and not path.exists():
            os.replace(old, path)

    try:
        with writing(path):
            put_back()  # a killed process was about to replace it
            for left in (temporary, old):
                if left.exists():
                    shutil.rmtree(left)
            temporary.mkdir(parents=True)
        yield temporary
        with writing(path):
            for file in temporary.iterdir():
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
    finally:
        put_back()
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)


def save_rows(path: Path, name: str, shape: tuple[int, int], parts: Iterable[np.ndarray]) -> None:
    """Writes one fp32 tensor as safetensors, of which only ``parts [n, shape[1]]`` are ever in memory.

    Raises:
        OSError: it cannot be written.
    """
    size = 4 * shape[0] * shape[1]
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({name: tensor}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype="<f4").data)
        if file.tell() != 8 + len(header) + size:
            raise AssertionError(f"{path}: expected parts of {shape[0]} rows in all")


def save_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes one safetensors file, whole or not at all; errors are those of :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.unlink(missing_ok=True)
        temporary.touch()
        permissions = temporary.stat().st_mode
        safetensors.torch.save_file(dict(tensors), temporary, dict(metadata))
        temporary.chmod(permissions)  # as of any new file; safetensors lets nobody but the owner read
