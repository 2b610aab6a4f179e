"""The quality benchmark: cells that are whole or not there, and honest significance."""

import json

import numpy as np
import polars as pl
import pytest
import torch

from benchmarks import quality
from benchmarks._balance import WithPopularity
from benchmarks._quality_plot import _COLORS
from benchmarks._quality_report import (
    at_equal_balance,
    best_at,
    is_complete,
    paired_bootstrap,
    significance,
    write_report,
)
from h2rec import SemanticIds
from h2rec.models import build_model

TINY = ("dim=8", "num_layers=1", "max_epochs=1", "max_length=6", "ranking_negatives=10", "accelerator=cpu")


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(40), 6)
    folder = tmp_path / "shop"
    folder.mkdir()
    pl.DataFrame(
        {
            "user_id": users,
            "item_id": (rng.integers(0, 50, 40).repeat(6) + np.tile(np.arange(6), 40)) % 50,
            "order": np.tile(np.arange(6), 40),
        }
    ).write_parquet(folder / "interactions.parquet")
    np.save(folder / "vectors.npy", rng.standard_normal((50, 8), dtype=np.float32))
    return folder


@pytest.fixture(autouse=True)
def small_codebooks(monkeypatch):
    from h2rec.tokenizers import RQKMeans

    monkeypatch.setattr(quality, "tokenize", lambda vectors, _: RQKMeans(2, 4).fit(vectors).tokenize(vectors))


def run(data, output, *arguments):
    settings = [part for setting in TINY for part in ("--set", setting)]
    quality.main(
        [
            str(data),
            "--output",
            str(output),
            "--models",
            "hash,h2rec,h2rec-no-smoothing",
            *settings,
            *arguments,
        ]
    )


def test_killed_cells_are_made_again_and_finished_ones_kept(data, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    train_run = quality.train_run

    def killed(config, run_dir, *, resume):
        if "h2rec" in config.models:
            train_run(config, run_dir, resume=resume)
            raise KeyboardInterrupt
        return train_run(config, run_dir, resume=resume)

    monkeypatch.setattr(quality, "train_run", killed)
    with pytest.raises(KeyboardInterrupt):
        run(data, output)
    assert [path.name for path in (output / "cells").glob("*.json")] == ["shop.hash.0.json"]
    before = (output / "cells" / "shop.hash.0.json").read_bytes()
    monkeypatch.setattr(quality, "train_run", train_run)
    run(data, output)
    assert (output / "cells" / "shop.hash.0.json").read_bytes() == before
    assert {path.name for path in (output / "cells").iterdir()} == {
        f"shop.{model}.0.{kind}"
        for model in ("hash", "h2rec", "h2rec-no-smoothing")
        for kind in ("json", "npz")
    }
    assert "3 cells, 1 of them finished before" in capsys.readouterr().out

    cell = json.loads((output / "cells" / "shop.h2rec.0.json").read_text())
    ranks = np.load(output / "cells" / "shop.h2rec.0.npz")
    for ranking in ("full", "sampled", "with_history"):
        gains = np.where(ranks[ranking] <= 10, 1 / np.log2(1 + ranks[ranking]), 0)
        assert gains.mean() == pytest.approx(cell["test"][ranking]["overall"]["NDCG@10"])
        assert gains[ranks["is_head"]].mean() == pytest.approx(cell["test"][ranking]["head"]["NDCG@10"])
    assert (ranks["full"] <= ranks["with_history"]).all()
    assert (ranks["full"] < ranks["with_history"]).any()
    curve = cell["balance"]
    for group in ("head", "tail"):
        assert curve[group][curve["weights"].index(0)] == pytest.approx(
            cell["test"]["full"][group]["NDCG@10"]
        )
        assert len(set(curve[group])) > 1
    report = (output / "report.md").read_text()
    assert "h2rec against" in report
    assert f"{cell['test']['full']['overall']['NDCG@10']:.4f}" in report
    assert {path.name for path in output.glob("*.png")} == {"bands.png", "seesaw.png", "ablation.png"}

    with pytest.raises(
        SystemExit, match=r"other settings, use another --output: learning_rate is 0\.001, not 0\.1"
    ):
        run(data, output, "--set", "learning_rate=0.1")


def test_settings_and_seeds_arrive(data, tmp_path):
    options = quality.parse(
        [str(data), "--output", str(tmp_path), "--seeds", "3,4", "--set", "dropout=0.5", "--set", "loss=bce"]
    )
    assert options.seeds == (3, 4)
    config = quality.make_config(quality.Cell(data, "h2rec-one-backbone", 4), options)
    assert (config.seed, config.dropout, config.loss, config.share_backbone) == (4, 0.5, "bce", True)
    assert config.embeddings == str(data / "vectors.npy")
    assert quality.make_config(quality.Cell(data, "h2rec-random-start", 4), options).embeddings is None
    wide = quality.make_config(quality.Cell(data, "sum-128", 4), options)
    assert (wide.models, wide.dim) == (("sum",), 128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "tiger"], "expected some of hash"),
        (["--set", "droput=1"], "expected NAME=VALUE with a setting of TrainConfig, got 'droput=1'"),
        (["--quantizer", "kd_tree"], "invalid choice"),
    ],
)
def test_refuses(arguments, message, data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        quality.parse([str(data), "--output", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        quality.parse([str(tmp_path / "nowhere"), "--output", str(tmp_path)])
    assert "expected a folder with interactions.parquet" in capsys.readouterr().err


def test_time_left(tmp_path):
    cells = [quality.Cell(tmp_path / "shop", model, 1) for model in ("hash", "sum")]
    assert quality.seconds_left(cells, tmp_path) is None
    for model, seconds in (("hash", 100), ("h2rec", 300)):
        content = {"data": "shop", "variant": model, "seconds": seconds}
        (tmp_path / f"{model}.json").write_text(json.dumps(content))
    assert quality.seconds_left(cells, tmp_path) == 100 + 200
    assert quality.time_left(300) == ", about 5 min left"
    assert quality.time_left(7500) == ", about 2 h 5 min left"


def test_bootstrap_agrees_with_the_normal_approximation():
    rng = np.random.default_rng(1)
    theirs = rng.random(4000) * (rng.random(4000) < 0.2)
    ours = np.where(rng.random(4000) < 0.9, theirs * 1.05, rng.random(4000) * (rng.random(4000) < 0.25))
    difference, low, high, p = paired_bootstrap(ours, theirs)
    assert difference == pytest.approx(ours.mean() / theirs.mean() - 1)
    # delta method for a ratio of means
    residual = (ours - (1 + difference) * theirs) / theirs.mean()
    deviation = residual.std() / 4000**0.5
    assert (high - low) / 2 == pytest.approx(1.96 * deviation, rel=0.05)
    assert low < difference < high
    assert 0 < p <= 1


def test_bootstrap_of_noise_is_rarely_significant():
    rng = np.random.default_rng(2)
    values = []
    for _ in range(60):
        pair = rng.random((2, 300)) * (rng.random((2, 300)) < 0.3)
        values.append(paired_bootstrap(*pair)[3])
    assert 0 <= np.mean(np.array(values) < 0.05) < 0.15
    assert 0.3 < np.mean(values) < 0.7


@pytest.mark.parametrize("of_seed_1", [[1, 4, 6], [1, 4, 7]])
def test_only_ranks_of_the_same_users_are_paired(of_seed_1, tmp_path):
    cells = [{"data": "shop", "variant": v, "seed": s} for v in ("hash", "h2rec") for s in (0, 1)]
    for cell in cells:
        np.savez(
            tmp_path / f"shop.{cell['variant']}.{cell['seed']}.npz",
            users=np.array(of_seed_1 if cell["seed"] else [1, 4, 6], dtype=np.int32),
            full=np.array([1.0, 2.0, 20.0]),
            sampled=np.array([1.0, 2.0, 9.0]),
            with_history=np.array([1.0, 3.0, 30.0]),
            is_head=np.array([True, False, False]),
        )
    is_said = "p = " in significance(cells, tmp_path)
    assert is_said == (of_seed_1 == [1, 4, 6])


def test_seeds_that_only_one_model_has_are_not_compared(tmp_path):
    cells = []
    for variant, seed, rank in (("h2rec", 0, 2), ("h2rec", 1, 1), ("hash", 0, 2), ("sum", 2, 1)):
        cells.append({"data": "shop", "variant": variant, "seed": seed})
        np.savez(
            tmp_path / f"shop.{variant}.{seed}.npz",
            users=np.arange(3),
            full=np.full(3, rank),
            sampled=np.full(3, rank),
            with_history=np.full(3, rank),
            is_head=np.array([True, False, False]),
        )
    lines = significance(cells, tmp_path).splitlines()[2:]
    assert lines[0].startswith("| hash | 1 | +0.0 %")
    assert not any(line.startswith("| sum") for line in lines)


def test_popularity_is_added_to_scores():
    counts = np.array([0, 1, 5, 30])
    model = build_model("hash", SemanticIds(torch.zeros(4, 1, dtype=torch.int64)), dim=8).eval()
    changed = WithPopularity(model, counts, -0.2)
    sequences = torch.tensor([[0, 2, 4], [3, 3, 1]]), torch.tensor([2, 3])
    scores, plain = (m.encode(*sequences) @ m.item_vectors().T for m in (changed, model))
    torch.testing.assert_close(scores, plain - 0.2 * torch.tensor([1, 2, 6, 31]).log())
    torch.testing.assert_close(torch.cat(list(changed.item_vector_parts())), changed.item_vectors())


def test_other_models_are_given_the_balance_of_h2rec():
    def cell(variant, seed, head, tail, curve=None):
        groups = {"head": {"NDCG@10": head}, "tail": {"NDCG@10": tail}, "bands": {}}
        cell = {"variant": variant, "seed": seed, "test": {"full": groups}}
        return {**cell, "balance": curve and dict(zip(("head", "tail"), curve, strict=True))}

    cells = [cell("h2rec", 0, 0.05, 0.02), cell("h2rec", 1, 0.06, 0.02)]
    # The mean of the two: heads 0.025, 0.045, 0.055.
    cells += [cell("sum", 0, 0.04, 0.03, ([0.02, 0.04, 0.05], [0.03, 0.015, 0.01]))]
    cells += [cell("sum", 1, 0.04, 0.03, ([0.03, 0.05, 0.06], [0.03, 0.015, 0.01]))]
    cells += [cell("semantic", 1, 0.01, 0.01, ([0.01, 0.02], [0.015, 0.01]))]
    lines = at_equal_balance(cells).splitlines()
    assert lines[2:4] == ["| semantic | 1 | never | never |", "| sum | 2 | +43.5 % | +100.0 % |"]
    assert at_equal_balance(cells[2:]) == ""


def test_of_a_curve_that_turns_the_better_side_counts():
    along, wanted = np.array([1.0, 3.0, 3.0, 2.0]), np.array([5.0, 3.0, 2.0, 1.0])
    assert best_at(2.5, along, wanted) == pytest.approx(3.5)
    assert best_at(3.0, along, wanted) == pytest.approx(3.0)
    assert best_at(0.5, along, wanted) == pytest.approx(5.0)
    assert best_at(3.1, along, wanted) is None
    assert best_at(0.0, np.zeros(3), along[:3]) == pytest.approx(3.0)


def test_cells_that_lack_a_part_are_finished(data, tmp_path, capsys):
    output = tmp_path / "out"
    run(data, output)
    folder = output / "cells"
    cells = {name: json.loads((folder / f"shop.{name}.0.json").read_text()) for name in ("hash", "h2rec")}
    del cells["hash"]["balance"], cells["h2rec"]["test"]["with_history"]
    for name, cell in cells.items():
        (folder / f"shop.{name}.0.json").write_text(json.dumps(cell))
    assert "Left out: 2 cells" in write_report(output).read_text()
    run(data, output)
    assert "3 cells, 1 of them finished before" in capsys.readouterr().out
    assert all(is_complete(json.loads(path.read_text())) for path in folder.glob("*.json"))


def test_every_model_that_is_compared_has_a_color():
    assert set(_COLORS) == set(quality.VARIANTS) - set(quality.ABLATIONS)


def test_bootstrap_ends():
    zeros, ones = np.zeros(10), np.ones(10)
    assert paired_bootstrap(zeros, zeros)[3] == 1
    assert paired_bootstrap(ones, ones) == (0, 0, 0, 1)
    assert paired_bootstrap(2 * ones, ones)[:3] == pytest.approx((1, 1, 1))
    assert paired_bootstrap(2 * ones, ones)[3] < 0.001
