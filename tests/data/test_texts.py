import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxskip.data import load_texts, texts


def test_pysrc_is_the_standard_library_in_order_and_nothing_else():
    names = [name for name, _ in texts.stdlib_files()]
    assert names == sorted(set(names))
    assert {"argparse.py", "json/decoder.py", "zipfile.py", "zipfile/__init__.py"} & set(names) > {"argparse.py"}
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"site-packages", "test", "tests", "__pycache__"}
    assert not [name for name in names if "_sysconfigdata" in name or name.startswith("config-")]


def test_source_files_are_decoded_by_their_cookie(tmp_path):
    file = tmp_path / "latin.py"
    file.write_bytes("# -*- coding: latin-1 -*-\r\nx = 'é'\r\n".encode("latin-1"))
    assert texts.read_source(file) == "# -*- coding: latin-1 -*-\nx = 'é'\n"


def test_pysrc_cap_and_split_by_file():
    train, validation = load_texts("pysrc", max_bytes=1_000_000)
    assert sum(len(text.encode()) for text in train + validation) == 1_000_000
    train_names, validation_names = texts.split_texts([name for name, _ in texts.stdlib_files()], 0.1)
    assert not set(train_names) & set(validation_names)
    assert len(validation_names) == len(train_names + validation_names) // 10
    # Every document is a whole file, except the one that the cap cuts.
    whole = {texts.read_source(path) for _, path in texts.stdlib_files()[: len(train + validation) + 60]}
    assert len(set(train + validation) - whole) <= 1


@given(st.lists(st.text(max_size=8), max_size=40), st.floats(0.01, 0.99))
@settings(deadline=None, max_examples=25)
def test_split_loses_nothing(documents, fraction):
    train, validation = texts.split_texts(documents, fraction)
    if len(documents) >= 10 and math.floor(len(documents) * fraction):
        assert sorted(train + validation) == sorted(documents)
        assert len(validation) == math.floor(len(documents) * fraction)
    else:
        assert "".join(train + validation) == "".join(documents)
        assert sum(map(len, validation)) == math.floor(sum(map(len, documents)) * fraction)


@given(st.text(alphabet="aé漢🙂", max_size=30), st.integers(1, 60))
@settings(deadline=None, max_examples=25)
def test_cap_keeps_whole_characters(text, cap):
    kept = "".join(texts._capped([text, text], cap))
    assert (text + text).startswith(kept)
    assert min(cap, 2 * len(text.encode())) - 3 <= len(kept.encode()) <= cap


def test_one_file_and_few_files_are_one_text(tmp_path):
    (tmp_path / "b.txt").write_text("0123456789" * 2)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.txt").write_text("x" * 20)
    assert load_texts(tmp_path / "b.txt") == (["012345678901234567"], ["89"])
    assert load_texts(tmp_path / "b.txt", validation_fraction=0.5) == (["0123456789"], ["0123456789"])
    assert load_texts(str(tmp_path)) == (["x" * 20, "0123456789012345"], ["6789"])


def test_a_directory_of_ten_files_is_split_by_file(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text(f"document {i}")
    train, validation = load_texts(tmp_path)
    assert validation == ["document 9", "document 19"]
    assert len(train) == 18


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such text source"):
        load_texts(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match=r"\.txt files nor"):
        load_texts(tmp_path)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8: byte 0xe9 at offset 3.*iconv"):
        load_texts(tmp_path / "latin.txt")
    with pytest.raises(ValueError, match="validation_fraction"):
        load_texts("pysrc", validation_fraction=1.0)
    with pytest.raises(ValueError, match="max_bytes"):
        load_texts("pysrc", max_bytes=0)
