"""How good a catalog's semantic IDs are: in numbers, as text, as JSON and as a picture."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from h2rec._files import replacing
from h2rec.ops.vector_batches import VectorSource, vector_batches
from h2rec.semantic_ids import SemanticIds, SemanticIdStats

_BATCH_SIZE = 16_384


@dataclass(frozen=True)
class PrefixLoad:
    """How many items share their first l + 1 codes.

    Attributes:
        prefixes: number of different ones.
        mean, largest: items of a prefix.
    """

    prefixes: int
    mean: float
    largest: int


@dataclass(frozen=True)
class QualityReport:
    """What :func:`quality_report` found.

    Attributes:
        stats: collisions, utilisation and perplexity.
        gini: for each level, how unequally its codes are used: 0 all alike, towards 1 a few take all.
        prefix_load: for each level.
        reconstruction_error: mean squared distance to the sum of codewords, after each level; None without vectors.
        relative_error: the same over the variance of the vectors.
        code_counts: for each level, items of each of its codes.
    """

    stats: SemanticIdStats
    gini: tuple[float, ...]
    prefix_load: tuple[PrefixLoad, ...]
    reconstruction_error: tuple[float, ...] | None
    relative_error: tuple[float, ...] | None
    code_counts: tuple[tuple[int, ...], ...]

    def table(self) -> str:
        """The numbers as lines of text."""
        lines = [self.stats.table(), "", "level  gini  prefixes  items each  largest  squared error"]
        for level, (gini, load) in enumerate(zip(self.gini, self.prefix_load, strict=True)):
            error = ""
            if self.reconstruction_error is not None:
                error = f"{self.reconstruction_error[level]:.4g} ({self.relative_error[level]:.1%})"
            line = f"{level:>5}  {gini:>4.2f}  {load.prefixes:>8,}  {load.mean:>10.1f}  {load.largest:>7,}  {error:>13}"
            lines.append(line.rstrip())
        return "\n".join(lines)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False)

    def save(self, path: str | os.PathLike) -> None:
        """Writes :meth:`to_json` if ``path`` ends in ``.json``, else :meth:`plot`; whole or not at all."""
        path = Path(path)
        if path.suffix.lower() != ".json":
            self.plot(path)
            return
        with replacing(path) as temporary:
            temporary.write_text(self.to_json() + "\n", encoding="utf-8")

    def plot(self, path: str | os.PathLike) -> None:
        """Draws the use of each level's codes and the load of prefixes; the suffix of ``path`` says the format.

        Raises:
            ImportError: matplotlib is missing (``pip install h2rec[train]``).
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs matplotlib: pip install h2rec[train]") from error
        figure = Figure(figsize=(10, 4), layout="constrained")
        figure.suptitle(
            f"{self.stats.num_items:,} items, {self.stats.distinct:,} tuples, "
            f"collision rate {self.stats.collision_rate:.1%}"
        )
        use, load = figure.subplots(1, 2)
        for level, counts in enumerate(self.code_counts):
            ordered = np.sort(counts)[::-1]
            places = (np.arange(len(ordered)) + 0.5) / len(ordered)
            label = f"level {level}, gini {self.gini[level]:.2f}"
            use.plot(places, ordered / max(ordered.mean(), 1e-12), label=label)
        use.axhline(1, color="grey", linewidth=0.8)
        use.set(xlabel="codes of a level, most used first (share)", ylabel="items of a code / mean")
        levels = np.arange(len(self.prefix_load))
        for shift, name in ((-0.2, "largest"), (0.2, "mean")):
            load.bar(levels + shift, [getattr(prefix, name) for prefix in self.prefix_load], 0.4, label=name)
        load.set(xlabel="prefixes up to level", ylabel="items of a prefix", xticks=levels, yscale="symlog")
        for axes in (use, load):
            axes.legend(frameon=False)
        with replacing(Path(path)) as temporary:
            figure.savefig(temporary, dpi=150)


def quality_report(sids: SemanticIds, vectors: VectorSource | None = None) -> QualityReport:
    """Judges semantic IDs by themselves and, if given, by the ``vectors [N, D]`` that they stand for.

    Raises:
        ValueError: vectors were given, but codebooks are not known, or the number or dimension of rows is another one.
    """
    counts = [
        np.bincount(column, minlength=size)
        for column, size in zip(sids.codes.numpy().T, sids.codebook_sizes, strict=True)
    ]
    errors = relative = None
    if vectors is not None:
        errors, variance = _errors(sids, vectors)
        relative = tuple(error / variance if variance else 0.0 for error in errors)
    return QualityReport(
        stats=sids.stats(),
        gini=tuple(_gini(count) for count in counts),
        prefix_load=_prefix_loads(sids),
        reconstruction_error=errors,
        relative_error=relative,
        code_counts=tuple(tuple(count.tolist()) for count in counts),
    )


def _gini(counts: np.ndarray) -> float:
    total, size = counts.sum(), len(counts)
    if total == 0:
        return 0.0
    ranks = np.arange(1, size + 1)
    return float(2 * (ranks * np.sort(counts)).sum() / (size * total) - (size + 1) / size)


def _prefix_loads(sids: SemanticIds) -> tuple[PrefixLoad, ...]:
    order, _ = sids.groups()
    ordered = sids.codes.numpy()[order]
    changes = np.zeros(max(sids.num_items - 1, 0), dtype=bool)
    loads = []
    for level in range(sids.num_levels):
        changes |= ordered[1:, level] != ordered[:-1, level]
        edges = np.concatenate([[0], np.flatnonzero(changes) + 1, [sids.num_items]])
        sizes = np.diff(edges)
        prefixes = int((sizes > 0).sum())
        loads.append(PrefixLoad(prefixes, sids.num_items / max(prefixes, 1), int(sizes.max(initial=0))))
    return tuple(loads)


def _errors(sids: SemanticIds, vectors: VectorSource) -> tuple[tuple[float, ...], float]:
    """Mean squared distances after each level, and the variance."""
    if sids.codebooks is None:
        raise ValueError("these SemanticIds have no codebooks, so vectors cannot be compared with them")
    dim = sids.codebooks[0].shape[1]
    errors = torch.zeros(sids.num_levels, dtype=torch.float64, device="cpu")
    sums, squares, start = errors.new_zeros(dim), 0.0, 0
    for batch in vector_batches(vectors, _BATCH_SIZE):
        if batch.shape[1] != dim:
            raise ValueError(f"vectors must have the dimension of the codebooks, {dim}, got {batch.shape[1]}")
        residual, stop = batch.cpu().clone(), start + len(batch)
        sums += residual.sum(0, dtype=torch.float64)
        squares += residual.square().sum(dtype=torch.float64).item()
        for level, codes in enumerate(sids.codes[start:stop].T):
            residual = residual[: len(codes)] - sids.codebooks[level][codes.long()]
            errors[level] += residual.square().sum(dtype=torch.float64)
        start = stop
    if start != sids.num_items:
        raise ValueError(f"vectors must have {sids.num_items} rows, one per item, got {start}")
    number = max(start, 1)
    variance = squares / number - (sums / number).square().sum().item()
    return tuple((errors / number).tolist()), max(variance, 0.0)
