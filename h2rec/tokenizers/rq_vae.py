"""RQ-VAE: semantic IDs from a residual quantizer inside an autoencoder."""

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from h2rec.layers import ResidualQuantizer
from h2rec.ops.vector_batches import VectorSource, vector_batches
from h2rec.semantic_ids import SemanticIds
from h2rec.tokenizers._encode import OnEncode, encode, level_sizes

_SINKHORN_STEPS = 5
# Of codewords that are parameters, times that of the weights.
_CODEWORD_RATE = 20


class RQVAE(nn.Module):
    """An MLP to a small latent vector, its residual quantization, and an MLP back (Lee et al., CVPR 2022).

    ``forward`` is for training loops of one's own, also within ``DistributedDataParallel``; :meth:`fit` is a plain
    one. The codebooks of the semantic IDs live in the latent space: give ``SemanticIds.append``, ``resolve_collisions``
    and ``quality_report`` the vectors that :meth:`latents` returns.

    Args:
        dim: size D of a vector.
        num_levels, codebook_size: as in :class:`h2rec.tokenizers.RQKMeans`.
        latent_dim: size of a latent vector.
        hidden: widths of the encoder's hidden layers; the decoder has them backwards.
        codebooks: ``"ema"``: running means with revival of dead codes; ``"gradient"``: parameters, drawn to what is
            assigned to them by the loss.
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
        if codebooks not in ("ema", "gradient"):
            raise ValueError(f"codebooks must be 'ema' or 'gradient', got {codebooks!r}")
        if sinkhorn < 0 or (sinkhorn and codebooks == "ema"):
            raise ValueError(f"sinkhorn must be at least 0, and 0 with codebooks='ema', got {sinkhorn}")
        self.dim, self.latent_dim, self.seed = dim, latent_dim, seed
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
            residual, total = residual - chosen.detach(), total + chosen
            codes.append(code)
        straight_through = latent + (total - latent).detach()
        return straight_through, torch.stack(codes, 1).int(), loss

    @property
    def codebooks(self) -> tuple[Tensor, ...]:
        """One ``[K_l, latent_dim]`` tensor per level."""
        packed = self.quantizer.packed_codebooks if self.codewords is None else self.codewords.detach()
        return packed.split(self.codebook_sizes)

    @torch.no_grad()
    def start_codebooks(self, vectors: VectorSource, *, batch_size: int = 16_384) -> None:
        """Starts the codebooks from k-means on the latent vectors; in a distributed run from those of rank 0."""
        self.quantizer.fit(self.latents(vectors, batch_size=batch_size), num_iters=10, seed=self.seed)
        if dist.is_initialized():
            for buffer in self.quantizer.buffers():
                dist.broadcast(buffer, src=0)
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
    ) -> "RQVAE":
        """Trains with AdamW, rows in their order; ``progress`` gets each epoch and its mean loss.

        Raises:
            ValueError: a number is out of range, there are fewer vectors than codewords, or rows are not finite.
        """
        if num_epochs < 1 or batch_size < 1:
            raise ValueError(
                f"num_epochs and batch_size must be at least 1, got {num_epochs} and {batch_size}"
            )
        device = next(self.parameters()).device
        self.start_codebooks(vectors)
        optimizer = torch.optim.AdamW(self._parameter_groups(learning_rate), lr=learning_rate)
        self.train()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)  # revival draws rows
            for epoch in range(num_epochs):
                total, num_rows = torch.zeros((), device=device), 0
                for batch in vector_batches(vectors, batch_size):
                    _, _, loss = self(batch.to(device))
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    total += loss.detach() * len(batch)
                    num_rows += len(batch)
                if progress is not None:
                    progress(epoch, (total / num_rows).item())
        return self.eval()

    def _parameter_groups(self, learning_rate: float) -> list[dict]:
        groups = [{"params": [*self.encoder.parameters(), *self.decoder.parameters()]}]
        if self.codewords is not None:
            # They must keep up with latent vectors that many weights move at once; decay would pull them away.
            rate = _CODEWORD_RATE * learning_rate
            groups.append({"params": [self.codewords], "lr": rate, "weight_decay": 0.0})
        return groups

    def latents(self, vectors: VectorSource, *, batch_size: int = 16_384) -> Callable:
        """The latent vectors of ``vectors [N, D]``, as batches: what the semantic IDs' codebooks are for."""

        def batches():
            device = next(self.parameters()).device
            for batch in vector_batches(vectors, batch_size):
                if batch.shape[1] != self.dim:
                    raise ValueError(f"vectors must have dimension {self.dim}, got {batch.shape[1]}")
                with torch.no_grad():
                    yield self.encoder(batch.to(device))

        return batches

    @torch.no_grad()
    def tokenize(
        self, vectors: VectorSource, beam_size: int = 1, progress: OnEncode | None = None
    ) -> SemanticIds:
        """The semantic IDs of ``vectors [N, D]``, with the codebooks of the latent space."""
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
            batch_size=16_384,
            beam_size=beam_size,
            provenance=provenance,
            progress=progress,
        )


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _even_assignment(squared: Tensor, temperature: float) -> Tensor:
    """Sinkhorn's log plan ``[B, K]``: rows sum to 1, columns to B / K (Cuturi, NeurIPS 2013), in the log domain."""
    log_plan = -squared / (temperature * squared.mean()).clamp_min(1e-12)
    fair = torch.log(squared.new_tensor(len(squared) / squared.shape[1]))
    for _ in range(_SINKHORN_STEPS):
        log_plan = log_plan - log_plan.logsumexp(0, keepdim=True) + fair
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
    return log_plan
