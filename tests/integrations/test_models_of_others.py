"""Models that were written for nn.Embedding train with each of our layers in its place."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from h2rec import SemanticIds
from h2rec.layers import HarmonizedEmbedding, HashEmbedding, SemanticEmbedding

ROOT = Path(__file__).parents[2]
NUM_ITEMS, DIM, LENGTH = 60, 16, 8


def make_sids() -> SemanticIds:
    generator = torch.Generator().manual_seed(0)
    return SemanticIds(torch.randint(0, 8, (NUM_ITEMS, 3), generator=generator), codebook_sizes=(8, 8, 8))


LAYERS = {
    "hash": lambda **options: HashEmbedding(NUM_ITEMS, DIM, **options),
    "semantic": lambda **options: SemanticEmbedding(make_sids(), DIM, **options),
    "both": lambda **options: HarmonizedEmbedding(make_sids(), DIM, **options),
}


def make_embedding(name: str, padding_idx: int | None = None) -> nn.Module:
    embedding = LAYERS[name](padding_idx=padding_idx)
    for parameter in embedding.parameters():
        nn.init.normal_(parameter, std=0.1)
    return embedding


def sequences() -> Tensor:
    """``[B, T + 1]`` over the items 1 .. NUM_ITEMS - 1; what comes next can be learned."""
    start = torch.arange(32).unsqueeze(1)
    return (start + 3 * torch.arange(LENGTH + 1)) % (NUM_ITEMS - 1) + 1


# A model, and its loss on the sequences.
Made = tuple[nn.Module, Callable[[nn.Module], Tensor]]


def transformers_decoder(layer: str) -> Made:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=NUM_ITEMS,
        hidden_size=DIM,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    model.set_input_embeddings(make_embedding(layer))
    return model, lambda model: model(input_ids=sequences(), labels=sequences()).loss


def recbole_sasrec(layer: str) -> Made:
    pytest.importorskip("recbole")
    from recbole.model.sequential_recommender.sasrec import SASRec

    config = {
        "USER_ID_FIELD": "user",
        "ITEM_ID_FIELD": "item",
        "LIST_SUFFIX": "_list",
        "ITEM_LIST_LENGTH_FIELD": "length",
        "NEG_PREFIX": "negative_",
        "MAX_ITEM_LIST_LENGTH": LENGTH,
        "device": "cpu",
        "n_layers": 1,
        "n_heads": 2,
        "hidden_size": DIM,
        "inner_size": 32,
        "hidden_dropout_prob": 0.0,
        "attn_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.1,
        "loss_type": "CE",
    }
    model = SASRec(config, SimpleNamespace(num=lambda field: NUM_ITEMS))
    model.item_embedding = make_embedding(layer, padding_idx=0)
    items = sequences()
    batch = {
        "item_list": items[:, :-1],
        "length": torch.full((len(items),), LENGTH),
        "item": items[:, -1],
    }

    def loss(model: nn.Module) -> Tensor:
        users = model(batch["item_list"], batch["length"])  # calculate_loss, through the compiled forward
        return nn.functional.cross_entropy(users @ model.item_embedding.weight.T, batch["item"])

    torch.testing.assert_close(loss(model), model.calculate_loss(batch))
    return model, loss


def replay_sasrec(layer: str) -> Made:
    pytest.importorskip("replay")
    from replay.data import FeatureHint, FeatureSource, FeatureType
    from replay.data.nn import TensorFeatureInfo, TensorFeatureSource, TensorSchema
    from replay.nn.sequential import SasRec

    item_id = TensorFeatureInfo(
        "item_id",
        is_seq=True,
        feature_type=FeatureType.CATEGORICAL,
        feature_hint=FeatureHint.ITEM_ID,
        feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
        cardinality=NUM_ITEMS,
        padding_value=NUM_ITEMS,
        embedding_dim=DIM,
    )
    schema = TensorSchema([item_id])
    model = SasRec.from_params(
        schema, embedding_dim=DIM, num_heads=2, num_blocks=1, max_sequence_length=LENGTH, dropout=0.0
    )
    model.body.embedder.feature_embedders["item_id"] = make_embedding(layer, padding_idx=NUM_ITEMS)
    inputs, targets = sequences()[:, :-1].clone(), sequences()[:, 1:]
    inputs[0, :3] = NUM_ITEMS
    mask = inputs != NUM_ITEMS

    def loss(model: nn.Module) -> Tensor:
        return model(
            feature_tensors={"item_id": inputs},
            padding_mask=mask,
            positive_labels=targets.unsqueeze(-1),
            target_padding_mask=mask.unsqueeze(-1),
        )["loss"]

    return model, loss


def rectools_sasrec(layer: str) -> Made:
    pytest.importorskip("rectools.models.nn.transformers")
    from rectools.models.nn import item_net
    from rectools.models.nn.transformers import net_blocks, sasrec, similarity, torch_backbone

    class Items(item_net.ItemNetBase):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = make_embedding(layer, padding_idx=0)

        def forward(self, items: Tensor) -> Tensor:
            return self.embedding(items)

    model = torch_backbone.TransformerTorchBackbone(
        n_heads=2,
        dropout_rate=0.0,
        item_model=item_net.SumOfEmbeddingsConstructor(NUM_ITEMS, [Items()]),
        pos_encoding_layer=net_blocks.LearnableInversePositionalEncoding(True, LENGTH, DIM),
        transformer_layers=sasrec.SASRecTransformerLayers(
            n_blocks=1, n_factors=DIM, n_heads=2, dropout_rate=0.0
        ),
        similarity_module=similarity.DistanceSimilarityModule(),
    )
    inputs, targets = sequences()[:, :-1], sequences()[:, 1:]

    def loss(model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model({"x": inputs}).flatten(0, 1), targets.flatten())

    return model, loss


MODELS = {
    make.__name__: make for make in (transformers_decoder, recbole_sasrec, replay_sasrec, rectools_sasrec)
}


@pytest.fixture(autouse=True)
def _outside_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would take the checkout's folder kernels/ for the package of that name."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() != ROOT])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", MODELS)
def test_trains_and_comes_back_from_its_state_dict(name: str, layer: str):
    torch.manual_seed(0)
    model, loss = MODELS[name](layer)
    (embedding,) = (module for module in model.modules() if type(module).__module__.startswith("h2rec."))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = loss(model).item()
    for _ in range(40):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert loss(model).item() < 0.5 * first
    assert all(parameter.grad.any() for parameter in embedding.parameters())

    twin, _ = MODELS[name](layer)
    assert loss(twin).item() > 0.5 * first
    twin.load_state_dict(model.state_dict())
    assert torch.equal(loss(twin), loss(model))
    assert torch.equal(loss(copy.deepcopy(model)), loss(model))


@pytest.mark.parametrize("name", MODELS)
def test_compiles(name: str):
    torch.manual_seed(0)
    model, loss = MODELS[name]("both")
    expected = loss(model)
    expected.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.compile(fullgraph=True, backend="aot_eager")
    compiled = loss(model)
    compiled.backward()
    torch.testing.assert_close(compiled, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name])
