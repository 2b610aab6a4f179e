import numpy as np
import polars as pl
import pytest
import safetensors.torch
import torch

from h2rec.ops.vector_batches import vector_batches
from h2rec.tokenizers import RQKMeans, open_vectors, vector_files

X = torch.randn(301, 6, generator=torch.Generator().manual_seed(0))


def as_npy(path, x):
    np.save(path, x.numpy())


def as_safetensors(path, x):
    safetensors.torch.save_file({"embeddings": x, "other": torch.zeros(3)}, path)


def as_parquet(path, x):
    pl.DataFrame({"item": range(len(x)), "vector": x.tolist()}).write_parquet(path)


WRITERS = {".npy": as_npy, ".safetensors": as_safetensors, ".parquet": as_parquet}


@pytest.fixture(params=WRITERS)
def path(request, tmp_path, monkeypatch):
    monkeypatch.setattr(vector_files, "_BATCH_BYTES", 1000)
    monkeypatch.setattr(vector_files, "_SLICE_BYTES", 1000)
    path = tmp_path / f"x{request.param}"
    WRITERS[request.param](path, X)
    return path


def read(source):
    return torch.cat(list(vector_batches(source, 100)))


def test_reads_every_row_each_time(path):
    source = open_vectors(path)
    assert source.shape == (301, 6)
    assert len(list(source())) > 5
    for _ in range(2):
        assert torch.equal(read(source), X)


def test_codes_are_those_of_the_same_vectors_in_memory(path):
    tokenizer = RQKMeans(2, 8, num_iters=4, batch_size=64).fit(X)
    seen = []
    sids = tokenizer.tokenize(open_vectors(path), progress=seen.append)
    assert torch.equal(sids.codes, tokenizer.tokenize(X).codes)
    assert (seen[-1].done, seen[-1].total) == (301, 301)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"only": X.to(dtype)}, path)
    assert torch.equal(read(open_vectors(path)), X.to(dtype).float())


CHANGES = {
    "grows": lambda content: content + b"more",
    "shrinks": lambda content: content[: len(content) // 2],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_changes_is_noticed(path, change):
    source = open_vectors(path)
    batches = source()
    next(batches)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match="changed while it was being read"):
        list(batches)
    with pytest.raises(ValueError, match="changed while it was being read"):
        next(source())


def cut(path):
    as_npy(path, X)
    path.write_bytes(path.read_bytes()[:-8])


def cut_safetensors(path):
    as_safetensors(path, X)
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        (
            "x.csv",
            lambda path: path.touch(),
            "expected one of .npy, .safetensors, .parquet, got the extension '.csv'",
        ),
        ("x.npy", lambda path: path.write_bytes(b"nonsense"), r"cannot be read as \.npy"),
        ("x.npy", lambda path: np.save(path, np.array([{}])), "expected float16, float32 or float64"),
        (
            "x.npy",
            lambda path: np.save(path, np.zeros((3, 2), np.int64)),
            "expected float16, float32 or float64",
        ),
        ("x.npy", lambda path: np.save(path, np.zeros(3)), r"expected a matrix .* got shape \[3\]"),
        ("x.npy", lambda path: np.save(path, np.zeros((3, 2), order="F")), "Fortran order"),
        ("x.npy", cut, r"truncated: \d+ bytes are announced"),
        ("x.safetensors", lambda path: path.write_bytes(b"nonsense" * 3), r"cannot be read as \.safetensors"),
        (
            "x.safetensors",
            lambda path: safetensors.torch.save_file({"a": X, "b": X.clone()}, path),
            "expected one tensor, or one named 'embeddings', got: a, b",
        ),
        (
            "x.safetensors",
            lambda path: safetensors.torch.save_file({"a": X.int()}, path),
            "expected one of F16, BF16, F32, F64, got I32",
        ),
        ("x.safetensors", cut_safetensors, "truncated"),
        ("x.parquet", lambda path: path.write_bytes(b"nonsense"), "cannot be read as parquet"),
        (
            "x.parquet",
            lambda path: pl.DataFrame({"a": [1, 2]}).write_parquet(path),
            "expected exactly one column of lists, got: a",
        ),
    ],
)
def test_bad_files(tmp_path, name, write, message):
    path = tmp_path / name
    write(path)
    with pytest.raises(ValueError, match=message):
        open_vectors(path)


def test_uneven_rows(tmp_path):
    path = tmp_path / "x.parquet"
    pl.DataFrame({"a": [[1.0, 2.0], [3.0]]}).write_parquet(path)
    with pytest.raises(ValueError, match="expected 2 numbers in every row of column 'a'"):
        read(open_vectors(path))


@pytest.mark.parametrize("missing", ["middle", "file"])
def test_a_parquet_file_that_is_damaged_behind_its_footer(tmp_path, missing):
    path = tmp_path / "x.parquet"
    pl.DataFrame({"a": X.tolist()}).write_parquet(path, row_group_size=100)
    source = open_vectors(path)
    if missing == "middle":
        content = bytearray(path.read_bytes())
        content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
        path.write_bytes(content)
        source = open_vectors(path)
    else:
        path.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"x\.parquet"):
        read(source)


def test_wrong_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_vectors(tmp_path / "x.npy")
    with pytest.raises(ValueError, match="column is for parquet files"):
        open_vectors(tmp_path / "x.npy", column="a")
    as_parquet(tmp_path / "x.parquet", X)
    with pytest.raises(ValueError, match="expected a column of lists 'no', got: item, vector"):
        open_vectors(tmp_path / "x.parquet", column="no")
