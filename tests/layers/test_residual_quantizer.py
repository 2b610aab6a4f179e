import copy

import pytest
import torch

from h2rec.layers import ResidualQuantizer


def clustered(num_rows=600, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(10, dim, generator=generator) * 3
    which = torch.randint(0, 10, (num_rows,), generator=generator)
    return centres[which] + 0.1 * torch.randn(num_rows, dim, generator=generator)


def test_fit_encode_decode(device):
    x = clustered().to(device)
    layer = ResidualQuantizer(6, 2, (10, 4)).to(device)
    layer(x)  # what had been learned before does not matter
    layer.fit(x)
    assert (layer.ema_counts == 1).all()
    assert torch.equal(layer.ema_sums, layer.packed_codebooks)  # the running means start from there
    codes = layer.encode(x.view(2, 300, 6))
    assert codes.shape == (2, 300, 2)
    decoded = layer.decode(codes).view(600, 6)
    assert (decoded - x).square().mean() < 0.02 * x.var()
    expected = (
        layer.codebooks[0][codes.view(600, 2)[:, 0].long()]
        + layer.codebooks[1][codes.view(600, 2)[:, 1].long()]
    )
    torch.testing.assert_close(decoded, expected)


def test_gradient_passes_straight_through(device):
    layer = ResidualQuantizer(6, 2, 8).to(device).eval()
    x = clustered(20).to(device).requires_grad_()
    quantized, codes, loss = layer(x)
    torch.testing.assert_close(quantized, layer.decode(codes))
    cotangent = torch.randn_like(quantized)
    (grad,) = torch.autograd.grad(quantized, x, cotangent, retain_graph=True)
    assert torch.equal(grad, cotangent)
    (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(grad, 0.25 * 2 * (x - quantized).detach() / x.numel())


def test_training_lowers_the_error_and_revives_dead_codes(device):
    torch.manual_seed(0)
    x = clustered().to(device)
    layer = ResidualQuantizer(6, 2, 16, ema_decay=0.8).to(device)
    layer.packed_codebooks[8:16] = 1e3  # out of reach
    errors = []
    for _ in range(60):
        quantized, _, _ = layer(x)
        errors.append((quantized - x).square().mean().item())
    assert errors[-1] < 0.2 * errors[0]
    assert layer.packed_codebooks.abs().max() < 100


def test_one_step_of_the_running_means(device):
    """Counts, sums and codewords after one batch, in the formula's words (a codeword that nobody chose included)."""
    torch.manual_seed(0)
    layer = ResidualQuantizer(6, 2, (3, 4), ema_decay=0.9, dead_code_threshold=0.0).to(device)
    x = clustered(20).to(device)
    before = [book.clone() for book in layer.codebooks]
    _, codes, _ = layer(x)
    residual = x
    for level, (old, new) in enumerate(zip(before, layer.codebooks, strict=True)):
        for code in range(len(old)):
            chosen = residual[codes[:, level] == code]
            count = 0.9 * 1 + 0.1 * len(chosen)
            torch.testing.assert_close(new[code], (0.9 * old[code] + 0.1 * chosen.sum(0)) / count)
        residual = residual - old[codes[:, level].long()]


def test_dead_codewords_become_rows_of_the_batch(device):
    layer = ResidualQuantizer(6, 1, 4, ema_decay=0.5, dead_code_threshold=0.6).to(device)
    layer.packed_codebooks[1:] = 1e3  # out of reach
    x = clustered(20).to(device)
    layer(x)
    for row in layer.codebooks[0][1:]:
        assert (x == row).all(1).any()
    assert layer.ema_counts[1:].tolist() == [1, 1, 1]
    assert torch.equal(layer.ema_sums[1:], layer.packed_codebooks[1:])


def test_evaluation_changes_nothing(device):
    layer = ResidualQuantizer(6, 2, 8).to(device).eval()
    before = copy.deepcopy(layer.state_dict())
    layer(clustered(20).to(device))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 2, 4), {}, "dim must be at least 1, got 0"),
        ((3, 0, 4), {}, "num_levels must be at least 1, got 0"),
        ((3, 2, (4,)), {}, r"codebook_size must be positive, or num_levels = 2 positive numbers, got \(4,\)"),
        ((3, 2, 0), {}, "codebook_size must be positive"),
        ((3, 2, 4), {"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\), got 1.0"),
        ((3, 2, 4), {"beam_size": 0}, "beam_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ResidualQuantizer(*arguments, **options)


def test_bad_input():
    layer = ResidualQuantizer(3, 2, 4)
    with pytest.raises(ValueError, match="vectors must have dimension 3, got 5"):
        layer.fit(torch.randn(10, 5))
    with pytest.raises(ValueError, match=r"codes must have shape \[\*, 2\], got \[4, 3\]"):
        layer.decode(torch.zeros(4, 3, dtype=torch.int32))
    before = copy.deepcopy(layer.state_dict())
    for call in (layer, layer.encode):
        with pytest.raises(ValueError, match=r"x must have shape \[\*, 3\], got \[3, 2\]"):
            call(torch.randn(3, 2))  # as many numbers as two rows have
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
