"""Semantic IDs and hash IDs together, for recommendation in PyTorch."""

from h2rec import layers, ops
from h2rec._version import __version__
from h2rec.ops._backends import show_config, use_backend
from h2rec.semantic_ids import SemanticIds

__all__ = ["SemanticIds", "__version__", "layers", "ops", "show_config", "use_backend"]
