import dataclasses
import json

import pytest

from h2rec import SemanticIds
from h2rec.models import MODELS, H2Rec, build_model, model_settings
from h2rec.models.backbones import BACKBONES
from h2rec.models.h2rec import MIXINGS
from h2rec.training import TrainConfig, config


def make(**settings) -> TrainConfig:
    return TrainConfig(**{"interactions": "log.csv", "sids": "sids.safetensors"} | settings)


# One value of each option that is not its default.
CHANGED = {
    "interactions": "other.csv",
    "sids": "other.safetensors",
    "items": "items.csv",
    "embeddings": "vectors.npy",
    "user_column": "visitor",
    "item_column": "asin",
    "order_column": "when",
    "title_column": "name",
    "models": ("h2rec", "hash"),
    "dim": 32,
    "backbone": "gru4rec",
    "num_layers": 3,
    "num_heads": 4,
    "dropout": 0.5,
    "max_length": 20,
    "fusion": "mean",
    "mixing": "attention",
    "share_backbone": True,
    "alignment_weight": 0.2,
    "alignment_temperature": 0.1,
    "min_shared_codes": 2,
    "co_occurrence": False,
    "granularity_weight": 0.1,
    "loss": "bce",
    "num_negatives": 7,
    "target_smoothing": 0.2,
    "batch_size": 64,
    "learning_rate": 0.01,
    "weight_decay": 0.1,
    "table_optimizer": "rowwise_adagrad",
    "table_learning_rate": 0.1,
    "max_epochs": 5,
    "steps_per_epoch": 100,
    "patience": 3,
    "seed": 9,
    "hold_out": False,
    "eval_users": 1000,
    "ranking_negatives": 50,
    "mask_history": False,
    "accelerator": "cpu",
    "devices": 2,
}


def test_json_and_back():
    assert CHANGED.keys() == {field.name for field in dataclasses.fields(TrainConfig)}
    for settings in ({}, CHANGED):
        original = make(**settings)
        again = TrainConfig.from_json(original.to_json())
        assert again == original
        assert json.loads(original.to_json()).keys() == CHANGED.keys()
    assert isinstance(again.models, tuple)
    assert again.difference(make()).keys() == CHANGED.keys()


def test_loads_from_a_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(make(dim=32).to_json())
    assert TrainConfig.load(path) == make(dim=32)
    path.write_text('{"interactions": "log.csv", "sids": "s", "dim": 0}')
    with pytest.raises(ValueError, match=r"config.json: dim: expected an integer of at least 1, got 0"):
        TrainConfig.load(path)
    path.write_text('{"interactions": "log.csv", "sids": "s", "dim": "64"}')
    with pytest.raises(TypeError, match=r"config.json: dim: expected an integer, got '64'"):
        TrainConfig.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"config.json: 'utf-8' codec can't decode"):
        TrainConfig.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config: not JSON \("),
        ("[1]", "config: expected a JSON object of options, got list"),
        ('{"sids": "s"}', "missing option 'interactions'"),
        ("{}", "missing option 'interactions' and 'sids'"),
        (
            '{"learning_rat": 1}',
            "unknown option 'learning_rat'; did you mean 'learning_rate'. options are int",
        ),
        ('{"zzz": 1}', "unknown option 'zzz'; options are interactions, sids, items"),
    ],
)
def test_refuses_what_is_no_config(text, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_json(text)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        *((name, 3, TypeError, f"{name}: expected text, got 3") for name in CHANGED if "column" in name),
        *(
            (name, "", ValueError, f"{name}: expected text, got an empty")
            for name in CHANGED
            if "column" in name
        ),
        ("interactions", None, TypeError, "interactions: expected text, got None"),
        ("sids", "", ValueError, "sids: expected text, got an empty string"),
        ("items", "", ValueError, "items: expected text, got an empty string"),
        ("embeddings", 1, TypeError, "embeddings: expected text, got 1"),
        ("models", "hash", TypeError, "models: expected a sequence of names, got 'hash'"),
        ("models", None, TypeError, "models: expected a sequence of names, got None"),
        ("models", ["hash", 1], TypeError, "models: expected a sequence of names, got"),
        (
            "models",
            (),
            ValueError,
            "models: expected at least one of 'hash', 'llminit', .*, got none",
        ),
        ("models", ("hash", "tiger"), ValueError, "models: expected one of 'hash', .* got 'tiger'"),
        (
            "models",
            ("hash", "sum", "hash"),
            ValueError,
            "models: each may be named once, got hash, sum, hash",
        ),
        ("dim", 33, ValueError, "dim: expected a multiple of num_heads = 2, got 33"),
        ("loss", "mse", ValueError, "loss: expected one of 'auto', 'full_softmax', .* got 'mse'"),
        ("accelerator", "tpu", ValueError, "accelerator: expected one of 'auto', 'cpu', 'gpu', got 'tpu'"),
        (
            "table_optimizer",
            "sgd",
            ValueError,
            "table_optimizer: expected one of 'auto', 'adamw', .* got 'sgd'",
        ),
        ("fusion", "max", ValueError, "fusion: expected one of 'sum', 'mean', 'adaptive', got 'max'"),
        *(
            (name, value, error, f"{name}: expected an integer")
            for name in (
                *("dim", "num_layers", "num_heads", "max_length", "batch_size", "max_epochs", "patience"),
                *("devices", "ranking_negatives", "num_negatives", "min_shared_codes"),
                *("steps_per_epoch", "eval_users"),
            )
            for value, error in ((0, ValueError), (2.0, TypeError), (True, TypeError))
        ),
        ("seed", -1, ValueError, "seed: expected an integer of at least 0, got -1"),
        ("seed", None, TypeError, "seed: expected an integer, got None"),
        *(
            (name, value, ValueError, f"{name}: expected a number above 0.0, got {value}")
            for name in ("learning_rate", "alignment_temperature", "table_learning_rate")
            for value in (0.0, -1.0, float("inf"), float("nan"))
        ),
        *(
            (name, value, ValueError, f"{name}: expected a number at least 0.0, got {value}")
            for name in ("weight_decay", "alignment_weight", "granularity_weight")
            for value in (-0.1, float("inf"), float("nan"))
        ),
        *(
            (name, value, TypeError, f"{name}: expected a number, got {value!r}")
            for name in ("learning_rate", "weight_decay", "dropout", "alignment_weight")
            for value in ("1", True, None)
        ),
        ("dropout", 1.0, ValueError, "dropout: expected a number at least 0.0 and below 1.0, got 1.0"),
        (
            "target_smoothing",
            1.0,
            ValueError,
            "target_smoothing: expected a number at least 0.0 and below 1.0",
        ),
        ("mixing", "gate", ValueError, "mixing: expected one of 'sum', 'attention', 'residual_attention'"),
        ("granularity_weight", 0.1, ValueError, "granularity_weight: expected 0.0 with mixing 'sum'"),
        ("dropout", -0.1, ValueError, "dropout: expected a number at least 0.0 and below 1.0, got -0.1"),
        *(
            (name, 1, TypeError, f"{name}: expected true or false, got 1")
            for name in ("share_backbone", "co_occurrence", "mask_history")
        ),
    ],
)
def test_checks_itself(name, value, error, message):
    with pytest.raises(error, match=message):
        make(**{name: value})


def test_whole_numbers_will_do_for_numbers():
    assert make(learning_rate=1, dropout=0) == make(learning_rate=1.0, dropout=0.0)
    assert make(learning_rate=1).to_json() == make(learning_rate=1.0).to_json()


def test_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    absolute = make(items="a/items.csv").with_absolute_paths()
    assert absolute.interactions == str(tmp_path / "log.csv")
    assert absolute.items == str(tmp_path / "a" / "items.csv")
    assert absolute.embeddings is None
    assert absolute.with_absolute_paths() == absolute


def test_says_what_differs():
    ours, theirs = make(dim=32, seed=1), make(seed=2)
    assert ours.difference(theirs) == {"dim": (32, 64), "seed": (1, 2)}
    assert ours.describe_difference(theirs) == "dim is 32, not 64; seed is 1, not 2"
    assert ours.difference(make(dim=32, seed=1)) == {}


def test_another_number_of_processes():
    """Is the same training, if a step has the same users."""
    config = make(devices=2, batch_size=6)
    assert config.on_devices(4) == make(devices=4, batch_size=3)
    assert config.difference(config.on_devices(1)) == {}
    assert config.difference(make(devices=4, batch_size=6)) == {"devices": (2, 4)}
    with pytest.raises(ValueError, match="devices: expected a divisor of 12, the users of a step, got 5"):
        config.on_devices(5)
    with pytest.raises(ValueError, match="devices: expected an integer of at least 1, got 0"):
        config.on_devices(0)


def test_preset_is_what_the_paper_says():
    """arXiv 2512.10388, as its authors ran it: BCE with one negative, attention, one backbone for both branches."""
    paper = make(**config.PRESETS["paper"])
    assert (paper.dim, paper.num_layers, paper.num_heads, paper.max_length) == (64, 2, 1, 200)
    assert (paper.loss, paper.num_negatives, paper.batch_size, paper.patience) == ("bce", None, 128, 20)
    assert (paper.fusion, paper.mixing, paper.share_backbone) == ("mean", "attention", True)
    assert paper.smoothing_of("h2rec") == 0
    assert (paper.alignment_weight, paper.alignment_temperature, paper.granularity_weight) == (0.1, 0.5, 0.1)


def test_llminit_needs_content():
    with pytest.raises(ValueError, match="embeddings: expected content vectors for 'llminit' to start from"):
        make(models=("hash", "llminit"))
    assert make(models=("llminit",), embeddings="vectors.npy").models == ("llminit",)


def test_models_take_the_settings():
    """Names and defaults are those of the models: a setting is never lost on the way."""
    changed = make(**CHANGED)
    for name in MODELS:
        known = model_settings(name)
        assert changed.model_settings(name).keys() == known.keys() - {"sparse", "max_aligned_items"}
        assert {key: known[key] for key in make().model_settings(name)} == make().model_settings(name)
        assert all(value == CHANGED[key] for key, value in changed.model_settings(name).items())


@pytest.mark.parametrize("name", BACKBONES)
def test_models_take_every_backbone(name, files):
    sids = SemanticIds.load(files / "sids.safetensors")
    for model in ("sum", "h2rec"):
        build_model(model, sids, backbone=name)


def test_h2rec_smooths_its_targets():
    assert [make().smoothing_of(name) for name in ("hash", "sum", "h2rec")] == [0, 0, 0.3]
    assert [make(target_smoothing=0.1).smoothing_of(name) for name in ("hash", "h2rec")] == [0.1, 0.1]


@pytest.mark.parametrize("name", MIXINGS)
def test_h2rec_takes_every_mixing(name, make_config, files):
    settings = make_config(mixing=name).model_settings("h2rec")
    assert H2Rec(SemanticIds.load(files / "sids.safetensors"), **settings).mixing == name


@pytest.mark.parametrize("name", config.FUSIONS)
def test_h2rec_takes_every_fusion(name, make_config, files):
    settings = make_config(fusion=name).model_settings("h2rec")
    H2Rec(SemanticIds.load(files / "sids.safetensors"), **settings)
