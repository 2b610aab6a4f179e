"""Checks of arguments that several operators or layers share. Each raises an error that names the argument.

Shapes, dtypes and options are checked in the real and in the fake kernels alike. Values (ids in range, finite
vectors) need the data: they are checked in real kernels only, and on a GPU only when asked for, because reading
them back would make the host wait.
"""

import os
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
NAMED = 5  # of many, in a message


def check_size(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_tensors(**values: object) -> None:
    """Each is a tensor or None; `torch.library` says otherwise that it found no 'Tensor', and prints the value."""
    for name, value in values.items():
        if value is not None:
            check_tensor(name, value)


def check_floating(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def check_integer(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name} must be an integer tensor, got {tensor.dtype}")


def check_dim(name: str, tensor: Tensor, shape: Sequence[str]) -> None:
    """``shape`` names the dimensions, e.g. ``("N", "D")``."""
    if tensor.dim() != len(shape):
        raise ValueError(f"{name} must have shape [{', '.join(shape)}], got {list(tensor.shape)}")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, but {other_name} is on {other.device}")


def check_option(name: str, value: str | None, options: Collection[str | None]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")


def checks_values(tensor: Tensor) -> bool:
    """Whether the values of tensors on this device are checked: always on the CPU, else on request."""
    return tensor.is_cpu or os.environ.get("H2REC_CHECK_VALUES") == "1"


def check_finite_rows(name: str, tensor: Tensor) -> None:
    """Every row of ``tensor [N, D]`` is finite."""
    if not checks_values(tensor) or tensor.numel() == 0:
        return
    low, high = tensor.aminmax()  # both are NaN if one element is; one pass, where isfinite makes copies
    if low.isfinite() and high.isfinite():
        return
    bad = (~tensor.isfinite().all(dim=1)).nonzero().flatten()
    raise ValueError(
        f"{name} must be finite, but {bad.numel()} of {tensor.shape[0]} rows hold NaN or infinity "
        f"({first_few('row', bad[:NAMED].tolist(), bad.numel())})"
    )


def check_range(name: str, tensor: Tensor, limit: int, *, exempt: int | None = None) -> None:
    """Every element lies in [0, limit), or equals ``exempt``."""
    if not checks_values(tensor) or tensor.numel() == 0:
        return
    low, high = tensor.aminmax()
    if low >= 0 and high < limit:
        return
    bad = (tensor < 0) | (tensor >= limit)
    if exempt is not None:
        bad &= tensor != exempt
    values = tensor[bad]
    if values.numel():
        raise ValueError(
            f"{name} must lie in [0, {limit}), but {values.numel()} of {tensor.numel()} do not "
            f"({first_few('value', values[:NAMED].tolist(), values.numel())})"
        )


def check_items(
    item_ids: Tensor, codes: Tensor | None, sizes: Sequence[int], num_items: int, padding_idx: int | None
) -> None:
    """Ids lie in [0, num_items) or equal ``padding_idx``; the codes of these items lie in their codebooks."""
    check_range("item_ids", item_ids, num_items, exempt=padding_idx)
    if not sizes or not checks_values(item_ids):
        return
    ids = item_ids.reshape(-1).to(torch.int64)
    ids = ids if padding_idx is None else ids[ids != padding_idx]
    for level, (column, size) in enumerate(zip(codes[ids].unbind(1), sizes, strict=True)):
        check_range(f"codes[:, {level}] of these items", column, size)


def first_few(what: str, values: Sequence[int], count: int) -> str:
    """``row 3``, or ``rows 3, 5, ...``: the first of ``count`` values, of which five are enough."""
    shown = ", ".join(map(str, values[:NAMED]))
    return f"{what if count == 1 else what + 's'} {shown}{', ...' if count > NAMED else ''}"
