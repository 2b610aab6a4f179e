import copy
import json
import os
import pickle
import struct

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from h2rec import SemanticIds, ops
from h2rec.semantic_ids import _group_codes, _group_codes_with_numpy

CODES = torch.tensor([[0, 1], [2, 0], [0, 1], [1, 1]])


def make(num_items=20, sizes=(4, 3), dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(0, k, (num_items,), generator=generator) for k in sizes], 1)
    codebooks = [torch.randn(k, dim, generator=generator) for k in sizes]
    return SemanticIds(codes, codebooks=codebooks, provenance={"method": "by hand"})


def test_stats_by_hand():
    stats = SemanticIds(CODES, codebook_sizes=(4, 2)).stats()
    assert (stats.num_items, stats.num_levels, stats.distinct, stats.largest_group) == (4, 2, 3, 2)
    assert stats.collision_rate == 0.5
    assert stats.utilisation == (0.75, 1.0)
    assert stats.perplexity[0] == pytest.approx(np.exp(-(0.5 * np.log(0.5) + 2 * 0.25 * np.log(0.25))))
    table = stats.table()
    for text in ("50.00%", "75.0%", "distinct tuples  3"):
        assert text in table


def test_stats_of_an_empty_catalog():
    stats = SemanticIds(torch.zeros(0, 2, dtype=torch.int32), codebook_sizes=(4, 2)).stats()
    assert (stats.num_items, stats.distinct, stats.largest_group, stats.collision_rate) == (0, 0, 0, 0.0)


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), max_size=30))
def test_lookup_finds_every_item_of_a_tuple(rows):
    codes = torch.tensor(rows, dtype=torch.int32).reshape(-1, 3)
    sids = SemanticIds(codes, codebook_sizes=(4, 4, 4))
    for wanted in {*rows, (0, 1, 2), (3, 3, 3)}:
        assert sids.lookup(list(wanted)).tolist() == [i for i, row in enumerate(rows) if row == wanted]


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 2)), max_size=40))
def test_compiled_and_numpy_grouping_agree(rows):
    codes = np.array(rows, dtype=np.int32).reshape(-1, 2)
    for actual, expected in zip(_group_codes(codes), _group_codes_with_numpy(codes), strict=True):
        assert np.array_equal(actual, expected)


def test_append_keeps_published_codes_and_encodes_new_items():
    sids = make()
    new = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))
    longer = sids.append(new).append(new[:2])
    assert torch.equal(longer.codes[:20], sids.codes)
    assert torch.equal(longer.codes[20:27], ops.residual_quantize(new, sids.codebooks)[1])
    assert longer.provenance == {"method": "by hand", "appended_items": "9"}
    with pytest.raises(ValueError, match="no codebooks, so new_vectors cannot be encoded"):
        SemanticIds(CODES).append(new)
    with pytest.raises(ValueError, match="new_vectors must have dimension 5, as the codebooks have, got 3"):
        sids.append(new[:, :3])
    with pytest.raises(ValueError, match="new_vectors must be finite, but 1 of 1 rows"):
        sids.append(torch.full((1, 5), torch.nan))


@pytest.mark.parametrize("with_codebooks", [True, False])
def test_save_and_load(tmp_path, with_codebooks):
    sids = make()
    if not with_codebooks:
        sids = SemanticIds(sids.codes, codebook_sizes=(9, 3))
    path = tmp_path / "sids.safetensors"
    sids.save(path)
    assert SemanticIds.load(path) == sids
    assert os.listdir(tmp_path) == ["sids.safetensors"]


def test_equality_and_copies():
    sids = make()
    assert copy.deepcopy(sids) == sids
    assert make(seed=1) != sids
    assert SemanticIds(sids.codes, codebook_sizes=sids.codebook_sizes) != sids
    assert repr(sids) == "SemanticIds(num_items=20, codebook_sizes=(4, 3), dim=5, method='by hand')"
    codes = CODES.int()
    held = SemanticIds(codes)
    codes.zero_()
    assert torch.equal(held.codes, CODES.int())


def test_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "sids.safetensors"
    make().save(path)
    before = path.read_bytes()

    def write_a_little_and_fail(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", write_a_little_and_fail)
    with pytest.raises(OSError, match="No space left"):
        make(seed=1).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["sids.safetensors"]


def saved(**changes):
    """A writer of a file that differs in some tensors (None: left out) or metadata entries from a good one."""

    def write(path):
        sids = make()
        tensors = {"codes": sids.codes, "codebooks.0": sids.codebooks[0], "codebooks.1": sids.codebooks[1]}
        metadata = {
            "format": "h2rec.semantic_ids",
            "version": "1",
            "codebook_sizes": "[4, 3]",
            "provenance": "{}",
        }
        for name, value in changes.items():
            name = name.replace("codebooks_", "codebooks.")
            target = metadata if isinstance(value, str) or name in metadata else tensors
            if value is None:
                del target[name]
            else:
                target[name] = value
        safetensors.torch.save_file(tensors, path, metadata)

    return write


def cut(keep):
    def write(path):
        make().save(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])

    return write


def with_header(header):
    return lambda path: path.write_bytes(struct.pack("<Q", len(header)) + header)


def test_whoever_may_read_new_files_may_read_it(tmp_path):
    path, other = tmp_path / "sids.safetensors", tmp_path / "other"
    other.touch()
    make().save(path)
    assert path.stat().st_mode == other.stat().st_mode


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (saved(version="2"), "written in format version 2, this h2rec reads versions up to 1; upgrade"),
        (saved(version="new"), "its format version must be a positive integer, got 'new'"),
        (saved(format="other"), "its metadata says format 'other'"),
        (saved(codebook_sizes="4"), "metadata 'codebook_sizes' must be a JSON list, got '4'"),
        (saved(provenance="nonsense"), "metadata 'provenance' must be a JSON dict, got 'nonsense'"),
        (saved(codes=None), "tensors codes are missing"),
        (saved(codebooks_1=None), r"tensors codebooks\.1 are missing"),
        (saved(extra=torch.zeros(1)), "tensors extra do not belong to semantic IDs of 2 levels"),
        (saved(codes=make().codes.long()), r"tensor codes must be torch\.int32, got torch\.int64"),
        (saved(codes=make().codes + 1), r"codes must lie in \[0, 4\) at level 0, but \d+ of 20 do not"),
        (saved(codes=make().codes - 1), r"codes must lie in \[0, 4\) at level 0"),
        (saved(codes=make().codes[:, 0].clone()), r"codes must have shape \[N, L\] with L >= 1, got \[20\]"),
        (saved(codebooks_0=torch.full((4, 5), torch.nan)), r"codebooks\[0\] must be finite, but 4 of 4"),
        (saved(codebooks_0=torch.zeros(9, 5)), r"codebook_sizes\[0\] is 4, but codebooks\[0\] has 9"),
        (saved(codebooks_0=torch.zeros(4, 6)), r"codebooks\[1\] has dimension 5, but codebooks\[0\] has 6"),
        (cut(0.99), r"truncated: the tensors have \d+ bytes, but only \d+ are there"),
        (cut(0.2), r"truncated: the header has \d+ bytes"),
        (cut(0), "the file is empty"),
        (with_header(b"{nonsense"), "corrupt header"),
        (with_header(json.dumps({"codes": 3}).encode()), "corrupt header"),
        (lambda path: path.write_bytes(pickle.dumps(CODES)), "a pickle; h2rec never unpickles"),
        (
            lambda path: torch.save(CODES, path),
            "a zip archive, as torch.save writes it; h2rec never unpickles",
        ),
        (lambda path: path.write_text("item_id,code\n1,2\n"), "not a safetensors file"),
        (lambda path: safetensors.torch.save_file({"x": CODES}, path), "not semantic IDs"),
    ],
)
def test_bad_files(tmp_path, write, message):
    path = tmp_path / "sids.safetensors"
    write(path)
    with pytest.raises(ValueError, match=message) as caught:
        SemanticIds.load(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing: no such file"):
        SemanticIds.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"codes": CODES.float()}, TypeError, "codes must be integers, got torch.float32"),
        ({"codes": CODES[0]}, ValueError, r"codes must have shape \[N, L\] with L >= 1, got \[2\]"),
        (
            {"codes": CODES, "codebook_sizes": (2, 2)},
            ValueError,
            r"\[0, 2\) at level 0, but 1 of 4 .*2 in row 1",
        ),
        ({"codes": CODES, "codebook_sizes": (4,)}, ValueError, "one entry for each of 2 levels, got 1"),
        (
            {"codes": CODES, "codebook_sizes": (4, 2.0)},
            TypeError,
            r"codebook_sizes\[1\] must be an integer, got float",
        ),
        ({"codes": CODES, "codebook_sizes": (4, 0)}, ValueError, r"codebook_sizes\[1\] must lie in"),
        ({"codes": CODES[:0]}, ValueError, "codebook_sizes must be given"),
        (
            {"codes": CODES, "codebooks": torch.zeros(4, 3)},
            ValueError,
            r"codebooks must have shape \[L, K, D\]",
        ),
        (
            {"codes": CODES, "codebooks": torch.zeros(3, 4, 3)},
            ValueError,
            "one entry for each of 2 levels, got 3",
        ),
        ({"codes": CODES, "codebooks": torch.zeros(2, 4, 3).int()}, TypeError, "must be floating point"),
        ({"codes": CODES, "provenance": {"seed": 0}}, TypeError, "provenance must map strings to strings"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        SemanticIds(**arguments)


@pytest.mark.parametrize(
    ("codes", "error", "message"),
    [
        ([0], ValueError, r"codes must have shape \[2\], got \[1\]"),
        ([0, 5], ValueError, r"codes must lie in \[0, 3\) at level 1"),
        ([0.5, 1.0], TypeError, "codes must be integers"),
    ],
)
def test_bad_lookup(codes, error, message):
    with pytest.raises(error, match=message):
        make().lookup(codes)
