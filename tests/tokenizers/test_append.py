import pytest
import torch

from h2rec import SemanticIds
from h2rec.tokenizers import RQKMeans, add_level, append

X = torch.randn(500, 12, generator=torch.Generator().manual_seed(0))
NEW = torch.randn(10_000, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def published() -> SemanticIds:
    return RQKMeans(2, (16, 5), num_iters=2).fit(X).tokenize(X, beam_size=3)


@pytest.mark.parametrize("change", [lambda sids: sids, add_level], ids=["as it is", "numbered"])
def test_equals_the_method(published, change):
    sids = change(published)
    longer = append(sids, NEW)
    assert longer == sids.append(NEW)
    assert longer != sids.append(NEW, beam_size=1)
    assert torch.equal(longer.codes[:500], sids.codes)
    assert append(longer, iter(NEW.split(999))) == longer.append(NEW)
    assert append(sids, NEW[:0]) == sids.append(NEW[:0])


def test_goes_on_after_the_last_whole_batch(published, tmp_path):
    expected = append(published, NEW).codes

    def interrupt(progress):
        if progress.done > 5000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        append(published, NEW, progress=interrupt, checkpoint=tmp_path)
    # Codes that are kept are not computed again: other ones show.
    (kept,) = tmp_path.iterdir()
    assert kept.stat().st_size == 2 * 4096 * 2 * 4
    expected[500, 0] = (expected[500, 0] + 1) % 16
    kept.write_bytes(expected[500:501].numpy().tobytes() + kept.read_bytes()[8:])
    assert torch.equal(append(published, NEW, checkpoint=tmp_path).codes, expected)


def test_known_codes(published):
    codes = published.codes[:3].long()
    longer = published.append_codes(codes)
    assert torch.equal(longer.codes[-3:], codes)
    assert longer.provenance["appended_items"] == "3"
    without_codebooks = SemanticIds(published.codes)
    assert torch.equal(add_level(without_codebooks).append_codes(codes).codes[:, :2], longer.codes)
    with pytest.raises(ValueError, match=r"new_codes must have shape \[M, 2\], got \[3, 1\]"):
        published.append_codes(codes[:, :1])
    with pytest.raises(ValueError, match="16"):
        published.append_codes(codes + 16)
    with pytest.raises(TypeError, match="codes must be integers"):
        published.append_codes(codes.float())


def test_bad_input(published):
    with pytest.raises(ValueError, match="vectors must have dimension 12, as the codebooks have, got 5"):
        append(published, NEW[:, :5])
    with pytest.raises(ValueError, match="have no codebooks, so new_vectors cannot be encoded"):
        append(SemanticIds(published.codes), NEW)
