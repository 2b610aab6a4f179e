"""The code-guided alignment loss: hash and semantic embeddings of one item attract each other."""

import torch
import torch.distributed
from torch import Tensor

from h2rec.ops import _backends
from h2rec.ops._checks import (
    check_dim,
    check_finite_rows,
    check_floating,
    check_integer,
    check_option,
    check_range,
    check_same_device,
    check_tensors,
    checks_values,
)
from h2rec.ops._gather import gather_rows
from h2rec.ops._registry import define


def alignment_loss(
    hash_emb: Tensor,
    semantic_emb: Tensor,
    *,
    item_ids: Tensor | None = None,
    codes: Tensor | None = None,
    min_shared_codes: int | None = None,
    pair_index: Tensor | None = None,
    pair_weight: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    r"""Contrastive loss between two views of a batch of items, in both directions, with weighted positives.

    With unit rows :math:`h_i, s_j`, logits :math:`z_{ij} = \langle h_i, s_j \rangle / \tau` and weights
    :math:`w_{ij}`,

    .. math::
        row_i = -\log \frac{\sum_j w_{ij} e^{z_{ij}}}{\sum_j e^{z_{ij}}}, \quad
        col_j = -\log \frac{\sum_i w_{ij} e^{z_{ij}}}{\sum_i e^{z_{ij}}}, \quad
        loss = \frac{\mathrm{mean}_i\, row_i + \mathrm{mean}_j\, col_j}{2}.

    The weight is 1 where i = j, where the item ids are equal, or where the codes agree in at least
    ``min_shared_codes`` positions; else the largest weight given for the pair in either order; else 0.
    (Code-guided alignment of H2Rec, arXiv 2512.10388.)

    Args:
        hash_emb, semantic_emb: ``[B, D]``, floating point, B at least 1. Rows shorter than 1e-12 count as zero.
        item_ids: ``[B]``, any integer dtype.
        codes: ``[B, L]``, any integer dtype; given together with ``min_shared_codes`` in [1, L].
        pair_index: ``[2, P]`` integer positions in the batch; given together with ``pair_weight``.
        pair_weight: ``[P]``, floating point, in (0, 1].
        temperature: positive; a 0-dim tensor may require a gradient.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, of the B values :math:`(row_i + col_i) / 2`.
        group: the batch is spread over the ranks of this process group, in the order of ranks and unevenly if
            need be. ``pair_index`` then counts positions in the whole batch. Every rank gets the whole
            batch's loss, and gradients that are scaled by the number of ranks, so that the average that DDP takes is
            the gradient of one process with the whole batch.

    Returns:
        0-dim, or ``[B]`` with ``reduction="none"``; fp32, or fp64 for fp64 inputs.

    Raises:
        ValueError: a shape, option, position, weight or temperature is wrong, or an embedding is not finite.
        TypeError: an argument is no tensor, or of a wrong dtype.
    """
    check_option("reduction", reduction, ("mean", "sum", "none"))
    if (codes is None) != (min_shared_codes is None):
        raise ValueError(
            f"codes and min_shared_codes must be given together, got {'no codes' if codes is None else 'codes'} "
            f"and min_shared_codes={min_shared_codes}"
        )
    if not isinstance(temperature, Tensor):
        temperature = torch.scalar_tensor(temperature, dtype=torch.float64, device="cpu")
    check_tensors(item_ids=item_ids, codes=codes, pair_index=pair_index, pair_weight=pair_weight)
    for name, emb in (("hash_emb", hash_emb), ("semantic_emb", semantic_emb)):
        check_floating(name, emb)
        check_dim(name, emb, ("B", "D"))
    arguments = (
        temperature,
        item_ids,
        codes,
        0 if min_shared_codes is None else min_shared_codes,
        pair_index,
        pair_weight,
    )
    dtype = torch.promote_types(hash_emb.dtype, semantic_emb.dtype)
    if group is None:
        row_sums, column_sums = _alignment_loss(
            hash_emb.to(dtype), semantic_emb.to(dtype), *arguments, 0, hash_emb.shape[0]
        )
    else:
        row_sums, column_sums = _SumsOverRanks.apply(group, hash_emb, semantic_emb, *arguments)
    losses = (_loss_of_sums(row_sums) + _loss_of_sums(column_sums)) / 2  # [B], fp64
    if reduction != "none":
        losses = losses.mean() if reduction == "mean" else losses.sum()
    return losses.to(torch.promote_types(dtype, torch.float32))


def _loss_of_sums(log_sums: Tensor) -> Tensor:
    """log(1 + N / P) ``[B]``: exact also near 0, where the difference of log(N + P) and log P would not be."""
    log_p, log_n = log_sums
    return torch.logaddexp(log_n - log_p, torch.zeros_like(log_p))


class _SumsOverRanks(torch.autograd.Function):
    """Every rank sums its own rows against the columns of all; each ends up with the sums of the whole batch.

    Backward, a rank computes the gradients of its own rows and columns alone. They are multiplied by the number of
    ranks, so that the average that data parallelism takes is their sum.
    """

    @staticmethod
    def forward(ctx, group, hash_emb, semantic_emb, temperature, item_ids, codes, min_shared_codes, *pairs):
        pair_index, pair_weight = pairs
        dtype = torch.promote_types(hash_emb.dtype, semantic_emb.dtype)
        pairs_by_row = None if pair_index is None else pair_index.T
        (hashes, semantics, item_ids, codes, pairs_by_row, pair_weight), counts = gather_rows(
            (hash_emb.to(dtype), semantic_emb.to(dtype), item_ids, codes, pairs_by_row, pair_weight), group
        )
        pair_index = None if pairs_by_row is None else pairs_by_row.T
        stripe = sum(counts[: group.rank()]), counts[group.rank()]
        row_sums, column_sums = _alignment_loss(
            hashes,
            semantics,
            temperature,
            item_ids,
            codes,
            min_shared_codes,
            pair_index,
            pair_weight,
            *stripe,
        )
        (rows, columns), _ = gather_rows((row_sums.T, column_sums.unsqueeze(0)), group)
        row_sums, column_sums = rows.T.contiguous(), columns.logsumexp(0)
        ctx.save_for_backward(
            row_sums, column_sums, hashes, semantics, temperature, item_ids, codes, pair_index, pair_weight
        )
        ctx.min_shared_codes, ctx.stripe, ctx.ranks = min_shared_codes, stripe, len(counts)
        ctx.dtypes, ctx.requested_backend = (hash_emb.dtype, semantic_emb.dtype), _backends.requested()
        return row_sums, column_sums

    @staticmethod
    def backward(ctx, grad_row_sums, grad_column_sums):
        with _backends.in_backward_of(ctx.requested_backend):
            grads = _gradients(ctx, grad_row_sums, grad_column_sums, ctx.needs_input_grad[3])
        grad_hash, grad_semantic, grad_temperature = (grad * ctx.ranks for grad in grads)
        hash_dtype, semantic_dtype = ctx.dtypes
        return (
            None,
            grad_hash.to(hash_dtype),
            grad_semantic.to(semantic_dtype),
            grad_temperature,
            *[None] * 5,
        )


def _check(
    hash_emb, semantic_emb, temperature, item_ids, codes, min_shared_codes, pair_index, pair_weight, *stripe
) -> None:
    torch._check_value(
        hash_emb.shape == semantic_emb.shape,
        lambda: (
            f"hash_emb and semantic_emb must have one shape, got {list(hash_emb.shape)} "
            f"and {list(semantic_emb.shape)}"
        ),
    )
    batch_size = hash_emb.shape[0]
    torch._check_value(batch_size >= 1, lambda: "hash_emb must have at least one row, got none")
    torch._check_value(hash_emb.shape[1] >= 1, lambda: "hash_emb must have at least one column, got none")
    check_floating("temperature", temperature)
    check_dim("temperature", temperature, ())
    torch._check_value(
        temperature.device.type in ("cpu", hash_emb.device.type),
        lambda: f"temperature is on {temperature.device}, but hash_emb is on {hash_emb.device}",
    )
    for name, tensor in (
        ("semantic_emb", semantic_emb),
        ("item_ids", item_ids),
        ("codes", codes),
        ("pair_index", pair_index),
        ("pair_weight", pair_weight),
    ):
        if tensor is not None:
            check_same_device(name, tensor, "hash_emb", hash_emb)
    if item_ids is not None:
        check_integer("item_ids", item_ids)
        torch._check_value(
            item_ids.shape == (batch_size,),
            lambda: f"item_ids must have shape [{batch_size}], got {list(item_ids.shape)}",
        )
    if codes is not None:
        check_integer("codes", codes)
        torch._check_value(
            codes.dim() == 2 and codes.shape[0] == batch_size,
            lambda: f"codes must have shape [{batch_size}, L], got {list(codes.shape)}",
        )
        torch._check_value(
            1 <= min_shared_codes <= codes.shape[1],
            lambda: f"min_shared_codes must lie in [1, {codes.shape[1]}], got {min_shared_codes}",
        )
    _check_pairs(pair_index, pair_weight)


def _check_pairs(pair_index: Tensor | None, pair_weight: Tensor | None) -> None:
    torch._check_value(
        (pair_index is None) == (pair_weight is None),
        lambda: "pair_index and pair_weight must be given together",
    )
    if pair_index is None:
        return
    check_integer("pair_index", pair_index)
    check_floating("pair_weight", pair_weight)
    torch._check_value(
        pair_index.dim() == 2 and pair_index.shape[0] == 2,
        lambda: f"pair_index must have shape [2, P], got {list(pair_index.shape)}",
    )
    torch._check_value(
        pair_weight.shape == pair_index.shape[1:],
        lambda: f"pair_weight must have shape [{pair_index.shape[1]}], got {list(pair_weight.shape)}",
    )


def _check_values(hash_emb, semantic_emb, temperature, pair_index, pair_weight) -> None:
    check_finite_rows("hash_emb", hash_emb)
    check_finite_rows("semantic_emb", semantic_emb)
    if checks_values(temperature) and not 0 < temperature.item() < torch.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature.item()}")
    if pair_index is not None:
        check_range("pair_index", pair_index, hash_emb.shape[0])
        if checks_values(pair_weight) and not ((pair_weight > 0) & (pair_weight <= 1)).all():
            bad = pair_weight[~((pair_weight > 0) & (pair_weight <= 1))]
            raise ValueError(
                f"pair_weight must lie in (0, 1], but {bad.numel()} of {pair_weight.numel()} do not "
                f"(the first is {bad[0].item()})"
            )


def _kernel(hash_emb, semantic_emb, temperature, *arguments) -> tuple[Tensor, Tensor]:
    _check(hash_emb, semantic_emb, temperature, *arguments)
    _item_ids, _codes, _min_shared_codes, pair_index, pair_weight, _first_row, _num_rows = arguments
    _check_values(hash_emb, semantic_emb, temperature, pair_index, pair_weight)
    implementation = _backends.choose("alignment_loss", hash_emb.device.type)
    return implementation(hash_emb, semantic_emb, temperature, *arguments)


def _fake(hash_emb, *arguments) -> tuple[Tensor, Tensor]:
    _check(hash_emb, *arguments)
    num_rows = arguments[-1]
    return (
        hash_emb.new_empty((2, num_rows), dtype=torch.float64),
        hash_emb.new_empty((2, hash_emb.shape[0]), dtype=torch.float64),
    )


def _backward_kernel(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    grad_row_sums = arguments[0]
    return _backends.choose("alignment_loss_backward", grad_row_sums.device.type)(*arguments)


def _backward_fake(
    grad_row_sums, grad_column_sums, row_sums, column_sums, hash_emb, semantic_emb, *arguments
):
    temperature, num_rows = arguments[0], arguments[-1]
    shape = (num_rows, hash_emb.shape[1])
    return hash_emb.new_empty(shape), semantic_emb.new_empty(shape), torch.empty_like(temperature)


def _setup_context(ctx, inputs, output) -> None:
    (
        hash_emb,
        semantic_emb,
        temperature,
        item_ids,
        codes,
        min_shared_codes,
        pair_index,
        pair_weight,
        *stripe,
    ) = inputs
    ctx.min_shared_codes, ctx.stripe = min_shared_codes, stripe
    ctx.save_for_backward(
        *output, hash_emb, semantic_emb, temperature, item_ids, codes, pair_index, pair_weight
    )


def _gradients(ctx, grad_row_sums: Tensor, grad_column_sums: Tensor, of_temperature: bool):
    *tensors, temperature, item_ids, codes, pair_index, pair_weight = ctx.saved_tensors
    if not of_temperature:  # a gradient of what lies on the host would make it wait for the device
        temperature = temperature.to(grad_row_sums.device, non_blocking=True)
    positives = item_ids, codes, ctx.min_shared_codes, pair_index, pair_weight
    return _alignment_loss_backward(
        grad_row_sums, grad_column_sums, *tensors, temperature, *positives, *ctx.stripe
    )


def _backward(ctx, grad_row_sums: Tensor, grad_column_sums: Tensor):
    grads = _gradients(ctx, grad_row_sums, grad_column_sums, ctx.needs_input_grad[2])
    wanted = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)]
    return *wanted, *[None] * 7


_INPUTS = (
    "Tensor hash_emb, Tensor semantic_emb, Tensor temperature, Tensor? item_ids, Tensor? codes, "
    "SymInt min_shared_codes, Tensor? pair_index, Tensor? pair_weight, SymInt first_row, SymInt num_rows"
)

_alignment_loss = define(
    f"alignment_loss({_INPUTS}) -> (Tensor, Tensor)",
    _kernel,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)

_alignment_loss_backward = define(
    "alignment_loss_backward(Tensor grad_row_sums, Tensor grad_column_sums, Tensor row_sums, Tensor column_sums, "
    f"{_INPUTS}) -> (Tensor, Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
)
