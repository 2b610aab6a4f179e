"""``h2rec export``: what is written serves in a process that has no h2rec."""

import json
import os
import re
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._inductor import config as inductor
from typer.testing import CliRunner

from h2rec import SemanticIds
from h2rec._files import replacing_folder
from h2rec.cli.app import app
from h2rec.training import export as export_module
from h2rec.training import load_model
from h2rec.training.recommend import item_history, recommend
from h2rec.training.user_encoder import check_compiler

NUM_ITEMS = 30
FILES = ["export.json", "items.safetensors", "sids.parquet", "sids.safetensors", "user_encoder.pt2"]


def call(*arguments: object, fails: bool = False) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert bool(result.exit_code) == fails, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two models of 40 users who walk through 30 items."""
    folder = tmp_path_factory.mktemp("shop")
    rng = np.random.default_rng(0)
    steps = [
        (user, start, step) for user, start in enumerate(rng.integers(0, NUM_ITEMS, 40)) for step in range(5)
    ]
    pl.DataFrame(
        {
            "user_id": [user for user, _, _ in steps],
            "item_id": [f"a{(start + step) % NUM_ITEMS}" for _, start, step in steps],
        }
    ).write_csv(folder / "log.csv")
    pl.DataFrame({"item_id": [f"a{item}" for item in range(NUM_ITEMS)]}).write_csv(folder / "items.csv")
    codes = torch.from_numpy(rng.integers(0, 4, (NUM_ITEMS, 3)))
    SemanticIds(codes, codebook_sizes=(4, 4, 4)).save(folder / "sids.safetensors")
    data = ["--interactions", folder / "log.csv", "--items", folder / "items.csv"]
    ids = ["--sids", folder / "sids.safetensors"]
    size = ["--dim", 8, "--layers", 1, "--epochs", 1, "--ranking-negatives", 5, "--accelerator", "cpu"]
    call("train", *data, *ids, *size, "--models", "h2rec,semantic", "-o", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run) -> Path:
    output = run.parent / "exported"
    assert "h2rec in " in call("export", run, output)
    return output


# What a server does: from raw ids to raw ids.
SERVE = """
import json, sys
sys.modules["h2rec"] = None
import polars as pl
import torch
from safetensors.torch import load_file

folder, histories = sys.argv[1], json.loads(sys.argv[2])
sizes = json.load(open(f"{folder}/export.json"))
encode = torch.export.load(f"{folder}/user_encoder.pt2").module()
items = load_file(f"{folder}/items.safetensors")["items"]
ids = pl.read_parquet(f"{folder}/sids.parquet")["item_id"].to_list()
row = {raw: item for item, raw in enumerate(ids)}
item_ids = torch.full((len(histories), max(map(len, histories))), sizes["padding_id"])
for user, history in enumerate(histories):
    item_ids[user, : len(history)] = torch.tensor([row[raw] for raw in history])
users = encode(item_ids, torch.tensor([len(history) for history in histories]))
scores, best = (users @ items.T).topk(5)
print(json.dumps([[[ids[i] for i in user] for user in best.tolist()], scores.tolist()]))
"""


def test_serves_where_there_is_no_h2rec(run, exported):
    assert sorted(file.name for file in exported.iterdir()) == FILES
    histories = [["a1", "a2", "a3"], ["a29"]]
    command = [sys.executable, "-c", SERVE, exported, json.dumps(histories)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=exported)
    assert result.returncode == 0, result.stderr
    best, scores = json.loads(result.stdout)
    model, _, catalog, _ = load_model(run, "h2rec")
    rows = [item_history(catalog, history) for history in histories]
    expected = recommend(model, catalog, rows, 5, exclude_history=False)
    assert best == [[found.item for found in user] for user in expected]
    np.testing.assert_allclose(scores, [[found.score for found in user] for user in expected], rtol=1e-4)


def test_tables(run, exported):
    model, _, catalog, sids = load_model(run, "h2rec")
    vectors = load_file(exported / "items.safetensors")["items"]
    with torch.no_grad():
        assert torch.equal(vectors, model.item_vectors())
    assert SemanticIds.load(exported / "sids.safetensors").codes.equal(sids.codes)
    table = pl.read_parquet(exported / "sids.parquet")
    assert table.columns == ["item_id", "code_0", "code_1", "code_2"]
    assert table["item_id"].to_list() == catalog.ids.to_list()
    assert np.array_equal(table.drop("item_id").to_numpy(), sids.codes.numpy())
    description = json.loads((exported / "export.json").read_text())
    sizes = {"num_items": NUM_ITEMS, "dim": 16, "max_length": 50, "padding_id": NUM_ITEMS}
    assert description == {"model": "h2rec", **sizes}


def test_tables_of_many_parts(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["h2rec.models.base"], "_PART_ITEMS", {"cpu": 7, "cuda": 7})
    call("export", run, tmp_path / "out", "--model", "semantic")
    model, _, _, _ = load_model(run, "semantic")
    vectors = load_file(tmp_path / "out" / "items.safetensors")["items"]
    save_file({"items": vectors}, tmp_path / "again")  # what safetensors itself makes of them
    assert (tmp_path / "out" / "items.safetensors").read_bytes() == (tmp_path / "again").read_bytes()
    with torch.no_grad():
        torch.testing.assert_close(vectors, model.item_vectors(), rtol=1e-6, atol=1e-7)


def test_the_example_of_the_documents(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("faiss")
    call("export", run, tmp_path / "exported" / "shop", "--faiss")
    page = Path(__file__).parents[2] / "docs" / "large-catalogs.md"
    (code,) = re.findall(
        r"^```python\n(import json.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    monkeypatch.chdir(tmp_path)
    exec(code.replace("B0013NB7DW", "a1").replace("B000FTYALG", "a2"), {})
    model, _, catalog, _ = load_model(run, "h2rec")
    histories = [item_history(catalog, history) for history in (["a1", "a2"], ["a2"])]
    expected = [[found.item for found in user] for user in recommend(model, catalog, histories, 10)]
    assert [literal_eval(line) for line in capsys.readouterr().out.splitlines()] == expected


@pytest.mark.parametrize("most", [200_000, 10], ids=["graph", "lists"])
def test_index(most, run, tmp_path, monkeypatch):
    faiss = pytest.importorskip("faiss")
    from h2rec.training import faiss_index

    monkeypatch.setattr(faiss_index, "_GRAPH_MAX_ITEMS", most)
    monkeypatch.setattr(faiss_index, "_TRAINING_ITEMS_PER_LIST", 5)
    printed = call("export", run, tmp_path / "out", "--faiss")
    found = json.loads((tmp_path / "out" / "export.json").read_text())["faiss"]
    assert found == {"index": found["index"], "recall@10": 1.0, "users": 40}  # it searches all of 30 items
    assert f"The index {found['index']} finds 100.0% of the exact 10 best items of 40 users" in printed
    index = faiss.read_index(str(tmp_path / "out" / "items.faiss"))
    model, _, _, _ = load_model(run, "h2rec")
    assert (index.ntotal, index.d) == (NUM_ITEMS, 16)
    users = torch.randn(50, 16)
    assert faiss_index.recall(index, model, users) > 0.99
    if most == 10:
        index.nprobe = 1
        assert 0.1 < faiss_index.recall(index, model, users) < 0.9
    index.reset()
    assert faiss_index.recall(index, model, users) == 0


def test_the_recall_of_lists_is_what_a_server_finds(run, tmp_path, monkeypatch):
    """One of five lists is searched; what is printed of it holds for the files, as a server reads them."""
    faiss = pytest.importorskip("faiss")
    from h2rec.training import faiss_index

    monkeypatch.setattr(faiss_index, "_GRAPH_MAX_ITEMS", 10)
    monkeypatch.setattr(faiss_index, "_TRAINING_ITEMS_PER_LIST", 5)
    monkeypatch.setattr(faiss_index, "_LISTS_SEARCHED", 1)
    call("export", run, tmp_path / "out", "--faiss")
    found = json.loads((tmp_path / "out" / "export.json").read_text())["faiss"]
    assert found["index"] == "IVF5,SQfp16"

    index = faiss.read_index(str(tmp_path / "out" / "items.faiss"))
    assert (index.ntotal, index.nlist, index.nprobe) == (NUM_ITEMS, 5, 1)
    items = load_file(tmp_path / "out" / "items.safetensors")["items"]
    rows = {raw: row for row, raw in enumerate(pl.read_parquet(tmp_path / "out" / "sids.parquet")["item_id"])}
    log = pl.read_csv(run.parent / "log.csv")
    histories = [
        [rows[raw] for raw in log.filter(pl.col("user_id") == user)["item_id"]] for user in range(40)
    ]
    encode = torch.export.load(tmp_path / "out" / "user_encoder.pt2").module()
    users = encode(torch.tensor(histories), torch.tensor([5] * 40)).detach()
    best = (users @ items.T).topk(10).indices
    _, searched = index.search(users.numpy(), 10)
    shares = [len(set(ours) & set(theirs)) / 10 for ours, theirs in zip(searched, best.tolist(), strict=True)]
    assert 0.1 < found["recall@10"] < 0.9
    assert found["recall@10"] == pytest.approx(np.mean(shares), abs=0.0026)  # one item of a user: a tie


def test_force_takes_the_place_of_an_export_only(run, exported, tmp_path):
    before = (exported / "export.json").read_bytes()
    assert "exported exists; --force overwrites it" in call("export", run, exported, fails=True)
    assert (exported / "export.json").read_bytes() == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    for force in ([], ["--force"]):
        printed = call("export", run, tmp_path / "out", *force, fails=True)
        assert "out exists and is no export (it has no export.json)" in printed
    assert (tmp_path / "out" / "thesis.tex").exists()
    call("export", run, tmp_path / "new", "--model", "semantic")
    (tmp_path / "new" / "items.faiss").touch()
    call("export", run, tmp_path / "new", "--model", "semantic", "--force")
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == FILES


def test_what_fails_or_was_killed_leaves_no_export(run, tmp_path, monkeypatch):
    (tmp_path / ".out.partial" / "left").mkdir(parents=True)  # by a killed process

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(export_module.user_encoder.torch.export, "save", full)
        printed = call("export", run, tmp_path / "out", fails=True)
    assert "user_encoder.pt2: cannot be written: No space left on device" in printed
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.partial" / "left").mkdir(parents=True)
    call("export", run, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_an_export_stays_until_another_has_its_place(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if source.name == ".out.partial":
            raise OSError(5, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with (
            pytest.raises(OSError, match="out: cannot be written: Input/output error"),
            replacing_folder(out),
        ):
            pass
    assert list(tmp_path.rglob("*")) == [out, out / "old"]
    os.replace(out, tmp_path / ".out.old")  # as a process leaves it that is killed between two renamings
    with pytest.raises(KeyboardInterrupt), replacing_folder(out):
        raise KeyboardInterrupt
    assert list(tmp_path.rglob("*")) == [out, out / "old"]


def test_an_export_where_a_link_leads(run, tmp_path):
    call("export", run, tmp_path / "v1")
    (tmp_path / "current").symlink_to("v1")
    for _ in range(2):
        call("export", run, tmp_path / "current", "--model", "semantic", "--force")
        assert (tmp_path / "current").readlink() == Path("v1")
        assert json.loads((tmp_path / "v1" / "export.json").read_text())["model"] == "semantic"
        assert {path.name for path in tmp_path.iterdir()} == {"current", "v1"}


def test_refuses(run, tmp_path, monkeypatch):
    assert "expected one of the run's models" in call(
        "export", run, tmp_path / "o", "--model", "sum", fails=True
    )
    printed = call("export", tmp_path / "nowhere", tmp_path / "o", fails=True)
    assert "no run here (it has no config.json)" in printed
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert 'pip install "h2rec[faiss]"' in call("export", run, tmp_path / "o", "--faiss", fails=True)
    with inductor.patch({"cpp.cxx": (str(tmp_path / "no-such-compiler"),)}):
        assert "aot: expected a C++ compiler" in call("export", run, tmp_path / "o", "--aot", fails=True)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "torch._inductor.cpp_builder", None)
    check_compiler()  # where torch cannot tell, compiling will
