"""The models by name, built alike."""

import inspect
from collections.abc import Callable

from torch import Tensor

from h2rec.layers import HarmonizedEmbedding, HashEmbedding, SemanticEmbedding
from h2rec.models.base import SequentialModel, scale_tables
from h2rec.models.h2rec import H2Rec
from h2rec.models.sasrec import SASRec
from h2rec.semantic_ids import SemanticIds


def hash_sasrec(sids: SemanticIds, *, dim: int = 64, sparse: bool = False, **settings) -> SASRec:
    """SASRec on hash IDs only."""
    num_items = sids.num_items
    return SASRec(HashEmbedding(num_items, dim, padding_idx=num_items, sparse=sparse), **settings)


def semantic_sasrec(sids: SemanticIds, *, dim: int = 64, **settings) -> SASRec:
    """SASRec on semantic IDs only: an item is the sum of its codewords."""
    return SASRec(SemanticEmbedding(sids, dim, padding_idx=sids.num_items), **settings)


def sum_sasrec(sids: SemanticIds, *, dim: int = 64, sparse: bool = False, **settings) -> SASRec:
    """SASRec on the sum of both."""
    return SASRec(HarmonizedEmbedding(sids, dim, padding_idx=sids.num_items, sparse=sparse), **settings)


MODELS: dict[str, Callable[..., SequentialModel]] = {
    "hash": hash_sasrec,
    "semantic": semantic_sasrec,
    "sum": sum_sasrec,
    "h2rec": H2Rec,
}


def model_settings(name: str) -> dict[str, object]:
    """The settings that `build_model` takes for a model, with their defaults.

    Raises:
        ValueError: an unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"name must be one of {', '.join(MODELS)}, got {name!r}")
    settings = {}
    for function in (MODELS[name], SASRec):
        parameters = inspect.signature(function).parameters.values()
        settings.update({p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY})
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return settings


def build_model(
    name: str, sids: SemanticIds, *, content: Tensor | None = None, **settings: object
) -> SequentialModel:
    """Builds a model by name.

    Args:
        name: ``"hash"``, ``"semantic"``, ``"sum"`` (SASRec on hash IDs, on semantic IDs, on the sum of
            both), or ``"h2rec"``.
        sids: semantic IDs of the catalog; ``"hash"`` reads the number of items only.
        content: ``[num_items, D0]`` content vectors. The hash table of a model that has one starts from
            their principal components.
        settings: of the model, see `model_settings`.

    Raises:
        ValueError: an unknown name, or a setting out of its range.
        TypeError: a setting that the model does not have.
    """
    known = model_settings(name)
    unknown = sorted(settings.keys() - known.keys())
    if unknown:
        raise TypeError(f"model {name!r} has no setting {', '.join(unknown)}; it has {', '.join(known)}")
    model = MODELS[name](sids, **settings)
    if content is not None and name != "semantic":
        model.embedding.initialize_hash_table(content)
        scale_tables(model.embedding)
    return model
