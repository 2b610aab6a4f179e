import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from h2rec import use_backend
from h2rec.ops import _backends

try:
    import hypothesis
except ImportError:  # tests/integrations does without
    pass
else:  # an example may take long on a machine that others use as well
    hypothesis.settings.register_profile(
        "h2rec", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("h2rec")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the fixture ``backend`` runs on each backend that can serve its module's ``OPERATOR``."""
    if "backend" in metafunc.fixturenames:
        device_type = torch.device(metafunc.config.getoption("--device")).type
        backends = _backends.usable(metafunc.module.OPERATOR, device_type)
        metafunc.parametrize("backend", backends, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def forget_compiled_code():
    """torch.compile gives up on a function after so many recompilations, in whichever tests they were."""
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


@pytest.fixture(params=[torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is allocated without a value holds NaN, so that whatever is not written shows."""

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            return tensor.fill_(torch.nan)
        return tensor.fill_(torch.iinfo(tensor.dtype).max) if tensor.dtype != torch.bool else tensor

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _original=original, **k: poison(_original(*a, **k)))
