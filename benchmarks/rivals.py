"""Other libraries, from the extra `bench`; one that is not installed has no column, and the report says so."""

import importlib.util

import torch
from torch import Tensor


def installed(package: str) -> bool:
    if importlib.util.find_spec(package) is not None:
        return True
    print(f"no column for {package}: it is not installed (pip install h2rec[bench])")
    return False


class FaissResidualQuantizer:
    """`faiss.ResidualQuantizer` with given codebooks [L, K, D], K a power of two.

    `use_beam_lut`: residuals are never formed, but tables of products between codewords are read.
    """

    def __init__(self, codebooks: Tensor, beam_size: int, use_beam_lut: bool) -> None:
        import faiss

        num_levels, size, dim = codebooks.shape
        self.codebooks, self.bits = codebooks, size.bit_length() - 1
        assert size == 1 << self.bits
        self.quantizer = faiss.ResidualQuantizer(dim, num_levels, self.bits)
        self.quantizer.max_beam_size = beam_size
        self.quantizer.use_beam_LUT = int(use_beam_lut)
        faiss.copy_array_to_vector(codebooks.numpy().ravel(), self.quantizer.codebooks)
        self.quantizer.is_trained = True
        if use_beam_lut:
            self.quantizer.compute_codebook_tables()

    def encode(self, x: Tensor):
        """Codes as faiss gives them, packed to bits."""
        return self.quantizer.compute_codes(x.numpy())

    def unpack(self, packed) -> tuple[Tensor, Tensor]:
        """(quantized [N, D], codes [N, L])."""
        import faiss

        codes = torch.from_numpy(faiss.unpack_bitstrings(packed, len(self.codebooks), self.bits)).long()
        rows = [codebook[code] for codebook, code in zip(self.codebooks, codes.T, strict=True)]
        return torch.stack(rows).sum(0), codes


def residual_vq(codebooks: Tensor):
    """`vector_quantize_pytorch.ResidualVQ` with given codebooks [L, K, D], in inference."""
    from vector_quantize_pytorch import ResidualVQ

    num_levels, size, dim = codebooks.shape
    module = ResidualVQ(dim=dim, num_quantizers=num_levels, codebook_size=size).eval()
    for layer, codebook in zip(module.layers, codebooks, strict=True):
        layer.codebook = codebook
    return module


def fit_faiss(x: Tensor, num_levels: int, size: int, num_iters: int, *, progressive: bool) -> list[Tensor]:
    """Codebooks by `faiss.ResidualQuantizer.train` with beam 1.

    `progressive`: k-means in more and more dimensions, `num_iters` steps in each of ten widths.
    """
    import faiss

    quantizer = faiss.ResidualQuantizer(x.shape[1], num_levels, size.bit_length() - 1)
    kind = quantizer.Train_progressive_dim if progressive else quantizer.Train_default
    quantizer.train_type = kind
    quantizer.max_beam_size = 1
    quantizer.cp.niter = num_iters
    quantizer.cp.max_points_per_centroid = len(x)
    quantizer.train(x.numpy())
    codebooks = torch.from_numpy(faiss.vector_to_array(quantizer.codebooks).copy())
    return list(codebooks.view(num_levels, size, x.shape[1]))


def fit_semantic_id(x: Tensor, num_levels: int, size: int, num_iters: int) -> list[Tensor]:
    """Codebooks by `semantic_id.RQKMeans`, which runs scikit-learn's k-means, from one start."""
    from semantic_id import RQKMeans

    quantizer = RQKMeans(num_levels, size, max_iter=num_iters, tol=0.0, random_state=0, n_init=1)
    return [torch.from_numpy(codebook) for codebook in quantizer.fit(x.numpy()).codebooks_]
