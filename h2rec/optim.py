"""Optimizers for large tables."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_hooks = WeakTensorKeyDictionary()  # table -> the handle of the hook that updates it


class RowwiseAdagrad(torch.optim.Optimizer):
    r"""Adagrad with one number of state per row, applied to a sparse gradient as soon as it is known.

    Every row r with a gradient :math:`g_r` (of D elements; all its occurrences in the batch summed) becomes::

        sum_r    <- sum_r + |g_r|^2 / D
        weight_r <- weight_r - lr * g_r / (sqrt(sum_r) + eps)

    which is the row-wise Adagrad of FBGEMM and torchrec. The sums are fp32 (fp64 for fp64 tables): R numbers, where
    Adam keeps 2 R D. Nothing of size ``[R, D]`` is allocated.

    The update runs inside ``backward()``, once a call, and leaves ``.grad`` None, so that no gradient outlives it;
    ``step()`` finds nothing left to do. What must see the gradient first (the averaging of
    ``DistributedDataParallel``, clipping, ``GradScaler``, several backward passes a step) needs ``in_backward=False``,
    where ``step()`` updates like that of any other optimizer.

    Args:
        params: tables ``[R, D]`` of layers with ``sparse=True``, or groups of them. With ``in_backward`` a table is
            updated by the optimizer that was built last.
        lr: learning rate; elements of a row that is seen for the first time move by about so much.
        eps: keeps the quotient finite.
        in_backward: see above.

    Raises:
        ValueError: a rate is negative, a parameter has not two dimensions, or (in backward or step) a gradient is
            dense.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.01, *, eps: float = 1e-8, in_backward: bool = True
    ) -> None:
        self._in_backward = in_backward
        super().__init__(params, {"lr": lr, "eps": eps})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "eps"):
            if not group[name] >= 0:
                raise ValueError(f"{name} must be at least 0, got {group[name]}")
        for table in group["params"]:
            if table.dim() != 2:
                raise ValueError(f"params must have shape [R, D], got {list(table.shape)}")
            if self._in_backward:
                self._update_in_backward(table, len(self.param_groups) - 1)

    def _update_in_backward(self, table: Tensor, group_index: int) -> None:
        def hook(table: Tensor) -> None:
            self._update(table, self.param_groups[group_index])  # load_state_dict makes new groups
            table.grad = None

        if table in _hooks:
            _hooks[table].remove()
        _hooks[table] = table.register_post_accumulate_grad_hook(hook)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the tables that have a gradient; ``closure`` computes it, and its result is returned."""
        result = None if closure is None else closure()
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._update(table, group)
        return result

    @torch.no_grad()
    def _update(self, table: Tensor, group: dict[str, Any]) -> None:
        if not table.grad.is_sparse:
            raise ValueError(
                f"the gradient of a table {list(table.shape)} must be sparse, got a dense one; "
                "build its layer with sparse=True"
            )
        grad = table.grad.coalesce()  # a table used twice in a batch has uncoalesced sums
        dtype = torch.promote_types(table.dtype, torch.float32)
        rows, values = grad.indices()[0], grad.values().to(dtype)  # [U], [U, D]
        state = self.state[table]
        if not state:
            state["sum"] = torch.zeros(len(table), dtype=dtype, device=table.device)
        sums = state["sum"].index_select(0, rows) + values.square().mean(1)
        state["sum"].index_copy_(0, rows, sums)
        steps = values * (group["lr"] / (sums.sqrt() + group["eps"])).unsqueeze(1)
        table.index_copy_(0, rows, (table.index_select(0, rows) - steps).to(table.dtype))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in the base class, which however would round the sums to the dtype of the table."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        tables = [table for group in self.param_groups for table in group["params"]]
        for index, table in zip(saved, tables, strict=True):
            if index in state_dict["state"]:
                self.state[table]["sum"] = state_dict["state"][index]["sum"].to(table.device, copy=True)
