"""What tests of the operator do not reach: parts of the Triton kernels by themselves."""

import pytest
import torch

from h2rec import reference

kernels = pytest.importorskip("h2rec.kernels", reason="triton is not installed")
pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize(
    ("pooling", "hash_mode", "combine"),
    [
        ("sum", "direct", None),
        ("mean", "multi", "concat"),
        ("levels", "prefix", None),
        ("concat", "multi", "concat"),
    ],
)
def test_forward_matches_the_reference(pooling, hash_mode, combine, generator):
    sizes, num_items, num_rows = [5, 11, 1], 97, 97
    codes = torch.stack([torch.randint(k, (num_items,), generator=generator) for k in sizes], 1)
    codebooks, table = (
        torch.randn(17, 12, generator=generator),
        torch.randn(num_rows, 20, generator=generator),
    )
    constants = None if hash_mode == "direct" else torch.randint(2**62, (3, 2), generator=generator) | 1
    item_ids = torch.randint(num_items, (65,), generator=generator)
    options = (hash_mode, constants, 0, num_items, pooling, 13, combine, False)
    arguments = (item_ids, codes, codebooks, sizes, table, *options)
    torch.testing.assert_close(
        kernels.harmonized_embedding(*arguments), reference.harmonized_embedding(*arguments)
    )


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
