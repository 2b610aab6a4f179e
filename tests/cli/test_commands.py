"""Every command, called as a user calls it: what it prints, writes and refuses."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import typer
from typer.testing import CliRunner

from h2rec import SemanticIds
from h2rec.cli import demo as demo_module
from h2rec.cli.app import app
from h2rec.cli.train import _config as make_config
from h2rec.training import TrainConfig
from h2rec.training.config import PRESETS

NUM_ITEMS, NUM_USERS = 40, 50


def call(*arguments: object, fails: bool = False) -> str:
    """What a command prints, on both streams, on one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert bool(result.exit_code) == fails, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """Files as a user has them: a log by name and time, items with a text, vectors."""
    folder = tmp_path_factory.mktemp("shop")
    rng = np.random.default_rng(0)
    starts = rng.integers(0, NUM_ITEMS, NUM_USERS)
    steps = [(user, start, step) for user, start in enumerate(starts.tolist()) for step in range(6)]
    pl.DataFrame(
        {
            "visitor": [f"v{user}" for user, _, _ in steps],
            "asin": [f"a{(start + step) % NUM_ITEMS}" for _, start, step in steps],
            "at": [step for _, _, step in steps],
        }
    ).write_csv(folder / "log.csv")
    items = [f"a{item}" for item in range(NUM_ITEMS)]
    kinds = ["red shoe", "garden hose", "war film", "tea pot"]
    texts = [f"{kinds[item % 4]} number {item}" for item in range(NUM_ITEMS)]
    pl.DataFrame({"asin": items, "name": texts}).write_csv(folder / "items.csv")
    np.save(folder / "vectors.npy", rng.standard_normal((NUM_ITEMS, 8), dtype=np.float32))
    return folder


@pytest.fixture(scope="module")
def sids(shop) -> Path:
    call("tokenize", "--embeddings", shop / "vectors.npy", "--codebook-size", "4,3", "-o", shop / "sids")
    return shop / "sids"


def train_options(shop: Path) -> list[object]:
    columns = ["--user", "visitor", "--item", "asin", "--order", "at", "--title", "name"]
    size = ["--dim", 8, "--layers", 1, "--heads", 1, "--epochs", 2, "--accelerator", "cpu"]
    return ["--interactions", shop / "log.csv", "--items", shop / "items.csv", *columns, *size]


@pytest.fixture(scope="module")
def trained(shop, sids) -> tuple[Path, str]:
    """A run, and what was printed while it was made."""
    run = shop / "run"
    ranking = ["--ranking-negatives", 20]
    return run, call(
        "train", *train_options(shop), *ranking, "--models", "hash,h2rec", "--sids", sids, "-o", run
    )


def test_every_command_explains_itself_with_an_example():
    overview = call("--help")
    for command in (
        "tokenize",
        "train",
        "evaluate",
        "refit",
        "recommend",
        "export",
        "plan",
        "config",
        "demo",
    ):
        assert f" {command} " in overview
        text = call(command, "--help")
        assert "Example:" in text
        assert f"h2rec {command}" in text


@pytest.mark.parametrize(
    "command", ["tokenize", "train", "evaluate", "refit", "recommend", "export", "plan", "config", "demo"]
)
def test_examples_can_be_copied_from_a_narrow_terminal(command):
    printed = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"}).output
    (source,) = (
        found.callback.__doc__ for found in app.registered_commands if found.callback.__name__ == command
    )
    examples = [
        line.strip().replace("\\[", "[") for line in source.partition("\b\n")[2].splitlines() if line.strip()
    ]
    assert examples
    lines = [line.strip() for line in printed.splitlines()]
    assert [line for line in examples if line not in lines] == []


def test_help_of_train_shows_the_defaults_of_the_config():
    options = typer.main.get_command(app).commands["train"].params
    shown = {option.name: option.show_default for option in options if isinstance(option.show_default, str)}
    for in_words in (
        *("preset", "order_column", "num_negatives"),
        *("target_smoothing", "steps_per_epoch", "eval_users"),
    ):
        del shown[in_words]
    config = TrainConfig(interactions="log.csv", sids="sids.safetensors")
    defaults = {name: getattr(config, name) for name in shown} | {"models": ",".join(config.models)}
    defaults["mask_history"] = "mask-history" if config.mask_history else "keep-history"
    assert shown == {name: str(value) for name, value in defaults.items()}


def test_config_and_version():
    assert "residual_quantize on" in call("config")
    assert call("--version").startswith("h2rec ")


def test_tokenize_vectors(sids, shop):
    made = SemanticIds.load(sids)
    assert made.codebook_sizes == (4, 3)
    assert made.num_items == NUM_ITEMS
    again = shop / "again"
    printed = call("tokenize", "--embeddings", shop / "vectors.npy", "--codebook-size", "4,3", "-o", again)
    assert "collision rate" in printed
    assert SemanticIds.load(again).codes.equal(made.codes)


def test_tokenize_text_keeps_the_vectors_on_request(shop):
    text = ["--items", shop / "items.csv", "--item", "asin", "--text", "name"]
    call("tokenize", *text, "--codebook-size", 4, "-o", shop / "text", "--save-embeddings", shop / "text.npy")
    assert SemanticIds.load(shop / "text").codebook_sizes == (4, 4, 4, 4)
    vectors = np.load(shop / "text.npy", allow_pickle=False)
    assert vectors.shape[0] == NUM_ITEMS
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_tokenize_refuses(shop, sids, tmp_path):
    vectors = ["--embeddings", shop / "vectors.npy"]
    before = sids.read_bytes()
    assert "exists; --force overwrites it" in call("tokenize", *vectors, "-o", sids, fails=True)
    assert sids.read_bytes() == before
    assert "either --items with --text, or --embeddings" in call("tokenize", "-o", tmp_path / "s", fails=True)
    printed = call("tokenize", *vectors, "--codebook-size", "many", "-o", tmp_path / "s", fails=True)
    assert "--codebook-size: expected one positive number" in printed
    printed = call("tokenize", *vectors, "--codebook-size", "64", "-o", tmp_path / "s", fails=True)
    assert "got 40" in printed
    assert list(tmp_path.iterdir()) == []


def test_train_prints_the_tables_and_writes_the_report(trained):
    run, printed = trained
    assert "with a head item next" in printed
    assert "Ranking against 20 sampled negatives" in printed
    assert "The report is" in printed
    assert (run / "report.html").read_text().startswith("<!")


def test_train_goes_on_with_the_settings_of_the_run(trained):
    run, _ = trained
    before = (run / "metrics.json").read_bytes()
    assert "hash: finished before" in call("train", "--resume", "-o", run)
    assert (run / "metrics.json").read_bytes() == before
    printed = call("train", "--resume", "--dim", 16, "-o", run, fails=True)
    assert "the run has another config: dim is 16, not 8" in printed


def test_train_refuses(shop, sids, trained, tmp_path):
    run, _ = trained
    options = train_options(shop)
    assert "train needs --interactions" in call("train", "--sids", sids, "-o", tmp_path / "r", fails=True)
    assert "exists already; resume it" in call("train", *options, "--sids", sids, "-o", run, fails=True)
    printed = call(
        "train", *options, "--sids", sids, "--models", "hash,dual", "-o", tmp_path / "r", fails=True
    )
    assert "models: expected one of 'hash', 'llminit'" in printed
    assert "got 'dual'" in printed
    printed = call("train", *options, "--sids", sids, "--preset", "papr", "-o", tmp_path / "r", fails=True)
    assert "--preset: expected one of paper, got 'papr'" in printed
    printed = call("train", *options, "--sids", shop / "log.csv", "-o", tmp_path / "r", fails=True)
    assert "log.csv" in printed
    printed = call("train", *options, "--order", "when", "--sids", sids, "-o", tmp_path / "r", fails=True)
    assert "when" in printed
    negatives = ["--negatives", 3, "--ranking-negatives", 20]
    printed = call("train", *options, *negatives, "--sids", sids, "-o", tmp_path / "r", fails=True)
    assert "num_negatives: expected none with the full softmax" in printed
    assert "No such option" in call("train", "--dimm", 8, "-o", tmp_path / "r", fails=True)
    assert list(tmp_path.iterdir()) == []


def test_options_change_the_preset(tmp_path):
    given = {"interactions": "log.csv", "sids": "sids.safetensors", "max_length": 20}
    config = make_config(given, "paper", tmp_path, resume=False)
    assert config == TrainConfig(**{**PRESETS["paper"], **given})
    assert (config.max_length, config.loss) == (20, "bce")


def test_evaluate_repeats_what_training_found(trained, tmp_path):
    run, _ = trained
    output = tmp_path / "new" / "metrics.json"
    assert "with a head item next" in call("evaluate", run, "-o", output)
    found = json.loads((run / "metrics.json").read_text())
    again = json.loads(output.read_text())
    assert again["ranking"] == found["ranking"]
    assert again["models"] == {name: {"test": model["test"]} for name, model in found["models"].items()}


def test_evaluate_by_other_rules(trained, tmp_path):
    run, _ = trained
    output = tmp_path / "metrics.json"
    printed = call("evaluate", run, "--models", "hash", "--keep-history", "--negatives", 5, "-o", output)
    assert "with the user's history" in printed
    again = json.loads(output.read_text())
    assert list(again["models"]) == ["hash"]
    found = json.loads((run / "metrics.json").read_text())["models"]["hash"]["test"]["full"]
    assert again["models"]["hash"]["test"]["full"] != found
    assert again["ranking"] == {"history_masked": False, "negatives": 5, "seed": 0, "users": None}
    assert "--force overwrites it" in call("evaluate", run, "-o", output, fails=True)
    assert "expected one of the run's models" in call("evaluate", run, "--models", "sum", fails=True)


def test_refit(trained, tmp_path):
    run, _ = trained
    served = tmp_path / "served"
    assert f"The model, trained on everything, is in {served}" in call(
        "refit", run, served, "--model", "hash"
    )
    assert "Next, says hash" in call("recommend", served, "--user", "v3")
    assert f"is in {served}" in call("train", "--resume", "-o", served)
    assert "nothing was held out" in call("evaluate", served, fails=True)
    assert "expected one of the run's models" in call(
        "refit", run, tmp_path / "b", "--model", "sum", fails=True
    )
    assert "exists already; resume it" in call("refit", run, served, fails=True)


def test_recommend(trained):
    run, _ = trained
    printed = call("recommend", run, "--user", "v3", "-k", 4)
    assert "6 items so far" in printed
    assert "Next, says h2rec" in printed
    assert " 4 a" in printed
    assert " 5 a" not in printed
    printed = call("recommend", run, "--history", "a1, a2", "--model", "hash", "-k", NUM_ITEMS)
    assert "the latest first: war film number 2; garden hose number 1" in printed
    assert f" {NUM_ITEMS - 2} a" in printed
    assert f" {NUM_ITEMS - 1} a" not in printed
    assert f" {NUM_ITEMS} a" in call(
        "recommend", run, "--history", "a1,a2", "-k", NUM_ITEMS, "--keep-history"
    )


def test_a_run_outlives_changes_of_its_files(trained, shop, tmp_path):
    """The order of the items is that of training; a longer log gives longer histories, and other test items."""
    run = shutil.copytree(trained[0], tmp_path / "run")
    files = {name: shutil.copy(shop / name, tmp_path) for name in ("items.csv", "log.csv")}
    config = dataclasses.replace(
        TrainConfig.of_run(run), items=files["items.csv"], interactions=files["log.csv"]
    )
    (run / "config.json").write_text(config.to_json())
    commands = {"recommend": ["recommend", run, "--user", "v3"], "evaluate": ["evaluate", run]}
    before = {name: call(*command) for name, command in commands.items()}
    pl.read_csv(files["items.csv"]).reverse().write_csv(files["items.csv"])
    assert {name: call(*command) for name, command in commands.items()} == before
    log = pl.read_csv(files["log.csv"])
    pl.concat([log, pl.DataFrame({"visitor": ["v3"], "asin": ["a0"], "at": [9]})]).write_csv(files["log.csv"])
    assert "7 items so far, the latest first: red shoe number 0" in call(*commands["recommend"])
    assert "began with 300 interactions of 50 users, got 301 interactions" in call(*commands["evaluate"])


def test_brackets_in_names_are_printed(trained, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "[bold]")
    items = pl.read_parquet(run / "items.parquet", glob=False)
    items.with_columns(title=pl.col("title") + " [remastered] [/b]").write_parquet(run / "items.parquet")
    assert call("recommend", run, "--user", "v3", "-k", 2).count("[remastered] [/b]") == 5 + 2
    assert "in " + str(tmp_path / "[bold].json") in call("evaluate", run, "-o", tmp_path / "[bold].json")


def test_recommend_refuses(trained, tmp_path):
    run, _ = trained
    assert "either --user or --history" in call("recommend", run, fails=True)
    assert "not among the 40 items of the catalog: 'a99'" in call(
        "recommend", run, "--history", "a99", fails=True
    )
    assert "'v99'" in call("recommend", run, "--user", "v99", fails=True)


@pytest.mark.parametrize(
    "arguments",
    [["train", "--resume", "-o"], ["evaluate"], ["recommend", "--user", "v1"]],
    ids=lambda a: a[0],
)
def test_no_run(arguments, tmp_path):
    assert "nowhere: no run here (it has no config.json)" in call(
        *arguments, tmp_path / "nowhere", fails=True
    )
    assert list(tmp_path.iterdir()) == []


def test_demo_without_its_data_says_how_to_go_on(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_module.importlib.util, "find_spec", lambda name: None)
    printed = call("demo", "-o", tmp_path / "demo", fails=True)
    assert "pip install --no-deps recbole" in printed
    assert "h2rec train --interactions log.csv" in printed
    assert list(tmp_path.iterdir()) == []


def test_demo_force_deletes_nothing_but_a_run(monkeypatch, tmp_path, shop):
    monkeypatch.setattr(demo_module, "movielens_files", lambda: (shop / "log.csv", shop / "items.csv"))
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.tex").touch()
    assert "is not the folder of a run" in call("demo", "-o", tmp_path / "demo", "--force", fails=True)
    assert (tmp_path / "demo" / "thesis.tex").exists()


def test_plan():
    options = ["--items", "100M", "--dim", 128, "--codebook", 8192]
    printed = call("plan", *options, "--gpus", 8)
    assert "Memory of each of 8 GPUs" in printed
    assert "hash table 6.4 GB" in printed
    assert "optimizer state of the table 50 MB" in printed
    assert "gradients, all-reduce" in printed
    assert "H200: 8.73 GB fits into 141 GB" in printed
    printed = call("plan", *options, "--dense")
    assert "optimizer state of the table 102 GB" in printed
    assert "does not fit into 180 GB" in printed
    assert "all-reduce" not in printed


def test_plan_refuses():
    assert "expected a number such as 100M, got 'many'" in call("plan", "--items", "many", fails=True)
    assert "items must be at least 1, got 0" in call("plan", "--items", "0", fails=True)
    printed = call("plan", "--items", "1M", "--dtype", "float16", fails=True)
    assert "dtype must be one of float32, bfloat16, got 'float16'" in printed


def test_one_of_several_processes_ends_at_once(tmp_path):
    """After an error; the others hear of it when its connections close."""
    program = "import atexit, time; atexit.register(time.sleep, 600); from h2rec.cli import main; main()"
    command = [sys.executable, "-c", program, "evaluate", str(tmp_path)]
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "2"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "no run here (it has no config.json)" in " ".join(result.stderr.split())
