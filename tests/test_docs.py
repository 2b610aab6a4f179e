"""Examples of the README and of docs/tokenize.md run as they stand, in a folder with what they read."""

import re
from pathlib import Path

import numpy as np
import pytest

from h2rec import SemanticIds

ROOT = Path(__file__).parents[1]


def example(page: str) -> str:
    """The page's only example in Python."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return code


@pytest.fixture
def folder(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    SemanticIds(rng.integers(0, 4, (100, 3)), codebook_sizes=(4, 4, 4)).save(tmp_path / "sids.safetensors")
    for name, rows in (("vectors", 400), ("new", 5)):
        np.save(tmp_path / f"{name}.npy", rng.standard_normal((rows, 6), dtype=np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme(folder):
    names = {}
    exec(example("README.md"), names)
    assert names["semantic"].shape == names["hashed"].shape == (4, 64)
    assert names["loss"].item() >= 0


def test_tokenize(folder):
    names = {}
    exec(example("docs/tokenize.md"), names)
    assert names["longer"].num_items == 405
    assert names["allowed"].shape == (2, 256)
    assert names["allowed"].any()
    assert (folder / "quality.png").exists()
    assert SemanticIds.load(folder / "sids.safetensors") == names["result"].sids
