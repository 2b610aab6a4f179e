import copy

import pytest
import torch

from h2rec.models.backbones import (
    BACKBONES,
    CausalAttention,
    GRU4RecBackbone,
    PositionedInput,
    SASRecBackbone,
    make_backbone,
)


def attend_plainly(layer, queries, context):
    _, length, dim = queries.shape
    head = dim // layer.num_heads
    query = layer.query(queries)
    key, value = layer.key_value(context).split(dim, -1)
    answer = torch.zeros_like(queries)
    for t in range(length):
        for start in range(0, dim, head):
            part = slice(start, start + head)
            logits = (key[:, : t + 1, part] * query[:, t : t + 1, part]).sum(-1) / head**0.5
            answer[:, t, part] = (logits.softmax(-1)[..., None] * value[:, : t + 1, part]).sum(1)
    return layer.output(answer)


def test_attention_matches_the_formula(device):
    torch.manual_seed(0)
    layer = CausalAttention(6, 3).to(device, torch.float64)
    queries, context = torch.randn(2, 2, 5, 6, dtype=torch.float64).to(device)
    torch.testing.assert_close(layer(queries, context), attend_plainly(layer, queries, context))


def test_attention_gradcheck(device):
    torch.manual_seed(0)
    layer = CausalAttention(4, 2).to(device, torch.float64)
    queries, context = (
        torch.randn(2, 3, 4, dtype=torch.float64).to(device).requires_grad_() for _ in range(2)
    )
    assert torch.autograd.gradcheck(layer, (queries, context))


def test_block_matches_the_formula(device):
    torch.manual_seed(0)
    backbone = SASRecBackbone(6, num_layers=1, num_heads=2, dropout=0.0).to(device, torch.float64)
    x = torch.randn(2, 5, 6, dtype=torch.float64).to(device)
    block = backbone.blocks[0]
    normed = block.attention_norm(x)
    y = x + attend_plainly(block.attention, normed, normed)
    y = y + block.contract(block.expand(block.feed_forward_norm(y)).clamp_min(0))
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(backbone(x), y)


def test_bert4rec_matches_the_formula(device):
    torch.manual_seed(0)
    backbone = make_backbone("bert4rec", 6, num_layers=1, num_heads=2, dropout=0.0).to(device, torch.float64)
    x = torch.randn(2, 5, 6, dtype=torch.float64).to(device)
    block = backbone.blocks[0]

    def normalize(y):
        return (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    y = normalize(x)
    y = normalize(y + attend_plainly(block.attention, y, y))
    hidden = block.expand(y)
    y = normalize(y + block.contract(hidden * (1 + torch.erf(hidden / 2**0.5)) / 2))
    assert block.expand.out_features == 24
    torch.testing.assert_close(backbone(x), y)


def test_gru4rec_matches_the_formula(device):
    torch.manual_seed(0)
    backbone = make_backbone("gru4rec", 4, num_layers=1, num_heads=2, dropout=0.0).to(device, torch.float64)
    x = torch.randn(2, 5, 4, dtype=torch.float64).to(device)
    gru = backbone.gru
    state = torch.zeros(2, 4, dtype=torch.float64, device=device)
    for t in range(5):
        inputs = (x[:, t] @ gru.weight_ih_l0.T + gru.bias_ih_l0).chunk(3, -1)
        states = (state @ gru.weight_hh_l0.T + gru.bias_hh_l0).chunk(3, -1)
        reset, update = ((inputs[i] + states[i]).sigmoid() for i in range(2))
        state = (1 - update) * (inputs[2] + reset * states[2]).tanh() + update * state
        torch.testing.assert_close(backbone(x)[:, t], backbone.output(state))


@pytest.fixture(params=BACKBONES)
def make(request, device):
    def make(dropout=0.0, num_layers=2):
        torch.manual_seed(0)
        backbone = make_backbone(request.param, 8, num_layers=num_layers, num_heads=2, dropout=dropout)
        return backbone.to(device)

    return make


def test_backbone_is_causal(make, device):
    backbone = make()
    x = torch.randn(3, 6, 8).to(device)
    encoded = backbone(x)
    for t in range(5):
        changed = x.clone()
        changed[:, t + 1 :] = torch.randn(3, 5 - t, 8).to(device)
        torch.testing.assert_close(backbone(changed)[:, : t + 1], encoded[:, : t + 1])
        assert not torch.allclose(backbone(changed)[:, t + 1 :], encoded[:, t + 1 :])


@pytest.mark.parametrize("num_layers", [1, 3])
def test_one_position_is_that_of_the_whole(num_layers, make, device):
    backbone = make(num_layers=num_layers).double()
    x = torch.randn(3, 6, 8, dtype=torch.float64).to(device)
    positions = torch.tensor([5, 0, 3], device=device)
    results = []
    for call in (lambda y: backbone.at(positions, y), lambda y: backbone(y)[torch.arange(3), positions]):
        y = x.clone().requires_grad_()
        vectors = call(y)
        gradients = torch.autograd.grad(vectors.square().sum(), [y, *backbone.parameters()])
        results.append((vectors, gradients))
    torch.testing.assert_close(*results)


def test_backbone_dropout_acts_in_training_only(make, device):
    backbone = make(dropout=0.5)
    x = torch.randn(3, 6, 8).to(device)
    assert not torch.equal(backbone(x), backbone(x))
    backbone.eval()
    assert torch.equal(backbone(x), backbone(x))


def test_positioned_input(device):
    layer = PositionedInput(4, 6, dropout=0.0).to(device)
    x = torch.randn(2, 5, 4).to(device)
    expected = 2 * x + layer.position.weight[:5]
    torch.testing.assert_close(layer(x), expected)
    levels = torch.stack((x, 3 * x), dim=2)
    torch.testing.assert_close(layer(levels)[:, :, 0], expected)
    torch.testing.assert_close(layer(levels)[:, :, 1], 6 * x + layer.position.weight[:5])


def test_state_dict_deepcopy_compile_autocast(make, device):
    backbone, other = make(), make()
    torch.nn.init.zeros_(next(other.parameters()))
    other.load_state_dict(backbone.state_dict())
    x = torch.randn(2, 5, 8).to(device)
    is_one_graph = not isinstance(backbone, GRU4RecBackbone)  # torch.compile leaves nn.GRU outside
    compiled = torch.compile(backbone, fullgraph=is_one_graph, backend="aot_eager")
    for twin in (other, copy.deepcopy(backbone), compiled):
        torch.testing.assert_close(twin(x), backbone(x))
    with torch.autocast(device, dtype=torch.bfloat16):
        mixed = backbone(x)
    torch.testing.assert_close(mixed.float(), backbone(x), rtol=0.05, atol=0.05)


def test_refuses_bad_sizes():
    with pytest.raises(ValueError, match="num_heads must divide dim, got num_heads=3 and dim=8"):
        CausalAttention(8, 3)
    for backbone in BACKBONES.values():
        with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
            backbone(8, num_layers=0)
    with pytest.raises(
        ValueError, match="backbone must be one of 'sasrec', 'gru4rec', 'bert4rec', got 'lstm'"
    ):
        make_backbone("lstm", 8, num_layers=1, num_heads=1, dropout=0.0)
