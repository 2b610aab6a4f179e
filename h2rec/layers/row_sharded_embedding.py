"""A hash table whose rows are spread over the processes of a group."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from h2rec import ops
from h2rec.layers.hash_embedding import HashEmbedding
from h2rec.ops._checks import check_integer, check_items
from h2rec.reference.harmonized_embedding import hash_rows

_REFUSED = -1  # told in the place of a count


class RowShardedEmbedding(nn.Module):
    """A :class:`HashEmbedding` of which each process keeps ``ceil(R / W)`` consecutive rows, the last ones fewer.

    Each of the W processes passes ids of its own, as many as it likes, none included; all of them must call together,
    forward and backward. An id's rows are asked of the processes that have them and come back as vectors: k (1 + D)
    numbers an id on the wire, whatever W is. The table's gradient is that of the mean of the processes' losses, as
    ``DistributedDataParallel`` makes it for other parameters; this layer stays outside of it.

    Args:
        layer: whose sizes, hashing and padding these are. Its table is copied from; on the meta device the own rows are
            drawn, from the generator of this process.
        group: None is all processes.

    Input ``[*]`` integer; output ``[*, D]``. ``table.weight`` holds the own rows ``[ceil(R / W), D]``; with the layer's
    ``sparse`` its gradient is sparse, which `h2rec.optim.RowwiseAdagrad` takes.

    Raises:
        ValueError: a process gets no row; in forward, ids out of range, in this process or in another: all of them
            raise then, and can go on together.
        TypeError: in forward, ids that are no integers.
    """

    def __init__(self, layer: HashEmbedding, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.num_rows, self.padding_idx = len(layer.hash_table), layer.padding_idx
        self._mode, _, self._divisor, _ = layer.hashing
        self.register_buffer("hash_constants", layer.hash_constants)
        self.rows_per_process = -(-self.num_rows // dist.get_world_size(group))
        self.first_row = dist.get_rank(group) * self.rows_per_process
        if self.rows_per_process * (dist.get_world_size(group) - 1) >= self.num_rows:
            raise ValueError(
                f"group: expected processes that get a row each of {self.num_rows}, {self.rows_per_process} at a time, "
                f"got {dist.get_world_size(group)}"
            )
        rows = layer.hash_table.detach()[self.first_row : self.first_row + self.rows_per_process]
        if rows.is_meta:
            rows = torch.randn(rows.shape).div_(layer.rows_per_item**0.5)
        self.table = nn.Embedding(*rows.shape, sparse=layer.table.sparse, _weight=rows.clone())

    def forward(self, item_ids: Tensor) -> Tensor:
        try:
            check_integer("item_ids", item_ids)
            # Also on a GPU, which is waited for below anyway: rows that nobody has would leave the others waiting.
            check_items(item_ids.cpu(), None, (), self.num_embeddings, self.padding_idx)
        except (TypeError, ValueError):  # the others wait for this process's counts
            world_size = dist.get_world_size(self.group)
            self._tell(torch.full((world_size,), _REFUSED, device=item_ids.device))
            raise
        ids = item_ids.flatten().to(torch.int64)
        kept = torch.ones_like(ids, dtype=torch.bool) if self.padding_idx is None else ids != self.padding_idx
        rows = hash_rows(ids[kept], None, self._mode, self.hash_constants, self._divisor, self.num_rows)
        vectors = self._look_up(rows.flatten()).unflatten(0, rows.shape).sum(1)  # [n, k, D] -> [n, D]
        output = vectors.new_zeros(len(ids), self.embedding_dim).masked_scatter(kept.unsqueeze(1), vectors)
        return output.unflatten(0, item_ids.shape)

    def _look_up(self, rows: Tensor) -> Tensor:
        """``[m]`` rows of the whole table, ``[m, D]``."""
        world_size = dist.get_world_size(self.group)
        owners = rows // self.rows_per_process
        order = owners.argsort(stable=True)
        counts = torch.bincount(owners, minlength=world_size)
        send, receive = counts.tolist(), self._tell(counts)
        refused = [rank for rank, count in enumerate(receive) if count == _REFUSED]
        if refused:
            raise ValueError(f"item_ids: expected legal ids in all processes, got others in {refused}")
        asked = _exchange(rows[order], send, receive, self.group)
        _, own = ops.harmonized_embedding(
            asked - self.first_row, None, None, self.table.weight, sparse=self.table.sparse
        )
        vectors = _Exchange.apply(own, receive, send, self.group)
        return torch.empty_like(vectors).index_copy(0, order, vectors)

    def _tell(self, counts: Tensor) -> list[int]:
        """How many rows each process asks of this one, which asks ``counts [W]`` of them."""
        asked = torch.empty_like(counts)
        dist.all_to_all_single(asked, counts, group=self.group)
        return asked.tolist()

    def extra_repr(self) -> str:
        last = self.first_row + len(self.table.weight) - 1
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, rows {self.first_row} to {last} of {self.num_rows}"
        )


class _Exchange(torch.autograd.Function):
    """Its gradient is that of the mean over processes."""

    @staticmethod
    def forward(
        ctx, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(rows, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        grad = _exchange(grad, ctx.receive, ctx.send, ctx.group)
        return grad / dist.get_world_size(ctx.group), None, None, None


def _exchange(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """``[sum(send), *]``, so many rows for each process in turn, to ``[sum(receive), *]`` from each in turn."""
    output = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(output, rows.contiguous(), receive, send, group=group)
    return output
