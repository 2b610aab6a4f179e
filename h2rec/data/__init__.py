"""Interaction logs and catalogs, vectors of texts, and what training and evaluation draw from them.

Item ids are rows of the catalog, 0-based; ``num_items`` itself marks padding in batches.
"""

try:
    import polars  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("h2rec.data reads files with polars: pip install 'h2rec[train]'") from error

from h2rec.data.batches import EvalBatches, SequenceBatch, TrainBatches
from h2rec.data.co_occurrence import CoOccurrence, co_occurrence
from h2rec.data.interactions import InteractionLog, read_interactions
from h2rec.data.items import ItemCatalog, read_items
from h2rec.data.negatives import sample_negatives
from h2rec.data.popularity import POPULARITY_BANDS, popularity_band, popularity_head
from h2rec.data.split import Split, leave_one_out, nothing_held_out
from h2rec.data.text import embed_texts

__all__ = [
    "POPULARITY_BANDS",
    "CoOccurrence",
    "EvalBatches",
    "InteractionLog",
    "ItemCatalog",
    "SequenceBatch",
    "Split",
    "TrainBatches",
    "co_occurrence",
    "embed_texts",
    "leave_one_out",
    "nothing_held_out",
    "popularity_band",
    "popularity_head",
    "read_interactions",
    "read_items",
    "sample_negatives",
]
