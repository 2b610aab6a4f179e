"""What training H2Rec on a catalog costs: memory, bytes and operations, and the time that they take at least.

Each piece of work is bound by what takes longest (a roofline): moving its bytes, its matrix products, its other
instructions, or what it sends to other devices. Pieces run one after the other: products, and the passes over what they
made, are pieces of their own. The formulas of the operators are those of kernels/README.md and csrc/README.md; those of
the model were counted as PyTorch's eager operators ran it, and tests/test_planning.py counts again.
"""

from __future__ import annotations

from dataclasses import dataclass

ITEM_SIZES = {"float32": 4, "bfloat16": 2}
SHARED_NEGATIVES = 1024  # of the sampled softmax, see h2rec.training.losses
SCORES_HELD = 2**26  # and how many scores it holds at a time
# Of a step, each with a gradient: sequences; targets and negatives; targets, each with a related item.
LOOKUPS = 3
ADDITIONS = 3 * (LOOKUPS - 1)  # of dense ones: each reads two and writes one
CONTENT_BYTES = 2  # content vectors are kept in fp16


@dataclass(frozen=True)
class Device:
    """What a device can do, per second.

    Attributes:
        memory: bytes.
        bandwidth: bytes from and to memory.
        fp32, bf16: operations of matrix products.
        instructions: other instructions, counted in lanes.
        link: bytes sent to other devices.
        gather_cost: how many times longer bytes take in rows at random places than in a stream. A core of a CPU has few
            cache lines under way, and each waits for its page to be found; on a GPU thousands of threads wait at once.
    """

    name: str
    memory: float
    bandwidth: float
    fp32: float
    bf16: float
    instructions: float
    link: float
    gather_cost: float = 1.0


# NVIDIA's data sheets: A100 80GB SXM, H100 SXM, H200 SXM, HGX B200 (an eighth of the board). Products without sparsity;
# four warps' instructions a clock of each multiprocessor; half of NVLink's two directions.
GPUS = (
    Device("A100", 80e9, 2.04e12, 19.5e12, 312e12, 1.9e13, 300e9),
    Device("H100", 80e9, 3.35e12, 67e12, 990e12, 2.9e13, 450e9),
    Device("H200", 141e9, 4.8e12, 67e12, 990e12, 2.9e13, 450e9),
    Device("B200", 180e9, 8.0e12, 75e12, 2250e12, 3.5e13, 900e9),
)


@dataclass(frozen=True)
class Work:
    """A piece of work of one device.

    Attributes:
        bytes: from and to memory.
        products: operations of matrix products (2 per multiply-add).
        instructions: other instructions that matter, in lanes.
        sent: bytes to other devices.
        gathered: of the bytes from and to memory, those in rows at random places.
        dtype: of the operands of the products.
    """

    name: str
    bytes: float = 0.0
    products: float = 0.0
    instructions: float = 0.0
    sent: float = 0.0
    gathered: float = 0.0
    dtype: str = "float32"

    def seconds_by_limit(self, device: Device) -> dict[str, float]:
        rate = device.bf16 if self.dtype == "bfloat16" else device.fp32
        return {
            "memory": (self.bytes + (device.gather_cost - 1) * self.gathered) / device.bandwidth,
            "products": self.products / rate,
            "instructions": self.instructions / device.instructions,
            "network": self.sent / device.link,
        }

    def limit(self, device: Device) -> str:
        """What binds: the largest of `seconds_by_limit`."""
        seconds = self.seconds_by_limit(device)
        return max(seconds, key=seconds.__getitem__)

    def seconds(self, device: Device) -> float:
        return max(self.seconds_by_limit(device).values())


@dataclass(frozen=True)
class Plan:
    """Training of H2Rec, as it is by default, with the rows of the table shared out over the devices.

    Two SASRec backbones read the sum of an item's vectors; sampled softmax with target smoothing, as on large catalogs.

    Args:
        items: N; the hash table has a row for each.
        dim: D.
        levels, codebook: L levels of K codewords.
        gpus: devices G. Each trains on a batch of its own; the model is on all, the table's rows on one each.
        batch, length: sequences B of T items, per device.
        layers: of each backbone.
        dtype: ``"float32"`` or ``"bfloat16"``, of tables, activations and products. Optimizers keep fp32.
        sparse: the table has sparse gradients and `h2rec.optim.RowwiseAdagrad`; else AdamW updates all of it.

    Raises:
        ValueError: a size is below 1, or an unknown dtype.
    """

    items: int
    dim: int = 64
    levels: int = 4
    codebook: int = 256
    gpus: int = 1
    batch: int = 256
    length: int = 50
    layers: int = 2
    dtype: str = "float32"
    sparse: bool = True

    def __post_init__(self) -> None:
        for name in ("items", "dim", "levels", "codebook", "gpus", "batch", "length", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in ITEM_SIZES:
            raise ValueError(f"dtype must be one of {', '.join(ITEM_SIZES)}, got {self.dtype!r}")

    @property
    def tokens(self) -> int:
        """Positions of a batch."""
        return self.batch * self.length

    @property
    def looked_up(self) -> int:
        """Items that a step looks up."""
        return 4 * self.tokens + SHARED_NEGATIVES

    @property
    def rows_touched(self) -> int:
        """Rows of the table with a gradient, at most."""
        return min(self.looked_up - self.tokens, self.items)  # both lookups of a target touch one row

    @property
    def row_bytes(self) -> int:
        return self.dim * ITEM_SIZES[self.dtype]

    @property
    def dense_parameters(self) -> int:
        """All parameters but the hash table and the codebooks."""
        d = self.dim
        backbone = self.layers * (6 * d * d + 10 * d) + 2 * d
        return 2 * backbone + self.length * d

    @property
    def codebook_parameters(self) -> int:
        return self.levels * self.codebook * self.dim

    def memory(self) -> dict[str, float]:
        """Bytes on each device."""
        size = ITEM_SIZES[self.dtype]
        rows = self.items / self.gpus
        dense = self.dense_parameters + self.codebook_parameters
        # sparse: of each lookup, and then summed by row
        gradient = (
            (self.looked_up + self.rows_touched) * (self.row_bytes + 8)
            if self.sparse
            else rows * self.row_bytes
        )
        # Tensors of [B, T, D] that autograd keeps: of the model, by layers, and 11 of the losses.
        kept = 4 + 26 * self.layers + 11
        scores = self.tokens * SHARED_NEGATIVES
        return {
            "hash table": rows * self.row_bytes,
            "codes": self.items * self.levels * 4,
            "codebooks": self.codebook_parameters * size,
            "dense parameters": self.dense_parameters * size,
            "gradient of the table": gradient,
            "other gradients": dense * size,
            "optimizer state of the table": rows * 4 if self.sparse else rows * 8 * self.dim,
            "other optimizer state": dense * 8,
            "activations": kept * self.tokens * self.row_bytes,
            # held twice, and which of them are left out
            "scores of the loss": 2 * min(scores, SCORES_HELD) * size + scores,
        }

    def step(self) -> list[Work]:
        """The work of a training step, per device."""
        d, levels, size, row = self.dim, self.levels, ITEM_SIZES[self.dtype], self.row_bytes
        tokens, found = self.tokens, self.looked_up
        elsewhere = (self.gpus - 1) / self.gpus
        dense = self.dense_parameters + self.codebook_parameters
        dense_gradients = self.codebook_parameters * size + (
            0 if self.sparse else self.items / self.gpus * row
        )
        work = [
            # ids, codes, rows of the table, outputs: the sum of the levels, and hashed
            Work(
                "harmonized_embedding",
                found * (8 + 4 * levels + row + 2 * row),
                gathered=found * (4 * levels + row),
            ),
            # Levels and table: four passes of a sort of 12-byte keys and places, then each run of cotangents is read.
            # The table's sums are written by row, the codebooks' whole.
            Work(
                "  its backward",
                found * (levels + 1) * (96 + 8 + row) + found * row + LOOKUPS * dense_gradients,
                gathered=found * (levels + 1) * row,
            ),
            # multiply-adds per position: of projections, in units of D^2; of attention, in units of D and the
            # (T + 1) / 2 positions that one sees
            Work(
                "products of the model",
                products=6.0 * tokens * d * d * 12 * self.layers,
                dtype=self.dtype,
            ),
            Work(
                "attention",
                products=14.0 * tokens * (self.length + 1) / 2 * d * 2 * self.layers,
                dtype=self.dtype,
            ),
            # every eager operator reads its inputs and writes its output
            Work("activations", (60 + 234 * self.layers) * tokens * row),
            # scores, and the gradients of users and negatives
            Work(
                "products of the loss",
                products=6.0 * tokens * SHARED_NEGATIVES * 2 * d,
                dtype=self.dtype,
            ),
            # scores: written; masked, log-softmax and exponentials, which read and write them; read by two products
            Work(
                "sampled softmax",
                tokens * SHARED_NEGATIVES * (9 * size + 1) + (38 * tokens + 16 * SHARED_NEGATIVES) * row,
            ),
            # with the related item among the candidates
            Work("target smoothing", 97.0 * tokens * row, products=6.0 * tokens * 2 * d, dtype=self.dtype),
            # parameter, gradient and two moments are read; all but the gradient written
            Work("AdamW", dense * (3 * size + 16) + ADDITIONS * self.codebook_parameters * size),
            self._table_step(),
        ]
        if self.gpus > 1:
            work += [
                Work("rows and their gradients, all to all", sent=2 * found * row * elsewhere),
                Work("gradients, all-reduce", sent=2 * dense * size * elsewhere),
            ]
        return work

    def _table_step(self) -> Work:
        size, row = ITEM_SIZES[self.dtype], self.row_bytes
        if not self.sparse:
            return Work(
                "AdamW of the table", self.items / self.gpus * self.dim * ((3 + ADDITIONS) * size + 16)
            )
        # Gradients of the lookups are joined, the two smallest first, then sorted, read, and written summed by row.
        joined = 2 * row * (self.looked_up + self.looked_up - 2 * self.tokens)
        summed = self.looked_up * (row + 96) + self.rows_touched * row
        # Eager operators read or write D numbers of a row 5 times in its dtype and 7 times in fp32, beside 100 bytes.
        update = self.rows_touched * (5 * row + 7 * 4 * self.dim + 100)
        # gradients in the order of their rows, and rows of the table, read and written
        gathered = (self.looked_up + 2 * self.rows_touched) * row
        return Work("row-wise Adagrad", joined + summed + update, gathered=gathered)

    def tokenizing(self) -> list[Work]:
        """Codes of the whole catalog, per device."""
        d, rows = self.dim, self.items / self.gpus
        return [
            Work(
                "residual_quantize, all items",
                rows * (2 * CONTENT_BYTES * d + 4 * self.levels),
                products=2.0 * rows * d * self.levels * self.codebook,
                # of a warp: 230 to scan 128 products, 250 for the residual and the decision
                instructions=32.0 * rows * self.levels * (230 * self.codebook / 128 + 250),
                dtype="bfloat16",  # 16-bit products find candidates
            )
        ]

    def ranking(self) -> list[Work]:
        """The best of all items for each user of a batch, exactly, per device."""
        rows, scores = self.items / self.gpus, self.items / self.gpus * self.batch
        size, row = ITEM_SIZES[self.dtype], self.row_bytes
        return [
            # codes and rows are read; semantic and hash half written, read, and made one vector of 2 D
            Work("item vectors, all items", rows * (4 * self.levels + 7 * row)),
            Work(
                f"their scores, {self.batch} users",
                rows * 2 * row + scores * size,
                products=4.0 * scores * self.dim,
                dtype=self.dtype,
            ),
            # the largest of each block is found; little is looked at again
            Work("the best scores", scores * size),
        ]
