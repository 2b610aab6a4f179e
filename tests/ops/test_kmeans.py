import numpy as np
import pytest
import torch

from h2rec.ops.kmeans import _leading_directions, _lloyd_step, _nearest, _Sums, fit_codebooks


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


def test_one_step_takes_means_and_splits_what_has_the_largest_error():
    x = torch.tensor([[0.0], [1.0], [10.0], [13.0], [40.0]])
    codebook = torch.tensor([[0.0], [11.0], [500.0], [600.0]])
    updated, counts, error = _lloyd_step(iter([x[:2], x[2:]]), codebook)
    torch.testing.assert_close(updated[:2], torch.tensor([[0.5], [21.0]]))
    spread = (546 / 3) ** 0.5
    torch.testing.assert_close(updated[2:], torch.tensor([[21 + 0.01 * spread], [0.5 + 0.01 * 0.5]]))
    assert counts.tolist() == [2, 3, 0, 0]
    assert error == pytest.approx((0 + 1 + 1 + 4 + 29**2) / 5)


def test_mini_batches_come_close_in_fewer_passes(device):
    x = torch.randn(4000, 12, generator=torch.Generator().manual_seed(0)).to(device)

    def error(**options):
        (codebook,) = fit_codebooks(x, [32], batch_size=500, **options)
        return torch.cdist(x, codebook).min(1).values.square().mean()

    assert error(mini_batch=True, num_iters=6) < 1.02 * error(num_iters=25)


def test_balance_evens_the_load(device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 10, generator=generator) * torch.rand(3000, 1, generator=generator) ** 3
    x = x.to(device)

    def largest(balance):
        (codebook,) = fit_codebooks(x, [16], balance=balance)
        return torch.bincount(torch.cdist(x, codebook).argmin(1)).max()

    assert largest(0.5) < 0.8 * largest(0.0)


def test_the_start_is_as_good_as_many_steps_from_random_rows(device):
    generator = torch.Generator().manual_seed(0)
    scales = torch.arange(1, 101).float() ** -0.5
    x = (torch.randn(3000, 100, generator=generator) * scales).to(device)
    errors = []
    fit_codebooks(x, [64], num_iters=20, progress=lambda level, step, error: errors.append((step, error)))
    assert [step for step, _ in errors] == list(range(10, 10 + len(errors)))
    codebook = x[:64]
    for _ in range(20):
        codebook, _, error = _lloyd_step([x], codebook)
    assert errors[-1][1] < error


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


def test_prices_of_nothing_change_nothing(device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 40, generator=generator).to(device)
    codebook = torch.randn(64, 40, generator=generator).to(device)
    assert torch.equal(_nearest(x, codebook), _nearest(x, codebook, torch.zeros(64, device=device)))


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("options", [{}, {"mini_batch": True, "balance": 0.5}], ids=["lloyd", "mini-batch"])
def test_seed_decides_and_threads_do_not(device, options, set_threads):
    x = torch.randn(5000, 384, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 385) ** -0.5
    x = x.to(device)
    books = []
    for threads, seed in ((1, 0), (2, 0), (8, 0), (2, 1)):
        set_threads(threads)
        books.append(
            torch.cat(fit_codebooks(x, [64, 16], seed=seed, num_iters=6, batch_size=2048, **options))
        )
    assert torch.equal(books[0], books[1])
    assert torch.equal(books[0], books[2])
    assert not torch.equal(books[1], books[3])


def test_leading_directions_do_not_depend_on_threads(device, set_threads):
    """Their last bits seldom change a codeword, so that the test above would seldom notice."""
    x = torch.randn(5000, 384, generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    for threads in (1, 2, 8):
        set_threads(threads)
        found.append(_leading_directions(x, 64, torch.Generator().manual_seed(0)))
        assert torch.get_num_threads() == threads
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


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
        (torch.ones(3, 2), [2], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (torch.ones(3, 2), [2], {"balance": -1.0}, "balance must be at least 0, got -1.0"),
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


def test_sums_are_the_same_in_any_order_of_batches():
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(40, 16, 5, generator=generator) * torch.logspace(-7, 7, 40)[:, None, None]
    codebook = torch.randn(3, 5, generator=generator)
    largest = batches.abs().max().item()

    def sums(order, bounds):
        total = _Sums(codebook, bounds)
        for batch in batches[order]:
            total.add(batch, _nearest(batch, codebook))
        return total.sums, total.squares

    rows, order = 40 * 16, torch.randperm(40, generator=generator)
    bounds = rows * largest, rows * 5 * largest**2
    for here, there, plain, unbounded in zip(
        sums(torch.arange(40), bounds),
        sums(order, bounds),
        sums(order, None),
        sums(torch.arange(40), None),
        strict=True,
    ):
        assert torch.equal(here, there)
        assert not torch.equal(plain, unbounded)  # what would come of them otherwise
        torch.testing.assert_close(here, plain, rtol=1e-9, atol=1e-9 * plain.abs().max().item())
