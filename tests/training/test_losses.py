import math

import pytest
import torch

from h2rec.training import losses
from h2rec.training.losses import (
    FULL_SOFTMAX_MAX_ITEMS,
    binary_cross_entropy,
    full_softmax,
    is_own_item,
    resolve_loss,
    sampled_softmax,
)

M, N, C = 23, 31, 5


def random(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def check(loss, oracle, tensors, device):
    """The value and every gradient of ``loss``, times 1.7, against those of a formula in fp64."""

    def run(function, dtype, device):
        leaves = [tensor.to(device, dtype).requires_grad_() for tensor in tensors]
        value = function(*leaves)
        return [value.detach(), *torch.autograd.grad(1.7 * value, leaves)]

    exact = run(oracle, torch.float64, "cpu")
    for ours, reference in zip(run(loss, torch.float64, device), exact, strict=True):
        torch.testing.assert_close(ours.cpu(), reference, rtol=1e-12, atol=1e-12)
    for ours, reference in zip(run(loss, torch.float32, device), exact, strict=True):
        torch.testing.assert_close(ours.cpu(), reference.float())


def cross_entropy_by_hand(scores, allowed):
    """Mean of -log of the first candidate's share among those allowed, a row at a time."""
    rows = [-(row[0].exp() / row[mask].exp().sum()).log() for row, mask in zip(scores, allowed, strict=True)]
    return sum(rows) / len(rows)


def test_binary_cross_entropy(generator, device):
    def oracle(users, targets, negatives):
        total = 0.0
        for m in range(M):
            total = total - torch.sigmoid(users[m] @ targets[m]).log()
            for n in range(3):
                total = total - (1 - torch.sigmoid(users[m] @ negatives[m, n])).log()
        return total / M

    tensors = random(generator, M, C), random(generator, M, C), random(generator, M, 3, C)
    check(binary_cross_entropy, oracle, tensors, device)


def test_binary_cross_entropy_of_large_scores(device):
    users = torch.tensor([[200.0]], device=device)
    assert binary_cross_entropy(users, -users, users[:, None]) == 2 * 200.0**2
    assert binary_cross_entropy(users, users, -users[:, None]) == 0


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per position"])
@pytest.mark.parametrize("with_hits", [True, False], ids=["hits", "no hits"])
@pytest.mark.parametrize("with_log_q", [True, False], ids=["log_q", "no log_q"])
def test_sampled_softmax(shared, with_hits, with_log_q, generator, device):
    hits = torch.rand(M, N, generator=generator) < 0.3
    hits[0] = True  # nothing but the target is left
    log_q = random(generator, M, 1 + N)

    def ours(users, targets, negatives):
        return sampled_softmax(
            users,
            targets,
            negatives,
            hits.to(device) if with_hits else None,
            log_q.to(users) if with_log_q else None,
        )

    def oracle(users, targets, negatives):
        scores = [
            torch.stack(
                [
                    users[m] @ targets[m],
                    *(users[m] @ (negatives if shared else negatives[m])[n] for n in range(N)),
                ]
            )
            for m in range(M)
        ]
        scores = torch.stack(scores) - (log_q.to(users) if with_log_q else 0.0)
        allowed = torch.ones(M, 1 + N, dtype=torch.bool)
        if with_hits:
            allowed[:, 1:] = ~hits
        return cross_entropy_by_hand(scores, allowed)

    negatives = random(generator, N, C) if shared else random(generator, M, N, C)
    check(ours, oracle, (random(generator, M, C), random(generator, M, C), negatives), device)


def test_sampled_softmax_gives_a_left_out_item_no_gradient(generator):
    users, targets, negatives = (
        random(generator, *shape).requires_grad_() for shape in ((2, C), (2, C), (3, C))
    )
    hits = torch.tensor([[False, True, False], [True, True, False]])
    loss = sampled_softmax(users, targets, negatives, hits)
    (gradient,) = torch.autograd.grad(loss, negatives)
    assert (gradient != 0).any(1).tolist() == [True, False, True]


def test_sampled_softmax_with_log_q_is_the_full_softmax_on_average(generator):
    """The point of the correction: importance weights 1 / q make the sampled sum an estimate of the whole one."""
    scores = random(generator, N)
    q = torch.softmax(random(generator, N), 0)
    sample = torch.multinomial(q, 200_000, replacement=True, generator=generator)
    one = torch.ones(1, 1, dtype=torch.float64)
    # A target that weighs nothing, so that what is left is the log of the mean of exp(score) / q.
    log_q = torch.cat([torch.tensor([-5.0]), q[sample].log() + math.log(len(sample))])
    loss = sampled_softmax(one, -5.0 * one, scores[sample, None], log_q=log_q)
    torch.testing.assert_close(loss, (1 + scores.exp().sum()).log(), rtol=0.01, atol=0.0)


def test_a_constant_log_q_changes_nothing(generator):
    vectors = random(generator, M, C), random(generator, M, C), random(generator, N, C)
    constant = torch.full((1 + N,), -3.0, dtype=torch.float64)
    torch.testing.assert_close(sampled_softmax(*vectors, log_q=constant), sampled_softmax(*vectors))


@pytest.mark.parametrize("tile", [1, 7, 23, 1000], ids=lambda tile: f"tiles of {tile}")
def test_full_softmax(tile, generator, device, monkeypatch):
    monkeypatch.setattr(losses, "_TILE_ELEMENTS", {device: tile * N})
    targets = torch.randint(N, (M,), generator=generator)
    targets[:3] = 4  # a target of several positions

    def oracle(users, items):
        scores = users @ items.T  # [M, N]
        order = torch.stack([torch.cat([t[None], torch.arange(N)[torch.arange(N) != t]]) for t in targets])
        return cross_entropy_by_hand(scores.gather(1, order), torch.ones(M, N, dtype=torch.bool))

    def ours(users, items):
        return full_softmax(users, items, targets.to(device))

    check(ours, oracle, (random(generator, M, C), random(generator, N, C)), device)


def test_full_softmax_of_large_scores(device):
    users = torch.tensor([[100.0], [-100.0]], device=device, requires_grad=True)
    items = torch.tensor([[100.0], [-100.0], [0.0]], device=device, requires_grad=True)
    loss = full_softmax(users, items, torch.tensor([0, 0], device=device))
    assert loss == 10_000  # the mean of 0 and 20000
    loss.backward()
    assert users.grad.flatten().tolist() == [0, -100]
    assert items.grad.flatten().tolist() == [50, -50, 0]


def test_full_softmax_passes_gradcheck(generator):
    targets = torch.tensor([3, 0, 3])
    vectors = random(generator, 3, C).requires_grad_(), random(generator, 4, C).requires_grad_()
    assert torch.autograd.gradcheck(lambda users, items: full_softmax(users, items, targets), vectors)


def test_is_own_item(generator, device):
    sequences = torch.randint(N, (9, 6), generator=generator)
    sequences[2, 3:] = N  # padding, which is no item
    negatives = torch.randint(N, (14,), generator=generator)
    negatives[5] = negatives[6]
    expected = [[item in row for item in negatives.tolist()] for row in sequences.tolist()]
    assert any(any(row) for row in expected)
    assert is_own_item(sequences.to(device), negatives.to(device)).tolist() == expected


def test_resolve_loss():
    assert resolve_loss("auto", FULL_SOFTMAX_MAX_ITEMS) == "full_softmax"
    assert resolve_loss("auto", FULL_SOFTMAX_MAX_ITEMS + 1) == "sampled_softmax"
    assert resolve_loss("bce", 10) == "bce"
