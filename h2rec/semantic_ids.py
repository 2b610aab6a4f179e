"""The semantic IDs of a catalog: one tuple of codes per item, and what is known about where they come from."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
from torch import Tensor

from h2rec import ops
from h2rec._files import save_safetensors
from h2rec.ops.vector_batches import VectorSource, vector_batches

_FORMAT = "h2rec.semantic_ids"
_VERSION = 1
_APPEND_BATCH = 4096
_MAX_CODEBOOK_SIZE = 2**31 - 1
# What safetensors itself accepts.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class SemanticIdStats:
    """How well a catalog's codes tell its items apart.

    Attributes:
        num_items, num_levels, codebook_sizes: as in :class:`SemanticIds`.
        distinct: number of different tuples.
        collision_rate: share of the items that share their tuple with another item.
        largest_group: most items with the same tuple.
        utilisation: for each level, the share of its codes that some item has.
        perplexity: for each level, exp of the entropy of its codes; K_l if all are equally frequent.
    """

    num_items: int
    num_levels: int
    codebook_sizes: tuple[int, ...]
    distinct: int
    collision_rate: float
    largest_group: int
    utilisation: tuple[float, ...]
    perplexity: tuple[float, ...]

    def table(self) -> str:
        """The numbers as lines of text."""
        lines = [
            f"items            {self.num_items:,}",
            f"distinct tuples  {self.distinct:,}",
            f"collision rate   {self.collision_rate:.2%}",
            f"largest group    {self.largest_group:,}",
            "",
            "level   codes     used  perplexity",
        ]
        lines += [
            f"{level:>5}  {size:>6}  {used:>7.1%}  {perplexity:>10.1f}"
            for level, (size, used, perplexity) in enumerate(
                zip(self.codebook_sizes, self.utilisation, self.perplexity, strict=True)
            )
        ]
        return "\n".join(lines)


class SemanticIds:
    """The codes of all items, their codebooks if known, and how they were made. Not to be changed in place.

    Args:
        codes: ``[N, L]``, any integer dtype, tensor or array; row i is the tuple of item i.
        codebook_sizes: ``(K_0, ..., K_{L-1})``; None takes them from the codebooks, else the largest code of each
            level plus one.
        codebooks: ``[L, K, D]`` or a sequence of L tensors ``[K_l, D]``, floating point.
        provenance: strings by name, e.g. ``{"method": "rq-kmeans"}``.

    Attributes:
        codes: ``[N, L]`` int32, on the CPU.
        codebook_sizes: tuple of L ints.
        codebooks: tuple of L tensors ``[K_l, D]`` fp32 on the CPU, or None.
        provenance: dict of strings.

    Raises:
        ValueError: shapes do not fit, a code lies outside its codebook, or a codebook is not finite.
        TypeError: a dtype is wrong.
    """

    def __init__(
        self,
        codes: Tensor | np.ndarray,
        *,
        codebook_sizes: Sequence[int] | None = None,
        codebooks: Tensor | Sequence[Tensor] | None = None,
        provenance: Mapping[str, str] | None = None,
    ) -> None:
        codes = _to_codes(codes)
        self.codebooks = None if codebooks is None else _to_codebooks(codebooks, codes.shape[1])
        self.codebook_sizes = _to_sizes(codebook_sizes, self.codebooks, codes)
        _check_codes(codes, self.codebook_sizes)
        self.codes = codes.to(torch.int32, copy=True, memory_format=torch.contiguous_format)
        self.provenance = _to_provenance(provenance)
        self._groups: tuple[np.ndarray, np.ndarray] | None = None
        self._sorted_columns: np.ndarray | None = None

    @property
    def num_items(self) -> int:
        return self.codes.shape[0]

    @property
    def num_levels(self) -> int:
        return self.codes.shape[1]

    def stats(self) -> SemanticIdStats:
        """Counts collisions and the use of each level's codes."""
        _, starts = self.groups()
        sizes = np.diff(starts)
        utilisation, perplexity = [], []
        for level, codebook_size in enumerate(self.codebook_sizes):
            counts = np.bincount(self.codes[:, level].numpy())
            counts = counts[counts > 0]
            share = counts / max(self.num_items, 1)
            utilisation.append(len(counts) / codebook_size)
            perplexity.append(math.exp(-float(share @ np.log(share))) if len(counts) else 0.0)
        return SemanticIdStats(
            num_items=self.num_items,
            num_levels=self.num_levels,
            codebook_sizes=self.codebook_sizes,
            distinct=len(sizes),
            collision_rate=float(sizes[sizes > 1].sum() / max(self.num_items, 1)),
            largest_group=int(sizes.max(initial=0)),
            utilisation=tuple(utilisation),
            perplexity=tuple(perplexity),
        )

    def lookup(self, codes: Tensor | Sequence[int]) -> Tensor:
        """The items of one tuple.

        The first call sorts the catalog; each takes L binary searches.

        Args:
            codes: ``[L]`` integers.

        Returns:
            Item ids in ascending order, int64; empty if no item has the tuple.

        Raises:
            ValueError: not L codes, or a code lies outside its codebook.
            TypeError: not integers.
        """
        codes = torch.as_tensor(codes)
        _check_integer(codes)
        if codes.shape != (self.num_levels,):
            raise ValueError(f"codes must have shape [{self.num_levels}], got {list(codes.shape)}")
        _check_codes(codes.unsqueeze(0), self.codebook_sizes)
        order, _ = self.groups()
        if self._sorted_columns is None:
            self._sorted_columns = np.ascontiguousarray(self.codes.numpy()[order].T)  # [L, N]
        start, stop = 0, self.num_items
        for column, code in zip(self._sorted_columns, codes.tolist(), strict=True):
            code = column.dtype.type(code)  # any other type makes numpy convert the whole column
            start, stop = (
                start + int(np.searchsorted(column[start:stop], code, side)) for side in ("left", "right")
            )
        return torch.from_numpy(order[start:stop].copy())

    def append(self, new_vectors: VectorSource, *, beam_size: int | None = None) -> "SemanticIds":
        """Gives new items the ids after the existing ones, whose codes stay as they are.

        Args:
            new_vectors: ``[M, D]``, floating point, or batches of such rows (see
                :func:`h2rec.ops.vector_batches.vector_batches`).
            beam_size: as in :func:`h2rec.ops.residual_quantize`; None takes what provenance says the catalog was
                encoded with, or 1.

        Returns:
            Semantic IDs of all N + M items; provenance counts the new ones under ``appended_items``. A level that
            numbers the items of a tuple goes on counting, and grows where it must.

        Raises:
            ValueError: the codebooks are not known, or the vectors are not finite or have another dimension.
        """
        codebooks = self.encoding_codebooks
        dim = codebooks[0].shape[1]
        if beam_size is None:
            beam_size = self.beam_size
        new_codes = [self.codes.new_empty(0, len(codebooks))]
        for batch in vector_batches(new_vectors, _APPEND_BATCH, name="new_vectors"):
            if batch.shape[1] != dim:
                raise ValueError(
                    f"new_vectors must have dimension {dim}, as the codebooks have, got {batch.shape[1]}"
                )
            new_codes.append(ops.residual_quantize(batch.cpu(), codebooks, beam_size=beam_size)[1])
        return self.append_codes(torch.cat(new_codes))

    def append_codes(self, new_codes: Tensor | np.ndarray) -> "SemanticIds":
        """As :meth:`append`, for new items whose codes are known.

        Args:
            new_codes: ``[M, L]``, any integer dtype; without the code of a level that numbers the items of a tuple.

        Raises:
            ValueError: a shape does not fit, or a code lies outside its codebook.
            TypeError: not integers.
        """
        new_codes, codebooks, sizes = _to_codes(new_codes), self.codebooks, self.codebook_sizes
        num_levels = self.num_levels - self.has_counting_level
        if new_codes.shape[1] != num_levels:
            raise ValueError(f"new_codes must have shape [M, {num_levels}], got {list(new_codes.shape)}")
        codes = torch.cat([self.codes[:, :num_levels], new_codes])
        if self.has_counting_level:
            counts = SemanticIds(codes, codebook_sizes=sizes[:-1]).numbers_within_groups()
            codes = torch.cat([codes, counts.unsqueeze(1)], dim=1)
            size = max(sizes[-1], int(counts.numpy().max(initial=0)) + 1)
            sizes = (*sizes[:-1], size)
            if codebooks is not None:
                codebooks = (*codebooks[:-1], torch.zeros(size, codebooks[0].shape[1]))
        appended = int(self.provenance.get("appended_items", 0)) + len(new_codes)
        return SemanticIds(
            codes,
            codebook_sizes=sizes,
            codebooks=codebooks,
            provenance=self.provenance | {"appended_items": str(appended)},
        )

    @property
    def encoding_codebooks(self) -> tuple[Tensor, ...]:
        """The codebooks of all levels but one that numbers the items of a tuple.

        Raises:
            ValueError: they are not known.
        """
        if self.codebooks is None:
            raise ValueError("these SemanticIds have no codebooks, so new_vectors cannot be encoded")
        return self.codebooks[:-1] if self.has_counting_level else self.codebooks

    @property
    def beam_size(self) -> int:
        """What provenance says the catalog was encoded with; 1 if it says nothing."""
        return int(self.provenance.get("beam_size", 1))

    @property
    def has_counting_level(self) -> bool:
        """Whether the last code numbers the items of a tuple, see :func:`h2rec.tokenizers.add_level`."""
        return self.provenance.get("collisions") == "counting level"

    def numbers_within_groups(self) -> Tensor:
        """How many earlier items have the same tuple, ``[N]`` int32."""
        order, starts = self.groups()
        numbers = np.empty(self.num_items, dtype=np.int32)
        numbers[order] = np.arange(self.num_items) - np.repeat(starts[:-1], np.diff(starts))
        return torch.from_numpy(numbers)

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file, whole or not at all."""
        tensors = {"codes": self.codes}
        for level, codebook in enumerate(self.codebooks or ()):
            tensors[_codebook_name(level)] = codebook
        metadata = {
            "format": _FORMAT,
            "version": str(_VERSION),
            "codebook_sizes": json.dumps(self.codebook_sizes),
            "provenance": json.dumps(self.provenance),
        }
        save_safetensors(Path(path), tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SemanticIds":
        """Reads a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no file of semantic IDs, or not a whole one, or its content is not consistent. The
                message names the file and what is wrong.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            tensors, metadata = _read(path)
            return cls._from_file(tensors, metadata)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def _from_file(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> "SemanticIds":
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"not semantic IDs: its metadata says format {metadata.get('format')!r}, expected {_FORMAT!r}"
            )
        version = metadata.get("version", "")
        if not version.isdecimal() or int(version) < 1:
            raise ValueError(f"its format version must be a positive integer, got {version!r}")
        if int(version) > _VERSION:
            raise ValueError(
                f"written in format version {version}, this h2rec reads versions up to {_VERSION}; upgrade h2rec"
            )
        sizes = _parse_json(metadata, "codebook_sizes", list)
        provenance = _parse_json(metadata, "provenance", dict)
        expected = {"codes"}
        if tensors.keys() != expected:
            expected |= {_codebook_name(level) for level in range(len(sizes))}
        if missing := sorted(expected - tensors.keys()):
            raise ValueError(f"tensors {', '.join(missing)} are missing")
        if unknown := sorted(tensors.keys() - expected):
            raise ValueError(
                f"tensors {', '.join(unknown)} do not belong to semantic IDs of {len(sizes)} levels"
            )
        for name, tensor in tensors.items():
            dtype = torch.int32 if name == "codes" else torch.float32
            if tensor.dtype != dtype:
                raise ValueError(f"tensor {name} must be {dtype}, got {tensor.dtype}")
        codebooks = (
            [tensors[_codebook_name(level)] for level in range(len(sizes))] if len(tensors) > 1 else None
        )
        return cls(tensors["codes"], codebook_sizes=sizes, codebooks=codebooks, provenance=provenance)

    def __eq__(self, other: object) -> bool:
        """Equal codes, sizes, codebooks (bit for bit) and provenance."""
        if not isinstance(other, SemanticIds):
            return NotImplemented
        if self.codebook_sizes != other.codebook_sizes or self.provenance != other.provenance:
            return False
        if (self.codebooks is None) != (other.codebooks is None):
            return False
        pairs = zip(self.codebooks or (), other.codebooks or (), strict=True)
        return torch.equal(self.codes, other.codes) and all(torch.equal(mine, its) for mine, its in pairs)

    __hash__ = None

    def __repr__(self) -> str:
        parts = [f"num_items={self.num_items}", f"codebook_sizes={self.codebook_sizes}"]
        if self.codebooks is not None:
            parts.append(f"dim={self.codebooks[0].shape[1]}")
        if method := self.provenance.get("method"):
            parts.append(f"method={method!r}")
        return f"SemanticIds({', '.join(parts)})"

    def groups(self) -> tuple[np.ndarray, np.ndarray]:
        """Items sorted by tuple ``[N]``, stable, and where each of the G tuples starts ``[G + 1]``."""
        if self._groups is None:
            self._groups = _group_codes(self.codes.numpy())
        return self._groups


def _group_codes(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    try:
        from h2rec._catalog import group_codes
    except ImportError:
        return _group_codes_with_numpy(codes)
    return group_codes(codes)


def _group_codes_with_numpy(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort(codes.T[::-1])
    ordered = codes[order]
    changes = (ordered[1:] != ordered[:-1]).any(axis=1).nonzero()[0] + 1
    first = [0] if len(codes) else []
    return order, np.concatenate([first, changes, [len(codes)]]).astype(np.int64)


def _codebook_name(level: int) -> str:
    return f"codebooks.{level}"


def _to_codes(codes: Tensor | np.ndarray) -> Tensor:
    codes = codes if isinstance(codes, Tensor) else torch.tensor(codes)
    _check_integer(codes)
    if codes.dim() != 2 or codes.shape[1] == 0:
        raise ValueError(f"codes must have shape [N, L] with L >= 1, got {list(codes.shape)}")
    codes = codes.detach().cpu()
    return codes if codes.dtype == torch.int32 else codes.to(torch.int64)


def _check_integer(codes: Tensor) -> None:
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise TypeError(f"codes must be integers, got {codes.dtype}")


def _to_codebooks(codebooks: Tensor | Sequence[Tensor], num_levels: int) -> tuple[Tensor, ...]:
    if isinstance(codebooks, Tensor) and codebooks.dim() != 3:
        raise ValueError(f"codebooks must have shape [L, K, D], got {list(codebooks.shape)}")
    if len(codebooks) != num_levels:
        raise ValueError(
            f"codebooks must have one entry for each of {num_levels} levels, got {len(codebooks)}"
        )
    checked = []
    for level, codebook in enumerate(codebooks):
        codebook = torch.as_tensor(codebook)
        if not codebook.is_floating_point():
            raise TypeError(f"codebooks[{level}] must be floating point, got {codebook.dtype}")
        if codebook.dim() != 2 or codebook.shape[0] == 0:
            raise ValueError(
                f"codebooks[{level}] must have shape [K, D] with K >= 1, got {list(codebook.shape)}"
            )
        if checked and codebook.shape[1] != checked[0].shape[1]:
            raise ValueError(
                f"codebooks[{level}] has dimension {codebook.shape[1]}, but codebooks[0] has {checked[0].shape[1]}"
            )
        codebook = codebook.detach().to("cpu", torch.float32, copy=True).contiguous()
        if bad := int((~codebook.isfinite().all(dim=1)).sum()):
            raise ValueError(
                f"codebooks[{level}] must be finite, but {bad} of {len(codebook)} codewords hold NaN or infinity"
            )
        checked.append(codebook)
    return tuple(checked)


def _to_sizes(
    sizes: Sequence[int] | None, codebooks: tuple[Tensor, ...] | None, codes: Tensor
) -> tuple[int, ...]:
    num_levels = codes.shape[1]
    if sizes is None:
        if codebooks is not None:
            return tuple(codebook.shape[0] for codebook in codebooks)
        if codes.shape[0] == 0:
            raise ValueError("codebook_sizes must be given if there are neither items nor codebooks")
        return tuple(max(largest, 0) + 1 for largest in codes.amax(dim=0).tolist())
    if len(sizes) != num_levels:
        raise ValueError(
            f"codebook_sizes must have one entry for each of {num_levels} levels, got {len(sizes)}"
        )
    for level, size in enumerate(sizes):
        if isinstance(size, bool) or not isinstance(size, int | np.integer):
            raise TypeError(f"codebook_sizes[{level}] must be an integer, got {type(size).__name__}")
        if not 1 <= size <= _MAX_CODEBOOK_SIZE:
            raise ValueError(f"codebook_sizes[{level}] must lie in [1, {_MAX_CODEBOOK_SIZE}], got {size}")
        if codebooks is not None and size != codebooks[level].shape[0]:
            raise ValueError(
                f"codebook_sizes[{level}] is {size}, but codebooks[{level}] has {codebooks[level].shape[0]} codewords"
            )
    return tuple(int(size) for size in sizes)


def _check_codes(codes: Tensor, sizes: tuple[int, ...]) -> None:
    if codes.shape[0] == 0:
        return
    low, high = codes.amin(dim=0).tolist(), codes.amax(dim=0).tolist()
    for level, size in enumerate(sizes):
        if low[level] >= 0 and high[level] < size:
            continue
        column = codes[:, level]
        outside = ((column < 0) | (column >= size)).nonzero().flatten()
        first = int(outside[0])
        raise ValueError(
            f"codes must lie in [0, {size}) at level {level}, but {len(outside)} of {len(column)} do not "
            f"(first: {int(column[first])} in row {first})"
        )


def _to_provenance(provenance: Mapping[str, str] | None) -> dict[str, str]:
    provenance = dict(provenance or {})
    for name, value in provenance.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"provenance must map strings to strings, got {name!r}: {value!r}")
    return provenance


def _parse_json(metadata: dict[str, str], name: str, kind: type) -> list | dict:
    try:
        value = json.loads(metadata[name])
    except (KeyError, ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise ValueError(f"its metadata {name!r} must be a JSON {kind.__name__}, got {metadata.get(name)!r}")
    return value


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, or a ValueError that says what the file is instead."""
    _check_header(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            # Copies: the tensors must not change with the file.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"corrupt safetensors file ({error})") from error


def _check_header(path: Path) -> None:
    """Tells what safetensors reports alike: another kind of file, a cut-off one, and a broken header."""
    size = path.stat().st_size
    if size == 0:
        raise ValueError("the file is empty")
    with open(path, "rb") as file:
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        if start[8:] != b"{" or length > _MAX_HEADER_BYTES:
            raise ValueError(_describe_other_file(start))
        if size < 8 + length:
            raise ValueError(f"truncated: the header has {length} bytes, but only {size - 8} are there")
        file.seek(8)
        header = file.read(length)
    try:
        entries = json.loads(header)
        end = max(
            (entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0
        )
        truncated = size < 8 + length + end
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"corrupt header ({type(error).__name__}: {error})") from error
    if truncated:
        raise ValueError(f"truncated: the tensors have {end} bytes, but only {size - 8 - length} are there")


def _describe_other_file(start: bytes) -> str:
    if start.startswith(b"PK\x03\x04"):
        return "not a safetensors file but a zip archive, as torch.save writes it; h2rec never unpickles"
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "not a safetensors file but a pickle; h2rec never unpickles"
    return "not a safetensors file"
