"""The columns of our own operators."""

from h2rec import use_backend
from h2rec.ops import _backends

from ._harness import Call


def h2rec_columns(operator: str, call: Call, device_type: str) -> dict[str, Call]:
    """ "h2rec" is what the automatic choice takes; where several backends can serve, each gets a column too."""
    backends = _backends.usable(operator, device_type)
    named = {f"h2rec[{name}]": _on(name, call) for name in backends} if len(backends) > 1 else {}
    return {**named, "h2rec": call}


def _on(backend: str, call: Call) -> Call:
    def run():
        with use_backend(backend):
            return call()

    return run
