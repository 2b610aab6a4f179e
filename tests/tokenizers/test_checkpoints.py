"""Tokenizers that were interrupted go on, and end where they would have ended."""

import numpy as np
import pytest
import torch

from h2rec.tokenizers import RQVAE, ProductQuantizer, RQKMeans, open_vectors, remove_checkpoints

X = torch.randn(700, 12, generator=torch.Generator().manual_seed(0))


def rq_kmeans(**options):
    return RQKMeans(3, (8, 4, 5), num_iters=4, batch_size=100, **options)


def pq():
    return ProductQuantizer(3, (8, 4, 5), num_iters=4, batch_size=100)


class SmallRQVAE(RQVAE):
    """With the number of epochs that takes the place of the levels."""

    def __init__(self, **options):
        super().__init__(12, 2, 8, latent_dim=4, hidden=(16,), **options)

    def fit(self, vectors, **options):
        return super().fit(vectors, num_epochs=3, batch_size=100, **options)


MAKERS = {
    "rq-kmeans": rq_kmeans,
    "mini-batch": lambda: rq_kmeans(mini_batch=True, balance=0.3),
    "pq": pq,
    "rq-vae": SmallRQVAE,
    "rq-vae gradient": lambda: SmallRQVAE(codebooks="gradient", sinkhorn=0.1),
}


@pytest.fixture(params=MAKERS.values(), ids=MAKERS)
def make(request):
    return request.param


def interrupt_at(stage):
    def progress(number, *_):
        if number == stage:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("source", ["memory", "file"])
def test_fit_goes_on_after_the_last_whole_stage(make, source, tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    vectors = X if source == "memory" else open_vectors(tmp_path / "x.npy")
    undisturbed = make().fit(vectors)
    for stage in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            make().fit(vectors, progress=interrupt_at(stage), checkpoint=tmp_path / "kept")
    seen = []
    resumed = make().fit(
        vectors, progress=lambda number, *_: seen.append(number), checkpoint=tmp_path / "kept"
    )
    assert set(seen) <= {2}  # an epoch is kept before it is shown
    for actual, expected in zip(resumed.codebooks, undisturbed.codebooks, strict=True):
        assert torch.equal(actual, expected)
    assert resumed.tokenize(vectors) == undisturbed.tokenize(vectors)


def test_codes_go_on_after_the_last_whole_batch(make, tmp_path, monkeypatch):
    tokenizer = make().fit(X)
    monkeypatch.setattr("h2rec.tokenizers.rq_vae._LATENT_ROWS", 100)
    expected = tokenizer.tokenize(X)

    def interrupt(progress):
        if progress.done > 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenizer.tokenize(X, progress=interrupt, checkpoint=tmp_path)
    (kept,) = tmp_path.iterdir()
    row_bytes = 4 * expected.num_levels
    assert kept.stat().st_size == 400 * row_bytes
    with kept.open("ab") as file:
        file.write(b"cut off")
    # Codes that are kept are not computed again: other ones show.
    changed = (int(expected.codes[0, 0]) + 1) % 8
    kept.write_bytes(np.int32(changed).tobytes() + kept.read_bytes()[4:])
    seen = []
    resumed = tokenizer.tokenize(X, progress=seen.append, checkpoint=tmp_path)
    assert resumed.codes[0, 0] == changed
    assert torch.equal(resumed.codes[1:], expected.codes[1:])
    assert (seen[-1].done, seen[-1].total) == (700, 700)
    remove_checkpoints(tmp_path)
    assert not tmp_path.exists()


def test_other_settings_and_other_vectors_start_anew(make, tmp_path):
    make().fit(X, checkpoint=tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    seen = []
    make().fit(X + 1, progress=lambda number, *_: seen.append(number), checkpoint=tmp_path)
    assert 0 in seen
    assert len(list(tmp_path.iterdir())) == 1
    assert before.isdisjoint(path.name for path in tmp_path.iterdir())
    tokenizer = make()
    tokenizer.seed = 5
    seen.clear()
    tokenizer.fit(X + 1, progress=lambda number, *_: seen.append(number), checkpoint=tmp_path)
    assert 0 in seen


def test_a_file_that_was_written_again_starts_anew(tmp_path):
    for shift in (0, 1):
        np.save(tmp_path / "x.npy", X.numpy() + shift)
        seen = []
        rq_kmeans().fit(
            open_vectors(tmp_path / "x.npy"),
            progress=lambda level, *_: seen.append(level),  # noqa: B023
            checkpoint=tmp_path / "kept",
        )
        assert set(seen) == {0, 1, 2}


def test_remove_checkpoints_leaves_other_files(tmp_path):
    rq_kmeans().fit(X, checkpoint=tmp_path)
    (tmp_path / "thesis.tex").touch()
    (tmp_path / ".fit-0123.partial").touch()  # of a process that was killed
    remove_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    remove_checkpoints(tmp_path / "nothing")


def test_vectors_that_come_once(make):
    with pytest.raises(TypeError, match="vectors are read several times, but an iterator gives them once"):
        make().fit(iter(X.split(100)))


def test_batches_in_a_list_and_an_iterator_to_encode(make):
    tokenizer = make().fit(X.split(130))
    assert torch.equal(tokenizer.tokenize(iter(X.split(130))).codes, tokenizer.tokenize(X).codes)
