"""A residual quantizer that learns its codebooks as running means of what is assigned to them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from h2rec import ops
from h2rec.ops._checks import check_size
from h2rec.ops._codebooks import level_sizes
from h2rec.ops.kmeans import fit_codebooks
from h2rec.ops.vector_batches import VectorSource


class ResidualQuantizer(nn.Module):
    """Straight-through residual quantization with running-mean codebooks, for use inside an autoencoder.

    In training mode each forward moves the codebooks towards the residuals assigned to them (van den Oord et al.,
    Neural Discrete Representation Learning, 2017, appendix A.1, at each level), and puts a residual of the batch in
    the place of a codeword that is hardly used any more. With ``torch.distributed`` initialised, the counts, the sums
    and the replacements are those of all ranks, so that ranks keep equal codebooks. Nothing waits for the device.

    Args:
        dim: size D of a vector.
        num_levels: number of levels L.
        codebook_size: codewords of each level, or one number per level.
        beam_size: as in :func:`h2rec.ops.residual_quantize`.
        commitment_weight: of the loss that draws vectors to their codewords.
        ema_decay: of the running means, in [0, 1).
        dead_code_threshold: a codeword whose running count per batch falls below it is replaced; 0 for never.

    Raises:
        ValueError: a size or a rate is wrong.
    """

    def __init__(
        self,
        dim: int,
        num_levels: int,
        codebook_size: int | Sequence[int],
        *,
        beam_size: int = 1,
        commitment_weight: float = 0.25,
        ema_decay: float = 0.99,
        dead_code_threshold: float = 0.1,
    ) -> None:
        super().__init__()
        check_size("dim", dim)
        sizes = level_sizes(num_levels, codebook_size)
        check_size("beam_size", beam_size)
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {ema_decay}")
        self.dim = dim
        self.sizes = sizes
        self.beam_size = beam_size
        self.commitment_weight = commitment_weight
        self.ema_decay = ema_decay
        self.dead_code_threshold = dead_code_threshold
        codebooks = torch.randn(sum(sizes), dim) / num_levels**0.5
        self.register_buffer("packed_codebooks", codebooks)  # [sum(K_l), D]
        self.register_buffer("ema_counts", torch.ones(sum(sizes)))
        self.register_buffer("ema_sums", codebooks.clone())

    @property
    def codebooks(self) -> tuple[Tensor, ...]:
        """One ``[K_l, D]`` view per level."""
        return self.packed_codebooks.split(self.sizes)

    @torch.no_grad()
    def fit(self, vectors: VectorSource, *, num_iters: int = 25, seed: int = 0) -> "ResidualQuantizer":
        """Starts the codebooks from k-means on ``vectors``, see :func:`h2rec.ops.kmeans.fit_codebooks`."""
        codebooks = torch.cat(fit_codebooks(vectors, self.sizes, num_iters=num_iters, seed=seed))
        if codebooks.shape[1] != self.dim:
            raise ValueError(f"vectors must have dimension {self.dim}, got {codebooks.shape[1]}")
        self.packed_codebooks.copy_(codebooks)
        self.ema_sums.copy_(codebooks)
        self.ema_counts.fill_(1)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x [*, D]`` to ``(quantized [*, D], codes [*, L] int32, commitment loss)``.

        The gradient of ``quantized`` goes to ``x`` as if nothing had been quantized.
        """
        rows = self._rows(x)
        quantized, codes = ops.residual_quantize(rows.detach(), self.codebooks, beam_size=self.beam_size)
        loss = self.commitment_weight * (rows - quantized).square().mean()
        if self.training:
            self._update(rows.detach(), codes)
        straight_through = rows + (quantized - rows).detach()
        return straight_through.view(x.shape), codes.view(*x.shape[:-1], len(self.sizes)), loss

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Codes of ``x [*, D]``, ``[*, L]`` int32."""
        _, codes = ops.residual_quantize(self._rows(x), self.codebooks, beam_size=self.beam_size)
        return codes.view(*x.shape[:-1], len(self.sizes))

    def decode(self, codes: Tensor) -> Tensor:
        """The sum of the codewords that ``codes [*, L]`` name, ``[*, D]``."""
        if codes.shape[-1:] != (len(self.sizes),):
            raise ValueError(f"codes must have shape [*, {len(self.sizes)}], got {list(codes.shape)}")
        flat = codes.reshape(-1, len(self.sizes))
        positions = torch.arange(len(flat), device=flat.device)
        vectors, _ = ops.harmonized_embedding(positions, flat, list(self.codebooks), None)
        return vectors.view(*codes.shape[:-1], self.dim)

    def _rows(self, x: Tensor) -> Tensor:
        """``[*, D]`` to ``[N, D]``"""
        if x.shape[-1:] != (self.dim,):
            raise ValueError(f"x must have shape [*, {self.dim}], got {list(x.shape)}")
        return x.reshape(-1, self.dim)

    @torch.no_grad()
    def _update(self, residual: Tensor, codes: Tensor) -> None:
        residual = residual.to(self.packed_codebooks.dtype)
        start = 0
        for level, size in enumerate(self.sizes):
            rows = slice(start, start + size)
            codebook = self.packed_codebooks[rows]  # a view: written in place
            level_codes = codes[:, level].long()
            chosen = codebook[level_codes]
            counts = torch.zeros(size, device=residual.device, dtype=residual.dtype)
            counts.index_add_(0, level_codes, torch.ones_like(residual[:, 0]))
            # In fixed order on every device, which index_add_ on rows is not.
            sums = torch.ops.aten.embedding_dense_backward(residual, level_codes, size, -1, False)
            candidates = self._candidates(residual, size)
            if dist.is_initialized():
                dist.all_reduce(counts)
                dist.all_reduce(sums)
                dist.broadcast(candidates, src=0)
            self.ema_counts[rows].lerp_(counts, 1 - self.ema_decay)
            self.ema_sums[rows].lerp_(sums, 1 - self.ema_decay)
            dead = (self.ema_counts[rows] < self.dead_code_threshold).unsqueeze(1)
            means = self.ema_sums[rows] / self.ema_counts[rows].clamp_min(1e-6).unsqueeze(1)
            codebook.copy_(torch.where(dead, candidates, means))
            self.ema_sums[rows] = torch.where(dead, candidates, self.ema_sums[rows])
            self.ema_counts[rows] = self.ema_counts[rows].where(~dead.squeeze(1), 1)
            residual = residual - chosen
            start += size

    def _candidates(self, residual: Tensor, size: int) -> Tensor:
        """Rows of the batch to put in the place of dead codewords."""
        if not len(residual):
            return torch.zeros(size, self.dim, device=residual.device, dtype=residual.dtype)
        return residual[torch.randint(len(residual), (size,), device=residual.device)]

    def extra_repr(self) -> str:
        return f"{self.dim}, sizes={self.sizes}, beam_size={self.beam_size}"
