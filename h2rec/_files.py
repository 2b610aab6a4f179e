"""Files that are whole or not there."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

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


def save_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes one safetensors file, whole or not at all; errors are those of :func:`replacing`."""
    with replacing(path) as temporary:
        safetensors.torch.save_file(dict(tensors), temporary, dict(metadata))
