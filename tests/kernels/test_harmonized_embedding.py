"""What tests of the operator do not reach: parts of the Triton kernels by themselves."""

import importlib

import pytest
import torch

from h2rec.testing import assert_as_accurate_as_eager

kernels = pytest.importorskip("h2rec.kernels", reason="triton is not installed")
_of_operator = importlib.import_module("h2rec.kernels.harmonized_embedding")
_one_hot_sums = importlib.import_module("h2rec.kernels._one_hot_sums")
_sum_by_row = importlib.import_module("h2rec.kernels._sum_by_row")
pytestmark = pytest.mark.usefixtures("poisoned_empty")


def test_what_is_out_of_range_is_not_read_and_gives_nan(generator):
    codes = torch.tensor([[0, 1], [1, 0], [2, 3]])  # the last two are in no codebook
    codebooks, table = torch.randn(5, 8, generator=generator), torch.randn(3, 8, generator=generator)
    item_ids = torch.tensor([0, 2, 3, -1, -7, 1])
    semantic, hashed = kernels.harmonized_embedding(
        item_ids, codes, codebooks, [2, 3], table, "direct", None, 0, 3, "sum", -7, None, False
    )
    assert semantic.isnan().all(1).tolist() == [False, True, True, True, False, False]
    assert torch.equal(semantic[5], codebooks[1] + codebooks[2])
    assert torch.equal(hashed[[0, 5]], table[[0, 1]])
    assert torch.equal(hashed.isnan(), semantic.isnan())
    assert not semantic[4].any()


@pytest.mark.parametrize("by_level", [False, True])
@pytest.mark.parametrize("name", ["one_hot_sums", "sum_by_row", "sum_by_row, sparse"])
def test_sums_of_runs_of_every_length(name, by_level, dtype, generator):
    """Rows that no token reads, that one reads, and that are read more often than one program sums."""
    if name == "one_hot_sums" and dtype == torch.float64:
        dtype = torch.float32  # sums of fp64 are left to the other
    sizes, dim, num_tokens = [70, 5], 12, 1300
    rows = torch.randint(70, 75, (num_tokens, 2), generator=generator, dtype=torch.int32)
    rows[:, 0] = 7  # in two parts: after 1200 tokens one after the other ...
    rows[1200:1250, 0] = torch.randint(70, (50,), generator=generator, dtype=torch.int32)
    rows[1250:1260] = sum(sizes)  # ... and around tokens that read nothing
    grad = torch.randn(num_tokens, 2 * dim if by_level else dim, generator=generator).to(dtype)
    level_stride = dim if by_level else 0
    if name == "one_hot_sums":
        sums = _one_hot_sums.one_hot_sums(rows, sizes, grad, level_stride, dim, 0.5)
    else:
        sums, read = _sum_by_row.sum_by_row(
            rows, sum(sizes), grad, level_stride, dim, 0.5, sparse=name.endswith("sparse")
        )

    def expected(in_dtype: torch.dtype) -> torch.Tensor:
        total = torch.zeros(sum(sizes) + 1, dim, dtype=in_dtype)
        for level in range(2):
            total.index_add_(0, rows[:, level], grad[:, level * level_stride :][:, :dim].to(in_dtype))
        return total[:-1] / 2

    if name == "sum_by_row, sparse":
        assert torch.equal(read, rows[rows < sum(sizes)].unique())
        sums = torch.zeros(sum(sizes), dim, dtype=dtype).index_copy_(0, read, sums)
    assert sums.dtype == dtype
    assert_as_accurate_as_eager(sums, expected(dtype), expected(torch.float64))


def test_codebook_sums_are_chosen_by_shape():
    choose = _of_operator.products_are_cheaper
    assert choose(25_600, [256] * 4, 64, torch.float32)
    assert not choose(1_000_000, [8192] * 3, 128, torch.float32)
    assert choose(200_000, [256] * 4, 64, torch.bfloat16)
    assert not choose(200_000, [256] * 4, 64, torch.float32)
    assert not choose(64, [4], 8, torch.float64)
