"""One semantic vector from the vectors of the levels."""

import torch
from torch import Tensor, nn

from h2rec.ops._checks import check_option, check_size

MODES = ("sum", "mean", "adaptive")


class GranularityFusion(nn.Module):
    """Fuses the L level vectors of an item into one.

    ``"sum"`` and ``"mean"`` have no parameters. ``"adaptive"`` is a weighted sum whose weights are a softmax
    over the levels of a linear map of the L vectors; it starts as the mean.

    Source: arXiv 2512.10388, dual-branch modelling (multi-granularity fusion of the semantic branch).

    Args:
        dim: size D of the vectors.
        num_levels: number L of levels.
        mode: ``"sum"``, ``"mean"`` or ``"adaptive"``.

    Raises:
        ValueError: an unknown mode, a size below 1, or an input whose last dimensions are not ``[L, D]``.
    """

    def __init__(self, dim: int, num_levels: int, mode: str = "sum") -> None:
        super().__init__()
        check_option("mode", mode, MODES)
        check_size("dim", dim)
        check_size("num_levels", num_levels)
        self.dim = dim
        self.num_levels = num_levels
        self.mode = mode
        self.score = nn.Linear(num_levels * dim, num_levels) if mode == "adaptive" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts ``"adaptive"`` as the mean."""
        if self.score is not None:
            nn.init.zeros_(self.score.weight)
            nn.init.zeros_(self.score.bias)

    def forward(self, levels: Tensor) -> Tensor:
        """``[*, L, D]`` -> ``[*, D]``"""
        if levels.shape[-2:] != (self.num_levels, self.dim):
            expected = f"[*, {self.num_levels}, {self.dim}]"
            raise ValueError(f"levels must have shape {expected}, got {list(levels.shape)}")
        if self.score is not None:
            weights = torch.softmax(self.score(levels.flatten(-2)), dim=-1)  # [*, L]
            return (weights.unsqueeze(-2) @ levels).squeeze(-2)
        return levels.sum(-2) if self.mode == "sum" else levels.mean(-2)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_levels={self.num_levels}, mode={self.mode!r}"
