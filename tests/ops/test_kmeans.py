import numpy as np
import pytest
import torch

from h2rec.ops.kmeans import _lloyd_step, fit_codebooks


def clustered(num_rows=500, num_clusters=8, dim=5, spread=0.01, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_clusters, dim, generator=generator)
    which = torch.randint(0, num_clusters, (num_rows,), generator=generator)
    return centres[which] + spread * torch.randn(num_rows, dim, generator=generator), centres


def test_finds_well_separated_clusters(device):
    x, centres = clustered()
    (codebook,) = fit_codebooks(x.to(device), [8], seed=3)
    nearest = torch.cdist(centres, codebook.cpu()).min(1).values
    assert nearest.max() < 0.01


def test_each_level_lowers_the_error(device):
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)).to(device)
    last = {}
    fit_codebooks(x, [8, 8, 8], progress=lambda level, step, error: last.__setitem__(level, error))
    assert 6 > last[0] > last[1] > last[2] > 0


def test_one_step_takes_means_and_moves_empty_codewords_to_the_farthest_vectors():
    x = torch.tensor([[0.0], [1.0], [10.0], [13.0], [40.0]])
    codebook = torch.tensor([[0.0], [11.0], [500.0], [600.0]])
    updated, error = _lloyd_step(iter([x[:2], x[2:]]), codebook)
    torch.testing.assert_close(updated[:2], torch.tensor([[0.5], [21.0]]))
    assert updated[2:].flatten().tolist() == [40.0, 13.0]  # farthest first
    assert error == pytest.approx((0 + 1 + 1 + 4 + 29**2) / 5)


def test_memory_stream_and_memory_map_agree(tmp_path):
    x, _ = clustered(num_rows=777)
    np.save(tmp_path / "x.npy", x.numpy())
    sources = [
        x,
        x.numpy(),
        np.load(tmp_path / "x.npy", mmap_mode="r"),
        lambda: x.split(100),
    ]
    results = [fit_codebooks(source, [6, 4], num_iters=4, batch_size=256) for source in sources]
    for books in results[1:]:
        for actual, expected in zip(books, results[0], strict=True):
            torch.testing.assert_close(actual, expected)


def test_seed_decides_and_threads_do_not(device):
    x = torch.randn(600, 8, generator=torch.Generator().manual_seed(0)).to(device)
    before = torch.get_num_threads()
    books = []
    try:
        for threads, seed in ((1, 0), (2, 0), (2, 1)):
            torch.set_num_threads(threads)
            books.append(fit_codebooks(x, [16], seed=seed, num_iters=5)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(books[0], books[1])
    assert not torch.equal(books[1], books[2])


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(20, 3),
        torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat(10, 1),
        torch.arange(20.0)[:, None] * torch.eye(3)[0],
    ],
    ids=["one point", "two points", "constant columns"],
)
def test_duplicates_and_constant_columns(x):
    books = fit_codebooks(x, [4, 2])
    assert all(book.isfinite().all() for book in books)


def test_the_input_is_left_alone():
    x, _ = clustered(50)
    before = x.clone()
    fit_codebooks(x, [4, 4])
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("x", "sizes", "options", "message"),
    [
        (torch.ones(3, 2), [4], {}, "at least as many rows as a level has codewords, 4, got 3"),
        (torch.ones(0, 2), [1], {}, "at least as many rows as a level has codewords, 1, got 0"),
        (torch.ones(3, 2), [], {}, r"sizes must be positive, one for each level, got \[\]"),
        (torch.ones(3, 2), [2, 0], {}, r"sizes must be positive, one for each level, got \[2, 0\]"),
        (torch.ones(3, 2), [2], {"num_iters": 0}, "num_iters must be at least 1, got 0"),
        (
            torch.tensor([[1.0], [torch.nan], [torch.inf]]),
            [1],
            {},
            r"2 of 3 rows hold NaN or infinity \(rows 1, 2\)",
        ),
    ],
)
def test_bad_input(x, sizes, options, message):
    with pytest.raises(ValueError, match=message):
        fit_codebooks(x, sizes, **options)
