import json
import pathlib
import sys

import numpy as np
import pytest

from jaxskip.data import ByteTokenizer, GrainBatches, load_corpus, load_texts, tfds_documents

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")

import tensorflow_datasets as tfds

from jaxskip.data.stdlib_text import StdlibText
from jaxskip.data.texts import read_source, stdlib_files

VERSES = [f"verse number {i}: é" for i in range(30)]


class JaxskipTestVerses(tfds.core.GeneratorBasedBuilder):
    """Two text features and a validation split."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = pathlib.Path(__file__).parent  # TFDS cannot find a test module by its name

    def _info(self):
        features = {"verse": tfds.features.Text(), "note": tfds.features.Text(), "number": np.int64}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 25), "validation": self._generate_examples(25, 30)}

    def _generate_examples(self, start, stop):
        for i in range(start, stop):
            yield i, {"verse": VERSES[i].encode(), "note": b"\xff" if i == 3 else b"a note", "number": i}


class JaxskipTestUnreachable(JaxskipTestVerses):
    pkg_dir_path = pathlib.Path(__file__).parent

    def _split_generators(self, dl_manager):
        raise ConnectionError("name or service not known")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    for builder in (StdlibText, JaxskipTestVerses):
        builder(data_dir=directory).download_and_prepare(file_format="array_record")
    return directory


def test_named_feature_and_its_own_validation_split(data_dir):
    train, validation = load_texts("tfds:jaxskip_test_verses:verse", data_dir=data_dir, download=False)
    assert (sorted(train), sorted(validation)) == (sorted(VERSES[:25]), sorted(VERSES[25:]))
    assert load_texts("tfds:jaxskip_test_verses:1.0.0:verse", data_dir=data_dir, download=False) == (train, validation)
    capped = load_texts("tfds:jaxskip_test_verses:verse", data_dir=data_dir, download=False, max_bytes=40)
    assert ["".join(part) for part in capped] == ["".join(part).encode()[:40].decode() for part in (train, validation)]


def test_builder_with_train_alone_is_split_by_document(data_dir):
    builder = StdlibText(data_dir=data_dir)
    train, validation = load_texts(builder)
    files = sorted(text for _, path in stdlib_files() if (text := read_source(path)))
    assert sorted(train + validation) == files
    corpus = load_corpus(builder)
    assert (corpus.name, corpus.vocab_size) == ("tfds:stdlib_text/1.0.0", 256)
    assert ByteTokenizer().decode(corpus.validation) == "".join(validation)


def test_documents_are_random_access(data_dir):
    documents = tfds_documents("tfds:jaxskip_test_verses", "train[:10]", feature="verse", data_dir=data_dir)
    assert len(documents) == len(list(documents)) == 10
    assert documents[7] == list(documents)[7]


def test_through_grain_and_back_without_tensorflow(data_dir):
    pytest.importorskip("grain")
    documents = tfds_documents(StdlibText(data_dir=data_dir))

    def make():
        return GrainBatches(documents, ByteTokenizer(), batch_size=2, context_length=16, seed=5)

    first = make()
    for _ in range(7):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    following = [next(first) for _ in range(3)]
    second = make()
    second.set_state(state)
    for batch in following:
        np.testing.assert_array_equal(next(second)["inputs"], batch["inputs"])
    assert bytes(following[0]["inputs"][0].tolist()) in b"\n".join(text.encode() for text in documents)
    assert "tensorflow" not in sys.modules


def test_errors(data_dir, tmp_path):
    with pytest.raises(ValueError, match=r"text features \['note', 'verse'\], asked for was None"):
        load_texts("tfds:jaxskip_test_verses", data_dir=data_dir)
    with pytest.raises(ValueError, match="asked for was number"):
        load_texts("tfds:jaxskip_test_verses:number", data_dir=data_dir)
    with pytest.raises(ValueError, match=r"document \d+ of jaxskip_test_verses/1\.0\.0 train is not UTF-8"):
        load_texts("tfds:jaxskip_test_verses:note", data_dir=data_dir)
    with pytest.raises(ValueError, match="TFDS has no set 'no_such_set'"):
        load_texts("tfds:no_such_set", data_dir=data_dir)
    with pytest.raises(ValueError, match=r"tfds:NAME\[:VERSION\]\[:FEATURE\]"):
        load_texts("tfds:lm1b:text:more", data_dir=data_dir)
    with pytest.raises(ValueError, match="has its own data_dir"):
        load_texts(StdlibText(data_dir=data_dir), data_dir=data_dir)
    with pytest.raises(FileNotFoundError, match=r"lm1b/1\.1\.0 is not in .*download=True"):
        load_texts("tfds:lm1b", data_dir=tmp_path, download=False)


def test_failed_download_is_announced_and_explained(tmp_path, caplog):
    with pytest.raises(RuntimeError, match=r"ConnectionError: name or service.*offline source"):
        load_texts(JaxskipTestUnreachable(data_dir=tmp_path))
    assert "about four minutes" in caplog.text
    assert not list(tmp_path.rglob("*.array_record*"))


def test_rows_lost_by_parquet_are_noticed(tmp_path):
    StdlibText(data_dir=tmp_path).download_and_prepare(file_format="parquet")
    with pytest.raises(ValueError, match=r"records where its own index says \d+.*array_record"):
        load_texts(StdlibText(data_dir=tmp_path))
