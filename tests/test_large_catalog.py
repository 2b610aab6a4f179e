"""The generated catalog, and the benchmarks of large ones at a small size."""

import argparse
import json
import sys

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from benchmarks import catalog_scaling, generated_catalog, large_catalog
from benchmarks.generated_catalog import Popularity, count, sequence_pieces, vector_pieces, write_vectors
from h2rec.cli.app import app


def test_counts():
    assert [count(text) for text in ("7", "20k", "10M")] == [7, 20_000, 10_000_000]
    for text in ("0", "-3k"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"expected a positive number, got {text}"):
            count(text)


@pytest.mark.parametrize("num_items", [1, 2, 999, 1000, 3001])
def test_ranks_and_items_are_each_others_inverse(num_items):
    popularity = Popularity(num_items)
    items = popularity.item(np.arange(num_items))
    assert sorted(items.tolist()) == list(range(num_items))
    assert (popularity.rank(items) == np.arange(num_items)).all()


def test_popularity_follows_zipf():
    popularity = Popularity(64_000)
    rng = np.random.default_rng(0)
    topics = rng.integers(0, popularity.topics, 500_000)
    ranks = popularity.rank(popularity.draw(topics, rng))
    assert (ranks % popularity.topics == topics).all()
    # Each topic has 64 places: the chance of place j is log((j + 2) / (j + 1)) / log(65).
    share = np.bincount(ranks // popularity.topics, minlength=64) / len(ranks)
    expected = np.log((np.arange(64) + 2) / (np.arange(64) + 1)) / np.log(65)
    assert np.abs(share - expected).max() < 5 * np.sqrt(0.2 / len(ranks))


def test_vectors_lie_around_their_topics(tmp_path):
    popularity = Popularity(4000)
    write_vectors(tmp_path / "vectors.npy", popularity, 16, seed=1)
    vectors = np.load(tmp_path / "vectors.npy", allow_pickle=False)
    assert vectors.dtype == np.float16
    assert vectors.shape == (4000, 16)
    assert (vectors == np.concatenate(list(vector_pieces(popularity, 16, seed=1)))).all()
    assert (vectors != np.concatenate(list(vector_pieces(popularity, 16, seed=2)))).any()
    topics = popularity.rank(np.arange(4000)) % popularity.topics
    by_topic = vectors[np.argsort(topics, kind="stable")].astype(np.float32).reshape(popularity.topics, 4, 16)
    assert by_topic.var(axis=1).mean() < 0.5 * vectors.astype(np.float32).var(axis=0).mean()


def test_users_stay_with_a_topic_for_a_while(monkeypatch):
    monkeypatch.setattr(generated_catalog, "_PIECE", 300)
    popularity = Popularity(50_000)
    users, items = map(np.concatenate, zip(*sequence_pieces(popularity, 1000, seed=3), strict=True))
    assert (np.unique(users) == np.arange(1000)).all()
    assert (np.diff(users) >= 0).all()
    assert np.bincount(users).min() >= 5
    topics = popularity.rank(items) % popularity.topics
    stays = topics[1:] == topics[:-1]
    same_user = users[1:] == users[:-1]
    assert stays[same_user].mean() == pytest.approx(0.8, abs=0.02)
    assert stays[~same_user].mean() < 0.02


def run_here(command: list[str], monkeypatch) -> dict[str, float]:
    """`large_catalog.measure` without a process of its own."""
    if "-m" in command:
        monkeypatch.setattr(sys, "argv", command[2:])
        generated_catalog.main()
    else:
        result = CliRunner().invoke(app, command[3:], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    return {"seconds": 1.0, "cpu_seconds": 2.0, "bytes": 3 << 30}


def test_every_phase_once(tmp_path, monkeypatch, capsys):
    ran = []

    def measure(command):
        ran.append(command)
        return run_here(command, monkeypatch)

    monkeypatch.setattr(large_catalog, "measure", measure)
    arguments = [
        "--items",
        "2k",
        "--dim",
        "8",
        "--steps",
        "2",
        "--steps-per-epoch",
        "1",
        "--eval-users",
        "50",
    ]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["large_catalog", str(tmp_path), *arguments])
        large_catalog.main()
    assert len(ran) == 8
    assert capsys.readouterr().out.count("| recommend h2rec | 1 s | 2 s | 3.0 GiB |") == 2
    assert (tmp_path / "phases.md").read_text().count("\n") == 10
    metrics = json.loads((tmp_path / "h2rec" / "metrics.json").read_text())
    assert metrics["data"]["items"] == 2000
    assert metrics["ranking"]["users"] == 50

    monkeypatch.setattr(large_catalog, "LIMIT", 1 << 30)
    monkeypatch.setattr(sys, "argv", ["large_catalog", str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match="more than 1 GiB resident: generate, tokenize, train sum"):
        large_catalog.main()


def test_memory_of_a_command():
    small = large_catalog.measure([sys.executable, "-c", "pass"])
    size = int(small["bytes"]) + (100 << 20)
    large = large_catalog.measure([sys.executable, "-c", f"b = bytearray(b'x') * {size}"])
    assert size <= large["bytes"] < size + (100 << 20)
    assert large["cpu_seconds"] > 0
    with pytest.raises(large_catalog.subprocess.CalledProcessError):
        large_catalog.measure([sys.executable, "-c", "raise SystemExit(3)"])


def test_scaling(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(catalog_scaling, "_USERS", 4000)
    write_vectors(tmp_path / "vectors.npy", Popularity(3000), 8, seed=0)

    def call(*arguments: object) -> None:
        command = ["scaling", *map(str, arguments), "--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", command)
        catalog_scaling.main()

    call("tokenize", "3k", "--vectors", tmp_path / "vectors.npy")
    for model in ("sum", "h2rec"):
        call("step", "3k", "--model", model, "--steps", 2, "--dim", 8)
    call("report")
    text = capsys.readouterr().out
    assert text == (tmp_path / "out" / "scaling.md").read_text()
    for line in ("| tokenize, fit | 0.003M |", "| step, sum | 0.003M |", "| step, h2rec | 0.003M |"):
        assert text.count(line) == 1
    assert (tmp_path / "out" / "scaling.png").exists()
    times = json.loads((tmp_path / "out" / "step.sum.3000.json").read_text())["steps"]
    assert len(times) == 2
    with pytest.raises(ValueError, match=r"vectors.npy: expected 5000 rows, got 3000"):
        call("tokenize", "5k", "--vectors", tmp_path / "vectors.npy")


def test_steps_are_of_equal_batches():
    split = catalog_scaling.long_sequences(5000)
    lengths = np.diff(split.train_offsets)
    assert lengths.min() > catalog_scaling._LENGTH
    assert isinstance(split.log.users, pl.Series)
