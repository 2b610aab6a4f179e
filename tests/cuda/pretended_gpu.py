"""A GPU that is not there: its tensors hold their values in host memory, and mix with no others.

In C++ they are on the device meta, for which autograd needs no driver; in Python they say "cuda". Operators of h2rec
run on their reference backend. What a real kernel would refuse of its own (a dtype, a layout) is not found out.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
_GPU, _IN_CPP = torch.device("cuda", 0), torch.device("meta")
_INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
_FILLING = {"masked_fill", "masked_fill_", "fill_"}
_TRANSFERS = {"_to_copy", "copy_"}
# For a result whose size, or value, the host must know.
_WAITING = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal", "bincount"}


@contextlib.contextmanager
def pretended_gpu() -> Iterator[list[str]]:
    """Within the block there is one; yields the names of the operators for which the host waited."""
    waits: list[str] = []
    before = torch.__future__.get_swap_module_params_on_conversion()
    # Parameters that are moved stay the same objects, as on a GPU.
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with _Placement(waits), _Names():
            yield waits
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


class _OnGpu(Tensor):
    device = property(lambda self: _GPU)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> Tensor:
        layout: dict[str, Any] = {"layout": values.layout}
        if values.layout == torch.strided:
            layout = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=_IN_CPP, **layout)

    def __init__(self, values: Tensor) -> None:
        self.values_on_host = values

    def __reduce_ex__(self, protocol: int) -> Any:  # in a checkpoint
        return self.values_on_host.__reduce_ex__(protocol)

    def __format__(self, spec: str) -> str:
        return format(self.cpu(), spec)

    def new_tensor(self, data: Any) -> Tensor:
        return torch.tensor(data, dtype=self.dtype, device=_GPU)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} of a pretended GPU's tensors outside of its block")


class _Names(TorchFunctionMode):
    """Takes "cuda" for the device that the tensors have in C++."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        if func is Tensor.backward:
            with self:
                ones, where = (
                    (torch.ones_like(args[0]),),
                    {"allow_unreachable": True, "accumulate_grad": True},
                )
                return _engine_run_backward(args, ones, False, False, (), **where)
        args, kwargs = tree_map(_in_cpp, (args, kwargs))
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == _IN_CPP:
            return func(*args, **kwargs | {"device": "cpu"}).to(_IN_CPP)  # meta would not look at the values
        return func(*args, **kwargs)


def _in_cpp(argument: Any) -> Any:
    names_gpu = isinstance(argument, (str, torch.device)) and str(argument).split(":")[0] == "cuda"
    return _IN_CPP if names_gpu else argument


class _Placement(TorchDispatchMode):
    """Computes on the host, after a check of where the tensors are."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "h2rec" and not func._schema.name.startswith("h2rec::_c"):
            with self, _Names(), torch.no_grad():
                return _kernel(func)(*args, **kwargs)
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        if func is aten._fused_sdp_choice.default:
            return 0  # plain operators
        name, device = func._schema.name.split("::")[1], kwargs.get("device")
        on_gpu = any(isinstance(tensor, _OnGpu) for tensor in tree_leaves((args, kwargs)))
        to_gpu = isinstance(args[0], _OnGpu) if name == "copy_" else on_gpu
        if device is not None:
            to_gpu, kwargs = device == _IN_CPP, kwargs | {"device": torch.device("cpu")}
        if on_gpu:
            _check_placement(func, name, args, kwargs)
        if to_gpu and kwargs.get("generator") is not None:
            raise RuntimeError(f"{func}: expected a generator on the GPU, got one on the CPU")
        by_mask = name in _INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
        asks_for_values = on_gpu and (name in _WAITING or by_mask)
        if asks_for_values or (name in _TRANSFERS and on_gpu != to_gpu):
            self.waits.append(name)
        hosts = tree_map(lambda x: x.values_on_host if isinstance(x, _OnGpu) else x, (args, kwargs))
        result = func(*hosts[0], **hosts[1])
        written = _written(func, args, kwargs)
        if written:
            return written[0] if len(written) == 1 else tuple(written)
        return tree_map(lambda x: _OnGpu(x) if to_gpu and isinstance(x, Tensor) else x, result)


def _kernel(func):
    name = func._schema.name.removeprefix("h2rec::")
    module = sys.modules[f"h2rec.ops.{name.removesuffix('_backward')}"]
    return module._backward_kernel if name.endswith("_backward") else module._kernel


def _check_placement(func, name: str, args: tuple, kwargs: dict) -> None:
    if name in _TRANSFERS or func.namespace == "c10d":
        return
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if name in _INDEXING and isinstance(args[0], _OnGpu):  # by indices on the host too
        tensors = [x for x in args[2:3] if isinstance(x, Tensor)]
    numbers = torch.Tag.pointwise in func.tags or name in _INDEXING | _FILLING
    hosts = [x for x in tensors if not isinstance(x, _OnGpu) and not (numbers and x.dim() == 0)]
    if hosts:
        shapes = [list(tensor.shape) for tensor in hosts]
        raise RuntimeError(f"{func}: expected all tensors on the GPU, got {shapes} on the CPU")


def _written(func, args: tuple, kwargs: dict) -> list:
    """The arguments that an operator in place, or with ``out``, returns."""

    def is_written(value) -> bool:
        return value.alias_info is not None and value.alias_info.is_write

    if not func._schema.returns or not all(map(is_written, func._schema.returns)):
        return []
    return [
        kwargs[argument.name] if argument.name in kwargs else args[place]
        for place, argument in enumerate(func._schema.arguments)
        if is_written(argument)
    ]
