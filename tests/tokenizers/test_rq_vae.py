import copy
import os

import pytest
import safetensors.torch
import torch
import torch.multiprocessing as mp

from h2rec import SemanticIds
from h2rec.tokenizers import RQVAE, quality_report
from h2rec.tokenizers.rq_vae import _even_assignment


@pytest.fixture(scope="module")
def vectors():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(600, 4, generator=generator) @ torch.randn(4, 12, generator=generator)


def make(**options):
    return RQVAE(12, 2, 16, **{"latent_dim": 4, "hidden": (32,)} | options)


@pytest.mark.parametrize(
    "options",
    [{}, {"codebooks": "gradient"}, {"codebooks": "gradient", "sinkhorn": 0.1}],
    ids=["ema", "gradient", "sinkhorn"],
)
def test_training_lowers_the_loss_and_is_repeatable(vectors, options):
    def run():
        losses = []
        model = make(**options).fit(
            vectors,
            num_epochs=12,
            batch_size=100,
            learning_rate=5e-3,
            progress=lambda epoch, loss: losses.append(loss),
        )
        return losses, model.tokenize(vectors)

    losses, sids = run()
    assert losses[-1] < 0.6 * losses[0]
    assert sids.provenance["method"] == "RQ-VAE"
    assert min(sids.stats().utilisation) > 0.7
    assert torch.equal(run()[1].codes, sids.codes)


def test_latents_are_what_append_and_the_report_take(vectors, tmp_path):
    model = make().fit(vectors[:400], num_epochs=5, batch_size=100)
    sids = model.tokenize(vectors[:400])
    sids.save(tmp_path / "sids.safetensors")
    longer = SemanticIds.load(tmp_path / "sids.safetensors").append(model.latents(vectors[400:]))
    assert torch.equal(longer.codes, model.tokenize(vectors).codes)
    assert quality_report(longer, model.latents(vectors)).relative_error[-1] < 0.2


def test_state_dict_round_trip_and_copies(vectors):
    model = make(codebooks="gradient").fit(vectors, num_epochs=2)
    other = make(codebooks="gradient", seed=5)
    other.load_state_dict(model.state_dict())
    expected = model.tokenize(vectors).codes
    assert torch.equal(other.tokenize(vectors).codes, expected)
    assert torch.equal(copy.deepcopy(model).tokenize(vectors).codes, expected)


@pytest.mark.parametrize("codebooks", ["ema", "gradient"])
def test_gradients_reach_encoder_decoder_and_codewords(vectors, codebooks):
    model = make(codebooks=codebooks)
    _, codes, loss = model(vectors[:50])
    loss.backward()
    assert codes.shape == (50, 2)
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_sinkhorn_loads_codewords_evenly():
    squared = torch.rand(600, 8, generator=torch.Generator().manual_seed(0))
    squared[:, 0] -= 0.4  # nearest to most
    squared = squared.clamp_min(0)
    plan = _even_assignment(squared, 0.2).exp()
    torch.testing.assert_close(plan.sum(1), torch.ones(600))
    assert (plan.sum(0) - 75).abs().max() < 5
    before = torch.bincount(squared.argmin(1), minlength=8).max()
    assert torch.bincount(plan.argmax(1), minlength=8).max() < 0.6 * before


def test_save_and_load(vectors, tmp_path):
    model = make(codebooks="gradient", hidden=(20, 10)).fit(vectors, num_epochs=1)
    model.save(tmp_path / "model.safetensors")
    loaded = RQVAE.load(tmp_path / "model.safetensors")
    assert loaded.tokenize(vectors) == model.tokenize(vectors)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-9])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole file of an RQ-VAE"):
        RQVAE.load(tmp_path / "model.safetensors")
    safetensors.torch.save_file({"x": vectors}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors: not the weights of an RQ-VAE"):
        RQVAE.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("codebooks", ["ema", "gradient"])
def test_codewords_that_nobody_chooses_become_rows_of_the_batch(vectors, codebooks):
    model = make(codebooks=codebooks)
    model.quantizer.ema_decay = 0.5
    words = model.quantizer.packed_codebooks if codebooks == "ema" else model.codewords.data
    words[5:16] = 1e3  # out of reach
    for _ in range(5):
        model(vectors[:50])
    latents = model.encoder(vectors[:50])
    for word in model.codebooks[0][5:]:
        assert torch.cdist(word[None], latents).min() < 1
    words[5:16] = 1e3
    model.eval()(vectors[:50])
    assert (words[5:16] == 1e3).all()


def _train_a_rank(rank, folder, codebooks):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    try:
        x = torch.randn(300 - 95 * rank, 12, generator=torch.Generator().manual_seed(rank))
        model = make(codebooks=codebooks)
        model.start_codebooks(x)
        words = model.quantizer.packed_codebooks if codebooks == "ema" else model.codewords.data
        words[3:9] = 1e3  # out of reach, so that ranks have to agree on what takes their place
        model.quantizer.ema_decay = 0.5
        torch.manual_seed(rank)
        parallel = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for batch in x.split(60 - 19 * rank):
            optimizer.zero_grad()
            parallel(batch)[2].backward()
            optimizer.step()
        torch.save(model.state_dict(), f"{folder}/{rank}.pt")
        error, message = [(ValueError, "as many rows"), (RuntimeError, "rank 0 could not start")][rank]
        with pytest.raises(error, match=message):
            model.start_codebooks(x[:3])
    finally:
        torch.distributed.destroy_process_group()
    os._exit(0)  # threads of gloo outlive the group; Python aborts if one lets go of a tensor while it ends


@pytest.mark.parametrize("codebooks", ["ema", "gradient"])
def test_ranks_with_uneven_batches_keep_equal_models(tmp_path, codebooks):
    mp.spawn(_train_a_rank, (str(tmp_path), codebooks), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name
    words = states[0]["quantizer.packed_codebooks" if codebooks == "ema" else "codewords"]
    assert words.abs().max() < 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": (0,)}, "dim, latent_dim and hidden must be positive"),
        ({"codebooks": "sgd"}, "codebooks must be one of 'ema', 'gradient', got 'sgd'"),
        ({"sinkhorn": 0.1}, "sinkhorn must be at least 0, and 0 with codebooks='ema', got 0.1"),
        ({"sinkhorn": -1.0, "codebooks": "gradient"}, "sinkhorn must be at least 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_bad_vectors(vectors):
    with pytest.raises(ValueError, match="vectors must have dimension 12, got 5"):
        make().tokenize(vectors[:, :5])
    with pytest.raises(ValueError, match="at least as many rows as a level has codewords, 16, got 3"):
        make().fit(vectors[:3])
    with pytest.raises(ValueError, match="num_epochs must be at least 1, got 0"):
        make().fit(vectors, num_epochs=0)
