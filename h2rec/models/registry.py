"""The models by name, built alike."""

import inspect
from collections.abc import Callable

from torch import Tensor

from h2rec.layers import HarmonizedEmbedding, HashEmbedding, SemanticEmbedding
from h2rec.models.base import SequentialModel, scale_tables
from h2rec.models.h2rec import H2Rec
from h2rec.models.single_branch import SingleBranch
from h2rec.ops._checks import check_option
from h2rec.semantic_ids import SemanticIds


def on_hash_ids(sids: SemanticIds, *, dim: int = 64, sparse: bool = False, **settings) -> SingleBranch:
    """One branch on hash IDs only."""
    num_items = sids.num_items
    return SingleBranch(HashEmbedding(num_items, dim, padding_idx=num_items, sparse=sparse), **settings)


def on_semantic_ids(sids: SemanticIds, *, dim: int = 64, **settings) -> SingleBranch:
    """One branch on semantic IDs only: an item is the sum of its codewords."""
    return SingleBranch(SemanticEmbedding(sids, dim, padding_idx=sids.num_items), **settings)


def on_both(fusion: str) -> Callable[..., SingleBranch]:
    """One branch on both IDs, fused before it."""

    def build(sids: SemanticIds, *, dim: int = 64, sparse: bool = False, **settings) -> SingleBranch:
        embedding = HarmonizedEmbedding(sids, dim, fusion=fusion, padding_idx=sids.num_items, sparse=sparse)
        return SingleBranch(embedding, **settings)

    return build


MODELS: dict[str, Callable[..., SequentialModel]] = {
    "hash": on_hash_ids,
    "llminit": on_hash_ids,
    "semantic": on_semantic_ids,
    "sum": on_both("sum"),
    "mean": on_both("mean"),
    "concat": on_both("concat"),
    "h2rec": H2Rec,
}
_WITHOUT_CONTENT = ("hash", "semantic")


def model_settings(name: str) -> dict[str, object]:
    """The settings that `build_model` takes for a model, with their defaults.

    Raises:
        ValueError: an unknown name.
    """
    check_option("name", name, MODELS)
    settings = {}
    for function in (MODELS[name], SingleBranch):
        parameters = inspect.signature(function).parameters.values()
        settings.update({p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY})
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return settings


def build_model(
    name: str, sids: SemanticIds, *, content: Tensor | None = None, **settings: object
) -> SequentialModel:
    """Builds a model by name.

    ========== =====================================================================================
    hash       one branch on hash IDs; knows nothing of the content
    llminit    the same with a hash table that starts from the content (Harte et al., RecSys 2023)
    semantic   one branch on semantic IDs
    sum        one branch on the sum of both vectors of an item
    mean       likewise on their mean
    concat     likewise on both side by side, which makes the branch twice as wide
    h2rec      a branch on each, see `H2Rec`
    ========== =====================================================================================

    Args:
        name: one of the above.
        sids: semantic IDs of the catalog; ``"hash"`` and ``"llminit"`` read the number of items only.
        content: ``[num_items, D0]`` content vectors. The hash table of every model but ``"hash"`` and
            ``"semantic"`` starts from their principal components.
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
    if content is not None and name not in _WITHOUT_CONTENT:
        model.embedding.initialize_hash_table(content)
        scale_tables(model.embedding)
    return model
