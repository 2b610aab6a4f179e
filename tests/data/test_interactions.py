import datetime

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from h2rec.data import InteractionLog, ItemCatalog, read_interactions

ROWS = {  # user b first in the file, times out of order, one tie
    "user_id": ["b", "a", "b", "a", "b"],
    "item_id": [5, 6, 7, 6, 5],
    "timestamp": [30, 2, 10, 1, 10],
}
SEQUENCES = {"a": [6, 6], "b": [7, 5, 5]}


def sequences_of(log: InteractionLog) -> dict:
    raw = log.catalog.ids.to_numpy()[log.items].tolist()
    return {
        user: raw[start:end]
        for user, start, end in zip(log.users, log.offsets, log.offsets[1:], strict=False)
    }


@pytest.fixture
def path(tmp_path):
    pl.DataFrame(ROWS).write_parquet(tmp_path / "log.parquet")
    return tmp_path / "log.parquet"


def test_reads_every_format_alike(tmp_path, path):
    frame = pl.DataFrame(ROWS)
    frame.write_csv(tmp_path / "log.csv")
    frame.write_csv(tmp_path / "log.tsv", separator="\t")
    recbole = frame.rename(
        {"user_id": "user_id:token", "item_id": "item_id:token", "timestamp": "timestamp:float"}
    )
    recbole.write_csv(tmp_path / "log.inter", separator="\t")
    for name in ("log.parquet", "log.csv", "log.tsv", "log.inter"):
        log = read_interactions(tmp_path / name)
        assert sequences_of(log) == SEQUENCES, name
        assert (log.num_users, log.num_items, log.num_interactions) == (2, 3, 5)
        assert log.items.dtype == log.offsets.dtype == np.int64


def test_columns_are_named_by_the_user(tmp_path):
    (tmp_path / "log.tsv").write_text("when\twho\twhat\n2\tu\tx\n1\tu\ty\n")
    log = read_interactions(tmp_path / "log.tsv", user="who", item="what", order="when")
    assert sequences_of(log) == {"u": ["y", "x"]}


def test_order_column_is_found_or_the_file_order_stands(tmp_path):
    for name in ("timestamp", "time", "order"):
        (tmp_path / "log.csv").write_text(f"user_id,item_id,{name}\n1,5,2\n1,6,1\n")
        assert sequences_of(read_interactions(tmp_path / "log.csv")) == {1: [6, 5]}
    (tmp_path / "log.csv").write_text("user_id,item_id,rank\n1,5,2\n1,6,1\n")
    assert sequences_of(read_interactions(tmp_path / "log.csv")) == {1: [5, 6]}


def test_timestamp_goes_before_order(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,order,timestamp\n1,5,1,2\n1,6,2,1\n")
    assert sequences_of(read_interactions(tmp_path / "log.csv")) == {1: [6, 5]}


@pytest.mark.parametrize(
    "times",
    [
        ["2024-02-01", "2023-12-31"],
        ["2024-02-01 10:00:00", "2024-02-01 09:59:59"],
        ["2024-02-01T10:00:00+00:00", "2024-02-01T09:00:00+00:00"],
        ["1600000000000000002", "1600000000000000001"],
        ["10", "9"],
        ["1e3", "2.5"],
    ],
)
def test_times_written_as_text(tmp_path, times):
    (tmp_path / "log.csv").write_text(f"user_id,item_id,time\n1,5,{times[0]}\n1,6,{times[1]}\n")
    assert sequences_of(read_interactions(tmp_path / "log.csv")) == {1: [6, 5]}


def test_times_of_parquet(tmp_path):
    times = [datetime.datetime(2024, 1, 2), datetime.datetime(2024, 1, 1)]
    pl.DataFrame({"user_id": [1, 1], "item_id": [5, 6], "time": times}).write_parquet(
        tmp_path / "log.parquet"
    )
    assert sequences_of(read_interactions(tmp_path / "log.parquet")) == {1: [6, 5]}


@given(
    rows=st.lists(
        st.tuples(st.sampled_from(["u", "v", "10", "9"]), st.integers(-3, 3), st.integers(0, 3)), min_size=1
    )
)
def test_agrees_with_the_obvious_way(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("logs") / "log.csv"
    path.write_text("user_id,item_id,order\n" + "".join(f"{u},{i},{o}\n" for u, i, o in rows))
    expected = {}
    for user, item, _ in sorted(rows, key=lambda row: row[2]):  # sorted() is stable
        expected.setdefault(user, []).append(item)
    log = read_interactions(path)
    assert {str(user): items for user, items in sequences_of(log).items()} == expected
    assert log.users.is_sorted()
    assert log.catalog.ids.to_list() == sorted({item for _, item, _ in rows})


def test_catalog_decides_the_rows(path):
    log = read_interactions(path, catalog=ItemCatalog(pl.Series([7, 9, 6, 5])))
    assert log.num_items == 4
    assert log.items.tolist() == [2, 2, 0, 3, 3]


def test_catalog_of_strings_finds_integers(path):
    log = read_interactions(path, catalog=ItemCatalog(pl.Series(["x", "7", "6", "5"])))
    assert log.items.tolist() == [2, 2, 1, 3, 3]


def test_num_items_makes_raw_ids_the_rows(path):
    log = read_interactions(path, num_items=9)
    assert log.num_items == 9
    assert log.items.tolist() == [6, 6, 7, 5, 5]


def test_index_of_user(path, tmp_path):
    log = read_interactions(path)
    assert [log.index_of_user("a"), log.index_of_user("b")] == [0, 1]
    with pytest.raises(ValueError, match="no user 'c' among the 2 users of the log"):
        log.index_of_user("c")
    (tmp_path / "log.csv").write_text("user_id,item_id\n70,1\n8,1\n")
    log = read_interactions(tmp_path / "log.csv")
    assert [log.index_of_user(70), log.index_of_user("70"), log.index_of_user(8)] == [1, 1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"user": "uid"},
            r"log\.parquet: no column 'uid' \(argument user\); its columns are: user_id, item_id, timestamp",
        ),
        ({"item": "sku"}, r"no column 'sku' \(argument item\)"),
        ({"order": "when"}, r"no column 'when' \(argument order\)"),
        ({"order": "user_id"}, r"column 'user_id': expected a number or a time to order by, got 'b'"),
        ({"num_items": 7}, r"log\.parquet: column 'item_id': items without a row in the catalog of 7: 7$"),
        ({"num_items": 0}, "num_items: expected at least 1, got 0"),
        (
            {"item": "user_id", "num_items": 7},
            r"column 'user_id': without a file of items the ids must be row numbers, integers in \[0, 7\), got 'b'",
        ),
        (
            {"catalog": ItemCatalog(pl.Series([6]))},
            r"column 'item_id': items without a row in the catalog of 1: 5, 7",
        ),
        (
            {"catalog": ItemCatalog(pl.Series([5, 6, 7])), "num_items": 4},
            "num_items: expected 3 as in the catalog, or None, got 4",
        ),
    ],
)
def test_refuses(path, arguments, message):
    with pytest.raises(ValueError, match=message):
        read_interactions(path, **arguments)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user_id": [1, None]}, r"column 'user_id': 1 of 2 ids are null, the first in row 1"),
        ({"item_id": [None, 4]}, r"column 'item_id': 1 of 2 ids are null, the first in row 0"),
        (
            {"user_id": [1.5, 2.0]},
            r"column 'user_id': expected integers of up to 64 bits or strings, got Float64",
        ),
        (
            {"item_id": [[1], [2]]},
            r"column 'item_id': expected integers of up to 64 bits or strings, got List",
        ),
        ({"order": [1, None]}, r"column 'order': 1 of 2 rows have no value to order by"),
        (
            {"order": [1.0, float("nan")]},
            r"column 'order': 1 of 2 rows are NaN, which has no place in an order",
        ),
        ({"order": [True, False]}, r"column 'order': expected a number or a time to order by, got Boolean"),
    ],
)
def test_refuses_columns(tmp_path, columns, message):
    pl.DataFrame({"user_id": [1, 2], "item_id": [3, 4], **columns}).write_parquet(tmp_path / "log.parquet")
    with pytest.raises(ValueError, match=r"log\.parquet: " + message):
        read_interactions(tmp_path / "log.parquet")


@pytest.mark.parametrize(
    ("offsets", "items", "message"),
    [
        ([0, 2], [0, 1], r"offsets: expected 3 ascending numbers from 0 to 2, got 2 that begin \[0, 2\]"),
        ([0, 3, 2], [0, 1], "offsets: expected 3 ascending numbers from 0 to 2"),
        ([0, 1, 1], [0, 1], "offsets: expected 3 ascending numbers from 0 to 2"),
        ([0.0, 1.0, 2.0], [0, 1], r"offsets: expected integers \[n\], got float64 \[3\]"),
        ([0, 1, 2], [0, 3], r"items: expected ids in \[0, 3\), got 0 to 3"),
        ([0, 1, 2], [-1, 2], r"items: expected ids in \[0, 3\), got -1 to 2"),
        ([0, 1, 2], [[0, 1]], r"items: expected integers \[n\], got int64 \[1, 2\]"),
    ],
)
def test_log_refuses(offsets, items, message):
    catalog = ItemCatalog(pl.Series(["x", "y", "z"]))
    with pytest.raises(ValueError, match=message):
        InteractionLog(pl.Series([1, 2]), catalog, np.array(offsets), np.array(items))
