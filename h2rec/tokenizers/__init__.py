"""Learning semantic IDs from content vectors."""

from h2rec.tokenizers.rq_kmeans import RQKMeans

__all__ = ["RQKMeans"]
