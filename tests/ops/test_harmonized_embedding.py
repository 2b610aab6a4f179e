import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from h2rec import ops
from h2rec.ops import Hashing
from h2rec.testing import assert_as_accurate_as_eager, zipf_ids

OPERATOR = "harmonized_embedding"
pytestmark = pytest.mark.usefixtures("poisoned_empty")

NUM_ITEMS, PADDING = 97, 13
SIZES = [5, 11, 1]
HASHINGS = {
    "direct": (Hashing.direct(), NUM_ITEMS),
    "multi": (Hashing.multi(num_hashes=3, seed=1), 31),
    "qr": (Hashing.qr(NUM_ITEMS, divisor=10), 20),
    "prefix": (Hashing.prefix(len(SIZES), seed=2), 23),
}
POOLINGS = ["sum", "mean", "levels", "concat"]


def rows_by_formula(item_id: int, codes: list[int], hashing: Hashing, num_rows: int) -> list[int]:
    """The rows of one item, in Python's integers."""
    if hashing.mode == "direct":
        return [item_id]
    if hashing.mode == "qr":
        return [item_id % hashing.divisor, hashing.divisor + item_id // hashing.divisor]
    keys = [item_id] * len(hashing.constants)
    if hashing.mode == "prefix":
        folded = itertools.accumulate(codes, lambda key, code: key * 0x9E3779B97F4A7C15 + code + 1, initial=0)
        keys = [key % 2**64 for key in folded][1:]
    return [
        ((((a * key + b) % 2**64) >> 32) * num_rows) >> 32
        for key, (a, b) in zip(keys, hashing.constants.tolist(), strict=True)
    ]


def eager(item_ids, codes, codebooks, hash_table, hashing, pooling, padding_idx, combine):
    """What a user would write: one ``F.embedding`` per level and per hash."""
    flat = item_ids.reshape(-1).long()
    keep = torch.ones_like(flat, dtype=torch.bool) if padding_idx is None else flat != padding_idx
    safe = flat.where(keep, torch.zeros_like(flat))
    semantic = hashed = None
    if codebooks is not None:
        levels = [F.embedding(codes[safe, level].long(), book) for level, book in enumerate(codebooks)]
        stacked = torch.stack(levels, dim=1)  # [T, L, D]
        semantic = {
            "sum": lambda: stacked.sum(1),
            "mean": lambda: stacked.mean(1),
            "levels": lambda: stacked,
            "concat": lambda: stacked.flatten(1),
        }[pooling]()
    if hash_table is not None:
        rows = torch.tensor(
            [
                rows_by_formula(i, [] if codes is None else codes[i].tolist(), hashing, len(hash_table))
                for i in safe.tolist()
            ],
            device=hash_table.device,
            dtype=torch.int64,
        ).reshape(len(safe), {"direct": 1, "qr": 2}.get(hashing.mode) or len(hashing.constants))
        hashed = sum(F.embedding(column, hash_table) for column in rows.unbind(1))
    halves = [half for half in (semantic, hashed) if half is not None]
    if combine is not None:
        halves = [
            torch.cat(halves, 1) if combine == "concat" else sum(halves) / (2 if combine == "mean" else 1)
        ]
    masked = [half * keep.view(-1, *[1] * (half.dim() - 1)) for half in halves]
    return [half.view(*item_ids.shape, *half.shape[1:]) for half in masked]


def is_interpreted(backend: str, device: str) -> bool:
    """Whether a call takes as long as hundreds elsewhere."""
    return backend == "triton" and torch.device(device).type == "cpu"


def make_inputs(num_tokens, dtype, device, generator, num_rows, dim=12):
    item_ids = zipf_ids((num_tokens,), NUM_ITEMS, generator).to(device)
    codes = torch.stack([torch.randint(0, k, (NUM_ITEMS,), generator=generator) for k in SIZES], 1).to(device)
    codebooks = [torch.randn(k, dim, generator=generator).to(device, dtype) for k in SIZES]
    table = torch.randn(num_rows, dim, generator=generator).to(device, dtype)
    return item_ids, codes, codebooks, table


def check_against_eager(inputs, hashing, generator, **options):
    """Outputs and every gradient, with random cotangents."""
    item_ids, codes, codebooks, table = inputs
    hashing = hashing._replace(
        constants=None if hashing.constants is None else hashing.constants.to(item_ids.device)
    )
    parameters = [*(codebooks or []), *([] if table is None else [table])]

    def run(function, dtype):
        leaves = [p.detach().to(dtype).requires_grad_() for p in parameters]
        books = leaves[: len(codebooks)] if codebooks else None
        outputs = function(books, leaves[-1] if table is not None else None)
        return outputs, leaves

    def ours(books, hash_table):
        outputs = ops.harmonized_embedding(item_ids, codes, books, hash_table, hashing=hashing, **options)
        return [outputs] if options.get("combine") else [output for output in outputs if output is not None]

    def rival(books, hash_table):
        keys = ("pooling", "padding_idx", "combine")
        return eager(
            item_ids,
            codes,
            books,
            hash_table,
            hashing,
            *(options.get(key, "sum" if key == "pooling" else None) for key in keys),
        )

    dtype = parameters[0].dtype
    runs = [run(ours, dtype), run(rival, dtype), run(rival, torch.float64)]
    cotangents = [torch.randn(out.shape, generator=generator).to(out) for out in runs[0][0]]
    for outputs, _ in runs:
        if item_ids.numel():
            torch.autograd.backward(
                outputs, [cotangent.to(out.dtype) for cotangent, out in zip(cotangents, outputs, strict=True)]
            )
    for actual, plain, exact in zip(*(outputs for outputs, _ in runs), strict=True):
        assert actual.dtype == dtype
        assert_as_accurate_as_eager(actual, plain, exact)
    if item_ids.numel():
        for actual, plain, exact in zip(*(leaves for _, leaves in runs), strict=True):
            grad = actual.grad.to_dense() if actual.grad.is_sparse else actual.grad
            assert_as_accurate_as_eager(grad, plain.grad, exact.grad)
    return runs[0]


@pytest.mark.parametrize("num_tokens", [0, 1, 63, 64, 65, 257])
@pytest.mark.parametrize("mode", HASHINGS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_matches_eager(backend, pooling, mode, num_tokens, device, generator):
    hashing, num_rows = HASHINGS[mode]
    inputs = make_inputs(num_tokens, torch.float32, device, generator, num_rows)
    check_against_eager(inputs, hashing, generator, pooling=pooling, padding_idx=PADDING)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("mode", HASHINGS)
def test_dtypes(backend, mode, sparse, dtype, device, generator):
    hashing, num_rows = HASHINGS[mode]
    inputs = make_inputs(129, dtype, device, generator, num_rows)
    check_against_eager(inputs, hashing, generator, sparse=sparse)


@pytest.mark.parametrize(
    ("pooling", "combine"),
    [("sum", "sum"), ("mean", "mean"), ("sum", "mean"), ("sum", "concat"), ("concat", "concat")],
)
def test_combine(backend, pooling, combine, dtype, device, generator):
    inputs = make_inputs(65, dtype, device, generator, 31)
    check_against_eager(
        inputs, HASHINGS["multi"][0], generator, pooling=pooling, combine=combine, padding_idx=PADDING
    )


def test_concatenated_levels_add_to_a_table_of_their_width(backend, device, generator):
    item_ids, codes, codebooks, _ = make_inputs(33, torch.float32, device, generator, NUM_ITEMS, dim=4)
    table = torch.randn(NUM_ITEMS, 12, generator=generator).to(device)
    inputs = (item_ids, codes, codebooks, table)
    check_against_eager(inputs, Hashing.direct(), generator, pooling="concat", combine="sum")


@pytest.mark.parametrize("half", ["semantic", "hashed"])
def test_either_half_may_be_left_out(backend, half, device, generator):
    item_ids, codes, codebooks, table = make_inputs(40, torch.float32, device, generator, NUM_ITEMS)
    if half == "semantic":
        outputs, _ = check_against_eager((item_ids, codes, codebooks, None), Hashing(), generator)
        assert ops.harmonized_embedding(item_ids, codes, codebooks, None)[1] is None
    else:
        outputs, _ = check_against_eager((item_ids, None, None, table), Hashing(), generator)
        assert ops.harmonized_embedding(item_ids, None, None, table)[0] is None
    assert len(outputs) == 1


@pytest.mark.parametrize("shape", [(), (0, 3), (4, 1, 5)])
@pytest.mark.parametrize(
    "id_dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str
)
def test_shapes_and_integer_dtypes_of_ids_and_codes(backend, shape, id_dtype, device, generator):
    _, codes, codebooks, table = make_inputs(1, torch.float32, device, generator, NUM_ITEMS)
    item_ids = torch.randint(0, NUM_ITEMS, shape, generator=generator).to(device, id_dtype)
    semantic, hashed = ops.harmonized_embedding(item_ids, codes.to(id_dtype), codebooks, table)
    expected = eager(item_ids, codes, codebooks, table, Hashing(), "sum", None, None)
    torch.testing.assert_close([semantic, hashed], expected)


def test_strided_views(backend, device, generator):
    item_ids, codes, codebooks, table = make_inputs(50, torch.float32, device, generator, NUM_ITEMS)
    strided_codes = codes.T.contiguous().T
    views = [book[:, ::2] for book in codebooks]
    assert not strided_codes.is_contiguous()
    inputs = (item_ids.view(5, 10).T, strided_codes, views, table[:, ::2])
    check_against_eager(inputs, Hashing.direct(), generator)


def test_padding_gives_zeros_and_no_gradient(backend, device, generator):
    _, codes, codebooks, table = make_inputs(1, torch.float32, device, generator, NUM_ITEMS)
    table.requires_grad_()
    item_ids = torch.tensor([PADDING, 2, PADDING], device=device)
    semantic, hashed = ops.harmonized_embedding(item_ids, codes, codebooks, table, padding_idx=PADDING)
    for half in (semantic, hashed):
        assert torch.equal(half[[0, 2]], torch.zeros_like(half[[0, 2]]))
        assert half[1].abs().sum() > 0
    (semantic.sum() + hashed.sum()).backward()
    assert torch.equal(table.grad.nonzero()[:, 0].unique(), torch.tensor([2], device=device))


def test_padding_may_lie_outside_the_catalog(backend, device, generator):
    _, codes, codebooks, table = make_inputs(1, torch.float32, device, generator, NUM_ITEMS)
    item_ids = torch.tensor([3, NUM_ITEMS, -1], device=device)
    for padding_idx in (NUM_ITEMS, -1):
        ids = item_ids[item_ids != (-1 if padding_idx == NUM_ITEMS else NUM_ITEMS)]
        semantic, _ = ops.harmonized_embedding(ids, codes, codebooks, table, padding_idx=padding_idx)
        assert torch.equal(semantic[1], torch.zeros_like(semantic[1]))


def test_sparse_gradient_is_coalesced_and_trains(backend, device, generator):
    item_ids, _, _, table = make_inputs(300, torch.float32, device, generator, NUM_ITEMS)
    weight = torch.nn.Parameter(table)
    _, hashed = ops.harmonized_embedding(item_ids, None, None, weight, sparse=True)
    (weight.grad,) = torch.autograd.grad(hashed.square().sum(), weight)
    assert weight.grad.is_coalesced()
    assert torch.equal(weight.grad.indices()[0], item_ids.unique())
    before = weight.detach().clone()
    torch.optim.SparseAdam([weight], lr=0.1).step()
    assert torch.equal((weight != before).any(1).nonzero()[:, 0], item_ids.unique())


def test_only_wanted_gradients_are_computed(backend, device, generator):
    item_ids, codes, codebooks, table = make_inputs(20, torch.float32, device, generator, NUM_ITEMS)
    for wants_table in (False, True):
        books = [book.clone().requires_grad_(not wants_table) for book in codebooks]
        hash_table = table.clone().requires_grad_(wants_table)
        ops.harmonized_embedding(item_ids, codes, books, hash_table, combine="sum").sum().backward()
        assert (hash_table.grad is not None) == wants_table
        assert all((book.grad is not None) != wants_table for book in books)


@pytest.mark.parametrize("mode", ["multi", "qr", "prefix"])
def test_hash_rows_follow_the_formula(backend, mode, device, generator):
    """The table's columns count how often each row was read."""
    ids = [0, 1, 2, 96, 12_345, 2**31, 2**40 + 7] if mode == "multi" else list(range(NUM_ITEMS))
    codes = torch.stack([torch.randint(0, k, (NUM_ITEMS,), generator=generator) for k in SIZES], 1)
    hashing, num_rows = HASHINGS[mode]
    on_device = hashing._replace(
        constants=None if hashing.constants is None else hashing.constants.to(device)
    )
    _, counts = ops.harmonized_embedding(
        torch.tensor(ids, device=device),
        codes.to(device) if mode == "prefix" else None,
        None,
        torch.eye(num_rows, device=device),
        hashing=on_device,
    )
    for item_id, row in zip(ids, counts.tolist(), strict=True):
        expected = [0] * num_rows
        for index in rows_by_formula(item_id, codes[item_id % NUM_ITEMS].tolist(), hashing, num_rows):
            expected[index] += 1
        assert row == expected


# From the formula in integers of any size, with A = (0x5851F42D4C957F2D, 0x14057B7EF767814F) and
# B = (0xD1342543DE82EF95, 0xF1357AEA2E62A9C5): a saved table must mean the same for ever.
GOLDEN_CONSTANTS = torch.tensor(
    [
        [0x5851F42D4C957F2D, 0x14057B7EF767814F],
        [0xD1342543DE82EF95 - (1 << 64), 0xF1357AEA2E62A9C5 - (1 << 64)],
    ]
)
GOLDEN_MULTI = {  # id: its rows of 31
    0: (2, 29),
    1: (13, 23),
    2: (23, 17),
    96: (6, 12),
    2**31: (22, 27),
    2**40 + 7: (2, 5),
}
GOLDEN_PREFIX = {(0, 0): (9, 17), (3, 1): (10, 11), (4, 10): (18, 19), (4, 9): (18, 0)}  # codes: rows of 23


@pytest.mark.parametrize("mode", ["multi", "prefix"])
def test_hash_rows_are_those_of_the_golden_table(backend, mode, device):
    golden, num_rows = (GOLDEN_MULTI, 31) if mode == "multi" else (GOLDEN_PREFIX, 23)
    ids = list(golden) if mode == "multi" else range(len(golden))
    _, counts = ops.harmonized_embedding(
        torch.tensor(ids, device=device),
        None if mode == "multi" else torch.tensor(list(golden), device=device),
        None,
        torch.eye(num_rows, device=device),
        hashing=Hashing(mode, GOLDEN_CONSTANTS.to(device)),
    )
    rows = [tuple(sorted(row.nonzero()[:, 0].tolist())) for row in counts]
    assert rows == [tuple(sorted(pair)) for pair in golden.values()]


def test_a_table_of_more_than_2_31_elements(backend, tmp_path, device, generator):
    """In a file with a hole, so that only rows that are touched take memory."""
    num_rows, dim = (1 << 31) // 64 + 1000, 64
    file = tmp_path / "table"
    with file.open("wb") as handle:
        handle.truncate(2 * num_rows * dim)
    table = torch.from_file(str(file), shared=True, size=num_rows * dim, dtype=torch.bfloat16)
    table = table.view(num_rows, dim).to(device)
    item_ids = num_rows - 1 - torch.randperm(700, generator=generator).to(device)
    rows = torch.randn(700, dim, generator=generator).to(device, torch.bfloat16)
    table[item_ids] = rows
    table.requires_grad_()
    _, hashed = ops.harmonized_embedding(item_ids, None, None, table, sparse=True)
    assert torch.equal(hashed, rows)
    (grad,) = torch.autograd.grad(hashed, table, rows)
    order = item_ids.argsort()
    assert torch.equal(grad.indices()[0], item_ids[order])
    assert torch.equal(grad.values(), rows[order])
    file.unlink()


def test_quotient_and_remainder_tell_all_items_apart():
    for num_items, divisor in ((97, 10), (100, 10), (5, 5), (7, 1)):
        hashing = Hashing.qr(num_items, divisor)
        rows = {tuple(rows_by_formula(i, [], hashing, 0)) for i in range(num_items)}
        assert len(rows) == num_items


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_backward_is_the_same_bits_every_time(backend, sparse, device, generator):
    """With so many tokens that every step of a backward is shared out among threads."""
    num_rows, num_tokens = 3001, 1_000 if is_interpreted(backend, device) else 20_000
    item_ids, codes, codebooks, table = make_inputs(
        num_tokens, torch.float32, device, generator, num_rows, dim=64
    )
    cotangents = torch.randn(2, num_tokens, 64, generator=generator).to(device).unbind()
    hashing = HASHINGS["multi"][0]
    hashing = hashing._replace(constants=hashing.constants.to(device))
    grads = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 8, 8):
            torch.set_num_threads(threads)
            leaves = [p.clone().requires_grad_() for p in (*codebooks, table)]
            outputs = ops.harmonized_embedding(
                item_ids, codes, leaves[:-1], leaves[-1], hashing=hashing, sparse=sparse
            )
            torch.autograd.backward(outputs, cotangents)
            grads.append([leaf.grad.to_dense() for leaf in leaves])
    finally:
        torch.set_num_threads(before)
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("mode", HASHINGS)
def test_gradcheck(backend, pooling, mode, device, generator):
    hashing, num_rows = HASHINGS[mode]
    hashing = hashing._replace(constants=None if hashing.constants is None else hashing.constants.to(device))
    item_ids, codes, codebooks, table = make_inputs(9, torch.float64, device, generator, num_rows, dim=2)
    leaves = [p.requires_grad_() for p in (*codebooks, table)]

    def function(*parameters):
        return ops.harmonized_embedding(
            item_ids,
            codes,
            parameters[:-1],
            parameters[-1],
            hashing=hashing,
            pooling=pooling,
            padding_idx=PADDING,
        )

    assert torch.autograd.gradcheck(function, leaves, fast_mode=is_interpreted(backend, device))


@pytest.mark.parametrize("combine", [None, "concat"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_opcheck(backend, sparse, combine, device, generator):
    item_ids, codes, codebooks, table = make_inputs(20, torch.float32, device, generator, NUM_ITEMS)
    packed, table = torch.cat(codebooks).requires_grad_(), table.requires_grad_()
    arguments = (
        item_ids,
        codes,
        packed,
        SIZES,
        table,
        "direct",
        None,
        0,
        NUM_ITEMS,
        "sum",
        None,
        combine,
        sparse,
    )
    torch.library.opcheck(torch.ops.h2rec.harmonized_embedding.default, arguments)


@pytest.mark.parametrize("combine", [None, "sum"])
def test_compiles_without_graph_breaks(backend, combine, device, generator):
    item_ids, codes, codebooks, table = make_inputs(20, torch.float32, device, generator, 31)
    hashing = HASHINGS["multi"][0]
    hashing = hashing._replace(constants=hashing.constants.to(device))

    def function(*parameters):
        out = ops.harmonized_embedding(
            item_ids, codes, parameters[:-1], parameters[-1], hashing=hashing, combine=combine
        )
        return out.square().sum() if combine else out[0].square().sum() + out[1].sum()

    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [p.clone().requires_grad_() for p in (*codebooks, table)]
        f(*leaves).backward()
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512"])
def test_every_instruction_set(capability):
    """The tests of numbers once more, in a process that uses nothing wider."""
    numbers = "cpp and (dtypes or combine or concatenated or strided or padding)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", numbers]
    environment = os.environ | {"H2REC_CPU_CAPABILITY": capability}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode in (0, 5), result.stdout  # 5: no test, for the extension is not built


IDS = torch.tensor([0, 1])
CODES = torch.zeros(4, 2, dtype=torch.int64)
BOOKS = torch.zeros(2, 3, 5)
TABLE = torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            (IDS.float(), CODES, BOOKS, TABLE),
            {},
            TypeError,
            "item_ids must be an integer tensor, got torch.float32",
        ),
        ((IDS, CODES.float(), BOOKS, TABLE), {}, TypeError, "codes must be an integer tensor"),
        ((IDS, CODES[0], BOOKS, TABLE), {}, ValueError, r"codes must have shape \[num_items, L\], got \[2\]"),
        ((IDS, CODES[:, :1], BOOKS, TABLE), {}, ValueError, "codes has 1 levels, but codebooks has 2"),
        ((IDS, None, BOOKS, TABLE), {}, ValueError, "codebooks need codes, got None"),
        ((IDS, CODES, None, None), {}, ValueError, "must not both be None"),
        (
            (IDS, CODES, BOOKS[:, :0], TABLE),
            {},
            ValueError,
            r"codebooks\[0\] must have at least one codeword",
        ),
        ((IDS, CODES, BOOKS[0], TABLE), {}, ValueError, r"codebooks must have shape \[L, K, D\]"),
        ((IDS, CODES, BOOKS, TABLE[0]), {}, ValueError, r"hash_table must have shape \[R, D\], got \[5\]"),
        ((IDS, CODES, BOOKS, TABLE.int()), {}, TypeError, "hash_table must be a floating-point tensor"),
        ((IDS, CODES, BOOKS, TABLE.half()), {}, TypeError, "hash_table is torch.float16, but codebooks is"),
        ((IDS, None, None, TABLE[:0]), {}, ValueError, "hash_table must have at least one row"),
        ((IDS, CODES, BOOKS, TABLE[:3]), {}, ValueError, "a row for each of the 4 items, got 3 rows"),
        (
            (IDS, CODES, BOOKS, TABLE),
            {"pooling": "max"},
            ValueError,
            "pooling must be one of 'sum'.*got 'max'",
        ),
        (
            (IDS, CODES, BOOKS, TABLE),
            {"combine": "max"},
            ValueError,
            "combine must be one of None, 'sum'.*'max'",
        ),
        ((IDS, CODES, BOOKS, None), {"combine": "sum"}, ValueError, "needs both codebooks and hash_table"),
        (
            (IDS, CODES, BOOKS, TABLE),
            {"combine": "sum", "pooling": "levels"},
            ValueError,
            "other than 'levels'",
        ),
        (
            (IDS, CODES, BOOKS, TABLE),
            {"combine": "sum", "pooling": "concat"},
            ValueError,
            "got 10 from.*5 from",
        ),
        (
            (IDS, CODES, BOOKS, TABLE),
            {"hashing": Hashing.qr(4, 2)._replace(divisor=3)},
            ValueError,
            "hash_table must have divisor .* = 5 rows for 4 items and divisor 3, got 4",
        ),
        (
            (IDS, CODES, BOOKS, TABLE),
            {"hashing": Hashing("qr")},
            ValueError,
            "hashing.divisor must be at least 1",
        ),
        ((IDS, CODES, BOOKS, TABLE), {"hashing": Hashing("multi")}, ValueError, "use Hashing.multi"),
        ((IDS, CODES, BOOKS, TABLE), {"hashing": Hashing("md5")}, ValueError, "hashing.mode must be one of"),
        ((IDS, None, None, TABLE), {"hashing": Hashing.prefix(2)}, ValueError, "'prefix' needs codes"),
        (
            (IDS, CODES, BOOKS, TABLE),
            {"hashing": Hashing.prefix(3)},
            ValueError,
            "for 3 levels, but codes has 2",
        ),
        (
            (IDS, CODES, BOOKS, TABLE),
            {"hashing": Hashing("multi", torch.zeros(2, 2))},
            TypeError,
            "hashing.constants must be int64",
        ),
        (
            (IDS, CODES, BOOKS, TABLE),
            {"hashing": Hashing("multi", torch.zeros(2, dtype=torch.int64))},
            ValueError,
            r"hashing.constants must have shape \[k, 2\]",
        ),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.harmonized_embedding(*arguments, **options)
    meta = [argument if argument is None else argument.to("meta") for argument in arguments]
    if (hashing := options.get("hashing")) is not None and hashing.constants is not None:
        options = {**options, "hashing": hashing._replace(constants=hashing.constants.to("meta"))}
    with pytest.raises(error, match=message):
        ops.harmonized_embedding(*meta, **options)


@pytest.mark.parametrize(
    ("item_ids", "message"),
    [
        ([0, 4], r"item_ids must lie in \[0, 4\), but 1 of 2 do not \(value 4\)"),
        ([-1, 0, -2], r"2 of 3 do not \(values -1, -2\)"),
        (list(range(4, 20)), r"16 of 16 do not \(values 4, 5, 6, 7, 8, \.\.\.\)"),
    ],
)
def test_ids_out_of_range(backend, item_ids, message, monkeypatch, device):
    monkeypatch.setenv("H2REC_CHECK_VALUES", "1")
    tensors = [tensor.to(device) for tensor in (torch.tensor(item_ids), CODES, BOOKS, TABLE)]
    with pytest.raises(ValueError, match=message):
        ops.harmonized_embedding(*tensors)


def test_codes_out_of_range(backend, monkeypatch, device):
    monkeypatch.setenv("H2REC_CHECK_VALUES", "1")
    codes = CODES.clone()
    codes[1] = torch.tensor([2, 3])
    tensors = [tensor.to(device) for tensor in (IDS, codes, BOOKS, TABLE)]
    with pytest.raises(
        ValueError, match=r"codes\[:, 1\] of these items must lie in \[0, 3\), .* \(value 3\)"
    ):
        ops.harmonized_embedding(*tensors)
    ops.harmonized_embedding(IDS[:1].to(device), *tensors[1:])  # the others are not read


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hashing.multi(0), "num_hashes must be at least 1, got 0"),
        (lambda: Hashing.prefix(0), "num_levels must be at least 1, got 0"),
        (lambda: Hashing.qr(10, 0), r"divisor must lie in \[1, num_items = 10\], got 0"),
        (lambda: Hashing.qr(10, 11), "divisor must lie in .* got 11"),
    ],
)
def test_bad_hashing(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_hash_constants_are_drawn_from_the_seed():
    assert torch.equal(Hashing.multi(4, seed=3).constants, Hashing.multi(4, seed=3).constants)
    assert not torch.equal(Hashing.multi(4, seed=3).constants, Hashing.multi(4, seed=4).constants)
    assert (Hashing.multi(64, seed=0).constants[:, 0] % 2 == 1).all()
    assert (Hashing.multi(64, seed=0).constants < 0).any()  # all 64 bits are used
