import json

import matplotlib.figure
import pytest
import torch

from h2rec import SemanticIds
from h2rec.tokenizers import RQKMeans, quality_report

CODES = torch.tensor([[0, 1], [2, 0], [0, 1], [0, 0]])


def test_numbers_by_hand():
    report = quality_report(SemanticIds(CODES, codebook_sizes=(4, 2)))
    # 3, 0, 1, 0: the mean difference of all pairs over twice the mean.
    assert report.gini == (pytest.approx((2 * (3 + 2 + 3 + 1 + 0 + 1) / 16) / (2 * 1.0)), 0.0)
    assert [(load.prefixes, load.mean, load.largest) for load in report.prefix_load] == [
        (2, 2.0, 3),
        (3, 4 / 3, 2),
    ]
    assert report.code_counts == ((3, 0, 1, 0), (2, 2))
    assert report.reconstruction_error is None
    assert report.stats == SemanticIds(CODES, codebook_sizes=(4, 2)).stats()


def test_errors_after_each_level():
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(0)) + 7
    sids = RQKMeans(3, 8, num_iters=4).fit(x).tokenize(x)
    report = quality_report(sids, lambda: x.split(70))
    residual = x
    for level in range(3):
        residual = residual - sids.codebooks[level][sids.codes[:, level].long()]
        expected = residual.square().sum(1).mean().item()
        assert report.reconstruction_error[level] == pytest.approx(expected, rel=1e-5)
        variance = x.var(0, correction=0).sum().item()
        assert report.relative_error[level] == pytest.approx(expected / variance, rel=1e-4)
    table = report.table()
    assert "collision rate" in table
    assert f"{report.reconstruction_error[2]:.4g}" in table
    again = json.loads(report.to_json())
    assert again["gini"] == list(report.gini)
    assert again["stats"]["num_items"] == 300


def test_an_empty_catalog():
    report = quality_report(SemanticIds(torch.zeros(0, 2, dtype=torch.int32), codebook_sizes=(4, 2)))
    assert [(load.prefixes, load.largest) for load in report.prefix_load] == [(0, 0), (0, 0)]
    assert report.gini == (0.0, 0.0)
    json.loads(report.to_json())
    assert "level" in report.table()


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(tmp_path, suffix):
    path = tmp_path / f"quality.{suffix}"
    quality_report(SemanticIds(CODES)).plot(path)
    assert path.stat().st_size > 1000
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_plot_leaves_nothing(tmp_path, monkeypatch):
    def write_a_little_and_fail(self, path, **options):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", write_a_little_and_fail)
    with pytest.raises(OSError, match="No space left"):
        quality_report(SemanticIds(CODES)).plot(tmp_path / "quality.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sids", "vectors", "message"),
    [
        (SemanticIds(CODES), torch.zeros(4, 3), "have no codebooks"),
        (SemanticIds(CODES, codebooks=torch.zeros(2, 3, 5)), torch.zeros(4, 3), "codebooks, 5, got 3"),
        (
            SemanticIds(CODES, codebooks=torch.zeros(2, 3, 5)),
            torch.zeros(3, 5),
            "have 4 rows, one per item, got 3",
        ),
        (
            SemanticIds(CODES, codebooks=torch.zeros(2, 3, 5)),
            torch.zeros(6, 5),
            "have 4 rows, one per item, got 6",
        ),
    ],
)
def test_bad_input(sids, vectors, message):
    with pytest.raises(ValueError, match=message):
        quality_report(sids, vectors)
