"""How item ids become rows of a hash table."""

from typing import NamedTuple

import torch
from torch import Tensor

from h2rec.ops._checks import check_size


class Hashing(NamedTuple):
    """The map from an item id to one or more rows of a hash table ``[R, D]``; several rows are summed.

    Build one with :meth:`direct`, :meth:`multi`, :meth:`qr` or :meth:`prefix`.

    Attributes:
        mode: the name of the method that built it.
        constants: int64 ``[k, 2]``, the multiplier (odd) and the offset of each hash function; None without any.
        divisor: of ``qr``, else 0.
        num_items: of ``qr``, else 0.
    """

    mode: str = "direct"
    constants: Tensor | None = None
    divisor: int = 0
    num_items: int = 0

    @classmethod
    def direct(cls) -> "Hashing":
        """row = item id."""
        return cls()

    @classmethod
    def multi(cls, num_hashes: int = 2, seed: int = 0) -> "Hashing":
        """k rows: ``row_j = (((a_j * id + b_j) mod 2^64 >> 32) * R) >> 32``."""
        return cls("multi", _draw_constants("num_hashes", num_hashes, seed))

    @classmethod
    def qr(cls, num_items: int, divisor: int) -> "Hashing":
        """Two rows, ``id mod m`` and ``m + id div m``, that no two items share; R is ``m + ceil(num_items / m)``."""
        if not 1 <= divisor <= num_items:
            raise ValueError(f"divisor must lie in [1, num_items = {num_items}], got {divisor}")
        return cls("qr", None, divisor, num_items)

    @classmethod
    def prefix(cls, num_levels: int, seed: int = 0) -> "Hashing":
        """One row a level: the codes up to that level are folded to one integer and hashed as in :meth:`multi`."""
        return cls("prefix", _draw_constants("num_levels", num_levels, seed))


def _draw_constants(name: str, count: int, seed: int) -> Tensor:
    check_size(name, count)
    generator = torch.Generator().manual_seed(seed)
    halves = torch.randint(0, 1 << 32, (count, 2, 2), generator=generator, device="cpu")  # 32 bits each
    constants = (halves[..., 0] << 32) | halves[..., 1]
    constants[:, 0] |= 1
    return constants.to(torch.get_default_device())
