"""What ``h2rec tokenize`` does with the vectors: learn, encode, tell apart, append, judge."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from h2rec.cli.console import output as console
from h2rec.cli.progress import RowProgress

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from h2rec import SemanticIds
    from h2rec.tokenizers import RQVAE, VectorFile

    Vectors = np.ndarray | Tensor | VectorFile


class Method(str, Enum):
    RQ_KMEANS = "rq-kmeans"
    RQ_VAE = "rq-vae"
    PQ = "pq"


class Collisions(str, Enum):
    KEEP = "keep"
    NEXT_BEST = "next-best"
    NEW_LEVEL = "new-level"


_ITERATIONS = {Method.RQ_KMEANS: 25, Method.PQ: 25, Method.RQ_VAE: 20}


@dataclass(frozen=True)
class Settings:
    """How semantic IDs are learned."""

    method: Method
    sizes: list[int]
    iterations: int | None = None
    mini_batch: bool = False
    balance: float = 0.0
    beam_size: int = 1
    seed: int = 0
    collisions: Collisions = Collisions.KEEP
    capacity: int = 1

    def __post_init__(self) -> None:
        if self.method is not Method.RQ_KMEANS and (self.mini_batch or self.balance):
            name = "--mini-batch" if self.mini_batch else "--balance"
            raise ValueError(f"{name} is for --method rq-kmeans, got {self.method.value}")
        if self.method is Method.PQ and self.beam_size > 1:
            raise ValueError("--beam-size is for residual quantizers: the parts of pq are independent")


@dataclass(frozen=True)
class Made:
    """Semantic IDs, the vectors in the space of their codebooks, and what new vectors need to get there."""

    sids: SemanticIds
    vectors: Any
    encoder: RQVAE | None = None


def learn(vectors: Vectors, settings: Settings, folder: Path) -> Made:
    """Semantic IDs of ``vectors [N, D]``. What an interrupted call left in ``folder`` is gone on with."""
    from h2rec.tokenizers import RQVAE, ProductQuantizer, RQKMeans, add_level

    sizes, seed = settings.sizes, settings.seed
    steps = settings.iterations or _ITERATIONS[settings.method]
    beam = {"beam_size": settings.beam_size}
    encoder, to_judge = None, vectors
    with RowProgress() as bars:
        if settings.method is Method.RQ_VAE:
            tokenizer = encoder = RQVAE(vectors.shape[1], len(sizes), sizes, seed=seed)
            _fit_rq_vae(encoder, vectors, steps, folder, bars)
            to_judge = encoder.latents(vectors)
        elif settings.method is Method.PQ:
            tokenizer, beam = ProductQuantizer(len(sizes), sizes, num_iters=steps, seed=seed), {}
            _fit_k_means(tokenizer, vectors, folder, bars)
        else:
            moves = {"mini_batch": settings.mini_batch, "balance": settings.balance}
            tokenizer = RQKMeans(len(sizes), sizes, num_iters=steps, seed=seed, **moves)
            _fit_k_means(tokenizer, vectors, folder, bars)
        show = bars.add("codes", len(vectors))
        sids = tokenizer.tokenize(
            vectors, progress=lambda encoded: show(encoded.done), checkpoint=folder, **beam
        )
        if settings.collisions is Collisions.NEW_LEVEL:
            sids = add_level(sids)
        elif settings.collisions is Collisions.NEXT_BEST:
            sids = _move_colliding(sids, to_judge, settings.capacity, bars)
    return Made(sids, to_judge, encoder)


def append(path: Path, vectors: Vectors, folder: Path) -> Made:
    """The published semantic IDs of ``path`` and, after them, those of new items with ``vectors [M, D]``.

    What an interrupted call left in ``folder`` is gone on with.
    """
    from h2rec import SemanticIds, tokenizers
    from h2rec.tokenizers import RQVAE

    published = SemanticIds.load(path)
    encoder = None
    if published.provenance.get("method") == "RQ-VAE":
        if not encoder_path(path).exists():
            raise FileNotFoundError(
                f"{encoder_path(path)}: no such file; {path} needs this encoder for new items"
            )
        encoder = RQVAE.load(encoder_path(path))
        vectors = encoder.latents(vectors)
    with RowProgress() as bars:
        show = bars.add("codes", len(vectors))
        longer = tokenizers.append(
            published, vectors, progress=lambda encoded: show(encoded.done), checkpoint=folder
        )
        if published.provenance.get("collisions") == "next-best":
            capacity = int(published.provenance["capacity"])
            longer = _move_colliding(longer, vectors, capacity, bars, num_published=published.num_items)
    console.print(
        f"{longer.num_items - published.num_items:,} new items after {published.num_items:,}", highlight=False
    )
    return Made(longer, None, encoder)


def judge(made: Made, reports: list[Path]) -> None:
    """Prints how good the semantic IDs are, and writes it."""
    from h2rec.tokenizers import quality_report

    with RowProgress() as bars:
        vectors = made.vectors
        if vectors is not None:
            vectors = bars.reading("quality", vectors, len(vectors))
        report = quality_report(made.sids, vectors)
    console.print(report.table(), highlight=False)
    for path in reports:
        path.parent.mkdir(parents=True, exist_ok=True)
        report.save(path)


def encoder_path(sids: Path) -> Path:
    """Where the encoder of an RQ-VAE is, beside its semantic IDs."""
    return sids.with_name(f"{sids.name.removesuffix('.safetensors')}.rq-vae.safetensors")


def _fit_k_means(tokenizer: Any, vectors: Vectors, folder: Path, bars: RowProgress) -> None:
    sizes, passes = tokenizer.codebook_sizes, tokenizer.num_iters
    show = bars.add("k-means", len(sizes) * passes * len(vectors))
    seen: set[int] = set()

    def progress(level: int, step: int, error: float) -> None:
        if not seen and level > 0:
            console.print(f"Going on after level {level}, where it was interrupted")
        seen.add(level)
        note = f"level {level + 1} of {len(sizes)}, mean squared distance {error:.4g}"
        show((level * passes + step + 1) * len(vectors), note)

    tokenizer.fit(vectors, progress=progress, checkpoint=folder)
    show(len(sizes) * passes * len(vectors))


def _fit_rq_vae(model: RQVAE, vectors: Vectors, epochs: int, folder: Path, bars: RowProgress) -> None:
    show = bars.add("RQ-VAE", epochs * len(vectors))
    seen: set[int] = set()

    def progress(epoch: int, loss: float) -> None:
        if not seen and epoch > 0:
            console.print(f"Going on after epoch {epoch}, where it was interrupted")
        seen.add(epoch)
        show((epoch + 1) * len(vectors), f"epoch {epoch + 1} of {epochs}, loss {loss:.4g}")

    model.fit(vectors, num_epochs=epochs, progress=progress, checkpoint=folder)
    show(epochs * len(vectors))


def _move_colliding(
    sids: SemanticIds, vectors: Any, capacity: int, bars: RowProgress, num_published: int = 0
) -> SemanticIds:
    from h2rec.tokenizers import resolve_collisions

    source = bars.reading("collisions", vectors, len(vectors))
    result = resolve_collisions(sids, source, capacity=capacity, num_published=num_published)
    console.print(result.summary(), highlight=False)
    return result.sids
