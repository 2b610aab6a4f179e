"""Next-item losses; every model trains with the same one, to which H2Rec by default adds `target_smoothing`.

All of them take the user vectors of the valid positions only, gathered to ``[M, C]``: a batch of sequences is mostly
padding, and a row of padding costs as much as a row of data.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# The whole catalog as negatives ranks best where one can pay for it. The sum model on Amazon Beauty (12,101 items, to
# early stopping, validation NDCG@10 with the history in the ranking, and seconds per epoch): full 0.0477 and 24, 1024
# uniform ones shared by the batch 0.0429 and 13, bce with one negative 0.0235 and 9.
FULL_SOFTMAX_MAX_ITEMS = 50_000
SHARED_NEGATIVES = 1024

# Scores held at a time: a tile that stays in cache is twice as fast on a CPU; a GPU wants few launches.
_TILE_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}


def resolve_loss(name: str, num_items: int) -> str:
    """What ``"auto"`` stands for with a catalog of this size; any other name is returned as it is."""
    if name != "auto":
        return name
    return "full_softmax" if num_items <= FULL_SOFTMAX_MAX_ITEMS else "sampled_softmax"


def binary_cross_entropy(users: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """Mean over positions of ``-log s(u.t) - sum_n log(1 - s(u.n))``, s the logistic function (the paper's loss).

    Args:
        users: ``[M, C]`` user vectors.
        targets: ``[M, C]`` vectors of the items that came next.
        negatives: ``[M, n, C]`` vectors of n items that did not.
    """
    target_scores = (users * targets).sum(-1)  # [M]
    negative_scores = torch.einsum("mc,mnc->mn", users, negatives)
    return (F.softplus(-target_scores) + F.softplus(negative_scores).sum(-1)).mean()


def sampled_softmax(
    users: Tensor,
    targets: Tensor,
    negatives: Tensor,
    log_expected: Tensor,
    left_out: Tensor,
    related: Tensor | None = None,
    is_target: Tensor | None = None,
) -> Tensor:
    """Mean cross entropy of the target over the catalog, which is estimated from a sample of it.

    A negative that is expected ``e`` times in the sample counts ``1 / e`` times, so that the sum over the sample is on
    average that over the catalog (logQ correction; Bengio and Senecal, 2008).

    Args:
        users: ``[M, C]`` user vectors.
        targets: ``[M, C]`` vectors of the items that came next.
        negatives: ``[n, C]`` vectors of the sample, shared by all positions.
        log_expected: ``[n]``, log of how often each is expected in the sample.
        left_out: bool ``[M, n]``; True leaves a negative out at a position (the target, or another item of the user's).
        related: ``[M, C]`` vectors that `target_smoothing` pulls to their users, one for each position. They have to
            count among the catalog: what is pulled and never pushed goes to infinity.
        is_target: bool ``[M]``, where the related item is the target itself, which counts already.
    """
    own_scores = [(users * targets).sum(-1)]  # [M] each
    if related is not None:
        own_scores.append((users * related).sum(-1).masked_fill(is_target, -math.inf))
    return _SampledSoftmax.apply(users, torch.stack(own_scores, 1), negatives, log_expected, left_out)


def full_softmax(users: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of the target over the whole catalog.

    Works through tiles of positions and forms the gradients on the way, so that neither the scores ``[M, N]`` nor their
    gradient are ever held as a whole.

    Args:
        users: ``[M, C]`` user vectors.
        items: ``[N, C]`` vectors of all items.
        targets: int64 ``[M]`` ids of the items that came next.
    """
    return _FullSoftmax.apply(users, items, targets)


def target_smoothing(
    users: Tensor, targets: Tensor, related: Tensor, shares: Tensor, *, logistic: bool = False
) -> Tensor:
    """What a loss above changes by when a share of each target's weight goes to items of its kind.

    It is label smoothing over the items of a kind instead of the whole catalog: who bought one of them might as well
    have bought another. With a softmax ``(1 - share) CE(target) + share CE(related) = CE(target) + share (s_t - s_r)``,
    s the scores, since both have the same denominator; with the logistic loss the scores enter as ``-log s(.)``.

    Args:
        users: ``[M, C]`` user vectors.
        targets: ``[M, C]`` vectors of the items that came next.
        related: ``[M, n, C]`` vectors of n items of the same kind, which get ``share / n`` each.
        shares: ``[M]`` in 0 .. 1.
        logistic: the loss is `binary_cross_entropy`, not a softmax.
    """
    target_scores = (users * targets).sum(-1)  # [M]
    related_scores = torch.einsum("mc,mnc->mn", users, related)
    if logistic:
        target_scores, related_scores = F.logsigmoid(target_scores), F.logsigmoid(related_scores)
    return (shares * (target_scores - related_scores.mean(-1))).mean()


def _tile_elements(users: Tensor) -> int:
    return _TILE_ELEMENTS.get(users.device.type, 2**24)


class _SampledSoftmax(torch.autograd.Function):
    """Own scores ``[M, j]`` are those of the target, first, and of other candidates that only this position has."""

    @staticmethod
    def forward(
        ctx, users: Tensor, own_scores: Tensor, negatives: Tensor, log_expected: Tensor, left_out: Tensor
    ) -> Tensor:
        num_positions, num_negatives = left_out.shape
        tile = max(1, min(_tile_elements(users) // num_negatives, num_positions))
        candidates = users.new_empty(tile, num_negatives + own_scores.shape[1])  # the same for each tile
        offset = -log_expected.to(users.dtype)
        loss = users.new_zeros(())
        user_grad, own_grad = torch.empty_like(users), torch.empty_like(own_scores)
        negative_grad = torch.zeros_like(negatives)
        for start in range(0, num_positions, tile):
            rows = slice(start, min(start + tile, num_positions))
            scores = candidates[: rows.stop - start]  # [tile, n + j]
            of_negatives = torch.addmm(offset, users[rows], negatives.T, out=scores[:, :num_negatives])
            of_negatives.masked_fill_(left_out[rows], -math.inf)
            scores[:, num_negatives:] = own_scores[rows]
            log_shares = scores.log_softmax(1)
            loss -= log_shares[:, num_negatives].sum()
            shares, own_grad[rows] = log_shares.exp_().tensor_split((num_negatives,), dim=1)
            torch.mm(shares, negatives, out=user_grad[rows])
            negative_grad.addmm_(shares.T, users[rows], alpha=1 / num_positions)
        own_grad[:, 0] -= 1
        ctx.save_for_backward(user_grad, own_grad, negative_grad)
        return loss / num_positions

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        user_grad, own_grad, negative_grad = ctx.saved_tensors
        of_each = grad_output / len(user_grad)
        return user_grad * of_each, own_grad * of_each, negative_grad * grad_output, None, None


class _FullSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, users: Tensor, items: Tensor, targets: Tensor) -> Tensor:
        num_positions, num_items = users.shape[0], items.shape[0]
        tile = max(1, _tile_elements(users) // num_items)
        loss = users.new_zeros(())
        user_grad = torch.empty_like(users)
        item_grad = torch.zeros_like(items)
        for start in range(0, num_positions, tile):
            tile_users = users[start : start + tile]
            tile_targets = targets[start : start + tile, None]
            scores = tile_users @ items.T  # [tile, N]
            target_scores = scores.gather(1, tile_targets)
            largest = scores.amax(1, keepdim=True)
            scores = scores.sub_(largest).exp_()
            total = scores.sum(1, keepdim=True)
            loss += (total.log() + largest - target_scores).sum()
            # d loss / d scores = (probabilities - one-hot of the target) / M, in place of the scores.
            grad = scores.div_(total * num_positions)
            grad.scatter_add_(1, tile_targets, torch.full_like(target_scores, -1 / num_positions))
            user_grad[start : start + tile] = grad @ items
            item_grad.addmm_(grad.T, tile_users)
        ctx.save_for_backward(user_grad, item_grad)
        return loss / num_positions

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        user_grad, item_grad = ctx.saved_tensors
        return user_grad * grad_output, item_grad * grad_output, None
