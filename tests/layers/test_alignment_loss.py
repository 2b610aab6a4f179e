import pytest
import torch

from h2rec.layers import AlignmentLoss


def make(device, batch=7, dim=5, num_levels=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hash_emb": torch.randn(batch, dim, generator=generator, dtype=dtype),
        "semantic_emb": torch.randn(batch, dim, generator=generator, dtype=dtype),
        "item_ids": torch.randint(5, (batch,), generator=generator),
        "codes": torch.randint(2, (batch, num_levels), generator=generator),
        "pair_index": torch.tensor([[0, 2, 2], [1, 4, 4]]),
        "pair_weight": torch.tensor([0.5, 0.4, 0.7], dtype=dtype),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def plain(inputs, temperature, min_shared_codes):
    h = inputs["hash_emb"] / inputs["hash_emb"].norm(dim=1, keepdim=True)
    s = inputs["semantic_emb"] / inputs["semantic_emb"].norm(dim=1, keepdim=True)
    batch = len(h)
    weights = torch.eye(batch, dtype=h.dtype, device=h.device)
    for (i, j), weight in zip(inputs["pair_index"].T.tolist(), inputs["pair_weight"], strict=True):
        weights[i, j] = weights[j, i] = torch.maximum(weights[i, j], weight)
    for i in range(batch):
        for j in range(batch):
            same_id = inputs["item_ids"][i] == inputs["item_ids"][j]
            shared = (inputs["codes"][i] == inputs["codes"][j]).sum()
            if same_id or (min_shared_codes is not None and shared >= min_shared_codes):
                weights[i, j] = 1
    e = (h @ s.T / temperature).exp()
    rows = -((weights * e).sum(1) / e.sum(1)).log()
    columns = -((weights * e).sum(0) / e.sum(0)).log()
    return (rows.mean() + columns.mean()) / 2


@pytest.mark.parametrize("min_shared_codes", [None, 2, 3])
@pytest.mark.parametrize("learn_temperature", [False, True])
def test_matches_the_formula(min_shared_codes, learn_temperature, device):
    inputs = make(device)
    layer = AlignmentLoss(0.5, min_shared_codes=min_shared_codes, learn_temperature=learn_temperature).to(
        device, torch.float64
    )
    torch.testing.assert_close(layer(**inputs), plain(inputs, 0.5, min_shared_codes))


@pytest.mark.parametrize("prefix", [1, 2, 3])
def test_a_common_prefix_makes_positives(prefix, device):
    inputs = make(device)
    loss = AlignmentLoss(0.5, min_shared_prefix=prefix)(**inputs)
    same = (inputs["codes"][:, None, :prefix] == inputs["codes"][:, :prefix]).all(2)
    labels = same.int().argmax(1)  # the first item with that prefix
    expected = plain(inputs | {"codes": labels.unsqueeze(1)}, 0.5, 1)
    torch.testing.assert_close(loss, expected)
    if prefix == 2:
        assert loss != AlignmentLoss(0.5, min_shared_codes=prefix)(**inputs)


def test_pairs_and_ids_may_be_left_out(device):
    inputs = make(device)
    emb = {name: inputs[name] for name in ("hash_emb", "semantic_emb")}
    nothing = {
        "item_ids": torch.arange(7, device=device),
        "codes": inputs["codes"],
        "pair_index": torch.empty(2, 0, dtype=torch.int64, device=device),
        "pair_weight": torch.empty(0, device=device),
    }
    torch.testing.assert_close(AlignmentLoss()(**emb), plain(emb | nothing, 0.1, None))


def test_gradients(device):
    inputs = make(device, batch=4, dim=3)
    inputs["pair_index"] = inputs["pair_index"][:, :1]
    inputs["pair_weight"] = inputs["pair_weight"][:1]
    layer = AlignmentLoss(0.5, min_shared_codes=2, learn_temperature=True).to(device, torch.float64)

    def run(hash_emb, semantic_emb, log_temperature):
        given = inputs | {"hash_emb": hash_emb, "semantic_emb": semantic_emb}
        return torch.func.functional_call(layer, {"log_temperature": log_temperature}, kwargs=given)

    embeddings = [inputs[name].requires_grad_() for name in ("hash_emb", "semantic_emb")]
    assert torch.autograd.gradcheck(run, [*embeddings, layer.log_temperature])


def test_learned_temperature_is_a_parameter():
    layer = AlignmentLoss(0.2, learn_temperature=True)
    assert [name for name, _ in layer.named_parameters()] == ["log_temperature"]
    assert layer.temperature.item() == pytest.approx(0.2)
    assert not list(AlignmentLoss(0.2).parameters())
    assert AlignmentLoss(0.2).temperature == 0.2


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_refuses_bad_temperature(temperature):
    with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
        AlignmentLoss(temperature)


def test_refuses_bad_min_shared_codes(device):
    with pytest.raises(ValueError, match="min_shared_codes must be at least 1 or None, got 0"):
        AlignmentLoss(min_shared_codes=0)
    inputs = make(device)
    with pytest.raises(ValueError, match="codes and min_shared_codes must be given together, got no codes"):
        AlignmentLoss(min_shared_codes=2)(inputs["hash_emb"], inputs["semantic_emb"])


def test_refuses_bad_min_shared_prefix(device):
    with pytest.raises(ValueError, match="min_shared_prefix must be at least 1 or None, got 0"):
        AlignmentLoss(min_shared_prefix=0)
    with pytest.raises(
        ValueError, match=r"min_shared_codes and min_shared_prefix exclude each other, got .*2"
    ):
        AlignmentLoss(min_shared_codes=1, min_shared_prefix=2)
    inputs = make(device)
    for codes, came in ((None, "none"), (inputs["codes"][:, :1], r"\[7, 1\]")):
        with pytest.raises(ValueError, match=f"L at least min_shared_prefix = 2, got {came}"):
            AlignmentLoss(min_shared_prefix=2)(**inputs | {"codes": codes})
