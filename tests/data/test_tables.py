import polars as pl
import pytest

from h2rec.data import read_interactions

HEADER = b"user_id,item_id\n"


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"log\.csv: no such file"):
        read_interactions(tmp_path / "log.csv")


def test_directory(tmp_path):
    (tmp_path / "log.parquet").mkdir()
    with pytest.raises(ValueError, match=r"log\.parquet: expected a file, got a directory"):
        read_interactions(tmp_path / "log.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "log.txt",
            b"x",
            r"expected one of \.parquet, \.csv, \.tsv, \.inter, \.item, got the extension '\.txt'",
        ),
        ("log.csv", b"", "the file is empty"),
        ("log.parquet", b"", "the file is empty"),
        ("log.inter", b"", "the file is empty"),
        ("log.csv", HEADER, "expected rows, got a header with none below it"),
        ("log.csv", b"\n\n", "cannot be read as csv: empty CSV"),
        ("log.csv", HEADER + b"\xe9,2\n", "cannot be read as csv: invalid utf-8"),
        ("log.csv", HEADER + b"1,2,3\n", "cannot be read as csv: found more fields"),
        ("log.csv", b"user_id;item_id\n1;2\n", r"no column 'user_id' .* its columns are: user_id;item_id"),
        ("log.inter", b"user_id:token\tuser_id:float\n1\t2\n", "cannot be read as inter: .*duplicate"),
        ("log.parquet", b"PAR1 and then nothing of use", "cannot be read as parquet"),
    ],
)
def test_file_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: {message}") as error:
        read_interactions(tmp_path / name)
    assert "\n" not in str(error.value)


def test_truncated_parquet(tmp_path):
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user_id": range(1000), "item_id": range(1000)}).write_parquet(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"log\.parquet: cannot be read as parquet"):
        read_interactions(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("crlf.csv", b"user_id,item_id\r\na,1\r\nb,2\r\n"),
        ("byte-order-mark.csv", b"\xef\xbb\xbfuser_id,item_id\na,1\nb,2\n"),
        ("upper.CSV", b"user_id,item_id\na,1\nb,2"),
        ("star*[1].csv", b"user_id,item_id\na,1\nb,2\n"),
        ("quoted.tsv", b'"user_id"\titem_id\n"a"\t1\nb\t2\n'),
        ("untyped.inter", b"user_id\titem_id\na\t1\nb\t2\n"),
    ],
)
def test_text_files_as_people_have_them(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    log = read_interactions(tmp_path / name)
    assert log.users.to_list() == ["a", "b"]
    assert log.catalog.ids.to_list() == [1, 2]
