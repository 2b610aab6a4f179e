"""Which implementation of an operator runs: one predicate per backend, and a choice among those that say yes.

A backend is a module with one function per operator (``residual_quantize``, ``harmonized_embedding``,
``harmonized_embedding_backward``, ...). To add one: write the module, and its predicate here.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import os
import threading
from collections.abc import Callable, Iterator

import torch

from h2rec._version import __version__

OPERATORS = ("residual_quantize", "harmonized_embedding", "alignment_loss")

# C++ has all of them.
_TRITON_OPERATORS = ("harmonized_embedding", "alignment_loss")
_CUDA_OPERATORS = ("residual_quantize",)

_MAX_CUDA_BEAM = 32  # h2rec::cuda::kMaxBeamSize


def _why_not_reference(operator: str, device_type: str, beam_size: int) -> str | None:
    return None


def _why_not_cpp(operator: str, device_type: str, beam_size: int) -> str | None:
    if device_type != "cpu":
        return f"it runs on the CPU, not on {device_type}"
    if reason := extension_error():
        return reason
    if not hasattr(torch.ops.h2rec, f"_cpp_{operator}"):
        return "h2rec._C is older than its kernel; `pip install --no-build-isolation .` builds it again"
    return None


def _why_not_triton(operator: str, device_type: str, beam_size: int) -> str | None:
    if operator not in _TRITON_OPERATORS:
        return "it has no Triton kernel"
    if reason := triton_error():
        return reason
    if device_type == "cpu" and not _triton_is_interpreted():
        return "on the CPU it runs in Triton's interpreter only, and TRITON_INTERPRET=1 is not set"
    return None


def _why_not_cuda(operator: str, device_type: str, beam_size: int) -> str | None:
    if operator not in _CUDA_OPERATORS:
        return "it has no CUDA kernel"
    if device_type != "cuda":
        return f"it runs on CUDA devices, not on {device_type}"
    if beam_size > _MAX_CUDA_BEAM:
        return f"it keeps at most {_MAX_CUDA_BEAM} paths of a row, not {beam_size}"
    return extension_error() or _why_no_cuda_code()


# In order of preference.
_WHY_NOT: dict[str, Callable[[str, str, int], str | None]] = {
    "cuda": _why_not_cuda,
    "triton": _why_not_triton,
    "cpp": _why_not_cpp,
    "reference": _why_not_reference,
}
BACKENDS = tuple(_WHY_NOT)
_MODULES = {
    "cuda": "h2rec.ops._cuda",
    "triton": "h2rec.kernels",
    "cpp": "h2rec.ops._cpp",
    "reference": "h2rec.reference",
}

_requested: str | None = None
# .requested: what was asked for when the graph was made that runs backward now, in this thread.
_of_forward = threading.local()


@functools.cache
def extension_error() -> str | None:
    """Why ``h2rec._C`` cannot be used, or None."""
    try:
        importlib.import_module("h2rec._C")
    except ImportError as error:
        return f"h2rec._C cannot be imported ({error}); `pip install --no-build-isolation .` in a checkout builds it"
    return None


def _why_no_cuda_code() -> str | None:
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    if not hasattr(torch.ops.h2rec, "_cuda_residual_quantize"):
        return "h2rec._C was built without nvcc; H2REC_BUILD_EXT=cuda asks for it"
    return None


@functools.cache
def triton_error() -> str | None:
    """Why Triton cannot be used, or None."""
    try:
        importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed"
    if torch.version.cuda is None and torch.version.hip is None and not _triton_is_interpreted():
        return "this build of torch has no GPU support, and TRITON_INTERPRET=1 is not set"
    return None


def _triton_is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(backend: str, operator: str, device_type: str, beam_size: int = 1) -> str | None:
    """Why ``backend`` cannot serve ``operator`` on this kind of device, or None if it can.

    ``beam_size`` is of account to ``residual_quantize`` only.
    """
    return _WHY_NOT[backend](operator, device_type, beam_size)


def usable(operator: str, device_type: str, beam_size: int = 1) -> list[str]:
    """The backends that can serve, in order of preference: an interpreter comes last, for it is slow and for tests."""
    serving = [backend for backend in BACKENDS if why_not(backend, operator, device_type, beam_size) is None]
    return sorted(serving, key=lambda backend: backend == "triton" and _triton_is_interpreted())


def choose(function: str, device_type: str, beam_size: int = 1) -> Callable:
    """The implementation of ``function`` (an operator, or its ``_backward``) by the requested or the best backend."""
    requested = (
        _requested or getattr(_of_forward, "requested", None) or os.environ.get("H2REC_BACKEND") or None
    )
    return _choose(function, device_type, requested, beam_size)


@functools.cache
def _choose(function: str, device_type: str, requested: str | None, beam_size: int) -> Callable:
    operator = function.removesuffix("_backward")
    if requested is None:
        backend = usable(operator, device_type, beam_size)[0]
    else:
        backend = _check_name("H2REC_BACKEND", requested)
        if reason := why_not(backend, operator, device_type, beam_size):
            raise RuntimeError(f"backend {backend!r} cannot serve {operator}: {reason}")
    return getattr(importlib.import_module(_MODULES[backend]), function)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every operator of the block on backend ``name``, in all threads; one that cannot serve raises.

    The backward of what eager code computes in the block runs there too, unless another block is around it by then;
    compiled code chooses when it runs.

    Raises:
        ValueError: there is no such backend.
    """
    global _requested
    before, _requested = _requested, _check_name("name", name)
    try:
        yield
    finally:
        _requested = before


def requested() -> str | None:
    """The backend that a block asks for."""
    return _requested


@contextlib.contextmanager
def in_backward_of(forward_requested: str | None) -> Iterator[None]:
    """Operators of the block, in this thread, run where the forward was asked to, if nothing else is asked for now."""
    before = getattr(_of_forward, "requested", None)
    _of_forward.requested = forward_requested
    try:
        yield
    finally:
        _of_forward.requested = before


def _check_name(argument: str, name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


def config_report() -> str:
    """What was built, what can be used, and why the rest cannot, as text."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    requested = _requested or os.environ.get("H2REC_BACKEND")
    lines = [
        f"h2rec {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        f"device      {torch.cuda.get_device_name() if device_type == 'cuda' else 'cpu (no CUDA device)'}",
        f"extension   {extension_error() or 'built; CPU kernels use ' + torch.ops.h2rec.cpu_capability()}",
        f"triton      {triton_error() or ('interpreted, if asked for' if _triton_is_interpreted() else 'usable')}",
        f"H2REC_BACKEND {requested or 'is not set: the first usable backend serves'}",
    ]
    for operator in OPERATORS:
        lines += ["", f"{operator} on {device_type}"]
        for backend in BACKENDS:
            lines.append(f"  {backend:<10}{why_not(backend, operator, device_type) or 'usable'}")
    return "\n".join(lines)


def show_config() -> None:
    """Prints what was built, which backends can be used on this machine, and why the others cannot."""
    print(config_report())
