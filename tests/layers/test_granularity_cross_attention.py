import math

import pytest
import torch

from h2rec.layers import GranularityCrossAttention


def make(device, batch=3, length=5, num_levels=4, dim=8, num_heads=2, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    layer = GranularityCrossAttention(dim, num_levels, num_heads=num_heads, **settings).to(device, dtype)
    torch.nn.init.normal_(layer.output_bias)  # zero by default, which would hide its part
    levels = torch.randn(batch, length, num_levels, dim, dtype=dtype).to(device)
    hashed = torch.randn(batch, length, dim, dtype=dtype).to(device)
    return layer, levels, hashed


def plain(layer, levels, hashed):
    """Level by level, position by position, head by head."""
    _, length, num_levels, dim = levels.shape
    head = dim // layer.num_heads
    gates = torch.softmax(layer.gate(hashed) + torch.linspace(1.0, 0.2, num_levels).to(levels), -1)
    mixed = torch.zeros_like(hashed)
    for level in range(num_levels):
        query = levels[:, :, level] @ layer.query_weight[level]
        key, value = (hashed @ layer.key_value_weight[level]).split(dim, -1)
        answer = torch.zeros_like(hashed)
        for t in range(length):
            for start in range(0, dim, head):
                part = slice(start, start + head)
                logits = (key[:, : t + 1, part] * query[:, t : t + 1, part]).sum(-1) / math.sqrt(head)
                answer[:, t, part] = (logits.softmax(-1)[..., None] * value[:, : t + 1, part]).sum(1)
        projected = answer @ layer.output_weight[level] + layer.output_bias[level]
        mixed = mixed + gates[..., level, None] * projected
    return mixed, gates


@pytest.mark.parametrize(
    ("batch", "length", "num_levels", "dim", "num_heads"),
    [(3, 5, 4, 8, 2), (1, 1, 1, 4, 1), (2, 7, 3, 6, 3)],
)
def test_matches_the_formula(batch, length, num_levels, dim, num_heads, device):
    layer, levels, hashed = make(device, batch, length, num_levels, dim, num_heads)
    mixed, gates = layer(levels, hashed)
    assert mixed.shape == (batch, length, dim)
    assert gates.shape == (batch, length, num_levels)
    expected_mixed, expected_gates = plain(layer, levels, hashed)
    torch.testing.assert_close(gates, expected_gates)
    torch.testing.assert_close(mixed, expected_mixed)


def test_prior_prefers_coarse_levels(device):
    layer, levels, hashed = make(device)
    for parameter in layer.gate.parameters():
        torch.nn.init.zeros_(parameter)
    _, gates = layer(levels, hashed)
    assert (gates[..., :-1] > gates[..., 1:]).all()
    torch.testing.assert_close(gates[0, 0].log().diff(), gates.new_full((3,), -0.8 / 3))


@pytest.mark.parametrize("changed", ["levels", "hashed"])
def test_later_positions_change_nothing(changed, device):
    layer, levels, hashed = make(device, length=6)
    mixed, gates = layer(levels, hashed)
    for t in range(5):
        inputs = {"levels": levels.clone(), "hashed": hashed.clone()}
        inputs[changed][:, t + 1 :] = torch.randn_like(inputs[changed][:, t + 1 :])
        other_mixed, other_gates = layer(**inputs)
        assert torch.equal(other_mixed[:, : t + 1], mixed[:, : t + 1])
        assert torch.equal(other_gates[:, : t + 1], gates[:, : t + 1])
        assert not torch.allclose(other_mixed[:, t + 1 :], mixed[:, t + 1 :])


def test_gradcheck(device):
    layer, levels, hashed = make(device, batch=2, length=3, num_levels=2, dim=4)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(levels, hashed, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (levels, hashed))

    inputs = [levels.requires_grad_(), hashed.requires_grad_(), *parameters]
    assert torch.autograd.gradcheck(run, inputs)


def test_dropout_acts_in_training_only(device):
    layer, levels, hashed = make(device, dropout=0.5)
    assert (layer(levels, hashed)[0] == 0).any()
    layer.eval()
    assert torch.equal(layer(levels, hashed)[0], layer(levels, hashed)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 8, "num_levels": 0}, "num_levels must be at least 1, got 0"),
        ({"dim": 8, "num_levels": 2, "num_heads": 3}, "num_heads must divide dim, got num_heads=3 and dim=8"),
        ({"dim": 8, "num_levels": 2, "num_heads": 0}, "num_heads must divide dim"),
    ],
)
def test_refuses_bad_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        GranularityCrossAttention(**arguments)


def test_refuses_bad_shapes(device):
    layer, levels, hashed = make(device)
    with pytest.raises(ValueError, match=r"hashed must have shape \[B, T, 8\], got \[3, 5, 4\]"):
        layer(levels, hashed[..., :4])
    with pytest.raises(ValueError, match=r"levels must have shape \[3, 5, 4, 8\].*got \[3, 4, 4, 8\]"):
        layer(levels[:, :4], hashed)
