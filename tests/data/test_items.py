import numpy as np
import polars as pl
import pytest

from h2rec.data import ItemCatalog, read_items

BIG = 2**63 + 5


def test_reads_every_format_alike(tmp_path):
    frame = pl.DataFrame({"id": [30, 10, 20], "name": ["c", "a", None], "genre": ["x y", None, None]})
    frame.write_parquet(tmp_path / "items.parquet")
    frame.write_csv(tmp_path / "items.csv")
    frame.write_csv(tmp_path / "items.tsv", separator="\t")
    (tmp_path / "items.item").write_text(
        "id:token\tname:token_seq\tgenre:token_seq\n30\tc\tx y\n10\ta\t\n20\t\t\n"
    )
    for extension in ("parquet", "csv", "tsv", "item"):
        catalog = read_items(tmp_path / f"items.{extension}", item="id", title="name", text=["name", "genre"])
        assert catalog.ids.to_list() == [30, 10, 20]
        assert catalog.titles == ["c", "a", "20"]
        assert catalog.texts == ["c. x y", "a", ""]
        assert catalog.num_items == 3
        assert catalog.index_of([20, 30, 20]).tolist() == [2, 0, 2]


def test_reads_only_what_is_named(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,text\n1,one\n2,two\n")
    catalog = read_items(tmp_path / "items.csv", text="text")
    assert catalog.titles is None
    assert catalog.texts == ["one", "two"]
    assert read_items(tmp_path / "items.csv").texts is None


def test_recbole_columns_may_be_named_with_their_type_and_quotes_are_text(tmp_path):
    path = tmp_path / "items.item"
    path.write_text('item_id:token\tmovie:title:token_seq\n1\t"Open\n2\tClose"\n')
    catalog = read_items(path, item="item_id:token", title="movie:title")
    assert catalog.titles == ['"Open', 'Close"']


def test_numbers_make_titles_and_categories_make_ids(tmp_path):
    ids = pl.Series(["a", "b"], dtype=pl.Categorical)
    pl.DataFrame({"item_id": ids, "year": [1999, 2000]}).write_parquet(tmp_path / "items.parquet")
    catalog = read_items(tmp_path / "items.parquet", title="year")
    assert catalog.titles == ["1999", "2000"]
    assert catalog.index_of(["b"]).tolist() == [1]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (["7", "12"], [7, 12]),
        (["007", "7"], ["007", "7"]),
        (["-0", "1"], ["-0", "1"]),
        (["1.0", "2"], ["1.0", "2"]),
        ([str(BIG), "1"], [str(BIG), "1"]),
    ],
    ids=["integers", "leading-zeros", "minus-zero", "decimals", "beyond-int64"],
)
def test_text_ids_become_integers_only_where_nothing_is_lost(tmp_path, written, expected):
    (tmp_path / "items.csv").write_text("\n".join(["item_id", *written]))
    pl.DataFrame({"item_id": written}).write_parquet(tmp_path / "items.parquet")
    assert read_items(tmp_path / "items.csv").ids.to_list() == expected
    assert read_items(tmp_path / "items.parquet").ids.to_list() == expected


def test_ids_beyond_int64_stay_exact():
    catalog = ItemCatalog(pl.Series([BIG, BIG + 1, 3], dtype=pl.UInt64))
    assert catalog.index_of(pl.Series([BIG + 1], dtype=pl.UInt64)).tolist() == [1]
    assert catalog.index_of([3]).tolist() == [2]
    with pytest.raises(ValueError, match=r"not among the 3 items of the catalog: -1"):
        catalog.index_of([-1])


@pytest.mark.parametrize(
    ("known", "wanted"),
    [(["a", "7"], [7]), (["a", "7"], ["7"]), ([3, 7], ["7"]), ([3, 7], np.array([7], dtype=np.int16))],
)
def test_index_of_matches_integers_and_their_text(known, wanted):
    assert ItemCatalog(pl.Series(known)).index_of(wanted).tolist() == [1]


def test_index_of_does_not_take_one_id_for_another():
    with pytest.raises(ValueError, match=r"not among the 2 items of the catalog: '007', 'x'"):
        ItemCatalog(pl.Series([3, 7])).index_of(["7", "007", "x", "007"])


def test_index_of_nothing_and_of_too_much():
    catalog = ItemCatalog(pl.Series([3, 7]))
    assert catalog.index_of([]).tolist() == []
    with pytest.raises(ValueError, match=r"catalog: 10, 11, 12, 13, 14, \.\.\. \(8 in all\)"):
        catalog.index_of(range(10, 18))
    with pytest.raises(ValueError, match=r"raw_ids: 1 of 2 ids are null, the first in row 1"):
        catalog.index_of([3, None])
    with pytest.raises(ValueError, match=r"raw_ids: expected integers or strings, all of one kind"):
        catalog.index_of([3, "x"])
    with pytest.raises(
        ValueError, match=r"raw_ids: expected integers of up to 64 bits or strings, got Float64"
    ):
        catalog.index_of([3.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": pl.Series([], dtype=pl.Int64)}, "ids: expected at least one item, got none"),
        ({"ids": pl.Series([1, 2, 2, 1])}, "ids: expected one row per item, got several for 1, 2"),
        ({"ids": pl.Series([1, None])}, "ids: 1 of 2 ids are null, the first in row 1"),
        ({"ids": pl.Series([True])}, "ids: expected integers of up to 64 bits or strings, got Boolean"),
        ({"ids": pl.Series([1, 2]), "titles": ["a"]}, "titles: expected 2, one per item, got 1"),
        ({"ids": pl.Series([1, 2]), "texts": ["a"] * 3}, "texts: expected 2, one per item, got 3"),
    ],
)
def test_catalog_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        ItemCatalog(**arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "item_id\n1\n2\n1\n",
            r"items\.csv: column 'item_id': expected one row per item, got several for 1$",
        ),
        ("item_id,x\n1,1\n,2\n", r"items\.csv: column 'item_id': 1 of 2 ids are null, the first in row 1"),
        ("sku,name\n1,a\n", r"items\.csv: no column 'item_id' \(argument item\); its columns are: sku, name"),
        ("item_id\n", r"items\.csv: expected rows, got a header with none below it"),
    ],
    ids=["repeated", "null", "missing-column", "no-rows"],
)
def test_read_items_names_file_and_column(tmp_path, content, message):
    (tmp_path / "items.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_items(tmp_path / "items.csv")


def test_missing_text_column_names_the_argument(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,a\n1,b\n")
    with pytest.raises(
        ValueError, match=r"no column 'genre' \(argument text\[1\]\); its columns are: item_id, a"
    ):
        read_items(tmp_path / "items.csv", text=["a", "genre"])
    with pytest.raises(ValueError, match=r"no column 'name' \(argument title\)"):
        read_items(tmp_path / "items.csv", title="name")


def test_text_of_a_wrong_type(tmp_path):
    pl.DataFrame({"item_id": [1], "tags": [["a", "b"]]}).write_parquet(tmp_path / "items.parquet")
    with pytest.raises(
        ValueError, match=r"items\.parquet: column 'tags': expected text or numbers, got List"
    ):
        read_items(tmp_path / "items.parquet", text="tags")
