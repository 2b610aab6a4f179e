"""What the machine can do: rates that an operator's own rate is set beside."""

import torch
import torch.nn.functional as F

from ._harness import Rate

MM_SIZE = 2048
COPY_BYTES = 256 * 2**20  # far beyond the caches


def of_matrix_products(operations: float, device: torch.device) -> Rate:
    """`operations` per call beside those of `torch.mm` at 2048^3 in fp32."""
    a, b = torch.randn(2, MM_SIZE, MM_SIZE, device=device)
    return Rate("FLOP", operations, f"torch.mm {MM_SIZE}^3", lambda: torch.mm(a, b), 2.0 * MM_SIZE**3)


def of_copies(bytes_moved: float, device: torch.device) -> Rate:
    """`bytes_moved` per call, read or written, beside those of a large `copy_`."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    name = f"copy of {COPY_BYTES // 2**20} MiB"
    return Rate("B", bytes_moved, name, lambda: target.copy_(source), 2.0 * COPY_BYTES)


def of_gathers(bytes_read: float, device: torch.device) -> Rate:
    """`bytes_read` per call beside those of `F.embedding_bag`: rows of 256 bytes in random order, sums of 64."""
    table = torch.ones(COPY_BYTES // 256, 64, device=device)
    rows = torch.randperm(len(table), device=device).view(-1, 64)
    name = f"rows of {COPY_BYTES // 2**20} MiB"
    return Rate("B", bytes_read, name, lambda: F.embedding_bag(rows, table, mode="sum"), COPY_BYTES)
