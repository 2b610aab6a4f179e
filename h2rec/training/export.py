"""A trained model as files that serve without h2rec."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from h2rec._files import replacing_folder, save_rows, writing
from h2rec.data import ItemCatalog
from h2rec.models import SequentialModel
from h2rec.semantic_ids import SemanticIds
from h2rec.training import faiss_index, user_encoder
from h2rec.training.config import TrainConfig
from h2rec.training.files import write_json
from h2rec.training.inputs import read_split
from h2rec.training.recommend import user_vectors
from h2rec.training.run import load_model

DESCRIPTION = "export.json"
_RECALL_USERS = 1000


def export_run(
    run_dir: str | os.PathLike[str],
    name: str,
    output: str | os.PathLike[str],
    *,
    aot: bool = False,
    faiss: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Writes a folder with what it takes to serve a model of a run.

    ========================== =====================================================================================
    export.json                model, num_items, dim, max_length, padding_id, and of an index its recall
    items.safetensors          ``items`` fp32 ``[num_items, C]``, the vectors that users are scored against
    sids.safetensors           `SemanticIds`
    sids.parquet               raw item ids and their codes: ``item_id``, ``code_0``, ...; row r is item r
    user_encoder.pt2           item_ids ``[B, T]``, lengths ``[B]`` -> ``[B, C]``: a ``torch.export`` package
    user_encoder_aot.pt2       with ``aot``: the same, compiled by AOTInductor
    items.faiss                with ``faiss``: an index of the items by inner product
    ========================== =====================================================================================

    The folder is made under another name and renamed: it is whole, or not there.

    Args:
        run_dir: a directory that `train_run` wrote.
        name: of the model.
        output: the folder to write.
        force: take the place of an earlier export.

    Returns:
        the content of ``export.json``.

    Raises:
        FileExistsError: ``output`` exists, and is no export or ``force`` is not set.
        FileNotFoundError, ValueError: see `load_model`; or ``aot`` without a compiler.
        ModuleNotFoundError: ``faiss`` without faiss.
        OSError: it cannot be written.
    """
    output = Path(output)
    _check_output(output, force)
    if aot:
        user_encoder.check_compiler()
    if faiss:
        faiss_index.check_installed()
    model, config, catalog, sids = load_model(run_dir, name)
    with replacing_folder(output) as folder:
        dim = _write_items(model, folder / "items.safetensors")
        _write_sids(sids, catalog, folder)
        program = user_encoder.export_user_encoder(model, folder / "user_encoder.pt2")
        if aot:
            user_encoder.compile_user_encoder(program, folder / "user_encoder_aot.pt2")
        description = {
            "model": name,
            "num_items": model.num_items,
            "dim": dim,
            "max_length": model.max_length,
            "padding_id": model.padding_idx,
        }
        if faiss:
            description["faiss"] = _write_index(model, config, catalog, folder / "items.faiss")
        write_json(folder / DESCRIPTION, description)
    return description


def _check_output(output: Path, force: bool) -> None:
    if not output.exists():
        return
    if not (output / DESCRIPTION).is_file():
        raise FileExistsError(
            f"{output} exists and is no export (it has no {DESCRIPTION}); name another folder"
        )
    if not force:
        raise FileExistsError(f"{output} exists; --force overwrites it")


def _write_items(model: SequentialModel, path: Path) -> int:
    with torch.no_grad():
        dim = next(model.item_vector_parts()).shape[1]
        save_rows(path, "items", (model.num_items, dim), (part.numpy() for part in model.item_vector_parts()))
    return dim


def _write_sids(sids: SemanticIds, catalog: ItemCatalog, folder: Path) -> None:
    sids.save(folder / "sids.safetensors")
    codes = {f"code_{level}": column.numpy() for level, column in enumerate(sids.codes.unbind(1))}
    path = folder / "sids.parquet"
    with writing(path):
        pl.DataFrame({"item_id": catalog.ids, **codes}).write_parquet(path)


def _write_index(
    model: SequentialModel, config: TrainConfig, catalog: ItemCatalog, path: Path
) -> dict[str, Any]:
    import faiss

    index, name = faiss_index.build_index(model)
    with writing(path):
        faiss.write_index(index, str(path))
    histories = _histories(config, catalog)
    found = faiss_index.recall(index, model, user_vectors(model, histories))
    return {"index": name, f"recall@{faiss_index.CUTOFF}": round(found, 4), "users": len(histories)}


def _histories(config: TrainConfig, catalog: ItemCatalog) -> Sequence[np.ndarray]:
    """All that some users of the log had."""
    log = read_split(config, catalog.num_items, catalog).log
    count = min(_RECALL_USERS, log.num_users)
    users = np.sort(np.random.default_rng(0).choice(log.num_users, count, replace=False))
    return [log.items[log.offsets[user] : log.offsets[user + 1]] for user in users]
