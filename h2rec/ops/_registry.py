"""How an operator becomes ``torch.ops.h2rec.<name>``: schema, kernel, fake and autograd, from one place."""

from collections.abc import Callable

import torch

from h2rec.ops import _backends

# A Library that goes out of scope takes its operators with it.
_LIBRARY = torch.library.Library("h2rec", "DEF")

# Of torch._C: what _with_gradient calls.
_PRIVATE_NAMES = ("_AutoDispatchBelowAutograd", "_after_autograd_keyset", "_any_requires_grad")


def define(
    schema: str,
    kernel: Callable,
    fake: Callable,
    *,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Registers ``schema`` ("name(Tensor x) -> Tensor") and returns the operator's overload.

    Args:
        kernel: computes, on every device; checks arguments and chooses a backend.
        fake: returns outputs of the right shape, dtype and device, from the same check of arguments.
        setup_context, backward: as in :func:`torch.library.register_autograd`, called by position; none for an
            operator that is itself a backward, or that has no gradient. The backward runs on the backend that its
            forward was asked for.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"h2rec::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.h2rec, name).default
    if backward is not None:
        setup_context, backward = _on_one_backend(setup_context, backward)
        if hasattr(operator, "redispatch") and all(hasattr(torch._C, private) for private in _PRIVATE_NAMES):
            _LIBRARY.impl(
                name, _with_gradient(operator, setup_context, backward), "Autograd", with_keyset=True
            )
        else:
            torch.library.register_autograd(
                f"h2rec::{name}", backward, setup_context=setup_context, lib=_LIBRARY
            )
    return operator


def _on_one_backend(setup_context: Callable, backward: Callable) -> tuple[Callable, Callable]:
    """Both, so that the backward runs on the backend that its forward was asked for."""

    def setup_with_backend(ctx, inputs, output):
        ctx.requested_backend = _backends.requested()
        setup_context(ctx, inputs, output)

    def backward_on_backend(ctx, *grads):
        with _backends.in_backward_of(ctx.requested_backend):
            return backward(ctx, *grads)

    return setup_with_backend, backward_on_backend


def _with_gradient(operator: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """What ``torch.library.register_autograd`` makes, for schemas without defaults.

    It looks for defaults at every call that needs a gradient, which takes longer than a small batch does. Where torch
    lacks one of the private names, :func:`define` calls it all the same.
    """

    def below_autograd(keyset, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs_and_keyset):
            *inputs, keyset = inputs_and_keyset
            output = below_autograd(keyset, *inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return *backward(ctx, *grads), None

    def call(keyset, *inputs):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return Function.apply(*inputs, keyset)
        return below_autograd(keyset, *inputs)

    return call
