import pickle

import numpy as np
import pytest

from jaxskip.data import BPETokenizer, ByteTokenizer, load_corpus, write_token_files


class Digits:
    """Decimal digits, and 10 to end a document."""

    vocab_size, end_of_text = 11, 10

    def encode(self, text):
        return np.array([int(digit) for digit in text], np.uint8)

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return "".join(map(str, ids))


def write_bins(directory, train=(1, 2, 300), validation=(4, 5)):
    for name, ids in (("train.bin", train), ("val.bin", validation)):
        np.array(ids, "<u2").tofile(directory / name)


def test_round_trip(tmp_path):
    write_token_files(tmp_path / "set", iter(["12", "", "345"]), ["6"], Digits())
    assert sorted(file.name for file in (tmp_path / "set").iterdir()) == ["meta.pkl", "train.bin", "val.bin"]
    assert np.fromfile(tmp_path / "set" / "train.bin", "<u2").tolist() == [1, 2, 10, 10, 3, 4, 5, 10]
    corpus = load_corpus(tmp_path / "set")
    assert isinstance(corpus.train, np.memmap)
    assert (corpus.train.dtype, corpus.vocab_size, corpus.tokenizer) == (np.uint16, 11, None)
    assert corpus.validation.tolist() == [6, 10]
    with pytest.raises(FileExistsError, match=r"train\.bin"):
        write_token_files(tmp_path / "set", ["1"], ["2"], Digits())
    with pytest.raises(ValueError, match="max_bytes"):
        load_corpus(tmp_path / "set", max_bytes=10)


def test_writer_refuses_what_uint16_or_an_empty_file_cannot_hold(tmp_path):
    wide = Digits()
    wide.vocab_size = 65537
    with pytest.raises(ValueError, match="65536"):
        write_token_files(tmp_path, ["1"], ["2"], wide)
    with pytest.raises(ValueError, match=r"val\.bin"):
        write_token_files(tmp_path, ["a"], [""], ByteTokenizer())
    write_token_files(tmp_path, ["a"], ["b"], ByteTokenizer())
    assert load_corpus(tmp_path).train.tolist() == [97]


def test_vocab_size_is_meta_then_tokenizer_then_gpt2(tmp_path):
    write_bins(tmp_path, train=(1, 2, 3))
    assert load_corpus(tmp_path).vocab_size == 50304
    assert load_corpus(tmp_path, tokenizer=Digits()).vocab_size == 11
    meta = {"vocab_size": 65, "stoi": {"a": 0}, "itos": {0: "a"}, "split": (1.5, None, [True])}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert load_corpus(tmp_path).vocab_size == 65
    assert load_corpus(tmp_path, tokenizer=Digits()).vocab_size == 65
    with pytest.raises(ValueError, match="256 ids"):
        load_corpus(tmp_path, tokenizer=ByteTokenizer())


class Harmful:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickle.dumps({"vocab_size": Harmful()}), r"print.*not safe"),
        (pickle.dumps({"vocab_size": np.int64(65)}), "not safe"),
        (pickle.dumps({"size": 65}), "positive integer vocab_size"),
        (pickle.dumps([65]), "dictionary"),
        (b"not a pickle", "refused"),
        (b"", "refused"),
    ],
)
def test_meta_is_unpickled_safely(tmp_path, capsys, content, words):
    write_bins(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_corpus(tmp_path)
    assert "must not run" not in capsys.readouterr().out


def test_damaged_files(tmp_path):
    write_bins(tmp_path)
    (tmp_path / "val.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"val\.bin has 3 bytes"):
        load_corpus(tmp_path)
    (tmp_path / "val.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="0 bytes"):
        load_corpus(tmp_path)
    (tmp_path / "val.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"val\.bin"):
        load_corpus(tmp_path)
    write_bins(tmp_path, train=(1, 60000))
    with pytest.raises(ValueError, match="token id 60000"):
        load_corpus(tmp_path)


def test_bpe_tokens_go_through_files(tmp_path):
    pytest.importorskip("tokenizers")
    texts = ["the cat sat", "the hat sat"]
    bpe = BPETokenizer.train(texts, vocab_size=262)
    write_token_files(tmp_path, texts, texts[:1], bpe)
    corpus = load_corpus(tmp_path, tokenizer=bpe)
    assert corpus.vocab_size == bpe.vocab_size
    assert bpe.decode(corpus.train) == "the cat sat<|endoftext|>the hat sat<|endoftext|>"
