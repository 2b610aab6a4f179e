"""What a tokenizer has got so far, kept in a folder, so that it goes on there after an interruption."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from h2rec._files import save_safetensors, writing
from h2rec._version import __version__
from h2rec.ops.vector_batches import VectorSource, check_repeatable

_BLOCK_ROWS = 65_536
_STAGES = ("fit", "codes")


class Checkpoint:
    """One file of intermediate results of one stage. The settings and the vectors are part of its name.

    What is there for other settings or vectors is not found, and deleted by the first :meth:`save`.

    Args:
        folder: made when there is something to keep.
        stage: ``"fit"`` or ``"codes"``.
        settings: whatever the results depend on, besides the vectors: JSON.
    """

    def __init__(
        self, folder: str | os.PathLike[str], stage: str, settings: object, vectors: VectorSource
    ) -> None:
        check_repeatable(vectors)
        key = json.dumps([__version__, settings, fingerprint(vectors)])
        self.folder, self.stage = Path(folder), stage
        self.path = self.folder / f"{stage}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def load(self) -> dict[str, Tensor]:
        """What was kept last; nothing before the first time."""
        try:
            return safetensors.torch.load_file(self.path)
        except (FileNotFoundError, safetensors.SafetensorError):
            return {}

    def save(self, tensors: dict[str, Tensor]) -> None:
        self._start()
        save_safetensors(self.path, tensors, {})

    def read_blocks(self, size: int) -> bytes:
        """What :meth:`append` wrote in blocks of ``size`` bytes, without one that was cut off at the end."""
        try:
            os.truncate(self.path, self.path.stat().st_size // size * size)
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""

    def append(self, block: bytes) -> None:
        if not self.path.exists():
            self._start()
        with writing(self.path), self.path.open("ab") as file:
            file.write(block)

    def _start(self) -> None:
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        for other in _files(self.folder, self.stage):
            if other != self.path:
                other.unlink()


class CodebookCheckpoint:
    """The codebooks that a fit has got so far. Of processes that fit together the first keeps them for all.

    Args:
        folder: None keeps nothing.
        settings, vectors: as of :class:`Checkpoint`.
        group: these processes, if there are several.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        settings: object,
        vectors: VectorSource,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.group, self.file = group, None
        if folder is not None and (group is None or group.rank() == 0):
            self.file = Checkpoint(folder, "fit", settings, vectors)

    def load(self) -> list[Tensor]:
        kept = self.file.load() if self.file else {}
        codebooks = [kept[str(index)] for index in range(len(kept))]
        if self.group is not None:
            shared = [codebooks]
            dist.broadcast_object_list(shared, group=self.group, group_src=0)
            (codebooks,) = shared
        return codebooks

    def save(self, codebooks: Sequence[Tensor]) -> None:
        if self.file:
            self.file.save({str(index): codebook.contiguous() for index, codebook in enumerate(codebooks)})


def remove_checkpoints(folder: str | os.PathLike[str]) -> None:
    """Deletes what tokenizers kept in ``folder``, and the folder if nothing else is in it."""
    folder = Path(folder)
    for stage in _STAGES:
        for file in _files(folder, stage):
            file.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _files(folder: Path, stage: str) -> list[Path]:
    """Of any settings and vectors, and what a killed process was about to write."""
    return [*folder.glob(f"{stage}-*"), *folder.glob(f".{stage}-*.partial")]


def digest(arrays: Iterable[Tensor | np.ndarray]) -> str:
    """Equal for equal tensors or arrays ``[N, *]`` only."""
    hashed = hashlib.sha256()
    for array in arrays:
        hashed.update(f"{array.dtype} {list(array.shape)}".encode())
        for start in range(0, len(array), _BLOCK_ROWS):
            block = array[start : start + _BLOCK_ROWS]
            if isinstance(block, Tensor):
                block = block.detach().cpu().contiguous().view(torch.uint8).numpy()
            hashed.update(np.ascontiguousarray(block))
    return hashed.hexdigest()


def fingerprint(vectors: VectorSource) -> list[object]:
    """What tells these vectors from others, as JSON; of a function that does not say it by itself, its first batch."""
    if hasattr(vectors, "fingerprint"):
        return vectors.fingerprint()
    if not isinstance(vectors, Tensor | np.ndarray):
        vectors = next(iter(vectors() if callable(vectors) else vectors), np.zeros(0, np.float32))
    return [digest([vectors])]
