"""What a user of PyTorch takes for granted, of every layer and on every backend that can serve it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from h2rec import SemanticIds, layers, use_backend
from h2rec.ops import _backends

B, T, L, K, D, NUM_ITEMS = 3, 4, 3, 6, 8, 20


def make_sids(sizes: tuple[int, ...] = (K,) * L) -> SemanticIds:
    generator = torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randint(0, size, (NUM_ITEMS,), generator=generator) for size in sizes], 1)
    return SemanticIds(codes, codebook_sizes=sizes)


def item_ids(generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randint(0, NUM_ITEMS, (B, T), generator=generator),)


def vectors(*shapes: tuple[int, ...]) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    return lambda generator: tuple(torch.randn(shape, generator=generator) for shape in shapes)


@dataclass(frozen=True)
class Layer:
    make: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], tuple[Tensor, ...]]
    operator: str | None = None  # of h2rec.ops


LOOKUP, ALIGN, QUANTIZE = "harmonized_embedding", "alignment_loss", "residual_quantize"
LAYERS = {
    "HashEmbedding": Layer(lambda: layers.HashEmbedding(NUM_ITEMS, D), item_ids, LOOKUP),
    "HashEmbedding multi": Layer(
        lambda: layers.HashEmbedding(NUM_ITEMS, D, mode="multi", num_buckets=7), item_ids, LOOKUP
    ),
    "SemanticEmbedding": Layer(lambda: layers.SemanticEmbedding(make_sids(), D), item_ids, LOOKUP),
    "SemanticEmbedding ragged": Layer(
        lambda: layers.SemanticEmbedding(make_sids((3, K, 5)), D, pooling="mean"), item_ids, LOOKUP
    ),
    "SemanticEmbedding prefix": Layer(
        lambda: layers.SemanticEmbedding(make_sids(), D, pooling="prefix", num_buckets=9), item_ids, LOOKUP
    ),
    "HarmonizedEmbedding": Layer(lambda: layers.HarmonizedEmbedding(make_sids(), D), item_ids, LOOKUP),
    "HarmonizedEmbedding gate": Layer(
        lambda: layers.HarmonizedEmbedding(make_sids(), D, fusion="gate"), item_ids, LOOKUP
    ),
    "HarmonizedEmbedding none": Layer(
        lambda: layers.HarmonizedEmbedding(make_sids(), D, fusion="none", pooling="levels", mode="qr"),
        item_ids,
        LOOKUP,
    ),
    "ResidualQuantizer": Layer(lambda: layers.ResidualQuantizer(D, L, K), vectors((B, T, D)), QUANTIZE),
    "ResidualQuantizer ragged": Layer(
        lambda: layers.ResidualQuantizer(D, L, (K, 3, 2)), vectors((B, T, D)), QUANTIZE
    ),
    "GranularityCrossAttention": Layer(
        lambda: layers.GranularityCrossAttention(D, L), vectors((B, T, L, D), (B, T, D))
    ),
    "GranularityFusion": Layer(lambda: layers.GranularityFusion(D, L, "adaptive"), vectors((B, T, L, D))),
    "AlignmentLoss": Layer(
        lambda: layers.AlignmentLoss(0.5, learn_temperature=True), vectors((B, D), (B, D)), ALIGN
    ),
    "MaskedGranularityLoss": Layer(lambda: layers.MaskedGranularityLoss(D, L), vectors((B, D), (B, D))),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device_type = torch.device(metafunc.config.getoption("--device")).type
    cases = [
        pytest.param((layer, backend), id=name if backend is None else f"{name}-{backend}")
        for name, layer in LAYERS.items()
        for backend in (_backends.usable(layer.operator, device_type) if layer.operator else [None])
    ]
    metafunc.parametrize("layer", cases, indirect=True)


@pytest.fixture
def layer(request: pytest.FixtureRequest):
    layer, backend = request.param
    if backend is None:
        yield layer
    else:
        with use_backend(backend):
            yield layer


def make(layer: Layer, device: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return layer.make().to(device)


def run(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs, and the gradients of floating-point inputs and parameters."""
    torch.manual_seed(1)  # a layer may draw numbers
    inputs = tuple(x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs)
    result = module(*inputs)
    outputs = result if isinstance(result, tuple) else (result,)
    leaves = [x for x in inputs if x.requires_grad] + [p for p in module.parameters() if p.requires_grad]
    loss = sum((output.float() * (1 + output.float())).sum() for output in outputs if output.requires_grad)
    return outputs, torch.autograd.grad(loss, leaves, allow_unused=True)


def assert_same(actual, expected, **tolerance) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, **tolerance)


@pytest.fixture
def inputs(layer: Layer, device: str) -> tuple[Tensor, ...]:
    return tuple(x.to(device) for x in layer.inputs(torch.Generator().manual_seed(0)))


def test_compile(layer: Layer, inputs, device):
    """In one graph, with its gradients and with what it writes into its buffers."""
    module, twin = make(layer, device), make(layer, device)
    expected = run(module, inputs)
    assert_same(run(torch.compile(twin, fullgraph=True, backend="aot_eager"), inputs), expected)
    assert_same([twin.state_dict().values()], [module.state_dict().values()])


def test_state_dict(layer: Layer, inputs, device):
    module, other = make(layer, device), make(layer, device, seed=1)
    run(module, inputs)  # which may change buffers
    other.load_state_dict(module.state_dict())
    assert_same(run(other, inputs), run(module, inputs), rtol=0, atol=0)


def test_deepcopy(layer: Layer, inputs, device):
    module = make(layer, device)
    twin = copy.deepcopy(module)
    expected = run(module, inputs)
    assert_same(run(twin, inputs), expected, rtol=0, atol=0)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.detach().zero_()
    assert_same([module.state_dict().values()], [state.values()], rtol=0, atol=0)  # they share nothing


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_to_dtype(layer: Layer, inputs, dtype, device):
    module = make(layer, device).to(dtype)
    cast = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    outputs, grads = run(module, cast)
    assert all(p.dtype == dtype for p in module.parameters())
    for output in outputs:
        if output.is_floating_point():
            assert output.dtype == dtype or (dtype == torch.bfloat16 and output.dim() == 0)
            assert output.isfinite().all()
    assert all(grad is None or (grad.dtype == dtype and grad.isfinite().all()) for grad in grads)
    if dtype == torch.float64:
        assert_same([outputs], [run(make(layer, device), inputs)[0]], check_dtype=False)


def test_to_device(layer: Layer, inputs, device):
    """Every tensor moves: meta is a device that any machine has."""
    module = make(layer, device).to("meta")
    assert {t.device.type for t in (*module.parameters(), *module.buffers())} <= {"meta"}
    if isinstance(module, layers.MaskedGranularityLoss):
        return  # it switches autocast off, which knows no meta
    outputs = module(*(x.to("meta") for x in inputs))
    expected, _ = run(make(layer, device), inputs)
    for output, like in zip(outputs if isinstance(outputs, tuple) else (outputs,), expected, strict=True):
        assert (output.device.type, output.shape, output.dtype) == ("meta", like.shape, like.dtype)


def test_autocast(layer: Layer, inputs, device):
    expected, _ = run(make(layer, device), inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        outputs, grads = run(make(layer, device), inputs)
    assert_same([[o.float() for o in outputs]], [[e.float() for e in expected]], rtol=0.05, atol=0.05)
    assert all(grad is None or (grad.dtype == torch.float32 and grad.isfinite().all()) for grad in grads)
