"""K-means on residuals, level by level: codebooks for residual quantization, learned from batches of vectors."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from h2rec.ops import _backends, _cpp
from h2rec.ops._checks import check_size
from h2rec.ops.residual_quantize import residual_quantize
from h2rec.ops.vector_batches import VectorSource, check_repeatable, vector_batches

# Rows of the sample that a level starts from, and of those that k-means++ draws from, for each codeword.
_SAMPLE_ROWS = 64
_PLUS_PLUS_ROWS = 16
# A level starts in this many leading directions of its sample, one width after the other.
_START_WIDTHS = (8, 16, 32, 64)
# How far a codeword that splits another lies from it, in standard deviations of what is split.
_SPLIT_DISTANCE = 0.01
# Rows of a mini-batch whose sums one process forms.
_SHARED_ROWS = 2048
# Floats of the largest intermediate, scores [rows, K]: 16 MiB.
_BLOCK_ELEMENTS = 4 << 20

Progress = Callable[[int, int, float], None]


def fit_codebooks(
    vectors: VectorSource,
    sizes: Sequence[int],
    *,
    num_iters: int = 25,
    seed: int = 0,
    batch_size: int = 4096,
    mini_batch: bool = False,
    balance: float = 0.0,
    progress: Progress | None = None,
    first: Sequence[Tensor] = (),
    on_level: Callable[[list[Tensor]], None] | None = None,
    group: dist.ProcessGroup | None = None,
) -> list[Tensor]:
    """Codebooks by k-means on what the levels before left over.

    Each level starts from k-means++ (Arthur and Vassilvitskii, SODA 2007) in the leading principal directions of a
    sample. The first half of its ``num_iters`` Lloyd steps stays with the sample and widens these directions step by
    step, which costs little and ends in a better minimum; the second half sees every vector whole. A codeword
    without vectors splits one of those with the largest error. A tensor or array in memory costs one copy in fp32; a
    memory map or a stream costs four bytes for each code, and is read again for each step. The result depends on the
    seed, not on the number of threads.

    Args:
        vectors: ``[N, D]``, or a function that returns batches of such rows, see
            :func:`h2rec.ops.vector_batches.vector_batches`.
        sizes: codewords of each level.
        mini_batch: codebooks move after each batch (Sculley, WWW 2010), not once per pass: fewer passes do.
        balance: price of a crowded codeword, in mean squared distances for each multiple of its fair share; 0 is plain
            k-means. Prices change which vectors form a mean, never which codeword is nearest to a vector.
        progress: called after each pass with the level, the step and the mean squared distance.
        first: codebooks of the first levels, if these are known: the others become what they would have become.
        on_level: called with the codebooks so far after each level.
        group: processes that share the work: all call this with the same arguments, vectors included, each forms the
            sums of its share of the batches (with ``mini_batch`` of each batch, 2048 rows at a time), and all get the
            codebooks that one process would have got.

    Returns:
        One ``[K_l, D]`` fp32 tensor per level.

    Raises:
        ValueError: a size or an option is wrong, there are fewer vectors than codewords, or rows are not finite.
        TypeError: vectors can be read only once.
    """
    check_repeatable(vectors)
    sizes = list(sizes)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes must be positive, one for each level, got {sizes}")
    check_size("num_iters", num_iters)
    check_size("batch_size", batch_size)
    if not 0 <= balance < torch.inf:
        raise ValueError(f"balance must be at least 0, got {balance}")
    residuals = _Residuals(vectors, batch_size)
    if residuals.num_rows < max(sizes):
        raise ValueError(
            f"vectors must have at least as many rows as a level has codewords, {max(sizes)}, got {residuals.num_rows}"
        )
    num_start_steps = num_iters // 2
    step = _mini_batch_step if mini_batch else _lloyd_step
    codebooks = [codebook.to(residuals.device) for codebook in first]
    for level, size in enumerate(sizes[len(first) :], len(first)):
        residuals.advance(codebooks)
        generator = torch.Generator().manual_seed(seed * len(sizes) + level)
        sample = residuals.sample(size * _SAMPLE_ROWS, generator)
        codebook = _start(sample, size, num_start_steps, generator)
        if group is not None:
            dist.broadcast(codebook, group=group, group_src=0)
        largest = sample.abs().max().item()
        bounds = residuals.num_rows * largest, residuals.num_rows * sample.shape[1] * largest**2
        prices, previous = None, None
        for index in range(num_start_steps, num_iters):
            batches = residuals.batches(slice(None) if mini_batch else _share(group))
            codebook, counts, error = step(batches, codebook, prices, bounds, group)
            if progress is not None:
                progress(level, index, error)
            if balance:
                load = counts * (size / counts.sum())
                # Half the way to the price of the load now: without memory, crowds would move to and fro.
                prices = torch.lerp(
                    load.new_zeros(()) if prices is None else prices, balance * error * load, 0.5
                )
            elif error == previous:
                break
            previous = error
        codebooks.append(codebook)
        if on_level is not None:
            on_level(codebooks)
    return codebooks


class _Residuals:
    """What the levels so far leave of the vectors: kept if these are in memory, else formed again from their codes."""

    def __init__(self, vectors: VectorSource, batch_size: int) -> None:
        self.vectors, self.batch_size = vectors, batch_size
        self.codebooks: list[Tensor] = []
        self.codes: list[Tensor] = []  # of a stream: [N] int32 for each codebook
        in_memory = isinstance(vectors, Tensor) or (
            isinstance(vectors, np.ndarray) and not isinstance(vectors, np.memmap)
        )
        self.kept = None
        if in_memory:
            self.kept = torch.cat(
                [batch.clone() for batch in vector_batches(vectors, batch_size)] or [_EMPTY]
            )
            self.num_rows, self.device = len(self.kept), self.kept.device
        else:
            self.num_rows, self.device = 0, None
            for batch in vector_batches(vectors, batch_size):
                self.num_rows, self.device = self.num_rows + len(batch), batch.device

    def batches(self, share: slice = slice(None)) -> Iterator[Tensor]:
        """Those whose numbers are in ``share``."""
        if self.kept is not None:
            yield from self.kept.split(self.batch_size)[share]
            return
        wanted = range(-(-self.num_rows // self.batch_size))[share]
        for number, batch in enumerate(vector_batches(self.vectors, self.batch_size)):
            if number not in wanted:
                continue
            rows = slice(number * self.batch_size, number * self.batch_size + len(batch))
            for codebook, codes in zip(self.codebooks, self.codes, strict=True):
                batch = batch - codebook[codes[rows].to(batch.device)]
            yield batch

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """At most ``count`` different rows, in their order."""
        rows = torch.randperm(self.num_rows, generator=generator, device="cpu")[:count].sort().values
        parts, start = [], 0
        for batch in self.batches():
            within = rows[(rows >= start) & (rows < start + len(batch))] - start
            parts.append(batch[within.to(batch.device)])
            start += len(batch)
        return torch.cat(parts)

    def advance(self, codebooks: Sequence[Tensor]) -> None:
        """Leaves what ``codebooks``, of which the first were there before, do not explain."""
        for codebook in codebooks[len(self.codebooks) :]:
            if self.kept is not None:
                for batch in self.kept.split(self.batch_size):  # views: written in place
                    batch -= residual_quantize(batch, [codebook])[0]
            else:
                codes, start = torch.empty(self.num_rows, dtype=torch.int32, device="cpu"), 0
                for batch in self.batches():
                    codes[start : start + len(batch)] = residual_quantize(batch, [codebook])[1].squeeze(1)
                    start += len(batch)
                self.codes.append(codes)
            self.codebooks.append(codebook)


_EMPTY = torch.zeros(0, 1)


def _share(group: dist.ProcessGroup | None) -> slice:
    """Which batches, or parts of one, are this process's; what is in them does not depend on the group."""
    return slice(None) if group is None else slice(group.rank(), None, group.size())


def _start(sample: Tensor, size: int, num_steps: int, generator: torch.Generator) -> Tensor:
    """Codewords to start from, by k-means in more and more of the sample's leading directions."""
    widths = [width for width in _START_WIDTHS if width < sample.shape[1]]
    if not widths:
        return _plus_plus(sample, size, generator)
    projected = sample @ _leading_directions(sample, widths[-1], generator)
    codebook = codes = None
    for index, width in enumerate(widths):
        narrow = projected[:, :width].contiguous()
        codebook = (
            _plus_plus(narrow, size, generator) if codebook is None else _means(narrow, codes, codebook)
        )
        for _ in range(num_steps // len(widths) + (index < num_steps % len(widths))):
            codebook, _, _ = _lloyd_step([narrow], codebook)
        codes = _nearest(narrow, codebook)
        wider = widths[index + 1] - width if index + 1 < len(widths) else sample.shape[1] - width
        codebook = torch.nn.functional.pad(codebook, (0, wider))
    return _means(sample, codes, codebook)


def _leading_directions(sample: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """About the first principal directions ``[D, width]``, by two rounds of subspace iteration."""
    centred = sample - sample.mean(0)
    basis = torch.randn(sample.shape[1], width, generator=generator, device="cpu").to(sample.device)
    for _ in range(2):
        product = centred.T @ (centred @ basis)
        with _one_thread():
            basis, _ = torch.linalg.qr(product)
    within = centred @ basis
    product = within.T @ within
    with _one_thread():
        _, turned = torch.linalg.eigh(product)
    return basis @ turned.flip(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """For decompositions of small matrices, whose last bits LAPACK makes depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _plus_plus(sample: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next codeword is a row drawn with a chance in proportion to its squared distance so far."""
    sample = sample[:: max(1, len(sample) // (size * _PLUS_PLUS_ROWS))]
    chosen = [int(torch.randint(len(sample), (), generator=generator, device="cpu"))]
    distance = torch.full((len(sample),), torch.inf, device=sample.device)
    norms = sample.square().sum(1)
    for _ in range(1, size):
        last = chosen[-1]
        to_last = (norms - 2 * (sample @ sample[last]) + norms[last]).clamp_min(0)
        to_last[last] = 0  # rounding may leave a little, and a row is not drawn twice while others are left
        distance = torch.minimum(distance, to_last)
        cumulative = distance.double().cumsum(0).cpu()
        if cumulative[-1] > 0:
            target = torch.rand((), dtype=torch.float64, generator=generator, device="cpu") * cumulative[-1]
            chosen.append(min(int(torch.searchsorted(cumulative, target, right=True)), len(sample) - 1))
        else:  # fewer different rows than codewords
            chosen.append(int(torch.randint(len(sample), (), generator=generator, device="cpu")))
    return sample[chosen].clone()


def _nearest(rows: Tensor, codebook: Tensor, prices: Tensor | None = None) -> Tensor:
    """``[B]`` int64; without the checks of :func:`residual_quantize`."""
    quantize = _backends.choose("residual_quantize", rows.device.type)
    if prices is None and quantize is _cpp.residual_quantize:
        return quantize(rows, codebook, [len(codebook)], 1)[1].squeeze(1).long()
    offsets = codebook.square().sum(1)
    if prices is not None:
        offsets += prices
    block = max(1, _BLOCK_ELEMENTS // len(codebook))
    return torch.cat(
        [torch.addmm(offsets, part, codebook.T, alpha=-2).argmin(1) for part in rows.split(block)]
    )


def _lloyd_step(
    batches: Iterable[Tensor],
    codebook: Tensor,
    prices: Tensor | None = None,
    bounds: tuple[float, float] | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, float]:
    """The means of the vectors of each codeword, how many these are, and their mean squared distance to the old."""
    total = _Sums(codebook, bounds)
    for batch in batches:
        total.add(batch, _nearest(batch, codebook, prices))
    total.all_reduce(group)
    return total.means(codebook), total.counts, total.error(codebook)


def _mini_batch_step(
    batches: Iterable[Tensor],
    codebook: Tensor,
    prices: Tensor | None,
    bounds: tuple[float, float],
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, float]:
    """Like :func:`_lloyd_step`, but each batch meets the means of those before it. Processes share its rows."""
    total, error, num_rows = _Sums(codebook, bounds), 0.0, 0
    for batch in batches:
        sums = _Sums(codebook, bounds)
        for part in batch.split(_SHARED_ROWS)[_share(group)]:
            sums.add(part, _nearest(part, codebook, prices))
        sums.all_reduce(group)
        error += sums.error(codebook) * len(batch)
        num_rows += len(batch)
        total.merge(sums)
        codebook = torch.where((total.counts == 0).unsqueeze(1), codebook, total.plain_means())
    return total.means(codebook), total.counts, error / num_rows


def _means(rows: Tensor, codes: Tensor, codebook: Tensor) -> Tensor:
    total = _Sums(codebook)
    total.add(rows, codes)
    return total.means(codebook)


class _Sums:
    """What k-means needs to know of the vectors of each codeword: number, sum, sum of squared norms.

    Args:
        bounds: what no sum of entries, and none of squared norms, exceeds. A batch's sums are then rounded to what
            fp64 resolves there, so that adding them rounds no more: neither the order of batches makes a difference
            nor who has them. (If a bound is wrong, it may; the sums are as good.)
    """

    def __init__(self, codebook: Tensor, bounds: tuple[float, float] | None = None) -> None:
        size, dim = codebook.shape
        self.counts = torch.zeros(size, dtype=torch.int64, device=codebook.device)
        self.sums = torch.zeros(size, dim, dtype=torch.float64, device=codebook.device)
        self.squares = torch.zeros(size, dtype=torch.float64, device=codebook.device)
        self.bounds = bounds

    def add(self, rows: Tensor, codes: Tensor) -> None:
        self.counts += torch.bincount(codes, minlength=len(self.counts))
        sums = self._by_code(rows, codes)
        squares = self._by_code(torch.linalg.vecdot(rows, rows).unsqueeze(1), codes).squeeze(1)
        if self.bounds is not None:
            sums, squares = map(_round_below, (sums, squares), self.bounds)
        self.sums += sums
        self.squares += squares

    def all_reduce(self, group: dist.ProcessGroup | None) -> None:
        if group is None:
            return
        for part in (self.counts, self.sums, self.squares):
            dist.all_reduce(part, group=group)

    def merge(self, other: "_Sums") -> None:
        self.counts += other.counts
        self.sums += other.sums
        self.squares += other.squares

    def _by_code(self, rows: Tensor, codes: Tensor) -> Tensor:
        # A sum in fixed order on every device, which index_add_ is not.
        return torch.ops.aten.embedding_dense_backward(rows, codes, len(self.counts), -1, False)

    def error(self, codebook: Tensor) -> float:
        """Mean squared distance to ``codebook``, from the sums alone."""
        books = codebook.double()
        apart = self.squares - 2 * (self.sums * books).sum(1) + self.counts * books.square().sum(1)
        return (apart.sum() / self.counts.sum()).clamp_min(0).item()

    def plain_means(self) -> Tensor:
        return (self.sums / self.counts.clamp_min(1).unsqueeze(1)).float()

    def means(self, codebook: Tensor) -> Tensor:
        """The means; the i-th codeword without vectors is put beside the one with the i-th largest error."""
        empty = (self.counts == 0).unsqueeze(1)
        means = torch.where(empty, codebook, self.plain_means())
        within = (self.squares - self.counts * means.double().square().sum(1)).clamp_min(0)  # [K]
        order = within.argsort(descending=True, stable=True)
        split = order[(empty.squeeze(1).cumsum(0) - 1).clamp_min(0)]
        spread = (within / self.counts.clamp_min(1) / means.shape[1]).sqrt().float()
        signs = 1 - 2.0 * (torch.arange(means.shape[1], device=means.device) % 2)
        beside = means[split] + _SPLIT_DISTANCE * spread[split].unsqueeze(1) * signs
        return torch.where(empty, beside, means)


def _round_below(values: Tensor, bound: float) -> Tensor:
    """fp64 multiples of what fp64 resolves at ``bound``."""
    shift = 1.5 * 2.0 ** math.ceil(math.log2(max(bound, 1e-30)))
    return values.double().add_(shift).sub_(shift)
