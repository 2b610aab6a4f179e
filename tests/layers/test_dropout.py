import copy

import pytest
import torch

from h2rec.layers._dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drops_a_share_and_scales_the_rest(p, dtype, device):
    torch.manual_seed(0)
    x = torch.full((37, 1001), 3.0, dtype=dtype).to(device).requires_grad_()
    y = Dropout(p)(x)
    kept = y != 0
    n = x.numel()
    assert abs(kept.sum().item() - n * (1 - p)) < 5 * (n * p * (1 - p)) ** 0.5
    torch.testing.assert_close(
        y[kept], (x / (1 - p))[kept], rtol=2e-4 if dtype == torch.float32 else 0.02, atol=0
    )
    y.sum().backward()
    assert torch.equal(x.grad * 3, y) or dtype == torch.bfloat16
    assert torch.equal(x.grad != 0, kept)


def test_elements_are_dropped_independently(device):
    torch.manual_seed(0)
    kept = Dropout(0.5)(torch.ones(2**18).to(device)) != 0
    bits = kept.view(-1, 8).long()  # the eight elements of two words
    counts = (bits * 2 ** torch.arange(8, device=device)).sum(1).bincount(minlength=256)
    expected = 2**15 / 256
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_squared < 255 + 5 * (2 * 255) ** 0.5


def test_seed_evaluation_and_ends_of_the_range(device):
    x = torch.randn(5, 7).to(device)
    layer = Dropout(0.3)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(layer(x))
    assert torch.equal(*results)
    assert not torch.equal(layer(x), layer(x))
    assert layer(torch.empty(0, 3).to(device)).shape == (0, 3)
    assert torch.equal(Dropout(0.0)(x), x)
    assert (Dropout(1.0)(x) == 0).all()
    assert torch.equal(layer.eval()(x), x)
    with pytest.raises(ValueError, match="dropout probability"):
        Dropout(1.5)


def test_is_not_scaled_by_the_wrong_share(device):
    # the mean of what is kept and what is scaled must be exact, not only near
    torch.manual_seed(0)
    y = Dropout(0.2)(torch.ones(10**6).to(device))
    (scale,) = y[y != 0].unique().tolist()
    assert scale == pytest.approx(1 / (1 - 0.2), rel=2**-16)


def test_deepcopy_and_compile(device):
    x = torch.randn(6, 4).to(device)
    layer = Dropout(0.5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for call in (layer, copy.deepcopy(layer), compiled):
        torch.manual_seed(2)
        results.append(call(x))
    assert torch.equal(results[0], results[1])
    assert set((results[2] / x).round(decimals=5).unique().tolist()) <= {0.0, 2.0}
