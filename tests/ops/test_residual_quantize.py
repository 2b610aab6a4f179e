import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from h2rec import ops, use_backend
from h2rec.ops import _backends
from h2rec.testing import assert_nearest_codes

OPERATOR = "residual_quantize"
pytestmark = pytest.mark.usefixtures("poisoned_empty")

SHAPES = [  # rows, dimension, sizes of the levels
    (0, 8, [4, 4]),
    (1, 1, [1]),
    (7, 20, [33, 33, 33]),
    (129, 37, [5, 300, 1, 17]),
    (63, 64, [256] * 4),
    (64, 3, [10_000]),
    (65, 24, [7] * 16),
]


def make_inputs(shape, dtype, device, generator):
    num_rows, dim, sizes = shape
    x = torch.randn(num_rows, dim, generator=generator).to(device, dtype)
    codebooks = [
        torch.randn(k, dim, generator=generator).to(device, dtype) / (level + 1)
        for level, k in enumerate(sizes)
    ]
    return x, codebooks


def beam_search(x, codebooks, beam_size):
    """The definition, one row at a time, in fp64: ties go to the earlier parent, then to the lower code."""
    errors, codes = [], []
    for row in x.double():
        beams = [((), torch.zeros_like(row))]
        for codebook in codebooks:
            extended = [
                (
                    (row - partial - codeword).square().sum().item(),
                    parent,
                    code,
                    (*path, code),
                    partial + codeword,
                )
                for parent, (path, partial) in enumerate(beams)
                for code, codeword in enumerate(codebook.double())
            ]
            extended.sort(key=lambda candidate: candidate[:3])
            beams = [(path, partial) for *_, path, partial in extended[:beam_size]]
        codes.append(beams[0][0])
        errors.append((row - beams[0][1]).square().sum().item())
    return torch.tensor(errors, dtype=torch.float64), torch.tensor(codes, dtype=torch.int32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_nearest(backend, shape, dtype, device, generator):
    x, codebooks = make_inputs(shape, dtype, device, generator)
    quantized, codes = ops.residual_quantize(x, codebooks)
    assert quantized.dtype == dtype
    assert_nearest_codes(x, codebooks, quantized, codes)


def test_ties_go_to_the_lowest_index(backend, device, generator):
    grid = torch.tensor(
        list(itertools.product([-1.0, 0.0, 1.0], repeat=3)), device=device
    )  # small integers: exact
    codebook = torch.cat([grid, grid])  # each codeword twice
    x = torch.randint(-3, 4, (200, 3), generator=generator).to(device, torch.float32)
    _, codes = ops.residual_quantize(x, [codebook, codebook])
    _, expected = beam_search(x.cpu(), [codebook.cpu()] * 2, beam_size=1)
    assert torch.equal(codes.cpu(), expected)
    assert codes.max() < len(grid)


@pytest.mark.parametrize("beam_size", [2, 3, 8, 1000])
def test_beam_search_matches_its_definition(backend, beam_size, device, generator):
    x = torch.randint(-4, 5, (20, 3), generator=generator).to(
        device, torch.float32
    )  # exact arithmetic, many ties
    codebooks = [
        torch.randint(-2, 3, (k, 3), generator=generator).to(device, torch.float32) for k in (4, 5, 3)
    ]
    quantized, codes = ops.residual_quantize(x, codebooks, beam_size=beam_size)
    errors, expected = beam_search(x.cpu(), [c.cpu() for c in codebooks], beam_size)
    assert torch.equal(codes.cpu(), expected)
    assert torch.equal((x - quantized).square().sum(1).double().cpu(), errors)


def test_wide_beam_reaches_the_error_of_an_fp64_search(backend, device, generator):
    x, codebooks = make_inputs((20, 16, [20, 20, 20]), torch.float32, device, generator)
    quantized, _ = ops.residual_quantize(x, codebooks, beam_size=4)
    expected, _ = beam_search(x.cpu(), [c.cpu() for c in codebooks], 4)
    error = (x - quantized).square().sum(1).double().cpu()
    assert error.mean().item() == pytest.approx(expected.mean().item(), rel=1e-5)
    single, _ = ops.residual_quantize(x, codebooks)
    assert error.mean() < (x - single).square().sum(1).mean()


def test_tensor_and_sequence_of_codebooks_agree(backend, device, generator):
    x = torch.randn(30, 6, generator=generator).to(device)
    codebooks = torch.randn(3, 9, 6, generator=generator).to(device)
    for actual, expected in zip(
        ops.residual_quantize(x, codebooks), ops.residual_quantize(x, list(codebooks)), strict=True
    ):
        assert torch.equal(actual, expected)


def test_strided_input(backend, device, generator):
    wide = torch.randn(40, 12, generator=generator).to(device)
    books = torch.randn(2, 5, 12, generator=generator).to(device)
    x, codebooks = wide[::3, ::2], books[:, :, ::2]
    assert not x.is_contiguous()
    for actual, expected in zip(
        ops.residual_quantize(x, codebooks),
        ops.residual_quantize(x.contiguous(), codebooks.contiguous()),
        strict=True,
    ):
        assert torch.equal(actual, expected)


def test_half_precision_vectors_meet_fp32_codebooks(backend, device, generator):
    x, codebooks = make_inputs((50, 10, [20, 20]), torch.float32, device, generator)
    half = x.half()
    quantized, codes = ops.residual_quantize(half, codebooks)
    assert quantized.dtype == torch.float16
    assert torch.equal(codes, ops.residual_quantize(half.float(), codebooks)[1])


def test_gradient_scatters_to_the_chosen_rows(backend, device, generator):
    x, codebooks = make_inputs((50, 6, [7, 3]), torch.float32, device, generator)
    codebooks = [codebook.requires_grad_() for codebook in codebooks]
    x.requires_grad_()
    quantized, codes = ops.residual_quantize(x, codebooks)
    cotangent = torch.randn(quantized.shape, generator=generator).to(device)
    quantized.backward(cotangent)
    assert x.grad is None
    for level, codebook in enumerate(codebooks):
        one_hot = torch.nn.functional.one_hot(codes[:, level].long(), len(codebook)).double()
        torch.testing.assert_close(
            codebook.grad.double(), one_hot.T @ cotangent.double(), rtol=1e-6, atol=1e-6
        )


def test_gradcheck(backend, device, generator):
    x, codebooks = make_inputs((9, 4, [5, 3]), torch.float64, device, generator)
    codebooks = [codebook.requires_grad_() for codebook in codebooks]
    assert torch.autograd.gradcheck(lambda *books: ops.residual_quantize(x, books)[0], codebooks)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_opcheck(backend, beam_size, device, generator):
    x, codebooks = make_inputs((9, 4, [5, 3]), torch.float32, device, generator)
    packed = torch.cat(codebooks).requires_grad_()
    torch.library.opcheck(torch.ops.h2rec.residual_quantize.default, (x, packed, [5, 3], beam_size))


def test_compiles_without_graph_breaks(backend, device, generator):
    x, codebooks = make_inputs((9, 4, [5, 3]), torch.float32, device, generator)
    compiled = torch.compile(ops.residual_quantize, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(x, codebooks), ops.residual_quantize(x, codebooks), strict=True):
        assert torch.equal(actual, expected)


def test_number_of_threads_changes_nothing(backend, device, generator):
    x, codebooks = make_inputs((500, 32, [64, 64, 64]), torch.float32, device, generator)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ops.residual_quantize(x, codebooks, beam_size=2)[1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_a_beam_wider_than_all_paths(backend, device, generator):
    x, codebooks = make_inputs((9, 4, [5, 3]), torch.float32, device, generator)
    for actual, expected in zip(
        ops.residual_quantize(x, codebooks, beam_size=10**9),
        ops.residual_quantize(x, codebooks, beam_size=15),
        strict=True,
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_codes_exist_even_where_distances_overflow(backend, beam_size, device, generator):
    x, codebooks = make_inputs((70, 24, [40, 40]), torch.float32, device, generator)
    _, codes = ops.residual_quantize(1e30 * x, [1e30 * book for book in codebooks], beam_size=beam_size)
    assert codes.min() >= 0
    assert codes.max() < 40


def test_rows_far_apart_in_memory(backend, device, generator):
    wide = np.zeros((2, 2**31 + 5), dtype=np.float16)  # what nothing touches costs no memory
    x = torch.from_numpy(wide)[:, :4]
    x[:] = torch.randn(2, 4, generator=generator).half()
    x = x.to(device)
    codebooks = torch.randn(2, 5, 4, generator=generator).to(device)
    for actual, expected in zip(
        ops.residual_quantize(x, codebooks), ops.residual_quantize(x.clone(), codebooks), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_codewords_that_are_not_finite_count_as_in_the_reference(backend, beam_size, device, generator):
    if device != "cpu":
        pytest.skip("values are not looked at on a GPU")
    x, codebooks = make_inputs((9, 4, [5, 3]), torch.float32, device, generator)
    codebooks[0][3] = torch.nan
    codebooks[1][1, 2] = torch.inf
    actual = ops.residual_quantize(x, codebooks, beam_size=beam_size)
    with use_backend("reference"):
        expected = ops.residual_quantize(x, codebooks, beam_size=beam_size)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512", "avx512vnni"])
def test_every_instruction_set(capability):
    """The tests of numbers once more, in a process that uses nothing wider."""
    numbers = "cpp and (nearest or ties or beam or half or strided)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", numbers]
    environment = os.environ | {"H2REC_CPU_CAPABILITY": capability}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode in (0, 5), result.stdout  # 5: no test, for the extension is not built


def hard_cases(generator):
    """Vectors and codebooks for which 8 bits say little, nothing, or the wrong thing."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def levels(num_levels, size, dim):
        return [normal(size, dim) / 2**level for level in range(num_levels)]

    x, books = normal(500, 128), levels(3, 256, 128)
    exponents = torch.empty(500, 1).uniform_(-40, 30, generator=generator)
    pairs = torch.randint(0, 256, (2, 500), generator=generator)
    between = (books[0][pairs[0]] + books[0][pairs[1]]) / 2
    outlier = [books[0].clone()]
    outlier[0][3, 5] = 1e6
    yield "plain", x, books
    yield "half", x.half(), books
    yield "bfloat16", x.bfloat16(), books
    yield "strided", normal(300, 256)[::2, 1::2], books
    yield "codewords", books[0][pairs[0]], books
    yield "between two codewords", between, books
    yield "almost between two codewords", between + 1e-6 * normal(500, 128), books
    yield "each codeword three times", x, [book.repeat(3, 1) for book in books]
    yield "codewords that differ little", x, [1 + 1e-6 * normal(300, 128)]
    yield "codewords that do not differ", x, [torch.ones(300, 128)]
    yield "vectors rounded away from the nearest", *aligned_rounding(of_vectors=True)
    yield "codewords rounded away from the vectors", *aligned_rounding(of_vectors=False)
    yield "codewords whose squares underflow, and whose mean is zero", *opposite_permutations()
    yield "zeros", torch.zeros(100, 128), books
    yield (
        "small integers",
        torch.randint(-2, 3, (500, 6), generator=generator).float(),
        [torch.randint(-2, 3, (200, 6), generator=generator).float()] * 2,
    )
    yield "one huge number", x, outlier
    for offset in (1.0, 30.0, 1e3, 1e6):
        yield f"offset {offset}", x + offset, [books[0] + offset, *books[1:]]
    for scale in (1e-42, 1e-38, 1e-30, 1e-19, 1e-16, 1e-9, 1e9, 1e17, 1e18, 1e19, 1e30, 1e37):
        yield f"scale {scale}", scale * x, [scale * book for book in books]
        yield f"vectors scaled by {scale}", scale * x, books
        yield f"codewords scaled by {scale}", x, [scale * book for book in books]
    yield "every row of another scale", 10.0**exponents * x, books
    for dim in (1, 2, 3, 5, 15, 16, 17, 63, 65, 100, 1000):
        yield f"dimension {dim}", normal(130, dim), levels(2, 77, dim)
    yield "beyond the sums of products of bytes", normal(64, 70_000), levels(1, 33, 70_000)
    yield "ragged", normal(129, 37), [normal(size, 37) for size in (5, 300, 1, 31, 32, 33)]
    yield "16 levels", normal(100, 24), levels(16, 40, 24)
    yield "10,000 codewords", normal(80, 20), levels(1, 10_000, 20)
    yield "20,000 codewords", normal(80, 20), levels(1, 20_000, 20)
    yield "few rows", x[:63], books
    yield "just enough rows", x[:64], books


def aligned_rounding(of_vectors):
    """The nearest codeword a looks farther than it is, as all roundings to bytes point away from it, and b, the second,
    looks as it is. Numbers up to 127 with steps of 1, codewords in pairs of opposites so that their mean is zero.
    """
    a, b, largest = torch.zeros(3, 64)
    x = torch.zeros(64, 64)
    if of_vectors:
        a[:31], b[31:62], largest[63] = 10.0, 10.0, 127.0
        x[:, :31], x[:, 31:62], x[:, 31:33] = 10.49, 10.0, 11.0
    else:
        a[:31], b[31:62], largest[63] = 60.49, 60.0, 127.0
        x[:, :62], x[:, 31] = 100.0, 110.0
    x[:, 62] = 127.0
    codewords = torch.stack([largest, b, a, torch.zeros(64)]).repeat_interleave(2, 0)
    codewords[1::2] *= -1
    return x, [codewords.repeat(4, 1)]


def opposite_permutations():
    """Constant vectors, and codewords equally near to them but for roundings, which are relative to norms of 1e-23."""
    generator = torch.Generator().manual_seed(0)
    values = 1e-24 * torch.randn(64, generator=generator)
    shuffled = torch.stack([values[torch.randperm(64, generator=generator)] for _ in range(16)])
    return torch.linspace(1, 2, 100)[:, None].repeat(1, 64), [torch.cat([shuffled, -shuffled])]


QUANTIZE_CASES = """
import sys, torch
from h2rec import ops
cases = torch.load(sys.argv[1], weights_only=True)
torch.save([ops.residual_quantize(x, books)[1] for _, x, books in cases], sys.argv[2])
"""


@pytest.mark.skipif(_backends.extension_error() is not None, reason="h2rec._C is not built")
def test_products_of_bytes_change_no_code(tmp_path, generator):
    if torch.ops.h2rec.cpu_capability() != "avx512vnni":
        pytest.skip("this processor has no AVX512-VNNI")
    cases = list(hard_cases(generator))
    torch.save(cases, tmp_path / "cases.pt")
    subprocess.run(
        [sys.executable, "-c", QUANTIZE_CASES, tmp_path / "cases.pt", tmp_path / "codes.pt"],
        env=os.environ | {"H2REC_CPU_CAPABILITY": "avx512", "H2REC_BACKEND": "cpp"},
        check=True,
    )
    for (name, x, books), expected in zip(
        cases, torch.load(tmp_path / "codes.pt", weights_only=True), strict=True
    ):
        with use_backend("cpp"):
            _, codes = ops.residual_quantize(x, books)
        assert torch.equal(codes, expected), f"{name}: {(codes != expected).any(1).sum()} of {len(x)} rows"


X, C = torch.zeros(3, 4), torch.zeros(2, 5, 4)


@pytest.mark.parametrize(
    ("x", "codebooks", "beam_size", "error", "message"),
    [
        (torch.zeros(3), C, 1, ValueError, r"x must have shape \[N, D\], got \[3\]"),
        (
            torch.zeros(3, 4, dtype=torch.int64),
            C,
            1,
            TypeError,
            "x must be a floating-point tensor, got torch.int64",
        ),
        (X, torch.zeros(2, 5, 3), 1, ValueError, "x has dimension 4, but codebooks has 3"),
        (X, torch.zeros(5, 4), 1, ValueError, r"codebooks must have shape \[L, K, D\], got \[5, 4\]"),
        (X, C.int(), 1, TypeError, "codebooks must be a floating-point tensor"),
        (X, [], 1, ValueError, "codebooks must have at least one level"),
        (
            X,
            [torch.zeros(2, 4), torch.zeros(0, 4)],
            1,
            ValueError,
            r"codebooks\[1\] must have at least one codeword",
        ),
        (X, [torch.zeros(2, 4), torch.zeros(2, 3)], 1, ValueError, r"codebooks\[1\] has dimension 3"),
        (
            X,
            [torch.zeros(2, 4), torch.zeros(2, 4).half()],
            1,
            ValueError,
            r"codebooks\[1\] has dtype torch.float16",
        ),
        (X, C, 0, ValueError, "beam_size must be at least 1, got 0"),
        (torch.full((3, 4), torch.nan), C, 1, ValueError, "x must be finite, but 3 of 3 rows .*rows 0, 1, 2"),
        (
            X.index_fill(0, torch.tensor(1), torch.inf),
            C,
            1,
            ValueError,
            r"1 of 3 rows hold NaN or infinity \(row 1\)",
        ),
    ],
)
def test_bad_input(x, codebooks, beam_size, error, message):
    with pytest.raises(error, match=message):
        ops.residual_quantize(x, codebooks, beam_size=beam_size)
    if "finite" not in message and "infinity" not in message:  # values are not known when tracing
        meta = [c.to("meta") for c in codebooks] if isinstance(codebooks, list) else codebooks.to("meta")
        with pytest.raises(error, match=message):
            ops.residual_quantize(x.to("meta"), meta, beam_size=beam_size)
