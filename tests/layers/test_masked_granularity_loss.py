import copy

import pytest
import torch
import torch.nn.functional as F

from h2rec.layers import MaskedGranularityLoss


def users(device, batch=6, dim=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(batch, dim, generator=generator, dtype=dtype).to(device) for _ in range(2))


def plain(u, v, temperature):
    similarity = temperature * (u @ u.T + v @ v.T) / 2
    targets = similarity.exp() / similarity.exp().sum(1, keepdim=True)
    total = 0.0
    for logits in (u @ v.T / temperature, v @ u.T / temperature):
        log_probabilities = (logits.exp() / logits.exp().sum(1, keepdim=True)).log()
        total = total - (targets * log_probabilities).sum(1).mean()
    return total / 2


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_matches_the_formula(temperature, device):
    u, v = users(device)
    layer = MaskedGranularityLoss(4, 4, temperature=temperature).to(device)
    torch.testing.assert_close(layer(u, v), plain(u, v, temperature))
    torch.testing.assert_close(layer(v, u), layer(u, v))


def test_hard_contrast_has_one_positive(device):
    u, v = users(device)
    layer = MaskedGranularityLoss(4, 4, temperature=0.5, contrast="hard").to(device)
    logits = F.normalize(u) @ F.normalize(v).T / 0.5
    itself = torch.arange(len(u), device=device)
    expected = (F.cross_entropy(logits, itself) + F.cross_entropy(logits.T, itself)) / 2
    torch.testing.assert_close(layer(u, v), expected)


@pytest.mark.parametrize("contrast", ["soft", "hard"])
def test_one_user_has_nothing_to_tell_apart(contrast, device):
    u, v = users(device, batch=1)
    assert MaskedGranularityLoss(4, 4, contrast=contrast).to(device)(u, v).item() == 0


@pytest.mark.parametrize("contrast", ["soft", "hard"])
def test_gradcheck(contrast, device):
    u, v = users(device, batch=3)
    layer = MaskedGranularityLoss(4, 4, contrast=contrast).to(device)
    assert torch.autograd.gradcheck(layer, [u.requires_grad_(), v.requires_grad_()])


@pytest.mark.parametrize(
    ("num_levels", "ratio", "expected"), [(4, 0.5, 2), (3, 0.5, 1), (2, 0.9, 1), (5, 0.01, 1)]
)
def test_masks_the_least_weighed_levels(num_levels, ratio, expected, device):
    torch.manual_seed(0)
    layer = MaskedGranularityLoss(4, num_levels, mask_ratio=ratio).to(device)
    levels = torch.randn(3, 5, num_levels, 4).to(device)
    gates = torch.rand(3, num_levels).softmax(-1).to(device)
    masked, full = layer.mix(levels, gates)
    torch.testing.assert_close(full, (levels * gates[:, None, :, None]).sum(2))
    for row in range(3):
        replaced = levels[row].clone()
        for level in gates[row].argsort()[:expected]:
            replaced[:, level] = layer.mask_vectors[level]
        torch.testing.assert_close(masked[row], (replaced * gates[row, :, None]).sum(1))


def test_mix_gradcheck(device):
    torch.manual_seed(0)
    layer = MaskedGranularityLoss(2, 3).to(device, torch.float64)
    levels = torch.randn(2, 3, 3, 2, dtype=torch.float64).to(device).requires_grad_()
    gates = torch.tensor([[0.7, 0.1, 0.2], [0.2, 0.5, 0.3]], dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(
        lambda *inputs: layer.mix(*inputs[:2]), (levels, gates.requires_grad_(), layer.mask_vectors)
    )


def test_state_dict_deepcopy_compile(device):
    u, v = users(device, dtype=torch.float32)
    levels, gates = torch.randn(2, 3, 4, 4).to(device), torch.rand(2, 4).to(device)
    layer, other = (MaskedGranularityLoss(4, 4).to(device) for _ in range(2))
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer)):
        for mixed, expected in zip(twin.mix(levels, gates), layer.mix(levels, gates), strict=True):
            assert torch.equal(mixed, expected)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(u, v), layer(u, v))
    mix = torch.compile(layer.mix, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(mix(levels, gates), layer.mix(levels, gates))


def test_is_exact_under_autocast(device):
    u, v = (8 * x for x in users(device, dtype=torch.float32))
    layer = MaskedGranularityLoss(4, 4).to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(layer(u, v), layer(u, v).float())
        mixed = layer(u, v)
    assert torch.equal(mixed, layer(u, v))
    assert torch.isfinite(layer(u.bfloat16(), v.bfloat16()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_levels": 1}, "num_levels must be at least 2"),
        ({"num_levels": 4, "mask_ratio": 0.0}, "mask_ratio must lie between 0 and 1, got 0.0"),
        ({"num_levels": 4, "mask_ratio": 1.0}, "mask_ratio must lie between 0 and 1, got 1.0"),
        ({"num_levels": 4, "contrast": "firm"}, "contrast must be one of 'soft', 'hard', got 'firm'"),
        ({"num_levels": 4, "temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
    ],
)
def test_refuses_bad_parameters(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskedGranularityLoss(4, **arguments)


def test_refuses_bad_shapes():
    layer = MaskedGranularityLoss(4, 2)
    with pytest.raises(ValueError, match=r"must have the same shape \[B, D\], got \[3, 4\] and \[2, 4\]"):
        layer(torch.zeros(3, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"levels must have shape \[B, T, 2, 4\], got \[3, 5, 4, 2\]"):
        layer.mix(torch.zeros(3, 5, 4, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"gates must have shape \[3, 2\].*got \[3, 5, 2\]"):
        layer.mix(torch.zeros(3, 5, 2, 4), torch.zeros(3, 5, 2))
