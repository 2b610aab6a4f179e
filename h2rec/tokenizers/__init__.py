"""Learning semantic IDs from content vectors, telling them apart, and finding items by them."""

from h2rec.tokenizers._encode import EncodeProgress
from h2rec.tokenizers.append import append
from h2rec.tokenizers.checkpoint import remove_checkpoints
from h2rec.tokenizers.collisions import Resolution, add_level, resolve_collisions
from h2rec.tokenizers.prefix_trie import PrefixTrie
from h2rec.tokenizers.product_quantizer import ProductQuantizer
from h2rec.tokenizers.quality import PrefixLoad, QualityReport, quality_report
from h2rec.tokenizers.rq_kmeans import RQKMeans
from h2rec.tokenizers.rq_vae import RQVAE
from h2rec.tokenizers.vector_files import VectorFile, open_vectors

__all__ = [
    "RQVAE",
    "EncodeProgress",
    "PrefixLoad",
    "PrefixTrie",
    "ProductQuantizer",
    "QualityReport",
    "RQKMeans",
    "Resolution",
    "VectorFile",
    "add_level",
    "append",
    "open_vectors",
    "quality_report",
    "remove_checkpoints",
    "resolve_collisions",
]
