"""Content vectors of a run, from each kind of file."""

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from h2rec.training.inputs import read_inputs

NUM_ITEMS = 60  # of conftest.py's catalog
VECTORS = torch.arange(NUM_ITEMS * 3, dtype=torch.float32).view(NUM_ITEMS, 3) / 4


@pytest.fixture
def content_of(make_config):
    def content_of(path: Path) -> Tensor:
        config = dataclasses.replace(make_config(), embeddings=str(path))
        return read_inputs(config, None).content

    return content_of


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npy_is_mapped_and_never_written(tmp_path, content_of, dtype):
    path = tmp_path / "vectors.npy"
    np.save(path, VECTORS.numpy().astype(dtype))
    before = path.read_bytes()
    content = content_of(path)
    assert content.numpy().dtype == dtype
    assert torch.equal(content.float(), VECTORS)
    assert str(path) in Path("/proc/self/maps").read_text()
    content[0] = 7  # a read-only array would make PyTorch warn
    assert path.read_bytes() == before


def test_safetensors_and_parquet(tmp_path, content_of):
    path = tmp_path / "vectors.safetensors"
    save_file({"other": torch.zeros(1), "embeddings": VECTORS.bfloat16()}, path)
    assert torch.equal(content_of(path), VECTORS.bfloat16())
    path = tmp_path / "vectors.parquet"
    pl.DataFrame({"vector": VECTORS.tolist()}).write_parquet(path)
    assert torch.equal(content_of(path), VECTORS)


def test_refused(tmp_path, content_of):
    path = tmp_path / "vectors.npy"
    with pytest.raises(FileNotFoundError, match=r"vectors\.npy: no such file"):
        content_of(path)
    np.save(path, VECTORS[:-1].numpy())
    with pytest.raises(
        ValueError, match=r"vectors\.npy: expected 60 rows, one per item of the catalog, got 59"
    ):
        content_of(path)
    bad = VECTORS.clone()
    bad[[3, 50], 0] = torch.nan
    np.save(path, bad.numpy())
    with pytest.raises(ValueError, match=r"vectors\.npy must be finite, but 2 of 60 rows .* \(rows 3, 50\)"):
        content_of(path)
