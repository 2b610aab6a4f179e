"""How an operator becomes ``torch.ops.h2rec.<name>``: schema, kernel, fake and autograd, from one place."""

from collections.abc import Callable

import torch

from h2rec.ops import _backends

# A Library that goes out of scope takes its operators with it.
_LIBRARY = torch.library.Library("h2rec", "DEF")


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
        setup_context, backward: as in :func:`torch.library.register_autograd`; none for an operator that is
            itself a backward, or that has no gradient. The backward runs on the backend that its forward was asked for.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"h2rec::{name}", fake, lib=_LIBRARY)
    if backward is not None:

        def setup(ctx, inputs, output) -> None:
            ctx.requested_backend = _backends.requested()
            setup_context(ctx, inputs, output)

        def backward_there(ctx, *grads):
            with _backends.in_backward_of(ctx.requested_backend):
                return backward(ctx, *grads)

        torch.library.register_autograd(f"h2rec::{name}", backward_there, setup_context=setup, lib=_LIBRARY)
    return getattr(torch.ops.h2rec, name).default
