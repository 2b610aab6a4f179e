"""How an operator becomes ``torch.ops.h2rec.<name>``: schema, kernel, fake and autograd, from one place."""

from collections.abc import Callable

import torch

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
            itself a backward, or that has no gradient.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"h2rec::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"h2rec::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.h2rec, name).default
