"""Whole runs: what they leave on disk, how they go on, and what they refuse."""

import csv
import dataclasses
import gc
import json
import multiprocessing
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar

from h2rec import SemanticIds
from h2rec._files import partial
from h2rec.data import TrainBatches
from h2rec.models import SingleBranch
from h2rec.training import (
    TrainConfig,
    evaluate_model,
    load_model,
    module,
    processes,
    rank_users,
    read_split,
    run,
    train_run,
)
from h2rec.training.config import DEFAULT_MODELS

GROUP = {f"{name}@{k}" for name in ("HR", "NDCG") for k in (5, 10, 20)} | {"count"}


def read_json(path: Path):
    return json.loads(
        path.read_text(), parse_constant=lambda name: pytest.fail(f"{path}: {name} is not JSON")
    )


def read_rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def untimed(metrics: dict) -> dict:
    """What has to be the same in every run of a config."""
    models = {name: {**model, "seconds": None} for name, model in metrics["models"].items()}
    return {**metrics, "models": models}


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# ---- a run, and what it leaves behind


def test_directory(finished_run, make_config, files):
    assert TrainConfig.load(finished_run / "config.json") == make_config(
        embeddings=str(files / "vectors.npy")
    )
    events = {str(path.relative_to(finished_run)) for path in finished_run.glob("*/events.out.tfevents.*")}
    assert len(events) == len(DEFAULT_MODELS)
    of_model = ("checkpoints/best.ckpt", "checkpoints/last.ckpt", "metrics.csv", "metrics.json", "ranks.npz")
    expected = {
        "config.json",
        "data.json",
        "items.parquet",
        "sids.safetensors",
        "metrics.json",
        "report.html",
    }
    expected |= {f"{name}/{file}" for name in DEFAULT_MODELS for file in (*of_model, "hparams.yaml")}
    assert files_of(finished_run) == expected | events
    assert SemanticIds.load(finished_run / "sids.safetensors").num_items == 60
    items = pl.read_parquet(finished_run / "items.parquet")
    assert items.row(3) == ("i03", "Item i03")


def test_metrics(finished_run):
    metrics = read_json(finished_run / "metrics.json")
    assert list(metrics["models"]) == list(DEFAULT_MODELS)
    assert metrics["ranking"] == {
        "history_masked": True,
        "negatives": 20,
        "seed": 0,
        "users": None,
    }
    assert metrics["data"]["items"] == metrics["sid_stats"]["num_items"] == 60
    assert metrics["data"]["users"] == 90
    assert metrics["data"]["short_users"] > 0
    for name, model in metrics["models"].items():
        assert model == read_json(finished_run / name / "metrics.json")
        assert model["epochs"] == 3
        assert model["loss"] == "full_softmax"
        for stage in ("valid", "test"):
            for ranking in (model[stage]["full"], model[stage]["sampled"]):
                assert ranking.keys() == {"overall", "head", "tail", "bands"}
                assert ranking["overall"].keys() == GROUP
                held_out = metrics["data"]["users"] - metrics["data"]["short_users"]
                assert ranking["overall"]["count"] == held_out
                assert ranking["head"]["count"] + ranking["tail"]["count"] == held_out
                assert sum(band["count"] for band in ranking["bands"].values()) == held_out


@pytest.mark.parametrize("name", DEFAULT_MODELS)
def test_epochs(name, finished_run):
    rows = read_rows(finished_run / name)
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert {"train_loss", "train_next_item", "valid_NDCG@10", "valid_HR@10"} <= rows[0].keys()
    assert ("train_smoothing" in rows[0]) == (name == "h2rec")
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    parts = [value for part, value in rows[0].items() if part.startswith("train_") and part != "train_loss"]
    assert sum(parts) == pytest.approx(rows[0]["train_loss"], rel=1e-5)

    metrics = read_json(finished_run / name / "metrics.json")
    scores = [row["valid_NDCG@10"] for row in rows]
    assert metrics["best_epoch"] == scores.index(max(scores))
    # The best weights are what is evaluated, by the rules of validation.
    assert metrics["valid"]["full"]["overall"]["NDCG@10"] == pytest.approx(max(scores), abs=1e-6)


@pytest.mark.parametrize("name", DEFAULT_MODELS)
def test_a_loaded_model_is_the_evaluated_one(name, finished_run):
    for checkpoint in (finished_run / name / "checkpoints").iterdir():
        torch.load(checkpoint, weights_only=True)  # nothing that could be executed
    model, config, catalog, sids = load_model(finished_run, name)
    assert not model.training
    assert catalog.titles[3] == "Item i03"
    split = read_split(config, sids.num_items)
    metrics = read_json(finished_run / name / "metrics.json")
    assert evaluate_model(model, split, "test", num_negatives=20) == metrics["test"]
    ranks = np.load(finished_run / name / "ranks.npz", allow_pickle=False)
    assert ranks["full"].tolist() == rank_users(model, split, "test").full.tolist()
    assert ranks["users"].tolist() == np.flatnonzero(split.test_targets >= 0).tolist()


def test_models_learn(make_config, tmp_path):
    """The log is predictable: a model that learns is far above the 10 of 60 that chance gives."""
    metrics = train_run(make_config(models=("sum",), max_epochs=15, dim=32), tmp_path / "run")
    assert metrics["models"]["sum"]["test"]["full"]["overall"]["HR@10"] > 0.6


def test_same_seed_same_run(finished_run, make_config, files, tmp_path):
    config = make_config(embeddings=str(files / "vectors.npy"), models=("h2rec",))
    metrics = train_run(config, tmp_path / "again")
    finished = read_json(finished_run / "metrics.json")
    # Neither the clock nor the models that came before have a part in it.
    assert untimed(metrics)["models"]["h2rec"] == untimed(finished)["models"]["h2rec"]
    other = train_run(dataclasses.replace(config, seed=1), tmp_path / "other")
    assert other["models"]["h2rec"]["test"] != metrics["models"]["h2rec"]["test"]


def test_every_epoch_has_batches_and_dropout_of_its_own(make_config, tmp_path, monkeypatch):
    seen, seeds = [], []
    original = run.Recommender.training_step

    def step(self, batch, batch_idx):
        seen.append(batch.user_ids.tolist())
        seeds.append((self.current_epoch, torch.initial_seed()))
        return original(self, batch, batch_idx)

    monkeypatch.setattr(run.Recommender, "training_step", step)
    config = make_config(models=("hash",), seed=5)
    train_run(config, tmp_path / "run")
    batches = TrainBatches(read_split(config, 60), batch_size=32, max_length=8, seed=5)
    expected = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        expected += [batch.user_ids.tolist() for batch in batches]
    assert seen == expected
    assert len(set(seeds)) == len({seed for _, seed in seeds}) == 3


@pytest.mark.parametrize("loss", ["sampled_softmax", "bce"])
@pytest.mark.parametrize("name", ["sum", "h2rec"])
def test_every_loss_trains(loss, name, make_config, tmp_path):
    config = make_config(
        models=(name,), loss=loss, num_negatives=20, mask_history=False, dim=32, max_epochs=12
    )
    metrics = train_run(config, tmp_path / "run")
    assert metrics["models"][name]["loss"] == loss
    assert not metrics["ranking"]["history_masked"]
    rows = read_rows(tmp_path / "run" / name)
    assert rows[-1]["train_next_item"] < 0.9 * rows[0]["train_next_item"]
    # Epochs are validated by the rules of the end, the kept history among them.
    best = metrics["models"][name]["valid"]["full"]["overall"]["NDCG@10"]
    assert max(row["valid_NDCG@10"] for row in rows) == pytest.approx(best, abs=1e-6)


def test_bce_has_one_negative_where_nothing_is_said(make_config):
    config = make_config(loss="bce")
    assert next(iter(module.train_batches(config, read_split(config, 60)))).negatives.shape[-1] == 1


def test_sampled_softmax_leaves_out_the_users_own_items(make_config, tmp_path, monkeypatch):
    """All that a user trains on, though the model reads the latest two items only."""
    batches, draws, masks = [], [], []
    original_step, original_loss = run.Recommender.training_step, module.sampled_softmax
    original_draw = module.SharedNegatives.draw

    def step(self, batch, batch_idx):
        batches.append((batch, self.model.padding_idx))
        return original_step(self, batch, batch_idx)

    def draw(self, user_ids):
        draws.append(original_draw(self, user_ids))
        return draws[-1]

    def loss(users, targets, negatives, log_expected, left_out):
        masks.append(left_out.cpu())
        return original_loss(users, targets, negatives, log_expected, left_out)

    monkeypatch.setattr(run.Recommender, "training_step", step)
    monkeypatch.setattr(module.SharedNegatives, "draw", draw)
    monkeypatch.setattr(module, "sampled_softmax", loss)
    config = make_config(
        models=("hash",), loss="sampled_softmax", num_negatives=50, max_length=2, max_epochs=1
    )
    train_run(config, tmp_path / "run")
    split = read_split(config, 60)
    for (batch, padding), drawn, mask in zip(batches, draws, masks, strict=True):
        expected = []
        for user, targets in zip(batch.user_ids.tolist(), batch.targets.tolist(), strict=True):
            own = split.train_items[split.train_offsets[user] : split.train_offsets[user + 1]]
            expected += [
                [item in own for item in drawn.items.tolist()] for target in targets if target != padding
            ]
        assert mask.tolist() == expected
        assert mask.any()


@pytest.mark.parametrize(
    ("places", "mask_history", "is_said"),
    [((0, 1, 2, 0, 1), True, True), ((0, 1, 2, 0, 1), False, False), ((0, 1, 0, 1, 2), True, False)],
    ids=["repeated", "ranked with the others", "the test item is new"],
)
def test_says_that_repeated_items_are_left_out(places, mask_history, is_said, make_config, tmp_path, capsys):
    users = np.repeat(np.arange(40), len(places))
    items = (users + np.tile(places, 40)) % 60
    pl.DataFrame({"user_id": users, "item_id": items}).write_csv(tmp_path / "log.csv")
    sids = SemanticIds(torch.randint(8, (60, 3), generator=torch.Generator().manual_seed(0)))
    sids.save(tmp_path / "sids.safetensors")
    paths = {"interactions": str(tmp_path / "log.csv"), "sids": str(tmp_path / "sids.safetensors")}
    config = make_config(
        **paths, items=None, title_column=None, models=("hash",), max_epochs=1, mask_history=mask_history
    )
    train_run(config, tmp_path / "run")
    printed = capsys.readouterr().out
    assert ("100% of the test items are" in printed) == ("their users had before" in printed) == is_said


def test_raw_rows_without_a_catalog(make_config, tmp_path, monkeypatch, capsys):
    """Item ids that are rows, no timestamps, relative paths, and a terminal to draw a progress bar on."""
    monkeypatch.chdir(tmp_path)
    users = np.repeat(np.arange(40), 5)
    pl.DataFrame({"user_id": users, "item_id": (users * 7 + np.tile(np.arange(5), 40)) % 60}).write_csv(
        "log.csv"
    )
    SemanticIds(torch.randint(8, (60, 3), generator=torch.Generator().manual_seed(0))).save(
        "sids.safetensors"
    )
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    paths = {"interactions": "log.csv", "sids": "sids.safetensors", "items": None, "title_column": None}
    train_run(make_config(models=("hash",), **paths), "run")
    assert "valid_NDCG@10" in capsys.readouterr().out
    assert files_of(tmp_path) - {f"run/{file}" for file in files_of(tmp_path / "run")} == {
        "log.csv",
        "sids.safetensors",
    }
    monkeypatch.chdir("/")  # the config's paths are absolute
    _, config, catalog, _ = load_model(tmp_path / "run", "hash")
    assert catalog.titles is None
    assert read_split(config, 60).num_users == 40


def test_progress_bar_on_a_terminal_only(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert isinstance(run.progress_callback(), RichProgressBar)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert not isinstance(run.progress_callback(), RichProgressBar)


# ---- going on


def test_a_model_is_gone_when_the_next_comes(make_config, tmp_path, monkeypatch):
    built, build_model = [], run.build_model

    def build(*arguments, **options):
        assert not any(reference() for reference in built)
        model = build_model(*arguments, **options)
        built.append(weakref.ref(model))
        return model

    monkeypatch.setattr(run, "build_model", build)
    gc.disable()  # what collects them now and then anyway
    try:
        train_run(make_config(models=("hash", "sum", "h2rec"), max_epochs=1), tmp_path / "run")
    finally:
        gc.enable()
    assert len(built) == 3


def test_resume_of_a_finished_run(make_config, tmp_path):
    config = make_config(models=("hash", "sum"), max_epochs=1)
    metrics = train_run(config, tmp_path / "run")
    checkpoint = tmp_path / "run" / "sum" / "checkpoints" / "last.ckpt"
    written = checkpoint.stat().st_mtime_ns
    (tmp_path / "run" / "report.html").unlink()
    assert train_run(config, tmp_path / "run", resume=True) == metrics
    assert checkpoint.stat().st_mtime_ns == written
    assert (tmp_path / "run" / "report.html").exists()


class Killed(BaseException):
    """Not an Exception, so that nothing on the way can handle it."""


@pytest.fixture
def stop_at(monkeypatch):
    def stop(owner, function: str, name: str = "", after: int = 0) -> None:
        """Stops a run at a call of a function, after so many with an argument that holds this name."""
        original, calls = getattr(owner, function), [0]

        def stopping(*arguments, **options):
            calls[0] += any(name in str(argument) for argument in arguments)
            if calls[0] > after:
                raise Killed
            return original(*arguments, **options)

        monkeypatch.setattr(owner, function, stopping)

    return stop


@pytest.mark.parametrize("moment", ["best", "last", "ranks", "first", "inputs"])
def test_a_run_goes_on_from_any_moment(moment, make_config, tmp_path, stop_at, monkeypatch):
    """Stopped between any two files, as SIGKILL would stop it."""
    config = make_config(models=("hash", "h2rec"), patience=2, max_epochs=6, loss="bce")
    undisturbed = train_run(config, tmp_path / "undisturbed")

    if moment == "best":  # the best checkpoint of the second model is there, its last one is an epoch behind
        stop_at(run.WholeCheckpoints, "save_checkpoint", "h2rec/checkpoints/last.ckpt", after=1)
    elif moment == "last":  # an epoch is over, its files are not written
        stop_at(run.WholeCheckpoints, "save_checkpoint", "h2rec/checkpoints/last.ckpt", after=2)
    elif moment == "first":  # nothing but the first model's best checkpoint
        stop_at(run.WholeCheckpoints, "save_checkpoint", "hash/checkpoints/last.ckpt")
    elif moment == "ranks":  # trained to the end, and stopped early by patience, but not evaluated
        stop_at(run, "rank_users", after=2)
    else:  # nothing but the inputs
        stop_at(run, "_train_model")
    with pytest.raises(Killed):
        train_run(config, tmp_path / "killed")
    monkeypatch.undo()

    resumed = train_run(config, tmp_path / "killed", resume=True)
    assert untimed(resumed) == untimed(undisturbed)
    for name in config.models:
        assert read_rows(tmp_path / "killed" / name) == read_rows(tmp_path / "undisturbed" / name)
        weights = [
            torch.load(folder / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
            for folder in (tmp_path / "killed", tmp_path / "undisturbed")
        ]
        torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_stops_when_nothing_gets_better(make_config, tmp_path, stop_at, monkeypatch):
    """Patience counts from the best epoch, the first of equals, whether or not the run was interrupted."""
    config = make_config(models=("hash",), learning_rate=1e-12, patience=2, max_epochs=9)
    stop_at(run.WholeCheckpoints, "save_checkpoint", "last.ckpt", after=2)
    with pytest.raises(Killed):
        train_run(config, tmp_path / "run")
    monkeypatch.undo()
    metrics = train_run(config, tmp_path / "run", resume=True)["models"]["hash"]
    assert (metrics["epochs"], metrics["best_epoch"]) == (3, 0)
    scores = {row["valid_NDCG@10"] for row in read_rows(tmp_path / "run" / "hash")}
    assert len(scores) == 1, "scores were to stay the same"
    best = torch.load(tmp_path / "run" / "hash" / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["epoch"] == 0


def test_sigkill_at_a_random_moment(make_config, tmp_path):
    config = make_config(models=("semantic", "h2rec"), max_epochs=12, patience=12)
    undisturbed = train_run(config, tmp_path / "undisturbed")
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    (tmp_path / "config.json").write_text(config.to_json())
    program = (
        "import sys; from h2rec.training import TrainConfig, train_run;"
        "train_run(TrainConfig.load(sys.argv[1]), sys.argv[2])"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "config.json"), str(tmp_path / "killed")],
        stdout=subprocess.PIPE,
        text=True,
    )
    last_line = rng.randrange(26)
    for number, line in enumerate(child.stdout):
        if number == last_line or ("best epoch" in line and "h2rec" in line):
            break
    time.sleep(rng.random() * 0.1)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    resumed = train_run(config, tmp_path / "killed", resume=True)
    assert untimed(resumed) == untimed(undisturbed), f"killed with random seed {seed}"


# ---- refused


def test_run_directory_exists(make_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").touch()
    with pytest.raises(FileExistsError, match="run: exists already; resume it, or name another directory"):
        train_run(make_config(), tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file: exists already"):
        train_run(make_config(), tmp_path / "file")
    assert files_of(tmp_path) == {"run/precious.txt", "file"}


def test_nothing_to_resume(make_config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run: no run here \(it has no config.json\)"):
        train_run(make_config(), tmp_path / "run", resume=True)
    with pytest.raises(FileNotFoundError, match="run: no run here"):
        load_model(tmp_path / "run", "hash")
    assert not files_of(tmp_path)


def test_resume_with_another_config(finished_run, make_config):
    with pytest.raises(ValueError, match=r"the run has another config: .*learning_rate is 0.5, not 0.01"):
        train_run(make_config(learning_rate=0.5), finished_run, resume=True)


def test_negatives_that_the_loss_does_not_take(make_config, tmp_path):
    config = make_config(models=("hash",), num_negatives=20, max_epochs=1)
    with pytest.raises(ValueError, match=r"num_negatives: expected none with the full softmax.* got 20"):
        train_run(config, tmp_path / "run")
    assert not files_of(tmp_path)
    # A run of an earlier version, which ignored them, goes on.
    train_run(dataclasses.replace(config, num_negatives=None), tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(config.with_absolute_paths().to_json())
    train_run(config, tmp_path / "run", resume=True)


@pytest.fixture
def own_files(files, tmp_path) -> Path:
    """A copy of the files, which may change."""
    return shutil.copytree(files, tmp_path / "files")


def test_data_that_have_changed_are_not_gone_on_with(make_config, own_files, tmp_path, stop_at, monkeypatch):
    changing = {"interactions": own_files / "log.parquet", "embeddings": own_files / "vectors.npy"}
    config = make_config(
        models=("hash",), max_epochs=2, **{name: str(path) for name, path in changing.items()}
    )
    stop_at(run, "rank_users")
    with pytest.raises(Killed):
        train_run(config, tmp_path / "run")
    monkeypatch.undo()
    log = pl.read_parquet(config.interactions)
    pl.concat([log, log.tail(1)]).write_parquet(config.interactions)
    before = {name: (tmp_path / "run" / name).read_bytes() for name in files_of(tmp_path / "run")}
    message = (
        f"expected those that the run began with, {len(log):,} interactions .*, got {len(log) + 1:,} interact"
    )
    with pytest.raises(ValueError, match=message):
        train_run(config, tmp_path / "run", resume=True)
    log.write_parquet(config.interactions)
    vectors = np.load(config.embeddings)
    np.save(config.embeddings, vectors[::-1])
    with pytest.raises(
        ValueError, match="embeddings: expected the vectors that the run began with, got others"
    ):
        train_run(config, tmp_path / "run", resume=True)
    assert {name: (tmp_path / "run" / name).read_bytes() for name in files_of(tmp_path / "run")} == before
    np.save(config.embeddings, vectors)
    train_run(config, tmp_path / "run", resume=True)


def test_items_in_another_order_are_those_of_the_run(make_config, own_files, tmp_path, stop_at, monkeypatch):
    config = make_config(models=("hash",), max_epochs=2, items=str(own_files / "items.csv"))
    expected = train_run(config, tmp_path / "undisturbed")
    stop_at(run.WholeCheckpoints, "save_checkpoint", "hash/checkpoints/last.ckpt", after=1)
    with pytest.raises(Killed):
        train_run(config, tmp_path / "run")
    monkeypatch.undo()
    pl.read_csv(config.items).reverse().write_csv(config.items)
    assert untimed(train_run(config, tmp_path / "run", resume=True)) == untimed(expected)
    catalog = load_model(tmp_path / "run", "hash")[2]
    assert catalog.ids[3] == "i03"
    again = read_split(config, 60, catalog).log
    assert np.array_equal(again.items, read_split(make_config(), 60).log.items)


@pytest.fixture
def half_run(make_config, tmp_path, stop_at, monkeypatch) -> Path:
    """A run that was stopped before the evaluation of its first model."""
    stop_at(run, "rank_users")
    with pytest.raises(Killed):
        train_run(make_config(models=("hash", "semantic"), max_epochs=1), tmp_path / "run")
    monkeypatch.undo()
    return tmp_path / "run"


def test_truncated_checkpoint(half_run):
    config = TrainConfig.load(half_run / "config.json")
    for file, use in (
        ("best.ckpt", lambda: load_model(half_run, "hash")),
        ("last.ckpt", lambda: train_run(config, half_run, resume=True)),
    ):
        path = half_run / "hash" / "checkpoints" / file
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match=rf"{file}: not a whole checkpoint .*remove the model's folder"):
            use()
    # The message's advice works.
    for path in sorted((half_run / "hash").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert train_run(config, half_run, resume=True)["models"].keys() == {"hash", "semantic"}


def test_checkpoint_that_would_execute_code(half_run):
    path = half_run / "hash" / "checkpoints" / "best.ckpt"
    torch.save({"state_dict": {}, "other": test_metrics}, path)
    with pytest.raises(ValueError, match=r"best.ckpt: not a whole checkpoint"):
        load_model(half_run, "hash")


def test_checkpoint_of_another_config(half_run):
    config = dataclasses.replace(TrainConfig.load(half_run / "config.json"), num_heads=4)
    (half_run / "config.json").write_text(config.to_json())
    message = "checkpoint: of another config: num_heads is 4, not 2"
    with pytest.raises(ValueError, match=message):
        load_model(half_run, "hash")
    with pytest.raises(ValueError, match=message):
        train_run(config, half_run, resume=True)


def test_checkpoint_of_another_model(half_run):
    (half_run / "hash").rename(half_run / "semantic")
    with pytest.raises(ValueError, match="checkpoint: expected one of model 'semantic', got one of 'hash'"):
        load_model(half_run, "semantic")
    with pytest.raises(FileNotFoundError, match="hash: model 'hash' of this run has no checkpoint yet"):
        load_model(half_run, "hash")
    with pytest.raises(ValueError, match="name: expected one of the run's models, hash, semantic, got 'sum'"):
        load_model(half_run, "sum")


def test_of_an_earlier_version_nobody_knows_the_data(half_run):
    (half_run / "data.json").unlink()
    train_run(TrainConfig.load(half_run / "config.json"), half_run, resume=True)
    assert not (half_run / "data.json").exists()


@pytest.mark.parametrize("file", ["data.json", "semantic/metrics.json"])
def test_a_damaged_file_is_named_before_anything_is_trained(file, half_run):
    (half_run / file).parent.mkdir(exist_ok=True)
    (half_run / file).write_text("{")
    before = files_of(half_run)
    with pytest.raises(ValueError, match=rf"{re.escape(file)} is not JSON"):
        train_run(TrainConfig.load(half_run / "config.json"), half_run, resume=True)
    assert files_of(half_run) == before


def test_a_run_may_move_with_its_files(half_run, make_config, tmp_path):
    moved = tmp_path / "moved.parquet"
    moved.write_bytes(Path(make_config().interactions).read_bytes())
    config = dataclasses.replace(TrainConfig.load(half_run / "config.json"), interactions=str(moved))
    (half_run / "config.json").write_text(config.to_json())
    half_run.rename(tmp_path / "elsewhere")
    load_model(tmp_path / "elsewhere", "hash")
    train_run(config, tmp_path / "elsewhere", resume=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"interactions": "nowhere.csv"}, FileNotFoundError, "nowhere.csv: no such file"),
        ({"sids": "nowhere.safetensors"}, FileNotFoundError, "nowhere.safetensors"),
        ({"user_column": "visitor"}, ValueError, "visitor"),
        (
            {"items": None, "title_column": None},
            ValueError,
            r"the ids must be row numbers, integers in \[0, 60\), got 'i",
        ),
        (
            {"min_shared_codes": 4},
            ValueError,
            "min_shared_codes: expected at most 3, the levels of .*, got 4",
        ),
        ({"ranking_negatives": 60}, ValueError, "^ranking_negatives: expected at most .* got 60"),
        (
            {"accelerator": "gpu", "devices": 99},
            ValueError,
            "devices: expected at most .* PyTorch sees, got 99|where PyTorch sees no GPU, got 'gpu'",
        ),
        (
            {"accelerator": "cpu", "devices": 99},
            ValueError,
            r"split: expected at least 99 users \(one per rank\) with two training items, got",
        ),
    ],
)
def test_nothing_is_written_for_bad_input(changes, error, message, make_config, tmp_path):
    with pytest.raises(error, match=message):
        train_run(make_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sids_of_another_catalog(make_config, tmp_path):
    SemanticIds(torch.zeros(59, 2, dtype=torch.int64)).save(tmp_path / "sids.safetensors")
    with pytest.raises(
        ValueError, match=r"sids: expected semantic IDs of the 60 items of .*items.csv, got 59 of"
    ):
        train_run(make_config(sids=str(tmp_path / "sids.safetensors")), tmp_path / "run")


def test_nobody_to_evaluate(make_config, tmp_path):
    log = pl.DataFrame({"user_id": [1, 1, 2, 2], "item_id": ["i01", "i02", "i03", "i04"]})
    log.write_csv(tmp_path / "log.csv")
    with pytest.raises(
        ValueError, match="interactions: expected at least one user with three or more, got none"
    ):
        train_run(make_config(interactions=str(tmp_path / "log.csv")), tmp_path / "run")


def spoil(monkeypatch, owner, function: str, call: int, rows: slice) -> None:
    """Makes some rows of what a call in training returns NaN."""
    original, calls = getattr(owner, function), iter(range(1000))

    def spoilt(self, *arguments):
        result = original(self, *arguments)
        if self.training and next(calls) == call:
            result = result.clone()
            result[rows] = torch.nan
        return result

    monkeypatch.setattr(owner, function, spoilt)


@pytest.mark.parametrize(
    ("function", "rows", "suspects"),
    [
        ("encode", slice(2, 4), r"users 'u\d\d', 'u\d\d'"),
        ("encode", slice(None), r"users ('u\d\d', ){5}\.\.\. \(\d\d in all\)"),
    ],
)
def test_a_loss_that_is_not_finite(function, rows, suspects, make_config, device, tmp_path, monkeypatch):
    """Training stops, says where, and the last good checkpoint stays."""
    spoil(monkeypatch, SingleBranch, function, 4, rows)
    message = f"model 'semantic': the next_item loss is nan in epoch 1, step 1, with {suspects}; a lower learning_rate"
    if device != "cpu":
        message = "model 'semantic'|not finite"  # looked at now and then
    with pytest.raises(FloatingPointError, match=message):
        train_run(make_config(models=("semantic",)), tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run" / "semantic" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 0
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_an_item_that_is_not_finite_is_named(make_config, device, tmp_path, monkeypatch):
    original = SingleBranch.item_vectors

    def item_vectors(self, item_ids=None):
        vectors = original(self, item_ids)
        at = (torch.arange(60) if item_ids is None else item_ids.cpu()) == 17
        return torch.where(at.unsqueeze(-1).to(vectors.device), torch.nan, vectors)

    monkeypatch.setattr(SingleBranch, "item_vectors", item_vectors)
    with pytest.raises(FloatingPointError, match="loss is nan in epoch 0, step 0, with items 'i17'; a lower"):
        train_run(make_config(models=("hash",), max_epochs=1, batch_size=90), tmp_path / "run")
    assert not (tmp_path / "run" / "hash" / "checkpoints").exists()


FULL_DISK = """
import resource, sys
from pathlib import Path
from h2rec.training import TrainConfig, train_run

config, run, limit = TrainConfig.load(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    train_run(config, run)
except OSError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
train_run(config, run, resume=(run / "config.json").exists())
"""


@pytest.mark.parametrize(
    ("limit", "file"), [(500, "sids.safetensors"), (20_000, "hash/checkpoints/last.ckpt")]
)
def test_a_full_disk(limit, file, make_config, tmp_path):
    """The kernel refuses what goes beyond a small size of a file, as it would on a full disk."""
    config = make_config(models=("hash",), max_epochs=2)
    (tmp_path / "config.json").write_text(config.to_json())
    run = tmp_path / "run"
    arguments = [sys.executable, "-c", FULL_DISK, tmp_path / "config.json", run, str(limit)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert re.search(f"{run / file}: cannot be written: .*File too large", result.stdout), result
    assert result.returncode == 0, result.stderr
    expected = train_run(config, tmp_path / "undisturbed")
    assert untimed(read_json(run / "metrics.json")) == untimed(expected)
    assert not [path for path in files_of(run) if "partial" in path]


def test_files_for_which_there_is_no_room(make_config, tmp_path):
    catalog = run.read_inputs(make_config(), None).catalog
    large = {str(index): torch.zeros(1000) for index in range(20)}
    for name, write in {
        "items.parquet": lambda path: run.write_catalog(catalog, path),
        "small.ckpt": lambda path: run.WholeCheckpoints().save_checkpoint({"a": torch.zeros(2)}, path),
        "large.ckpt": lambda path: run.WholeCheckpoints().save_checkpoint(large, path),
    }.items():
        partial(tmp_path / name).symlink_to("/dev/full")
        with pytest.raises(OSError, match=f"{name}: cannot be written: .*No space left"):
            write(tmp_path / name)
    assert not files_of(tmp_path)


@pytest.mark.parametrize("moment", ["write_catalog", "write_json"])
def test_killed_before_there_was_a_config(moment, make_config, own_files, tmp_path, stop_at, monkeypatch):
    """Nothing has begun then, and a run that begins there has nothing of it."""
    config = make_config(models=("hash",), max_epochs=1)
    stop_at(run, moment)
    with pytest.raises(Killed):
        train_run(config, tmp_path / "run")
    monkeypatch.undo()
    partial(tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(FileNotFoundError, match="no run here"):
        train_run(config, tmp_path / "run", resume=True)
    other = torch.zeros(60, 2, dtype=torch.int64)
    SemanticIds(other, codebook_sizes=(4, 4)).save(own_files / "sids.safetensors")
    train_run(dataclasses.replace(config, sids=str(own_files / "sids.safetensors")), tmp_path / "run")
    assert SemanticIds.load(tmp_path / "run" / "sids.safetensors").codes.tolist() == other.tolist()
    assert ".config.partial.json" not in files_of(tmp_path / "run")


def test_a_folder_that_cannot_be_written(make_config, tmp_path, monkeypatch):
    # Root may write anywhere.
    def mkdir(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(PermissionError, match=r"Permission denied: .*run"):
        train_run(make_config(), tmp_path / "run")


# ---- several processes


def test_two_processes(make_config, device, tmp_path, capfd):
    if device != "cpu" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    log = pl.read_parquet(make_config().interactions).filter(pl.len().over("user_id") > 3)
    even = log["user_id"].unique(maintain_order=True)[:70]  # else two processes leave one user out
    log.filter(pl.col("user_id").is_in(even.implode())).write_parquet(tmp_path / "log.parquet")
    config = make_config(
        interactions=str(tmp_path / "log.parquet"),
        models=("sum", "h2rec"),
        dropout=0.0,
        target_smoothing=0.0,
        devices=2,
        batch_size=16,
        max_epochs=2,
    )
    metrics = train_run(config, tmp_path / "run")
    assert capfd.readouterr().out.count("h2rec: best epoch") == 1
    train_run(config.on_devices(1), tmp_path / "one")
    for name in config.models:
        for ours, theirs in zip(
            *(read_rows(tmp_path / folder / name) for folder in ("run", "one")), strict=True
        ):
            assert ours == pytest.approx(theirs, rel=1e-4), name
    split = read_split(config, 60)
    for name in config.models:
        model = load_model(tmp_path / "run", name)[0]
        assert evaluate_model(model, split, "test", num_negatives=20) == metrics["models"][name]["test"]
        assert evaluate_model(model, split, "valid", num_negatives=20) == metrics["models"][name]["valid"]
        ranks = np.load(tmp_path / "run" / name / "ranks.npz", allow_pickle=False)
        assert ranks["full"].tolist() == rank_users(model, split, "test").full.tolist()
        rows = read_rows(tmp_path / "run" / name)
        assert max(row["valid_NDCG@10"] for row in rows) == pytest.approx(
            metrics["models"][name]["valid"]["full"]["overall"]["NDCG@10"], abs=1e-6
        )
    assert train_run(config, tmp_path / "run", resume=True) == metrics


def test_a_launcher_has_another_number_of_processes(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="devices: expected 3, the processes that were started, got 2"):
        train_run(make_config(devices=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_process_that_does_not_come(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(processes, "_MEETING_TIME", timedelta(seconds=1))
    with (
        pytest.raises(ChildProcessError, match=r"the 2 processes did not meet .* 1/2 clients joined"),
        processes.launched_group("cpu"),
    ):
        pass


WAIT_FOR_EACH_OTHER = r"""
import os
import torch
import torch.distributed as dist
from h2rec.training.processes import train_in_processes

def wait_for_each_other():
    os.write(1, b"ready\n")  # in one piece
    dist.recv(torch.empty(1), src=1 - dist.get_rank())

if __name__ == "__main__":
    train_in_processes(wait_for_each_other, (), 2, "cpu")
"""


def test_the_process_that_started_the_others_is_killed(tmp_path):
    (tmp_path / "wait.py").write_text(WAIT_FOR_EACH_OTHER)
    command = [sys.executable, str(tmp_path / "wait.py")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert [child.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
    time.sleep(0.5)
    child.kill()
    child.communicate(timeout=60)  # until both have ended


def test_an_error_in_one_of_two_processes(make_config, device, tmp_path):
    if device != "cpu" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    config = make_config(models=("sum",), devices=2, learning_rate=1e30)
    with pytest.raises(
        FloatingPointError, match=r"^model 'sum': the next_item loss is \w+ in epoch \d"
    ) as raised:
        train_run(config, tmp_path / "run")
    assert "Traceback" not in str(raised.value)


def test_one_of_two_processes_is_killed(make_config, device, tmp_path):
    if device != "cpu" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    config = make_config(models=("hash",), devices=2, max_epochs=500, patience=500)

    def kill() -> None:
        while not (tmp_path / "run" / "hash" / "metrics.csv").exists():
            time.sleep(0.01)
        multiprocessing.active_children()[0].kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(ChildProcessError, match=r"terminated with signal SIGKILL; resume the run to go on"):
        train_run(config, tmp_path / "run")
    assert len(read_rows(tmp_path / "run" / "hash")) < 500
