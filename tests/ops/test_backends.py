import pytest
import torch

import h2rec
from h2rec import ops
from h2rec.ops import _backends, _registry


@pytest.fixture(autouse=True)
def no_cached_choice():
    choose = _backends._choose
    choose.cache_clear()
    yield
    choose.cache_clear()


def quantize():
    return ops.residual_quantize(torch.zeros(2, 3), torch.zeros(1, 4, 3))


@pytest.mark.parametrize("operator", _backends.OPERATORS)
def test_every_backend_serves_or_says_why_not(operator):
    for backend in _backends.BACKENDS:
        reason = _backends.why_not(backend, operator, "cpu")
        assert reason is None or len(reason) > 10
    assert "reference" in _backends.usable(operator, "cpu")


def test_a_requested_backend_that_cannot_serve_raises_with_the_reason():
    with (
        h2rec.use_backend("cuda"),
        pytest.raises(RuntimeError, match="backend 'cuda' cannot serve residual_quantize: it runs on CUDA"),
    ):
        quantize()
    quantize()  # the request has ended


def test_the_environment_requests_a_backend(monkeypatch):
    monkeypatch.setenv("H2REC_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot serve residual_quantize"):
        quantize()
    with h2rec.use_backend("reference"):  # the block wins
        quantize()
    monkeypatch.setenv("H2REC_BACKEND", "tpu")
    with pytest.raises(ValueError, match=r"H2REC_BACKEND must be one of .* got 'tpu'"):
        quantize()


def test_a_beam_may_be_too_wide_for_a_backend():
    reason = _backends.why_not("cuda", "residual_quantize", "cuda", 33)
    assert reason == "it keeps at most 32 paths of a row, not 33"
    assert reason != _backends.why_not("cuda", "residual_quantize", "cuda", 32)
    assert "cuda" not in _backends.usable("residual_quantize", "cuda", 33)


def embed():
    codes = torch.zeros(2, 1, dtype=torch.int64)
    books, table = torch.zeros(1, 4, 3, requires_grad=True), torch.zeros(2, 3)
    return sum(ops.harmonized_embedding(torch.tensor([0, 1]), codes, books, table)).sum()


def align():
    return ops.alignment_loss(torch.eye(3, requires_grad=True), torch.eye(3))


@pytest.mark.parametrize(("operator", "run"), [("harmonized_embedding", embed), ("alignment_loss", align)])
def test_backward_runs_where_its_forward_was_asked_to(operator, run, monkeypatch):
    chosen = []
    choose = _backends._choose

    def record(function, device_type, requested, beam_size):
        chosen.append((function, requested))
        return choose(function, device_type, requested, beam_size)

    monkeypatch.setattr(_backends, "_choose", record)
    monkeypatch.delenv("H2REC_BACKEND", raising=False)
    with h2rec.use_backend("reference"):
        asked = run()
    free = run()
    asked.backward(retain_graph=True)
    free.backward()
    with h2rec.use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' cannot serve"):
        asked.backward()  # the block that is there now wins
    backward = f"{operator}_backward"
    assert chosen == [
        (operator, "reference"),
        (operator, None),
        (backward, "reference"),
        (backward, None),
        (backward, "cuda"),
    ]


@pytest.mark.parametrize("private", [True, False], ids=["private names", "public way"])
def test_an_operator_is_differentiated_with_and_without_private_names_of_torch(private, monkeypatch):
    if not private:
        monkeypatch.setattr(_registry, "_PRIVATE_NAMES", ("_not_in_this_torch",))
    asked = []

    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[1]

    def backward(ctx, grad):
        asked.append(getattr(_backends._of_forward, "requested", None))
        return grad * ctx.factor, None

    with torch.library._scoped_library("h2rec", "FRAGMENT") as library:
        monkeypatch.setattr(_registry, "_LIBRARY", library)
        scale = _registry.define(
            "scale(Tensor x, float factor) -> Tensor",
            lambda x, factor: x * factor,
            lambda x, factor: torch.empty_like(x),
            setup_context=setup_context,
            backward=backward,
        )
        x = torch.ones(3, requires_grad=True)
        with h2rec.use_backend("reference"):
            y = scale(x, 2.5)
        assert ("GeneratedBackwardFor" in y.grad_fn.name()) != private
        y.sum().backward()
        scale(x, 1.0).sum().backward()
        assert torch.equal(x.grad, torch.full((3,), 3.5))
        assert asked == ["reference", None]
        assert scale(x.detach(), 2.5).grad_fn is None


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match=r"name must be one of 'cuda', .* got 'tpu'"),
        h2rec.use_backend("tpu"),
    ):
        pass


def test_the_best_usable_backend_serves(monkeypatch):
    def serve(*arguments):
        return "served"

    monkeypatch.setattr(_backends, "usable", lambda operator, device_type, beam_size: ["reference"])
    monkeypatch.setattr("h2rec.reference.residual_quantize", serve)
    assert _backends.choose("residual_quantize", "cpu") is serve


def test_interpreted_triton_serves_only_when_asked_for(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _backends.usable("harmonized_embedding", "cpu")[-2:] == ["reference", "triton"]
    assert _backends.usable("harmonized_embedding", "cuda")[-2:] == ["reference", "triton"]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(_backends, "triton_error", lambda: None)
    assert "TRITON_INTERPRET=1 is not set" in _backends.why_not("triton", "harmonized_embedding", "cpu")
    assert _backends.usable("harmonized_embedding", "cuda")[0] == "triton"


def test_show_config_names_every_operator_and_backend(capsys):
    h2rec.show_config()
    printed = capsys.readouterr().out
    for name in (*_backends.OPERATORS, *_backends.BACKENDS, h2rec.__version__, torch.__version__):
        assert name in printed


@pytest.mark.skipif(_backends.extension_error() is not None, reason="h2rec._C is not built")
def test_an_extension_older_than_the_kernel_does_not_serve():
    assert "older than its kernel" in _backends.why_not("cpp", "not_yet_compiled", "cpu")
