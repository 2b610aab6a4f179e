"""A model of a run, trained again on everything."""

import shutil
from contextlib import nullcontext

import numpy as np
import polars as pl
import pytest
import torch

from h2rec import SemanticIds
from h2rec.training import TrainConfig, evaluate_model, load_model, read_split, refit_run, run, train_run
from h2rec.training.export import export_run
from h2rec.training.report import write_report

from .conftest import walks, write_log


@pytest.fixture
def best_in_second_epoch(finished_run, tmp_path):
    """A copy of the run whose sum model was best in the second of three epochs."""
    copy = shutil.copytree(finished_run, tmp_path / "run")
    path = copy / "sum" / "metrics.json"
    text = path.read_text()
    best = f'"best_epoch": {run.read_json(path)["best_epoch"]}'
    assert best in text
    path.write_text(text.replace(best, '"best_epoch": 1'))
    return copy


def weights_of(folder, name):
    return load_model(folder, name)[0].state_dict()


def test_trains_on_everything_for_the_best_number_of_epochs(
    best_in_second_epoch, make_config, files, tmp_path
):
    """As training does with two more items per user, which it holds out."""
    metrics = refit_run(best_in_second_epoch, tmp_path / "all", "sum")

    write_log(
        tmp_path / "longer.parquet", [[*walk, user % 60, user % 60] for user, walk in enumerate(walks())]
    )
    longer = make_config(
        interactions=str(tmp_path / "longer.parquet"),
        embeddings=str(files / "vectors.npy"),
        models=("sum",),
        max_epochs=2,
    )
    train_run(longer, tmp_path / "longer")
    last = torch.load(tmp_path / "longer" / "sum" / "checkpoints" / "last.ckpt", weights_only=True)
    expected = {name.removeprefix("model."): weight for name, weight in last["state_dict"].items()}
    torch.testing.assert_close(weights_of(tmp_path / "all", "sum"), expected, rtol=0, atol=0)

    assert metrics["models"]["sum"]["epochs"] == 2
    assert metrics["models"]["sum"]["best_epoch"] == 1
    assert metrics["ranking"] is None

    shutil.rmtree(best_in_second_epoch / "sum" / "checkpoints")  # which takes no part
    again = refit_run(tmp_path / "all", tmp_path / "again", "sum")
    assert again["models"]["sum"]["epochs"] == 2
    torch.testing.assert_close(weights_of(tmp_path / "again", "sum"), expected, rtol=0, atol=0)


def test_a_run_without_ranks(finished_run, tmp_path, capsys):
    refit_run(finished_run, tmp_path / "all")
    printed = capsys.readouterr().out
    assert "valid" not in printed
    assert "not tested" not in printed
    config = TrainConfig.of_run(tmp_path / "all")
    assert (config.models, config.hold_out) == (("h2rec",), False)
    split = read_split(config, 60)
    assert split.train_items.tolist() == split.log.items.tolist()
    assert not (tmp_path / "all" / "report.html").exists()
    assert not (tmp_path / "all" / "h2rec" / "ranks.npz").exists()
    header = (tmp_path / "all" / "h2rec" / "metrics.csv").read_text().splitlines()[0]
    assert header == "epoch,train_loss,train_next_item,train_smoothing"
    with pytest.raises(ValueError, match="nothing was held out of this run's training"):
        write_report(tmp_path / "all")
    with pytest.raises(ValueError, match="split: expected users with a held-out item for test, got none"):
        evaluate_model(load_model(tmp_path / "all", "h2rec")[0], split, "test")
    assert export_run(tmp_path / "all", "h2rec", tmp_path / "export")["model"] == "h2rec"


def test_goes_on_when_interrupted(best_in_second_epoch, tmp_path, monkeypatch):
    refit_run(best_in_second_epoch, tmp_path / "undisturbed", "sum")
    save = run.WholeCheckpoints.save_checkpoint

    def stop_after_the_first(self, checkpoint, path, storage_options=None):
        save(self, checkpoint, path, storage_options)
        if checkpoint["epoch"] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.WholeCheckpoints, "save_checkpoint", stop_after_the_first)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        refit_run(best_in_second_epoch, tmp_path / "killed", "sum")
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="'sum' of this run has no checkpoint yet"):
        load_model(tmp_path / "killed", "sum")
    train_run(TrainConfig.of_run(tmp_path / "killed"), tmp_path / "killed", resume=True)
    expected, found = (weights_of(tmp_path / name, "sum") for name in ("undisturbed", "killed"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.fixture
def movable_run(make_config, files, tmp_path):
    """A run whose files may be changed."""
    for name in ("log.parquet", "items.csv", "vectors.npy", "sids.safetensors"):
        shutil.copy(files / name, tmp_path)
    config = make_config(
        interactions=str(tmp_path / "log.parquet"),
        items=str(tmp_path / "items.csv"),
        sids=str(tmp_path / "sids.safetensors"),
        embeddings=str(tmp_path / "vectors.npy"),
        models=("semantic",),
        max_epochs=1,
    )
    train_run(config, tmp_path / "run")
    return tmp_path / "run"


def test_the_log_may_have_grown_and_the_items_are_those_of_the_run(movable_run, tmp_path):
    refit_run(movable_run, tmp_path / "before")
    pl.read_csv(tmp_path / "items.csv").reverse().write_csv(tmp_path / "items.csv")
    sids = SemanticIds.load(tmp_path / "sids.safetensors")
    SemanticIds(sids.codes.flip(0), codebook_sizes=(8, 8, 8)).save(tmp_path / "sids.safetensors")
    refit_run(movable_run, tmp_path / "changed")
    expected, found = (weights_of(tmp_path / name, "semantic") for name in ("before", "changed"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert load_model(tmp_path / "changed", "semantic")[3].codes.tolist() == sids.codes.tolist()

    write_log(tmp_path / "log.parquet", [[*walk, 7] for walk in walks()] + [[1, 2]])
    assert refit_run(movable_run, tmp_path / "grown")["data"]["users"] == 91


def test_any_number_of_processes_shares_the_steps_of_the_run(movable_run, tmp_path, monkeypatch):
    assert TrainConfig.of_run(movable_run).batch_size == 32
    monkeypatch.setattr(run, "_train_models", lambda *_: None)
    monkeypatch.setattr(run, "train_in_processes", lambda *_: None)
    monkeypatch.setattr(run, "read_json", lambda _: {"best_epoch": 0})
    for name in ("asked", "launched"):
        refit_run(movable_run, tmp_path / name, devices=2 if name == "asked" else None)
        config = TrainConfig.of_run(tmp_path / name)
        assert (config.devices, config.batch_size) == (2, 16)
        monkeypatch.setattr(run, "launched_world_size", lambda: 2)
        monkeypatch.setattr(run, "launched_group", nullcontext)
        monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    with pytest.raises(ValueError, match="devices: expected a divisor of 32, the users of a step, got 3"):
        refit_run(movable_run, tmp_path / "three", devices=3)


def test_a_run_of_an_earlier_version_with_negatives_that_were_ignored(movable_run, tmp_path):
    text = (movable_run / "config.json").read_text()
    assert '"num_negatives": null' in text
    (movable_run / "config.json").write_text(text.replace('"num_negatives": null', '"num_negatives": 9'))
    refit_run(movable_run, tmp_path / "all")


def test_vectors_of_other_items_are_refused(movable_run, tmp_path):
    np.save(tmp_path / "vectors.npy", np.load(tmp_path / "vectors.npy")[::-1])
    with pytest.raises(ValueError, match="embeddings: expected the vectors that the run began with"):
        refit_run(movable_run, tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_refuses(finished_run, best_in_second_epoch, tmp_path):
    with pytest.raises(FileNotFoundError, match="no run here"):
        refit_run(tmp_path / "nowhere", tmp_path / "all")
    with pytest.raises(ValueError, match=r"name: expected one of the run's models, .*, got 'mean'"):
        refit_run(finished_run, tmp_path / "all", "mean")
    (best_in_second_epoch / "sum" / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match="model 'sum' of this run has not finished training"):
        refit_run(best_in_second_epoch, tmp_path / "all", "sum")
    assert not (tmp_path / "all").exists()
    with pytest.raises(ValueError, match="items_of: expected None for a run that is resumed"):
        train_run(TrainConfig.of_run(finished_run), finished_run, resume=True, items_of=best_in_second_epoch)
    with pytest.raises(FileExistsError, match="exists already"):
        refit_run(finished_run, best_in_second_epoch)
