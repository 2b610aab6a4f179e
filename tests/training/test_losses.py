import pytest
import torch

from h2rec.training import losses
from h2rec.training.losses import (
    FULL_SOFTMAX_MAX_ITEMS,
    binary_cross_entropy,
    full_softmax,
    resolve_loss,
    sampled_softmax,
    target_smoothing,
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


@pytest.mark.parametrize("tile", [1, 7, 23, 1000], ids=lambda tile: f"tiles of {tile}")
def test_sampled_softmax(tile, generator, device, monkeypatch):
    monkeypatch.setattr(losses, "_TILE_ELEMENTS", {device: tile * N})
    left_out = torch.rand(M, N, generator=generator) < 0.3
    left_out[0] = True  # nothing but the target is left
    log_expected = random(generator, N)

    def ours(users, targets, negatives):
        return sampled_softmax(users, targets, negatives, log_expected.to(users), left_out.to(device))

    def oracle(users, targets, negatives):
        scores = [
            torch.stack([users[m] @ targets[m], *(users[m] @ vector for vector in negatives)])
            for m in range(M)
        ]
        scores = torch.stack(scores)
        scores[:, 1:] -= log_expected
        allowed = torch.ones(M, 1 + N, dtype=torch.bool)
        allowed[:, 1:] = ~left_out
        return cross_entropy_by_hand(scores, allowed)

    check(ours, oracle, (random(generator, M, C), random(generator, M, C), random(generator, N, C)), device)


def test_sampled_softmax_gives_a_left_out_item_no_gradient(generator):
    users, targets, negatives = (
        random(generator, *shape).requires_grad_() for shape in ((2, C), (2, C), (3, C))
    )
    left_out = torch.tensor([[False, True, False], [True, True, False]])
    loss = sampled_softmax(users, targets, negatives, torch.zeros(3), left_out)
    (gradient,) = torch.autograd.grad(loss, negatives)
    assert (gradient != 0).any(1).tolist() == [True, False, True]


def test_sampled_softmax_of_large_scores(device):
    users = torch.tensor([[100.0], [-100.0]], device=device, requires_grad=True)
    targets = torch.tensor([[100.0], [100.0]], device=device, requires_grad=True)
    negatives = torch.tensor([[-100.0], [0.0]], device=device, requires_grad=True)
    left_out = torch.zeros(2, 2, dtype=torch.bool, device=device)
    loss = sampled_softmax(users, targets, negatives, torch.zeros(2, device=device), left_out)
    assert loss == 10_000  # the mean of 0 and 20000
    loss.backward()
    assert users.grad.flatten().tolist() == [0, -100]
    assert targets.grad.flatten().tolist() == [0, 50]
    assert negatives.grad.flatten().tolist() == [-50, 0]


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


@pytest.mark.parametrize("loss", ["softmax", "logistic"])
def test_target_smoothing_gives_related_items_a_share(loss, generator, device):
    items, *related = (torch.randint(N, (M,), generator=generator) for _ in range(3))
    negatives = random(generator, M, 3, C)

    def next_item(users, catalog, targets, rows=slice(None)):
        if loss == "softmax":
            return full_softmax(users, catalog, targets.to(users.device))
        return binary_cross_entropy(users, catalog[targets], negatives[rows].to(users))

    shares = torch.rand(M, generator=generator)

    def ours(users, catalog):
        smoothing = target_smoothing(
            users,
            catalog[items],
            catalog[torch.stack(related, 1)],
            shares.to(users),
            logistic=loss == "logistic",
        )
        return next_item(users, catalog, items) + smoothing

    def oracle(users, catalog):
        total = 0
        for m, share in enumerate(shares.tolist()):
            one = slice(m, m + 1)
            of_related = sum(next_item(users[one], catalog, ids[one], one) for ids in related)
            total += (1 - share) * next_item(users[one], catalog, items[one], one) + share / 2 * of_related
        return total / M

    check(ours, oracle, (random(generator, M, C), random(generator, N, C)), device)


@pytest.mark.parametrize("tile", [1, 7, 23, 1000], ids=lambda tile: f"tiles of {tile}")
def test_smoothed_sampled_softmax_is_that_of_target_and_related_item(tile, generator, device, monkeypatch):
    """Both among the candidates, so that the loss has a lower bound; an item that is both counts once."""
    monkeypatch.setattr(losses, "_TILE_ELEMENTS", {device: tile * 9})
    items, related = (torch.randint(N, (M,), generator=generator) for _ in range(2))
    related[:4] = items[:4]
    left_out = torch.rand(M, 9, generator=generator) < 0.3
    left_out[:2] = True  # nothing else is left; of the first, not even a related item
    log_expected = random(generator, 9)
    shares = torch.rand(M, generator=generator)

    def ours(users, catalog, negatives):
        rest = log_expected.to(users), left_out.to(device), catalog[related], (related == items).to(device)
        loss = sampled_softmax(users, catalog[items], negatives, *rest)
        return loss + target_smoothing(users, catalog[items], catalog[related, None], shares.to(users))

    def oracle(users, catalog, negatives):
        losses = []
        for m in range(M):
            kind = catalog[sorted({int(items[m]), int(related[m])})] @ users[m]
            sample = (negatives @ users[m] - log_expected)[~left_out[m]]
            total = torch.cat([kind, sample]).logsumexp(0)
            of_target, of_related = catalog[items[m]] @ users[m], catalog[related[m]] @ users[m]
            losses.append(total - (1 - shares[m]) * of_target - shares[m] * of_related)
        assert min(losses) >= 0
        return sum(losses) / M

    check(ours, oracle, (random(generator, M, C), random(generator, N, C), random(generator, 9, C)), device)


def test_resolve_loss():
    assert resolve_loss("auto", FULL_SOFTMAX_MAX_ITEMS) == "full_softmax"
    assert resolve_loss("auto", FULL_SOFTMAX_MAX_ITEMS + 1) == "sampled_softmax"
    assert resolve_loss("bce", 10) == "bce"
