"""nn.Modules around the operators: parameters, buffers and defaults."""

from h2rec.layers.alignment_loss import AlignmentLoss
from h2rec.layers.granularity_cross_attention import GranularityCrossAttention
from h2rec.layers.granularity_fusion import GranularityFusion
from h2rec.layers.harmonized_embedding import HarmonizedEmbedding
from h2rec.layers.hash_embedding import HashEmbedding
from h2rec.layers.masked_granularity_loss import MaskedGranularityLoss
from h2rec.layers.residual_quantizer import ResidualQuantizer
from h2rec.layers.row_sharded_embedding import RowShardedEmbedding
from h2rec.layers.semantic_embedding import SemanticEmbedding

__all__ = [
    "AlignmentLoss",
    "GranularityCrossAttention",
    "GranularityFusion",
    "HarmonizedEmbedding",
    "HashEmbedding",
    "MaskedGranularityLoss",
    "ResidualQuantizer",
    "RowShardedEmbedding",
    "SemanticEmbedding",
]
