"""What the operator's tests do not reach: many tiles a stripe, wide rows, a temperature that only the device knows."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from h2rec import ops, use_backend
from h2rec.reference.alignment_loss import positive_weights
from h2rec.testing import assert_as_accurate_as_eager

kernels = pytest.importorskip("h2rec.kernels", reason="triton is not installed")
module = importlib.import_module("h2rec.kernels.alignment_loss")

BATCH = 150


@pytest.fixture
def few_stripes(monkeypatch):
    monkeypatch.setattr(module, "_STRIPES", 2)
    monkeypatch.setattr(module, "_CHUNK_ROWS", 64)


def eager(hash_emb, semantic_emb, temperature, **options):
    logits = F.normalize(hash_emb) @ F.normalize(semantic_emb).T / temperature
    given = (
        options.get(name) for name in ("item_ids", "codes", "min_shared_codes", "pair_index", "pair_weight")
    )
    weighted = logits + positive_weights(logits, slice(None), *given).log()
    rows = logits.logsumexp(1) - weighted.logsumexp(1)
    columns = logits.logsumexp(0) - weighted.logsumexp(0)
    return (rows.mean() + columns.mean()) / 2


def triton(hash_emb, semantic_emb, temperature, **options):
    return ops.alignment_loss(hash_emb, semantic_emb, temperature=temperature, **options)


def results(function, dtype, inputs, temperature, **options):
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    leaves.append(torch.tensor(temperature, dtype=dtype, device=leaves[0].device, requires_grad=True))
    with use_backend("triton"):
        loss = function(*leaves, **options)
        loss.backward()
    return loss.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("dim", [24, 300])
@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_many_tiles_and_a_temperature_unknown_to_the_host(
    dim, temperature, few_stripes, monkeypatch, device, generator
):
    monkeypatch.setattr(module, "_may_be_cold", lambda temperature: (False, True))
    inputs = torch.randn(2, BATCH, dim, generator=generator).to(device)
    options = {
        "codes": torch.randint(0, 3, (BATCH, 4), generator=generator).to(device),
        "min_shared_codes": 3,
        "pair_index": torch.randint(0, BATCH, (2, 500), generator=generator).to(device),
        "pair_weight": (torch.rand(500, generator=generator) * 0.7 + 0.3).to(device),
    }
    temperature = float(torch.tensor(temperature))

    def run(function, dtype, inputs=inputs):
        return results(function, dtype, inputs, temperature, **options)

    others = [torch.randn(2, BATCH, dim, generator=generator).to(device) for _ in range(3)]
    draws = [(run(eager, torch.float32, other)[-1], run(eager, torch.float64, other)[-1]) for other in others]
    *rest, of_temperature = zip(
        run(triton, torch.float32), run(eager, torch.float32), run(eager, torch.float64), strict=True
    )
    for result in rest:
        assert_as_accurate_as_eager(*result)
    assert_as_accurate_as_eager(*of_temperature, draws=draws)


def test_one_pair_given_often_counts_once_with_its_largest_weight(device, generator):
    inputs = torch.randn(2, 9, 5, generator=generator).to(device)
    index = torch.tensor([[1, 4, 1, 1], [4, 1, 4, 4]], device=device)
    weight = torch.tensor([0.3, 0.9, 0.5, 0.9], device=device)
    many = results(triton, torch.float32, inputs, 0.2, pair_index=index, pair_weight=weight)
    once = results(triton, torch.float32, inputs, 0.2, pair_index=index[:, 1:2], pair_weight=weight[1:2])
    assert all(torch.equal(a, b) for a, b in zip(many, once, strict=True))


@pytest.mark.parametrize(
    ("index", "weight"), [([[2], [9]], 0.5), ([[-1], [2]], 0.5), ([[2], [5]], 2.0), ([[2], [5]], 0.0)]
)
def test_an_unchecked_pair_that_is_wrong_gives_nan(index, weight, device, generator):
    h, s = torch.randn(2, 9, 5, generator=generator).to(device)
    temperature = torch.tensor(0.2, device=device)
    pairs = torch.tensor(index, device=device), torch.tensor([weight], device=device)
    row_sums, _ = kernels.alignment_loss(h, s, temperature, None, None, 0, *pairs, 0, 9)
    assert row_sums[:, 2].isnan().all()
