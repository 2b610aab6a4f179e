import pytest
import torch

from h2rec.layers import GranularityFusion

MODES = ["sum", "mean", "adaptive"]


def make(mode, device, num_levels=3, dim=4):
    torch.manual_seed(0)
    layer = GranularityFusion(dim, num_levels, mode).to(device, torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer, torch.randn(2, 5, num_levels, dim, dtype=torch.float64).to(device)


@pytest.mark.parametrize("mode", MODES)
def test_matches_the_formula(mode, device):
    layer, levels = make(mode, device)
    weights = levels.new_full((2, 5, 3), {"sum": 1.0, "mean": 1 / 3, "adaptive": 0.0}[mode])
    if mode == "adaptive":
        scores = torch.einsum("btx,lx->btl", levels.reshape(2, 5, 12), layer.score.weight) + layer.score.bias
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    expected = sum(weights[..., level, None] * levels[..., level, :] for level in range(3))
    torch.testing.assert_close(layer(levels), expected)
    torch.testing.assert_close(layer(levels[0, 0]), expected[0, 0])


def test_adaptive_starts_as_the_mean(device):
    levels = torch.randn(7, 3, 4).to(device)
    torch.testing.assert_close(GranularityFusion(4, 3, "adaptive").to(device)(levels), levels.mean(1))


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode, device):
    layer, levels = make(mode, device, num_levels=2, dim=3)
    names = [name for name, _ in layer.named_parameters()]

    def run(levels, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (levels,))

    assert torch.autograd.gradcheck(run, [levels.requires_grad_(), *layer.parameters()])


def test_refuses_bad_input():
    with pytest.raises(ValueError, match="mode must be one of 'sum', 'mean', 'adaptive', got 'max'"):
        GranularityFusion(4, 3, "max")
    with pytest.raises(ValueError, match="num_levels must be at least 1, got 0"):
        GranularityFusion(4, 0)
    with pytest.raises(ValueError, match=r"levels must have shape \[\*, 3, 4\], got \[5, 4, 3\]"):
        GranularityFusion(4, 3)(torch.zeros(5, 4, 3))
