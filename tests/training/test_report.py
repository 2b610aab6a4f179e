"""report.html: complete, self-contained, and safe whatever names a run holds."""

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from h2rec.training.report import read_run, write_report

MODELS = ("hash", "semantic", "sum", "h2rec")
BANDS = {"0": 0, "1-9": 61, "10-29": 170}
VOID = {"meta", "link", "br", "img", "hr", "input"}


def ranking(quality: float) -> dict:
    def group(count: int, factor: float = 1.0) -> dict:
        values = {f"{name}@{k}": quality * factor * k / 100 for name in ("HR", "NDCG") for k in (5, 10, 20)}
        return (values if count else dict.fromkeys(values, math.nan)) | {"count": count}

    bands = {band: group(count) for band, count in BANDS.items()}
    return {
        "overall": group(231),
        "head": group(181, 2),
        "tail": group(50, 0.5),
        "bands": bands,
    }


def write_run(folder: Path, models: tuple[str, ...] = MODELS) -> Path:
    folder.mkdir()
    of_models = {}
    for i, model in enumerate(models):
        test = {"full": ranking(0.1 + 0.02 * i), "sampled": ranking(0.5 - 0.02 * i)}
        of_models[model] = {
            "test": test,
            "valid": test,
            "epochs": 3,
            "best_epoch": 2,
            "seconds": 4000.0 + i,
            "parameters": 12345,
        }
        (folder / model).mkdir()
        with (folder / model / "metrics.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["epoch", "train_loss", "valid_NDCG@10", "valid_HR@10"])
            rows.writerows([[1, 5.0, 0.01, 0.02], [2, 4.0, 0.03, 0.04], [3, 3.5, 0.02, 0.03]])
    metrics = {
        "models": of_models,
        "sid_stats": {
            "num_items": 500,
            "num_levels": 2,
            "codebook_sizes": [8, 16],
            "distinct": 120,
            "collision_rate": 0.82,
            "largest_group": 9,
            "utilisation": [1.0, 0.875],
            "perplexity": [7.1, 11.0],
        },
        "data": {"users": 231, "items": 500, "interactions": 12000},
        "ranking": {"history_masked": True, "negatives": 100, "seed": 0},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "config.json").write_text(json.dumps({"interactions": "log.csv", "dim": 64, "items": None}))
    return folder


class Page(HTMLParser):
    """Checks that elements nest, and gathers the cells of the first table, the text and every attribute."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "first run")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(write_run(tmp_path_factory.mktemp("runs") / "first run")).read_text(encoding="utf-8")


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_has_every_part(source: str):
    page = Page(source)
    for title in (
        "first run",
        "231 users · 500 items · 12,000 interactions",
        "Head and tail",
        "Full ranking",
        "items of the user's history left out of the others",
        "100 sampled negatives",
        "By popularity",
        "Head against tail",
        "Semantic IDs",
        "Learning curves",
        "1 h 06 min",
        "Settings",
        "interactions",
        "log.csv",
    ):
        assert title in page.text
    assert page.tags.count("svg") == 5


def test_is_self_contained(source: str):
    assert "://" not in source
    page = Page(source)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", source))
    assert "@import" not in source
    assert not any(name.startswith("on") for name, _ in page.attributes)


def test_ids_are_unique_and_links_resolve(source: str):
    page = Page(source)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for name, value in page.attributes if name == "href"}
    targets |= set(re.findall(r"url\(#([^)]*)\)", source))
    assert targets <= set(ids)


def test_every_colour_comes_from_the_style_sheet(source: str):
    """A fixed colour would be unreadable in one of light and dark."""
    body = source[source.index("<body>") :]
    assert set(re.findall(r"#[0-9a-f]{6}\b", body)) == set()
    used = set(re.findall(r"var\((--[\w-]+)\)", source))
    assert used <= set(re.findall(r"(--[\w-]+):", source))


def test_values_and_gains(source: str):
    table = re.findall(r'<table class="results">.*?</table>', source)[0]
    rows = {
        re.sub("<[^>]*>", "", row.split("</th>")[0]): re.findall(r"<td[^>]*>(.*?)</td>", row)
        for row in re.findall(r"<tr>(.*?)</tr>", table)
    }
    # HR@10 and NDCG@10 of overall, head (twice that) and tail (half of it), all proportional to the quality.
    plain = {
        name: [re.sub(r"<small>.*|<[^>]*>", "", cell) for cell in cells]
        for name, cells in rows.items()
        if cells
    }
    assert plain["Hash IDs only"] == ["0.0100", "0.0100", "0.0200", "0.0200", "0.0050", "0.0050"]
    assert plain["H2Rec"] == ["0.0160", "0.0160", "0.0320", "0.0320", "0.0080", "0.0080"]
    assert all("+60.0%" in cell and "<strong>" in cell for cell in rows["H2Rec"])
    assert all("baseline" in cell and "<strong>" not in cell for cell in rows["Hash IDs only"])
    sampled = re.findall(r'<table class="results">.*?</table>', source)[1]
    assert "\N{MINUS SIGN}12.0%" in sampled


def test_standard_error_is_that_of_a_share(source: str):
    assert f"standard error of {math.sqrt(0.008 * 0.992 / 50):.4f}" in Page(source).text


def test_bands_without_users_are_left_out(source: str):
    chart = source[source.index("NDCG@10 by popularity band") :].partition("</svg>")[0]
    assert "61 users" in chart
    assert "0 users" not in re.sub(r"\d0 users", "", chart)


def test_escapes_names(tmp_path: Path):
    nasty = "<script>alert(1)</script>&$x_1$"
    run = write_run(tmp_path / "a<b>&c", ("hash", nasty.replace("/", "")))
    config = {"items": "<img src=x>", "</dd><script>": 1, "list": [1, "<b>"]}
    (run / "config.json").write_text(json.dumps(config))
    page = page_of(run)
    assert not {"script", "img", "b"} & set(page.tags)
    assert "a<b>&c" in page.text
    assert nasty.replace("/", "") in page.text


def test_one_model(tmp_path: Path):
    page = page_of(write_run(tmp_path / "run", ("h2rec",)))
    assert "against hash IDs only" not in page.text
    assert page.tags.count("svg") == 5


def test_writes_nothing_else_and_overwrites(run: Path):
    before = sorted(path.name for path in run.iterdir())
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert sorted(path.name for path in run.iterdir()) == sorted([*before, "report.html"])


def test_leaves_matplotlib_as_it_was(run: Path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_report(run)
    assert dict(matplotlib.rcParams) == before


def test_bad_runs(tmp_path: Path, run: Path):
    with pytest.raises(FileNotFoundError, match=r"no metrics\.json"):
        write_report(tmp_path)
    (run / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json is not JSON"):
        write_report(run)
    (run / "metrics.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, expected an object"):
        write_report(run)
    (run / "metrics.json").write_text('{"models": {}}')
    with pytest.raises(ValueError, match='has no "models"'):
        write_report(run)
    assert not (run / "report.html").exists()


def test_gain_needs_the_baseline(tmp_path: Path):
    run = read_run(write_run(tmp_path / "run", ("sum", "h2rec")))
    assert math.isnan(run.gain("h2rec", "full", "tail", "HR@10"))
