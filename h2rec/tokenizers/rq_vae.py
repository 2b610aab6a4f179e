"""RQ-VAE: semantic IDs from a residual quantizer inside an autoencoder."""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from h2rec._files import save_safetensors
from h2rec.layers import ResidualQuantizer
from h2rec.ops._checks import check_option, check_size
from h2rec.ops._codebooks import level_sizes
from h2rec.ops.vector_batches import VectorSource, check_repeatable, vector_batches
from h2rec.semantic_ids import SemanticIds
from h2rec.tokenizers._encode import OnEncode, encode, num_rows
from h2rec.tokenizers.checkpoint import Checkpoint, digest, fingerprint

_FORMAT = "h2rec.rq_vae"
# Batches that are in memory at a time, and whose rows are shuffled.
_SHUFFLED_BATCHES = 32
_LATENT_ROWS = 4096
_SINKHORN_STEPS = 5
# Of codewords that are parameters, times that of the weights.
_CODEWORD_RATE = 20


class RQVAE(nn.Module):
    """An MLP to a small latent vector, its residual quantization, and an MLP back (Lee et al., CVPR 2022).

    ``forward`` is for training loops of one's own, also within ``DistributedDataParallel``; :meth:`fit` is a plain
    one. A codeword that is hardly used any more is replaced by what the batch leaves at its level; ranks count together
    and replace alike. The codebooks of the semantic IDs live in the latent space: give ``SemanticIds.append``,
    ``resolve_collisions`` and ``quality_report`` the vectors that :meth:`latents` returns.

    Args:
        dim: size D of a vector.
        num_levels, codebook_size: as in :class:`h2rec.tokenizers.RQKMeans`.
        latent_dim: size of a latent vector.
        hidden: widths of the encoder's hidden layers; the decoder has them backwards.
        codebooks: ``"ema"``: running means; ``"gradient"``: parameters, drawn to what is assigned to them by the loss.
        sinkhorn: 0 for the nearest codewords; above, the temperature (in mean squared distances) of an
            assignment that loads the last level's codewords evenly within a training batch. ``"gradient"`` only.
        commitment_weight: of the loss that draws latent vectors to their codewords.

    Raises:
        ValueError: a size or an option is wrong.
    """

    def __init__(
        self,
        dim: int,
        num_levels: int = 4,
        codebook_size: int | Sequence[int] = 256,
        *,
        latent_dim: int = 32,
        hidden: Sequence[int] = (512, 128),
        codebooks: str = "ema",
        sinkhorn: float = 0.0,
        commitment_weight: float = 0.25,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.codebook_sizes = level_sizes(num_levels, codebook_size)
        if min(dim, latent_dim, *hidden) < 1:
            raise ValueError(
                f"dim, latent_dim and hidden must be positive, got {dim}, {latent_dim}, {hidden}"
            )
        check_option("codebooks", codebooks, ("ema", "gradient"))
        if sinkhorn < 0 or (sinkhorn and codebooks == "ema"):
            raise ValueError(f"sinkhorn must be at least 0, and 0 with codebooks='ema', got {sinkhorn}")
        self.dim, self.latent_dim, self.hidden, self.seed = dim, latent_dim, tuple(hidden), seed
        self.sinkhorn, self.commitment_weight = sinkhorn, commitment_weight
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            widths = [dim, *hidden, latent_dim]
            self.encoder, self.decoder = _mlp(widths), _mlp(widths[::-1])
            self.quantizer = ResidualQuantizer(
                latent_dim, num_levels, self.codebook_sizes, commitment_weight=commitment_weight
            )
        self.codewords = None
        if codebooks == "gradient":
            self.codewords = nn.Parameter(self.quantizer.packed_codebooks.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x [B, D]`` to ``(reconstruction [B, D], codes [B, L] int32, loss)``; the loss is the whole of it."""
        latent = self.encoder(x)
        if self.codewords is None:
            quantized, codes, commitment = self.quantizer(latent)
        else:
            quantized, codes, commitment = self._quantize_by_gradient(latent)
        reconstruction = self.decoder(quantized)
        return reconstruction, codes, F.mse_loss(reconstruction, x) + commitment

    def _quantize_by_gradient(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        residual, total, codes = latent, torch.zeros_like(latent), []
        loss = latent.new_zeros(())
        books = self.codewords.split(self.codebook_sizes)
        for level, book in enumerate(books):
            squared = torch.cdist(residual.detach(), book.detach()).square()
            if self.sinkhorn and self.training and level == len(books) - 1:
                squared = -_even_assignment(squared, self.sinkhorn)
            code = squared.argmin(1)
            chosen = F.embedding(code, book)
            loss = loss + F.mse_loss(chosen, residual.detach())
            loss = loss + self.commitment_weight * F.mse_loss(residual, chosen.detach())
            if self.training:
                self._replace_dead(level, residual.detach(), code)
            residual, total = residual - chosen.detach(), total + chosen
            codes.append(code)
        straight_through = latent + (total - latent).detach()
        return straight_through, torch.stack(codes, 1).int(), loss

    @torch.no_grad()
    def _replace_dead(self, level: int, residual: Tensor, code: Tensor) -> None:
        """What :class:`h2rec.layers.ResidualQuantizer` does by itself; on every rank the same, without waiting."""
        start, size = sum(self.codebook_sizes[:level]), self.codebook_sizes[level]
        # bincount would wait.
        counts = self.codewords.new_zeros(size).index_add_(0, code, self.codewords.new_ones(len(code)))
        candidates = residual[torch.randint(len(residual), (size,), device=residual.device)].to(counts.dtype)
        if dist.is_initialized():
            dist.all_reduce(counts)
            dist.broadcast(candidates, src=0)
        running = self.quantizer.ema_counts[start : start + size]  # a view, as the next is
        words = self.codewords.data[start : start + size]
        running.lerp_(counts, 1 - self.quantizer.ema_decay)
        dead = running < self.quantizer.dead_code_threshold
        words.copy_(torch.where(dead.unsqueeze(1), candidates, words))
        running.masked_fill_(dead, 1)

    @property
    def codebooks(self) -> tuple[Tensor, ...]:
        """One ``[K_l, latent_dim]`` tensor per level."""
        packed = self.quantizer.packed_codebooks if self.codewords is None else self.codewords.detach()
        return packed.split(self.codebook_sizes)

    @torch.no_grad()
    def start_codebooks(self, vectors: VectorSource, *, batch_size: int = 4096) -> None:
        """Starts the codebooks from k-means on the latent vectors; in a distributed run from those of rank 0.

        Raises:
            ValueError: there are fewer vectors than codewords, or rows are not finite.
            RuntimeError: on the other ranks, when that happens on rank 0.
        """
        error = None
        if not dist.is_initialized() or dist.get_rank() == 0:
            try:
                self.quantizer.fit(self.latents(vectors, batch_size=batch_size), num_iters=10, seed=self.seed)
            except Exception as raised:  # the other ranks must hear of it, or they would wait forever
                error = raised
        if dist.is_initialized():
            failed = torch.tensor(error is not None, device=self.quantizer.packed_codebooks.device)
            dist.broadcast(failed, src=0)
            if failed and error is None:
                raise RuntimeError("rank 0 could not start the codebooks")
            if not failed:
                for buffer in self.quantizer.buffers():
                    dist.broadcast(buffer, src=0)
        if error is not None:
            raise error
        if self.codewords is not None:
            self.codewords.copy_(self.quantizer.packed_codebooks)

    def fit(
        self,
        vectors: VectorSource,
        *,
        num_epochs: int = 20,
        batch_size: int = 1024,
        learning_rate: float = 1e-3,
        progress: Callable[[int, float], None] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> "RQVAE":
        """Trains with AdamW, rows shuffled among those of 32 batches at a time.

        Args:
            progress: gets each epoch and its mean loss.
            checkpoint: a folder, as in :meth:`h2rec.tokenizers.RQKMeans.fit`; weights and optimizer are kept after each
                epoch.

        Raises:
            ValueError: a number is out of range, there are fewer vectors than codewords, or rows are not finite.
            TypeError: vectors can be read only once.
        """
        check_repeatable(vectors)
        check_size("num_epochs", num_epochs)
        check_size("batch_size", batch_size)
        device = next(self.parameters()).device
        optimizer = torch.optim.AdamW(self._parameter_groups(learning_rate), lr=learning_rate)
        kept, first_epoch = None, 0
        if checkpoint is not None:
            start = digest(self.state_dict().values())
            settings = [self._arguments(), start, num_epochs, batch_size, learning_rate]
            kept = Checkpoint(checkpoint, "fit", settings, vectors)
            first_epoch = self._load_epoch(kept.load(), optimizer)
        if first_epoch == 0:
            self.start_codebooks(vectors)
        self.train()
        # Of no other GPU: a context would be made on each.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for epoch in range(first_epoch, num_epochs):
                torch.manual_seed(
                    self.seed * num_epochs + epoch
                )  # of the shuffle, and of what replaces dead codes
                total, done = torch.zeros((), device=device), 0
                for batch in _shuffled(vectors, batch_size):
                    _, _, loss = self(batch.to(device))
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    total += loss.detach() * len(batch)
                    done += len(batch)
                if kept is not None:
                    kept.save(self._epoch_state(epoch + 1, optimizer))
                if progress is not None:
                    progress(epoch, (total / done).item())
        return self.eval()

    def _parameter_groups(self, learning_rate: float) -> list[dict]:
        groups = [{"params": [*self.encoder.parameters(), *self.decoder.parameters()]}]
        if self.codewords is not None:
            # They must keep up with latent vectors that many weights move at once; decay would pull them away.
            rate = _CODEWORD_RATE * learning_rate
            groups.append({"params": [self.codewords], "lr": rate, "weight_decay": 0.0})
        return groups

    def _epoch_state(self, num_done: int, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        state = {f"model.{name}": tensor for name, tensor in self.state_dict().items()}
        for index, entries in optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{name}": tensor for name, tensor in entries.items()}
        return state | {"num_done": torch.tensor(num_done)}

    def _load_epoch(self, state: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
        """Takes weights and optimizer from what :meth:`_epoch_state` returned; how many epochs are done."""
        if not state:
            return 0
        entries: dict[int, dict[str, Tensor]] = {}
        for name in [name for name in state if name.startswith("optimizer.")]:
            _, index, entry = name.split(".")
            entries.setdefault(int(index), {})[entry] = state.pop(name)
        num_done = int(state.pop("num_done"))
        self.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
        optimizer.load_state_dict(optimizer.state_dict() | {"state": entries})
        return num_done

    def latents(self, vectors: VectorSource, *, batch_size: int = _LATENT_ROWS) -> "Latents":
        """The latent vectors of ``vectors [N, D]``, as batches: what the semantic IDs' codebooks are for."""
        return Latents(self, vectors, batch_size)

    @torch.no_grad()
    def tokenize(
        self,
        vectors: VectorSource,
        beam_size: int = 1,
        progress: OnEncode | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> SemanticIds:
        """The semantic IDs of ``vectors [N, D]``, with the codebooks of the latent space.

        Arguments and errors are those of :meth:`h2rec.tokenizers.RQKMeans.tokenize`.
        """
        provenance = {
            "method": "RQ-VAE",
            "vector_dim": self.dim,
            "seed": self.seed,
            "codebook_sizes": self.codebook_sizes,
            "codebooks": "ema" if self.codewords is None else "gradient",
            "sinkhorn": self.sinkhorn,
        }
        return encode(
            self.codebooks,
            self.latents(vectors),
            batch_size=_LATENT_ROWS,
            beam_size=beam_size,
            provenance=provenance,
            progress=progress,
            folder=checkpoint,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes weights and arguments to one safetensors file, whole or not at all: new items need the encoder."""
        metadata = {"format": _FORMAT, "arguments": json.dumps(self._arguments())}
        save_safetensors(Path(path), self.state_dict(), metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RQVAE":
        """Reads a file that :meth:`save` wrote.

        Raises:
            ValueError: it is no such file, or not a whole one.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"{path}: not the weights of an RQ-VAE")
                model = cls(**json.loads(metadata["arguments"]))
                model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (safetensors.SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path}: not a whole file of an RQ-VAE: {error}") from error
        return model.eval()

    def _arguments(self) -> dict[str, object]:
        return {
            "dim": self.dim,
            "num_levels": len(self.codebook_sizes),
            "codebook_size": self.codebook_sizes,
            "latent_dim": self.latent_dim,
            "hidden": self.hidden,
            "codebooks": "ema" if self.codewords is None else "gradient",
            "sinkhorn": self.sinkhorn,
            "commitment_weight": self.commitment_weight,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Latents:
    """The latent vectors of ``vectors``, computed anew in each pass, in batches."""

    model: RQVAE
    vectors: VectorSource
    batch_size: int

    def __len__(self) -> int:
        if (rows := num_rows(self.vectors)) is None:
            raise TypeError("these vectors do not say how many they are")
        return rows

    def fingerprint(self) -> list[object]:
        return [digest(self.model.encoder.parameters()), *fingerprint(self.vectors)]

    def __call__(self) -> Iterator[Tensor]:
        device = next(self.model.parameters()).device
        for batch in vector_batches(self.vectors, self.batch_size):
            if batch.shape[1] != self.model.dim:
                raise ValueError(f"vectors must have dimension {self.model.dim}, got {batch.shape[1]}")
            with torch.no_grad():
                yield self.model.encoder(batch.to(device))


def _shuffled(vectors: VectorSource, batch_size: int) -> Iterator[Tensor]:
    """Batches whose rows are drawn from as many rows as fit in memory: rows of a kind often follow each other."""
    for rows in vector_batches(vectors, _SHUFFLED_BATCHES * batch_size):
        yield from rows[torch.randperm(len(rows)).to(rows.device)].split(batch_size)


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _even_assignment(squared: Tensor, temperature: float) -> Tensor:
    """Sinkhorn's log plan ``[B, K]``: rows sum to 1, columns to B / K (Cuturi, NeurIPS 2013), in the log domain."""
    log_plan = -squared / (temperature * squared.mean()).clamp_min(1e-12)
    fair = math.log(len(squared) / squared.shape[1])
    for _ in range(_SINKHORN_STEPS):
        log_plan = log_plan - log_plan.logsumexp(0, keepdim=True) + fair
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
    return log_plan
