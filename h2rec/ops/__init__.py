"""Stateless operators. This package is the only place that registers anything with ``torch.library``."""

from h2rec.ops.alignment_loss import alignment_loss
from h2rec.ops.harmonized_embedding import harmonized_embedding
from h2rec.ops.hashing import Hashing
from h2rec.ops.residual_quantize import residual_quantize
from h2rec.ops.score_topk import score_topk

__all__ = ["Hashing", "alignment_loss", "harmonized_embedding", "residual_quantize", "score_topk"]
