"""Item ids to semantic embeddings (codes, then codebook rows) and hash embeddings (hash, then table rows)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from h2rec.ops import _backends, _cpp
from h2rec.ops._checks import (
    check_dim,
    check_floating,
    check_integer,
    check_items,
    check_option,
    check_same_device,
    check_tensors,
)
from h2rec.ops._codebooks import pack_codebooks
from h2rec.ops._registry import define
from h2rec.ops.hashing import Hashing

_POOLINGS = ("sum", "mean", "levels", "concat")
_COMBINES = (None, "sum", "mean", "concat")
_HASH_MODES = ("direct", "multi", "qr", "prefix")
_UNBOUNDED = (1 << 63) - 1


def harmonized_embedding(
    item_ids: Tensor,
    codes: Tensor | None,
    codebooks: Tensor | Sequence[Tensor] | None,
    hash_table: Tensor | None,
    *,
    hashing: Hashing | None = None,
    pooling: str = "sum",
    padding_idx: int | None = None,
    sparse: bool = False,
    combine: str | None = None,
) -> tuple[Tensor | None, Tensor | None] | Tensor:
    r"""Looks items up in both worlds at once.

    The semantic half of item i with codes :math:`(k_0, ..., k_{L-1})` pools the codebook rows :math:`c_{l,k_l}`;
    its hash half is the sum of the rows of ``hash_table`` that ``hashing`` gives. Either half may be left out.

    Args:
        item_ids: ``[*]``, any integer dtype, each in [0, num_items) or equal to ``padding_idx``.
        codes: ``[num_items, L]``, any integer dtype; needed with ``codebooks`` and by the hash mode ``prefix``.
        codebooks: ``[L, K, D]``, or a sequence of L tensors ``[K_l, D]``; None leaves the semantic half out.
        hash_table: ``[R, D_h]`` in the codebooks' dtype; None leaves the hash half out.
        hashing: how ids become rows; None is :meth:`Hashing.direct`, where R must be at least num_items.
        pooling: ``"sum"`` or ``"mean"`` over levels gives ``[*, D]``, ``"levels"`` ``[*, L, D]``, ``"concat"``
            ``[*, L * D]``.
        padding_idx: items with this id get zeros and give no gradient. It may lie outside [0, num_items).
        sparse: the gradient of ``hash_table`` is a coalesced sparse tensor.
        combine: ``"sum"``, ``"mean"`` or ``"concat"`` of the two halves, written once, instead of the pair.

    Returns:
        ``(semantic, hashed)`` with ``hashed [*, D_h]`` and None for a half that is left out; or with ``combine`` one
        tensor. Sums are taken in fp32 (fp64 for fp64). Gradients of the codebooks and of the table are the same bits
        in every run. On a GPU items with an id out of range give NaN instead of an error, unless
        ``H2REC_CHECK_VALUES=1``; and there an incoming gradient that is not finite may make NaN of the gradients of
        other codewords too.

    Raises:
        ValueError: a shape or an option is wrong, or an id is out of range.
        TypeError: an argument is no tensor, or of a wrong dtype.
    """
    check_tensors(item_ids=item_ids, codes=codes, hash_table=hash_table)
    hashing = Hashing() if hashing is None else hashing
    packed, sizes = (None, []) if codebooks is None else pack_codebooks(codebooks)
    first, hashed = _harmonized_embedding(
        item_ids,
        codes,
        packed,
        sizes,
        hash_table,
        hashing.mode,
        hashing.constants,
        hashing.divisor,
        _num_items(codes, hash_table, hashing),
        pooling,
        padding_idx,
        combine,
        sparse,
    )
    if combine is not None:
        return first
    return None if codebooks is None else first, None if hash_table is None else hashed


def _num_items(codes: Tensor | None, hash_table: Tensor | None, hashing: Hashing) -> int:
    if codes is not None and codes.dim() == 2:
        return codes.shape[0]
    if hashing.mode == "qr":
        return hashing.num_items
    if hashing.mode == "direct" and hash_table is not None and hash_table.dim() == 2:
        return hash_table.shape[0]
    return _UNBOUNDED


def _check(
    item_ids,
    codes,
    codebooks,
    sizes,
    hash_table,
    hash_mode,
    hash_constants,
    divisor,
    num_items,
    pooling,
    padding_idx,
    combine,
    sparse,
) -> None:
    # Plain comparisons: a small batch must not wait for its checks.
    check_integer("item_ids", item_ids)
    check_option("pooling", pooling, _POOLINGS)
    check_option("combine", combine, _COMBINES)
    check_option("hashing.mode", hash_mode, _HASH_MODES)
    if codebooks is None and hash_table is None:
        raise ValueError("codebooks and hash_table must not both be None")
    if codes is not None:
        check_integer("codes", codes)
        check_dim("codes", codes, ("num_items", "L"))
        check_same_device("codes", codes, "item_ids", item_ids)
    if codebooks is not None:
        if codes is None:
            raise ValueError("codebooks need codes, got None")
        check_same_device("codebooks", codebooks, "item_ids", item_ids)
        if codes.shape[1] != len(sizes):
            raise ValueError(f"codes has {codes.shape[1]} levels, but codebooks has {len(sizes)}")
    if hash_table is not None:
        _check_hashing(item_ids, codes, hash_table, hash_mode, hash_constants, divisor, num_items)
        if codebooks is not None and hash_table.dtype != codebooks.dtype:
            raise TypeError(f"hash_table is {hash_table.dtype}, but codebooks is {codebooks.dtype}")
    if combine is not None:
        if codebooks is None or hash_table is None:
            raise ValueError(f"combine={combine!r} needs both codebooks and hash_table")
        if pooling == "levels":
            raise ValueError(f"combine={combine!r} needs a pooling other than 'levels'")
        width = codebooks.shape[1] * (len(sizes) if pooling == "concat" else 1)
        if combine != "concat" and width != hash_table.shape[1]:
            raise ValueError(
                f"combine={combine!r} needs halves of one width, got {width} from codebooks "
                f"and {hash_table.shape[1]} from hash_table"
            )


def _check_hashing(item_ids, codes, hash_table, hash_mode, hash_constants, divisor, num_items) -> None:
    check_floating("hash_table", hash_table)
    check_dim("hash_table", hash_table, ("R", "D"))
    check_same_device("hash_table", hash_table, "item_ids", item_ids)
    num_rows = hash_table.shape[0]
    if num_rows < 1:
        raise ValueError("hash_table must have at least one row, got none")
    if hash_mode == "direct":
        if num_rows < num_items:
            raise ValueError(
                f"hash_table must have a row for each of the {num_items} items, got {num_rows} rows"
            )
        return
    if hash_mode == "qr":
        if divisor < 1:
            raise ValueError(f"hashing.divisor must be at least 1, got {divisor}; use Hashing.qr")
        expected = divisor + (num_items + divisor - 1) // divisor
        if num_rows != expected:
            raise ValueError(
                f"hash_table must have divisor + ceil(num_items / divisor) = {expected} rows for "
                f"{num_items} items and divisor {divisor}, got {num_rows}; other sizes make items share both rows"
            )
        return
    if num_rows > 1 << 32:
        raise ValueError(f"hash_table must have at most 2^32 rows to hash, got {num_rows}")
    if hash_constants is None:
        raise ValueError(f"hashing.constants is None; use Hashing.{hash_mode}")
    if hash_constants.dtype != torch.int64:
        raise TypeError(f"hashing.constants must be int64, got {hash_constants.dtype}")
    if hash_constants.dim() != 2 or hash_constants.shape[1] != 2 or hash_constants.shape[0] < 1:
        raise ValueError(f"hashing.constants must have shape [k, 2], got {list(hash_constants.shape)}")
    check_same_device("hashing.constants", hash_constants, "item_ids", item_ids)
    if hash_mode == "prefix":
        if codes is None:
            raise ValueError("hashing 'prefix' needs codes, got None")
        if codes.shape[1] != hash_constants.shape[0]:
            raise ValueError(
                f"hashing is for {hash_constants.shape[0]} levels, but codes has {codes.shape[1]}"
            )


def _output_shapes(item_ids, codebooks, sizes, hash_table, pooling, combine):
    shape = list(item_ids.shape)
    semantic, hashed = None, None
    if codebooks is not None:
        dim, num_levels = codebooks.shape[1], len(sizes)
        semantic = {"levels": [num_levels, dim], "concat": [num_levels * dim]}.get(pooling, [dim])
    if hash_table is not None:
        hashed = [hash_table.shape[1]]
    if combine == "concat":
        return [*shape, semantic[0] + hashed[0]], [0]
    if combine is not None:
        return shape + hashed, [0]
    return shape + semantic if semantic else [0], shape + hashed if hashed else [0]


def _kernel(item_ids, codes, codebooks, sizes, hash_table, *options) -> tuple[Tensor, Tensor]:
    _check(item_ids, codes, codebooks, sizes, hash_table, *options)
    implementation = _backends.choose("harmonized_embedding", item_ids.device.type)
    if implementation is not _cpp.harmonized_embedding:  # which checks values as it reads them
        _, _, _, num_items, _, padding_idx, _, _ = options
        check_items(item_ids, codes, sizes if codebooks is not None else (), num_items, padding_idx)
    return implementation(item_ids, codes, codebooks, sizes, hash_table, *options)


def _fake(item_ids, codes, codebooks, sizes, hash_table, *options) -> tuple[Tensor, Tensor]:
    _check(item_ids, codes, codebooks, sizes, hash_table, *options)
    _, _, _, _, pooling, _, combine, _ = options
    shapes = _output_shapes(item_ids, codebooks, sizes, hash_table, pooling, combine)
    like = codebooks if codebooks is not None else hash_table
    return like.new_empty(shapes[0]), like.new_empty(shapes[1])


def _backward_kernel(grad_first, grad_hashed, item_ids, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    implementation = _backends.choose("harmonized_embedding_backward", item_ids.device.type)
    return implementation(grad_first, grad_hashed, item_ids, *arguments)


def _backward_fake(
    grad_first, grad_hashed, item_ids, codes, sizes, codebook_dim, num_rows, hash_dim, *options
) -> tuple[Tensor, Tensor, Tensor]:
    *_, combine, sparse = options
    like = grad_first if grad_first is not None else grad_hashed
    has_table = num_rows > 0 and (grad_hashed is not None or combine is not None)
    grad_codebooks = like.new_empty(
        (sum(sizes), codebook_dim) if codebook_dim and grad_first is not None else 0
    )
    if not has_table:
        return grad_codebooks, like.new_empty(0), item_ids.new_empty(0, dtype=torch.int64)
    if not sparse:
        return (
            grad_codebooks,
            like.new_empty((num_rows, hash_dim)),
            item_ids.new_empty(0, dtype=torch.int64),
        )
    num_unique = torch.library.get_ctx().new_dynamic_size()
    return (
        grad_codebooks,
        like.new_empty((num_unique, hash_dim)),
        item_ids.new_empty(num_unique, dtype=torch.int64),
    )


def _setup_context(ctx, inputs, output) -> None:
    item_ids, codes, codebooks, sizes, hash_table, hash_mode, hash_constants, *options = inputs
    ctx.save_for_backward(item_ids, codes, hash_constants)
    ctx.sizes, ctx.hash_mode, ctx.options = sizes, hash_mode, options
    ctx.codebook_dim = 0 if codebooks is None else codebooks.shape[1]
    ctx.num_rows, ctx.hash_dim = (0, 0) if hash_table is None else hash_table.shape
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_first, grad_hashed):
    item_ids, codes, hash_constants = ctx.saved_tensors
    *_, combine, sparse = ctx.options
    no_grads = [None] * 13
    if grad_first is None and grad_hashed is None:
        return tuple(no_grads)
    wants_codebooks = ctx.needs_input_grad[2] and grad_first is not None
    wants_table = ctx.needs_input_grad[4] and (grad_hashed if combine is None else grad_first) is not None
    grad_codebooks, grad_table, grad_rows = _harmonized_embedding_backward(
        grad_first if combine is not None or wants_codebooks else None,
        grad_hashed if combine is None and wants_table else None,
        item_ids,
        codes,
        ctx.sizes,
        ctx.codebook_dim if wants_codebooks else 0,
        ctx.num_rows if wants_table else 0,
        ctx.hash_dim,
        ctx.hash_mode,
        hash_constants,
        *ctx.options,
    )
    if wants_table and sparse:
        grad_table = torch.sparse_coo_tensor(
            grad_rows.unsqueeze(0),
            grad_table,
            (ctx.num_rows, ctx.hash_dim),
            is_coalesced=True,
            check_invariants=False,
        )
    no_grads[2] = grad_codebooks if wants_codebooks else None
    no_grads[4] = grad_table if wants_table else None
    return tuple(no_grads)


_OPTIONS = "SymInt divisor, SymInt num_items, str pooling, SymInt? padding_idx, str? combine, bool sparse"

_harmonized_embedding = define(
    "harmonized_embedding(Tensor item_ids, Tensor? codes, Tensor? codebooks, SymInt[] sizes, Tensor? hash_table, "
    f"str hash_mode, Tensor? hash_constants, {_OPTIONS}) -> (Tensor, Tensor)",
    _kernel,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)

_harmonized_embedding_backward = define(
    "harmonized_embedding_backward(Tensor? grad_first, Tensor? grad_hashed, Tensor item_ids, Tensor? codes, "
    "SymInt[] sizes, SymInt codebook_dim, SymInt num_rows, SymInt hash_dim, str hash_mode, Tensor? hash_constants, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
)
