"""Learning semantic IDs from content vectors, telling them apart, and finding items by them."""

from h2rec.tokenizers._encode import EncodeProgress
from h2rec.tokenizers.collisions import Resolution, add_level, resolve_collisions
from h2rec.tokenizers.prefix_trie import PrefixTrie
from h2rec.tokenizers.product_quantizer import ProductQuantizer
from h2rec.tokenizers.rq_kmeans import RQKMeans

__all__ = [
    "EncodeProgress",
    "PrefixTrie",
    "ProductQuantizer",
    "RQKMeans",
    "Resolution",
    "add_level",
    "resolve_collisions",
]
