import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from h2rec import ops
from h2rec.testing import assert_as_accurate_as_eager

OPERATOR = "alignment_loss"
pytestmark = pytest.mark.usefixtures("poisoned_empty")


def eager(hash_emb, semantic_emb, temperature, weights, reduction="mean"):
    """What a user would write, with the weights [B, B] given."""
    logits = F.normalize(hash_emb, eps=1e-12) @ F.normalize(semantic_emb, eps=1e-12).T / temperature
    weighted = logits + weights.to(logits.dtype).log()
    rows = logits.logsumexp(1) - weighted.logsumexp(1)
    columns = logits.logsumexp(0) - weighted.logsumexp(0)
    losses = (rows + columns) / 2
    return losses if reduction == "none" else getattr(losses, reduction)()


def weights_by_definition(
    batch_size, item_ids=None, codes=None, min_shared_codes=None, pair_index=None, pair_weight=None
):
    weights = torch.zeros(batch_size, batch_size, dtype=torch.float64)
    if pair_index is not None:
        for (i, j), weight in zip(pair_index.T.tolist(), pair_weight.tolist(), strict=True):
            weights[i, j] = max(weights[i, j], weight)
            weights[j, i] = max(weights[j, i], weight)
    for i in range(batch_size):
        for j in range(batch_size):
            same_item = item_ids is not None and item_ids[i] == item_ids[j]
            alike = codes is not None and (codes[i] == codes[j]).sum() >= min_shared_codes
            if i == j or same_item or alike:
                weights[i, j] = 1
    return weights


def make_positives(kind, batch_size, generator):
    item_ids = torch.randint(0, max(1, batch_size // 2), (batch_size,), generator=generator)
    codes = torch.randint(0, 3, (batch_size, 4), generator=generator)
    num_pairs = 2 * batch_size
    pair_index = torch.randint(0, batch_size, (2, num_pairs), generator=generator)
    pair_weight = torch.rand(num_pairs, generator=generator) * 0.7 + 0.3
    given = {
        "none": {},
        "items": {"item_ids": item_ids},
        "all equal": {"item_ids": torch.zeros_like(item_ids)},
        "codes": {"codes": codes, "min_shared_codes": 2},
        "pairs": {"pair_index": pair_index, "pair_weight": pair_weight},
    }
    return {k: v for values in given.values() for k, v in values.items()} if kind == "all" else given[kind]


def to_device(options, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def check_against_eager(hash_emb, semantic_emb, temperature, options, generator, reduction="mean"):
    device, dtype = hash_emb.device, hash_emb.dtype
    weights = weights_by_definition(len(hash_emb), **options).to(device)
    options = to_device(options, device)

    def run(function, to, embeddings=(hash_emb, semantic_emb)):
        leaves = [x.detach().to(to).requires_grad_() for x in embeddings]
        leaves.append(torch.tensor(temperature, dtype=to, device=device, requires_grad=True))
        return function(*leaves), leaves

    ours, our_leaves = run(
        lambda h, s, t: ops.alignment_loss(h, s, temperature=t, reduction=reduction, **options), dtype
    )
    temperature = float(torch.tensor(temperature, dtype=dtype))  # what a half-precision one stands for
    assert ours.dtype == torch.promote_types(dtype, torch.float32)
    cotangent = torch.randn(ours.shape, generator=generator, dtype=torch.float64).to(device)

    def run_eager(to, *embeddings):
        loss, leaves = run(lambda *leaves: eager(*leaves, weights, reduction), to, *embeddings)
        loss.backward(cotangent.to(loss.dtype))
        return loss.detach(), *(leaf.grad for leaf in leaves)

    ours.backward(cotangent.to(ours.dtype))
    others = [torch.randn(2, *hash_emb.shape, generator=generator).to(device, dtype) for _ in range(7)]
    draws = [(run_eager(dtype, other)[-1], run_eager(torch.float64, other)[-1]) for other in others]
    *results, (of_temperature, *eager_and_exact) = zip(
        (ours.detach(), *(leaf.grad for leaf in our_leaves)),
        run_eager(dtype),
        run_eager(torch.float64),
        strict=True,
    )
    for result in results:
        assert_as_accurate_as_eager(*result)
    assert_as_accurate_as_eager(of_temperature, *eager_and_exact, draws=draws)


@pytest.mark.parametrize("batch_size", [1, 2, 63, 64, 65, 131])
@pytest.mark.parametrize("positives", ["none", "items", "all equal", "codes", "pairs", "all"])
def test_matches_eager(backend, positives, batch_size, device, generator):
    h, s = torch.randn(2, batch_size, 24, generator=generator).to(device)
    options = make_positives(positives, batch_size, generator)
    check_against_eager(h, s, 0.1, options, generator)


def test_sums_over_a_large_batch_keep_small_terms(backend, device, generator):
    h, s = torch.randn(2, 1000, 64, generator=generator).to(device)
    check_against_eager(h, s, 0.5, make_positives("none", 1000, generator), generator)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_dtypes_and_reductions(backend, reduction, dtype, device, generator):
    h, s = torch.randn(2, 33, 17, generator=generator).to(device, dtype)
    check_against_eager(h, s, 0.25, make_positives("all", 33, generator), generator, reduction)


@pytest.mark.parametrize("temperature", [0.01, 0.02, 1.0, 30.0])
def test_temperatures(backend, temperature, device, generator):
    h, s = torch.randn(2, 40, 8, generator=generator).to(device)
    check_against_eager(h, s, temperature, make_positives("all", 40, generator), generator)


def test_huge_and_tiny_norms(backend, device, generator):
    h, s = torch.randn(2, 40, 8, generator=generator, dtype=torch.float64).to(device)
    scale = torch.logspace(-10, 37, 40, dtype=torch.float64, device=device).unsqueeze(1)
    large, small = (h * scale).float().requires_grad_(), (s * scale.flip(0)).float()
    loss = ops.alignment_loss(large, small)
    assert loss.item() == pytest.approx(ops.alignment_loss(h, s).item(), rel=1e-5)
    loss.backward()
    (expected,) = torch.autograd.grad(ops.alignment_loss(h.requires_grad_(), s), h)
    torch.testing.assert_close(large.grad.double() * scale, expected, rtol=1e-3, atol=1e-5)


def test_zero_rows_count_as_zero_and_get_no_gradient(backend, device, generator):
    h, s = torch.randn(2, 9, 5, generator=generator).to(device)
    h[3] = 0
    h[4] = 1e-14
    h.requires_grad_()
    loss = ops.alignment_loss(h, s)
    loss.backward()
    assert loss.isfinite()
    assert not h.grad[3:5].any()
    assert h.grad[5:].any()


@pytest.mark.parametrize("temperature", [1 / 300, 1 / 700])
def test_cold(backend, temperature, device, generator):
    h, s = torch.randn(2, 40, 8, generator=generator).to(device)
    check_against_eager(h, s, temperature, make_positives("items", 40, generator), generator)


def test_ids_beyond_32_bits(backend, device, generator):
    h, s = torch.randn(2, 6, 5, generator=generator).to(device)
    ids = torch.tensor([0, 2**32, 2**32, -(2**40), 0, 7], device=device)
    small = torch.tensor([0, 1, 1, 2, 0, 7], device=device)
    assert torch.equal(ops.alignment_loss(h, s, item_ids=ids), ops.alignment_loss(h, s, item_ids=small))


def test_same_bits_for_any_number_of_threads(backend, device, generator):
    batch_size = 100 if backend == "triton" and device == "cpu" else 300  # the interpreter takes long
    leaves = [x.requires_grad_() for x in torch.randn(2, batch_size, 70, generator=generator).to(device)]
    options = to_device(make_positives("all", batch_size, generator), device)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            loss = ops.alignment_loss(*leaves, **options)
            results.append((loss, *torch.autograd.grad(loss, leaves)))
    finally:
        torch.set_num_threads(threads)
    if backend == "reference":  # plain products promise nothing
        torch.testing.assert_close(results[0], results[2])
    else:
        for first, *others in zip(*results, strict=True):
            assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(("first_row", "num_rows"), [(0, 131), (0, 5), (70, 61), (129, 2), (40, 0)])
@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_a_stripe_of_rows_is_its_part_of_all(backend, first_row, num_rows, temperature, device, generator):
    h, s = torch.randn(2, 131, 24, generator=generator, dtype=torch.float64).to(device)
    given = to_device(make_positives("all", 131, generator), device)
    arguments = (h, s, torch.tensor(temperature, dtype=torch.float64), *given.values())
    operator, backward = torch.ops.h2rec.alignment_loss, torch.ops.h2rec.alignment_loss_backward
    rows = slice(first_row, first_row + num_rows)
    stripes = [(0, first_row), (first_row, num_rows), (rows.stop, 131 - rows.stop)]
    parts = [operator(*arguments, *stripe) for stripe in stripes]
    sums = row_sums, column_sums = operator(*arguments, 0, 131)
    torch.testing.assert_close(parts[1][0], row_sums[:, rows])
    torch.testing.assert_close(torch.stack([part[1] for part in parts]).logsumexp(0), column_sums)
    grads = torch.randn(2, 2, 131, generator=generator, dtype=torch.float64).to(device)
    whole = backward(*grads, *sums, *arguments, 0, 131)
    parts = [backward(*grads, *sums, *arguments, *stripe) for stripe in stripes]
    for k in range(2):
        torch.testing.assert_close(torch.cat([part[k] for part in parts]), whole[k])
    torch.testing.assert_close(sum(part[2] for part in parts), whole[2])


def test_one_row_gives_zero(backend, device):
    assert ops.alignment_loss(torch.ones(1, 3, device=device), -torch.ones(1, 3, device=device)).item() == 0


def test_mixed_dtypes_are_promoted(backend, device, generator):
    h, s = torch.randn(2, 9, 5, generator=generator).to(device)
    expected = ops.alignment_loss(h.bfloat16().float(), s)
    assert torch.equal(ops.alignment_loss(h.bfloat16(), s), expected)


@pytest.mark.parametrize("positives", ["none", "all"])
def test_gradcheck(backend, positives, device, generator):
    h, s = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64).to(device)
    options = to_device(make_positives(positives, 6, generator), device)
    temperature = torch.tensor(0.4, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a, b, t: ops.alignment_loss(a, b, temperature=t, reduction="none", **options),
        (h.requires_grad_(), s.requires_grad_(), temperature),
        fast_mode=backend == "triton",  # the interpreter takes long, and each entry is a call
    )


def test_opcheck(backend, device, generator):
    h, s = (x.requires_grad_() for x in torch.randn(2, 6, 3, generator=generator).to(device))
    options = to_device(make_positives("all", 6, generator), device)
    temperature = torch.tensor(0.4, device=device, requires_grad=True)
    arguments = (h, s, temperature, *(options[k] for k in ("item_ids", "codes", "min_shared_codes")))
    arguments = (*arguments, options["pair_index"], options["pair_weight"], 0, len(h))
    torch.library.opcheck(torch.ops.h2rec.alignment_loss.default, arguments)


def test_compiles_without_graph_breaks(backend, device, generator):
    h, s = torch.randn(2, 12, 5, generator=generator).to(device)
    options = to_device(make_positives("all", 12, generator), device)
    results = []
    function = ops.alignment_loss
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (h, s)]
        loss = f(*leaves, **options)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("counts", [(5, 3), (4, 1, 6)], ids=str)
def test_group_equals_one_process_with_the_whole_batch(counts, tmp_path):
    """Two and three processes, uneven: equal losses, and an average of gradients that is the single process's."""
    script = Path(__file__).parent / "alignment_loss_ranks.py"
    result = subprocess.run(
        [sys.executable, script, str(tmp_path / "rendezvous"), *map(str, counts)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("equal to one process") == len(counts)
    assert result.stdout.count("widths [5, 4") == len(counts)


H = torch.ones(4, 3)
IDS, CODES = torch.zeros(4, dtype=torch.int64), torch.zeros(4, 2, dtype=torch.int32)
PAIRS, WEIGHTS = torch.zeros(2, 1, dtype=torch.int64), torch.ones(1)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((H[:0], H[:0]), {}, ValueError, "hash_emb must have at least one row"),
        ((H[:, :0], H[:, :0]), {}, ValueError, "hash_emb must have at least one column"),
        ((H, H[:3]), {}, ValueError, r"must have one shape, got \[4, 3\] and \[3, 3\]"),
        ((H[0], H[0]), {}, ValueError, r"hash_emb must have shape \[B, D\], got \[3\]"),
        ((H.int(), H), {}, TypeError, "hash_emb must be a floating-point tensor"),
        ((H, H), {"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ((H, H), {"temperature": -1.0}, ValueError, "temperature must be positive and finite, got -1.0"),
        (
            (H, H),
            {"temperature": float("nan")},
            ValueError,
            "temperature must be positive and finite, got nan",
        ),
        ((H, H), {"temperature": torch.ones(1)}, ValueError, r"temperature must have shape \[\], got \[1\]"),
        ((H, H), {"item_ids": IDS[:2]}, ValueError, r"item_ids must have shape \[4\], got \[2\]"),
        ((H, H), {"item_ids": IDS.float()}, TypeError, "item_ids must be an integer tensor"),
        ((H, H), {"codes": CODES}, ValueError, "codes and min_shared_codes must be given together"),
        ((H, H), {"min_shared_codes": 1}, ValueError, "codes and min_shared_codes must be given together"),
        (
            (H, H),
            {"codes": CODES, "min_shared_codes": 3},
            ValueError,
            r"min_shared_codes must lie in \[1, 2\], got 3",
        ),
        ((H, H), {"codes": CODES[:1], "min_shared_codes": 1}, ValueError, r"codes must have shape \[4, L\]"),
        ((H, H), {"pair_index": PAIRS}, ValueError, "pair_index and pair_weight must be given together"),
        (
            (H, H),
            {"pair_index": PAIRS.T, "pair_weight": WEIGHTS},
            ValueError,
            r"pair_index must have shape \[2, P\]",
        ),
        (
            (H, H),
            {"pair_index": PAIRS, "pair_weight": torch.ones(2)},
            ValueError,
            r"pair_weight must have shape \[1\]",
        ),
        (
            (H, H),
            {"pair_index": PAIRS + 4, "pair_weight": WEIGHTS},
            ValueError,
            r"pair_index must lie in \[0, 4\)",
        ),
        (
            (H, H),
            {"pair_index": PAIRS, "pair_weight": WEIGHTS * 2},
            ValueError,
            r"pair_weight must lie in \(0, 1\]",
        ),
        (
            (H, H),
            {"pair_index": PAIRS, "pair_weight": WEIGHTS * 0},
            ValueError,
            r"must lie in \(0, 1\].*first is 0.0",
        ),
        (
            (H, H),
            {"reduction": "max"},
            ValueError,
            "reduction must be one of 'mean', 'sum', 'none', got 'max'",
        ),
        ((H * torch.nan, H), {}, ValueError, "hash_emb must be finite, but 4 of 4 rows"),
        ((H, H * torch.inf), {}, ValueError, "semantic_emb must be finite, but 4 of 4 rows"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.alignment_loss(*arguments, **options)
