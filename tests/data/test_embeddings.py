import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from h2rec.data import read_embeddings

VECTORS = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npy_is_mapped_and_never_written(tmp_path, dtype):
    path = tmp_path / "vectors.npy"
    np.save(path, VECTORS.astype(dtype))
    before = path.read_bytes()
    vectors = read_embeddings(path, num_items=4)
    assert isinstance(vectors, np.memmap)
    assert vectors.dtype == dtype
    torch.from_numpy(vectors)[0] = 7  # a read-only array would make PyTorch warn
    assert path.read_bytes() == before
    np.testing.assert_array_equal(vectors[1:], VECTORS[1:])


def test_safetensors(tmp_path):
    path = tmp_path / "vectors.safetensors"
    save_file({"anything": torch.from_numpy(VECTORS)}, path)
    np.testing.assert_array_equal(read_embeddings(path, num_items=4), VECTORS)
    save_file({"other": torch.zeros(1), "embeddings": torch.from_numpy(VECTORS).bfloat16()}, path)
    vectors = read_embeddings(path)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, VECTORS)


def test_missing_file_and_unknown_extension(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vectors\.npy: no such file"):
        read_embeddings(tmp_path / "vectors.npy")
    with pytest.raises(ValueError, match=r"expected one of \.npy, \.safetensors, got the extension '\.pt'"):
        read_embeddings(tmp_path / "vectors.pt")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (VECTORS[0], r"expected a matrix \[items, dimensions\], got shape \[3\]"),
        (VECTORS[:0], r"expected a matrix \[items, dimensions\], got shape \[0, 3\]"),
        (VECTORS.astype(np.int64), r"expected float16, float32 or float64, got dtype\('int64'\)"),
        (VECTORS.astype(">f4"), r"expected float16, float32 or float64, got dtype\('>f4'\)"),
        (VECTORS.astype(object), r"cannot be read as \.npy \(without pickle\)"),
        (VECTORS[:3], "expected 4 rows, one per item of the catalog, got 3"),
    ],
    ids=["vector", "empty", "integers", "big-endian", "objects", "rows"],
)
def test_npy_refused(tmp_path, array, message):
    np.save(tmp_path / "vectors.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=r"vectors\.npy: " + message):
        read_embeddings(tmp_path / "vectors.npy", num_items=4)


class Unpicklable:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"not an array", pickle.dumps(Unpicklable())])
def test_damaged_npy(tmp_path, content):
    (tmp_path / "vectors.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"vectors\.npy: cannot be read as \.npy \(without pickle\)"):
        read_embeddings(tmp_path / "vectors.npy")


def test_truncated_npy(tmp_path):
    path = tmp_path / "vectors.npy"
    np.save(path, np.zeros((5000, 4)))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"vectors\.npy: cannot be read as \.npy"):
        read_embeddings(path)


def test_archive_named_npy(tmp_path):
    np.savez(tmp_path / "vectors.npz", VECTORS)
    (tmp_path / "vectors.npz").rename(tmp_path / "vectors.npy")
    with pytest.raises(ValueError, match=r"vectors\.npy: expected one array, got an \.npz archive"):
        read_embeddings(tmp_path / "vectors.npy")


def test_safetensors_refused(tmp_path):
    path = tmp_path / "vectors.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"vectors\.safetensors: cannot be read as \.safetensors"):
        read_embeddings(path)
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=r"expected one tensor, or one named 'embeddings', got: a, b"):
        read_embeddings(path)


def test_rows_that_are_not_finite_are_counted_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr("h2rec.data.embeddings._ROWS_PER_CHECK", 4)
    vectors = np.zeros((11, 2), dtype=np.float16)
    vectors[[3, 5], 0] = np.nan
    vectors[10, 1] = -np.inf
    np.save(tmp_path / "vectors.npy", vectors)
    with pytest.raises(ValueError, match=r"vectors\.npy: 3 of 11 rows hold NaN or infinity: 3, 5, 10$"):
        read_embeddings(tmp_path / "vectors.npy")
    vectors[:] = np.nan
    np.save(tmp_path / "vectors.npy", vectors)
    with pytest.raises(ValueError, match=r"11 of 11 rows hold NaN or infinity: 0, 1, 2, 3, 4, \.\.\.$"):
        read_embeddings(tmp_path / "vectors.npy")
