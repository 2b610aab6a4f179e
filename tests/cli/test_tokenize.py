"""``h2rec tokenize`` as a user calls it: every option, interruptions, and files that are bad."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from h2rec import SemanticIds
from h2rec.cli.app import app
from h2rec.tokenizers import RQVAE, quality_report

NUM_ITEMS = 300
X = torch.randn(NUM_ITEMS, 8, generator=torch.Generator().manual_seed(0))
PROGRAM = [sys.executable, "-c", "from h2rec.cli import main; main()", "tokenize"]


def tokenize(*arguments: object, fails: bool = False) -> str:
    """What the command prints, on both streams, on one line."""
    result = CliRunner().invoke(
        app, ["tokenize", *(str(argument) for argument in arguments)], env={"COLUMNS": "200"}
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert bool(result.exit_code) == fails, result.output
    return " ".join(result.output.split())


@pytest.fixture
def vectors(tmp_path) -> Path:
    np.save(tmp_path / "x.npy", X.numpy())
    return tmp_path / "x.npy"


@pytest.fixture
def out(tmp_path) -> Path:
    """Where to write: nothing else is in the folder."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "sids.safetensors"


def files_beside(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir())


SMALL = ("--levels", 2, "--codebook-size", "8,6", "--iterations", 4)


@pytest.mark.parametrize(
    ("options", "provenance"),
    [
        ((), {"method": "RQ-KMeans", "num_iters": "4", "beam_size": "1", "seed": "0"}),
        (
            ("--mini-batch", "--balance", 0.5, "--beam-size", 3, "--seed", 5),
            {"mini_batch": "true", "balance": "0.5", "beam_size": "3", "seed": "5"},
        ),
        (("--method", "pq"), {"method": "PQ", "num_iters": "4"}),
        (("--method", "rq-vae", "--beam-size", 2), {"method": "RQ-VAE", "beam_size": "2"}),
    ],
    ids=["default", "mini-batch", "pq", "rq-vae"],
)
def test_methods(vectors, out, options, provenance):
    printed = tokenize("--embeddings", vectors, *SMALL, *options, "-o", out)
    assert "collision rate" in printed
    assert "squared error" in printed
    assert "rows/s" in printed
    sids = SemanticIds.load(out)
    assert (sids.num_items, sids.codebook_sizes) == (NUM_ITEMS, (8, 6))
    assert provenance.items() <= sids.provenance.items()
    encoder = ["sids.rq-vae.safetensors"] if "rq-vae" in options else []
    assert files_beside(out) == [*encoder, "sids.safetensors"]


def as_npy(path, x):
    np.save(path, x.numpy())


def as_safetensors(path, x):
    safetensors.torch.save_file({"embeddings": x}, path)


def as_parquet(path, x):
    pl.DataFrame({"other": [[1.0]] * len(x), "vector": x.tolist()}).write_parquet(path)


WRITERS = {"x.npy": as_npy, "x.safetensors": as_safetensors, "x.parquet": as_parquet}


@pytest.mark.parametrize("in_memory", [True, False])
def test_files_of_each_kind_give_the_same_codes(tmp_path, out, in_memory, monkeypatch):
    if not in_memory:
        monkeypatch.setattr("h2rec.cli.tokenize._IN_MEMORY_BYTES", 0)
    found = []
    for name, write in WRITERS.items():
        write(tmp_path / name, X)
        column = ("--column", "vector") if name.endswith("parquet") else ()
        tokenize("--embeddings", tmp_path / name, *column, *SMALL, "-o", out, "--force")
        found.append(SemanticIds.load(out))
    assert found[0] == found[1] == found[2]


def test_next_best_codes_keep_the_capacity(vectors, out):
    printed = tokenize(
        "--embeddings", vectors, *SMALL, "--collisions", "next-best", "--capacity", 12, "-o", out
    )
    assert "items moved" in printed
    assert SemanticIds.load(out).stats().largest_group == 12


def test_a_new_level_tells_all_items_apart(vectors, out):
    tokenize("--embeddings", vectors, *SMALL, "--collisions", "new-level", "-o", out)
    sids = SemanticIds.load(out)
    assert sids.num_levels == 3
    assert sids.stats().collision_rate == 0


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--collisions", "next-best", "--capacity", 17),
        ("--collisions", "new-level"),
        ("--method", "rq-vae"),
        ("--method", "pq"),
    ],
    ids=["keep", "next-best", "new-level", "rq-vae", "pq"],
)
def test_append_leaves_published_codes(vectors, out, tmp_path, options):
    tokenize("--embeddings", vectors, *SMALL, *options, "-o", out)
    published = SemanticIds.load(out)
    np.save(tmp_path / "new.npy", X[:40].numpy() + 0.01)
    longer, again = out.with_name("longer.safetensors"), out.with_name("again.safetensors")
    printed = tokenize("--append", out, "--embeddings", tmp_path / "new.npy", "-o", longer)
    assert "40 new items after 300" in printed
    tokenize("--append", longer, "--embeddings", tmp_path / "new.npy", "-o", again)
    sids = SemanticIds.load(again)
    assert sids.num_items == 380
    assert torch.equal(sids.codes[:300], published.codes)
    assert torch.equal(sids.codes[:340], SemanticIds.load(longer).codes)
    if "next-best" in options:
        assert sids.stats().largest_group == 17
    elif "new-level" in options:
        assert sids.stats().collision_rate == 0
    else:
        same = (sids.codes[300:340] == published.codes[:40]).all(1).float().mean()
        assert same > 0.8


def test_append_in_place(vectors, out):
    tokenize("--embeddings", vectors, *SMALL, "-o", out)
    printed = tokenize("--append", out, "--embeddings", vectors, "-o", out, fails=True)
    assert "--force overwrites it" in printed
    tokenize("--append", out, "--embeddings", vectors, "-o", out, "--force")
    assert SemanticIds.load(out).num_items == 600
    assert files_beside(out) == ["sids.safetensors"]


def test_reports(vectors, out):
    reports = [out.with_name(f"quality{suffix}") for suffix in (".json", ".png", ".svg")]
    options = [option for report in reports for option in ("--report", report)]
    printed = tokenize("--embeddings", vectors, *SMALL, "-o", out, *options)
    found = json.loads(reports[0].read_text())
    expected = quality_report(SemanticIds.load(out), X)
    assert found["reconstruction_error"] == pytest.approx(expected.reconstruction_error)
    assert found["stats"]["collision_rate"] == expected.stats.collision_rate
    assert f"{expected.reconstruction_error[-1]:.4g}" in printed
    assert all(report.stat().st_size > 1000 for report in reports[1:])


def test_the_seed_decides(vectors, out):
    codes = []
    for seed in (0, 0, 1):
        tokenize("--embeddings", vectors, *SMALL, "--seed", seed, "-o", out, "--force")
        codes.append(SemanticIds.load(out).codes)
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


# ---- interruptions


@pytest.fixture
def large(tmp_path) -> Path:
    x = np.random.default_rng(0).standard_normal((10_000, 32), dtype=np.float32)
    np.save(tmp_path / "large.npy", x)
    return tmp_path / "large.npy"


def kill_as_soon_as_kept(stage: str, options: list[object], out: Path) -> Path:
    """Starts the command, kills it when something of the stage is kept, and returns what is."""
    child = subprocess.Popen(
        [*PROGRAM, *map(str, options), "-o", out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    folder = out.with_name(f"{out.name}.unfinished")
    while child.poll() is None and not any(file.stat().st_size for file in folder.glob(f"{stage}*")):
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert child.returncode == -signal.SIGKILL
    assert not out.exists()
    (kept,) = folder.glob(f"{stage}*")
    return kept


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "stage"), [("rq-kmeans", "fit-"), ("rq-vae", "fit-"), ("rq-kmeans", "codes-")]
)
def test_killed_at_any_moment_it_goes_on(large, out, method, stage):
    options = ["--embeddings", large, "--method", method, "--codebook-size", 64, "--iterations", 6]
    expected = out.with_name("undisturbed.safetensors")
    tokenize(*options, "-o", expected)
    kill_as_soon_as_kept(stage, options, out)
    printed = tokenize(*options, "-o", out)
    assert ("Going on after" in printed) == (stage == "fit-")
    assert SemanticIds.load(out) == SemanticIds.load(expected)
    leftovers = [name for name in files_beside(out) if "rq-vae" not in name]
    assert leftovers == ["sids.safetensors", "undisturbed.safetensors"]


def test_what_goes_on_may_replace_what_it_wrote_and_nothing_else(vectors, out, monkeypatch):
    report, encoder = out.with_name("quality.json"), out.with_name("sids.rq-vae.safetensors")
    options = ["--embeddings", vectors, *SMALL, "--method", "rq-vae", "-o", out]
    monkeypatch.setattr(SemanticIds, "save", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(AssertionError, match="goes on with"):
        tokenize(*options)
    monkeypatch.undo()
    assert files_beside(out) == [encoder.name, "sids.safetensors.unfinished"]
    report.write_text("of somebody else")
    assert f"{report} exists" in tokenize(*options, "--report", report, fails=True)
    assert report.read_text() == "of somebody else"
    tokenize(*options)
    assert files_beside(out) == [report.name, encoder.name, out.name]
    assert f"{out} exists" in tokenize(*options, fails=True)


def test_an_interrupted_force_does_not_go_on_without(vectors, out, monkeypatch):
    options = ["--embeddings", vectors, *SMALL, "-o", out]
    tokenize(*options)
    monkeypatch.setattr("h2rec.cli.tokenize.learn", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    tokenize(*options, "--force", fails=True)
    monkeypatch.undo()
    assert files_beside(out) == [out.name]
    assert f"{out} exists" in tokenize(*options, fails=True)


def test_an_append_in_place_is_saved_last(vectors, out, monkeypatch):
    options = ["--append", out, "--embeddings", vectors, "-o", out, "--force"]
    tokenize("--embeddings", vectors, *SMALL, "-o", out)
    monkeypatch.setattr("h2rec.cli.tokenize.judge", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    tokenize(*options, fails=True)
    monkeypatch.undo()
    tokenize(*options)
    assert SemanticIds.load(out).num_items == 2 * len(np.load(vectors))


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, KeyboardInterrupt])
def test_what_ends_the_report_does_not_end_the_ids(vectors, out, error, monkeypatch):
    options = ["--embeddings", vectors, *SMALL, "--report", out.with_name("quality.json"), "-o", out]

    def fails(*_):
        raise error

    monkeypatch.setattr("h2rec.cli.tokenize.judge", fails)
    with pytest.raises((error, AssertionError)):
        tokenize(*options)
    made = SemanticIds.load(out)
    assert list(out.with_name("sids.safetensors.unfinished").glob("fit-*"))
    monkeypatch.undo()
    tokenize(*options)
    assert SemanticIds.load(out) == made
    assert files_beside(out) == ["quality.json", "sids.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rq-kmeans", "rq-vae"])
def test_an_append_that_was_killed_goes_on(vectors, large, out, tmp_path, method):
    published, expected = tmp_path / "published.safetensors", tmp_path / "undisturbed.safetensors"
    options = ["--levels", 3, "--codebook-size", 64, "--iterations", 2, "--method", method]
    tokenize("--embeddings", large, *options, "-o", published)
    more = ["--append", published, "--embeddings", large]
    tokenize(*more, "-o", expected)
    codes = SemanticIds.load(expected).codes
    kept = kill_as_soon_as_kept("codes-", more, out)
    # Codes that are kept are not computed again: other ones show.
    codes[10_000, 0] = (codes[10_000, 0] + 1) % 64
    kept.write_bytes(codes[10_000:10_001].numpy().tobytes() + kept.read_bytes()[12:])
    tokenize(*more, "-o", out)
    assert torch.equal(SemanticIds.load(out).codes, codes)
    assert [name for name in files_beside(out) if "rq-vae" not in name] == ["sids.safetensors"]


def test_control_c_says_how_to_go_on(vectors, out, monkeypatch):
    def interrupted(*arguments, **options):
        (Path(options["checkpoint"]) / "fit-1").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("h2rec.tokenizers.RQKMeans.tokenize", interrupted)
    printed = tokenize("--embeddings", vectors, *SMALL, "-o", out, fails=True)
    assert "The same command goes on with what is in" in printed


# ---- bad input


def with_bad_rows(path):
    x = X.clone()
    x[7, 3], x[250] = torch.nan, torch.inf
    as_npy(path.with_suffix(".npy"), x)
    return path.with_suffix(".npy")


def cut(write, suffix, keep):
    def cut_file(path):
        path = path.with_suffix(suffix)
        write(path, X)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])
        return path

    return cut_file


def few(path):
    as_npy(path.with_suffix(".npy"), X[:5])
    return path.with_suffix(".npy")


BAD_FILES = {
    "not finite": (with_bad_rows, r"2 of 300 rows hold NaN or infinity \(rows 7, 250\)"),
    "fewer than codewords": (few, "at least as many rows as a level has codewords, 8, got 5"),
    "npy cut off": (cut(as_npy, ".npy", 0.9), r"bad\.npy: truncated"),
    "npy header cut off": (cut(as_npy, ".npy", 0.005), r"bad\.npy: cannot be read as \.npy"),
    "safetensors cut off": (cut(as_safetensors, ".safetensors", 0.9), r"bad\.safetensors: truncated"),
    "parquet cut off": (cut(as_parquet, ".parquet", 0.9), r"bad\.parquet: cannot be read as parquet"),
    "missing": (lambda path: path.with_suffix(".npy"), r"bad\.npy: no such file"),
}


@pytest.mark.parametrize(("make", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_told_and_leave_nothing(tmp_path, out, make, message, monkeypatch):
    monkeypatch.setattr("h2rec.cli.tokenize._IN_MEMORY_BYTES", 0)
    path = make(tmp_path / "bad")
    column = ("--column", "vector") if path.suffix == ".parquet" else ()
    printed = tokenize("--embeddings", path, *column, *SMALL, "-o", out, fails=True)
    assert re.search(message, printed), printed
    assert files_beside(out) == []


@pytest.mark.parametrize("method", ["rq-vae", "pq"])
@pytest.mark.parametrize("name", ["not finite", "fewer than codewords"])
def test_bad_vectors_are_told_by_every_method(tmp_path, out, method, name):
    make, message = BAD_FILES[name]
    path = make(tmp_path / "bad")
    printed = tokenize("--embeddings", path, *SMALL, "--method", method, "-o", out, fails=True)
    assert re.search(message, printed), printed
    assert files_beside(out) == []


def test_duplicates_and_constant_columns(tmp_path, out):
    x = torch.ones(100, 8)
    x[50:, 0] = 2
    as_npy(tmp_path / "x.npy", x)
    for method in ("rq-kmeans", "rq-vae", "pq"):
        tokenize("--embeddings", tmp_path / "x.npy", *SMALL, "--method", method, "-o", out, "--force")
        sids = SemanticIds.load(out)
        for half in (sids.codes[:50], sids.codes[50:]):
            assert (half == half[0]).all()


def test_append_of_another_dimension(vectors, out, tmp_path):
    tokenize("--embeddings", vectors, *SMALL, "-o", out)
    np.save(tmp_path / "narrow.npy", X[:, :5].numpy())
    longer = out.with_name("longer.safetensors")
    printed = tokenize("--append", out, "--embeddings", tmp_path / "narrow.npy", "-o", longer, fails=True)
    assert "vectors must have dimension 8, as the codebooks have, got 5" in printed
    assert files_beside(out) == ["sids.safetensors"]


def test_a_file_that_changes_while_it_is_read(vectors, out, monkeypatch):
    monkeypatch.setattr("h2rec.cli.tokenize._IN_MEMORY_BYTES", 0)
    from h2rec.tokenizers import RQKMeans

    fit = RQKMeans.fit

    def fit_and_change(self, *arguments, **options):
        fit(self, *arguments, **options)
        with vectors.open("ab") as file:
            file.write(b"more")

    monkeypatch.setattr(RQKMeans, "fit", fit_and_change)
    printed = tokenize("--embeddings", vectors, *SMALL, "-o", out, fails=True)
    assert "the file changed while it was being read" in printed
    assert files_beside(out) == []


def test_targets_that_cannot_be_written(vectors, out, tmp_path):
    printed = tokenize("--embeddings", vectors, "-o", vectors / "sids", fails=True)
    assert "x.npy is not a folder" in printed
    printed = tokenize("--embeddings", vectors, "-o", out.parent, fails=True)
    assert "is a folder, expected the name of a file" in printed


def test_a_folder_without_permission(vectors, tmp_path, monkeypatch):
    # Root may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: mode & os.W_OK == 0)
    printed = tokenize("--embeddings", vectors, "-o", tmp_path / "new" / "sids", fails=True)
    assert "no permission to write into" in printed
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("limit", [100, 600])
def test_a_full_disk(vectors, out, limit):
    """The kernel refuses what goes beyond a small size of a file, as it would on a full disk."""

    def shrink_the_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    options = ["--embeddings", vectors, *SMALL, "-o", out]
    result = subprocess.run(
        [*PROGRAM, *map(str, options)],
        preexec_fn=shrink_the_disk,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "cannot be written: " in result.stderr
    assert "Traceback" not in result.stderr
    # The learned codebooks are whole, if there was room for them; codes that are cut off are not taken for whole.
    kept = out.with_name("sids.safetensors.unfinished")
    assert files_beside(out) == ([kept.name] if limit == 600 else [])
    assert ("The same command goes on" in result.stderr) == (limit == 600)
    tokenize(*options)
    expected = out.with_name("expected")
    tokenize(*options[:-1], expected)
    assert SemanticIds.load(out) == SemanticIds.load(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "pq", "--mini-batch"), "--mini-batch is for --method rq-kmeans, got pq"),
        (("--method", "rq-vae", "--balance", 1), "--balance is for --method rq-kmeans, got rq-vae"),
        (("--method", "pq", "--beam-size", 2), "--beam-size is for residual quantizers"),
        (("--method", "kmeans"), "'kmeans' is not one of"),
        (("--capacity", 2), "--capacity goes with --collisions next-best"),
        (("--report", "quality.gif"), r"--report: expected one of .json, .png, .svg, .pdf, got quality.gif"),
        (("--append", "sids", "--levels", 3), "--levels does not go with --append"),
        (("--save-embeddings", "x"), "--save-embeddings keeps the vectors of --text"),
        (("--column", "a"), "column is for parquet files"),
    ],
)
def test_options_that_do_not_fit(vectors, out, options, message):
    assert message in tokenize("--embeddings", vectors, *options, "-o", out, fails=True)
    assert files_beside(out) == []


def test_append_needs_the_encoder(vectors, out):
    tokenize("--embeddings", vectors, *SMALL, "--method", "rq-vae", "-o", out)
    encoder = out.with_name("sids.rq-vae.safetensors")
    assert RQVAE.load(encoder).codebook_sizes == (8, 6)
    encoder.unlink()
    longer = out.with_name("longer.safetensors")
    printed = tokenize("--append", out, "--embeddings", vectors, "-o", longer, fails=True)
    assert "sids.rq-vae.safetensors: no such file" in printed
    assert files_beside(out) == ["sids.safetensors"]
