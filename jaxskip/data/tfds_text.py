"""Text sets of TensorFlow Datasets, read through ``as_data_source``: no TensorFlow."""

import logging
import os
import re
from collections.abc import Sequence

_log = logging.getLogger(__name__)


def tfds_documents(
    source,
    split: str = "train",
    *,
    feature: str | None = None,
    data_dir: str | os.PathLike | None = None,
    download: bool = True,
) -> Sequence[str]:
    """The documents of one split of a TFDS text set, with random access: nothing is read before it is indexed.

    ``source``: ``"tfds:NAME[:VERSION][:FEATURE]"`` (NAME as TFDS spells it, a config after a slash) or a
    ``tfds.core.DatasetBuilder``; ``split``: a TFDS split such as ``"train[:10%]"``; ``feature``: the text feature, by
    default ``text`` or else the only ``Text`` feature there is. ``data_dir``: TFDS's data directory. A set that is not
    there is downloaded and prepared as array_record files unless ``download`` is False.

    Raises FileNotFoundError for a set that is not there when ``download`` is False, RuntimeError for a download that
    failed (without a network TFDS retries for minutes first: a log message says so before), ValueError for an unknown
    set, an ambiguous feature, a document that is not UTF-8, or files that hold fewer records than they should.

    >>> import tempfile
    >>> from jaxskip.data.stdlib_text import StdlibText
    >>> directory = tempfile.TemporaryDirectory()
    >>> documents = tfds_documents(StdlibText(data_dir=directory.name))  # doctest: +ELLIPSIS
    Downloading and preparing ... reuse this data.
    >>> len(documents) > 300, type(documents[7])
    (True, <class 'str'>)
    >>> directory.cleanup()
    """
    builder, named = _open(source, data_dir)
    _prepare(builder, download)
    return _Documents(builder, split, _text_feature(builder, feature or named))


def is_tfds(source) -> bool:
    return hasattr(source, "as_data_source") or (isinstance(source, str) and source.startswith("tfds:"))


def tfds_name(source) -> str:
    return source if isinstance(source, str) else f"tfds:{source.info.full_name}"


def tfds_texts(source, *, data_dir, download) -> tuple[Sequence[str], Sequence[str] | None]:
    """Documents of the train split, and of the validation split or None where the set has none."""
    builder, feature = _open(source, data_dir)
    _prepare(builder, download)
    feature = _text_feature(builder, feature)
    validation = next((name for name in ("validation", "valid", "val") if name in builder.info.splits), None)
    return (
        _Documents(builder, "train", feature),
        _Documents(builder, validation, feature) if validation else None,
    )


class _Documents(Sequence[str]):
    def __init__(self, builder, split: str, feature: str):
        self._name = f"{builder.info.full_name} {split}"
        self._feature = feature
        self._source = builder.as_data_source(split)
        expected = builder.info.splits[split].num_examples
        if len(self._source) != expected:
            raise ValueError(
                f"{self._name} has {len(self._source)} records where its own index says {expected}: prepare it again "
                'with file_format="array_record" (TFDS loses rows in parquet files)'
            )

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index):
        try:
            return self._source[index][self._feature].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"document {index} of {self._name} is not UTF-8: {error}") from error


def _open(source, data_dir):
    """(builder, feature named in the source or None)"""
    if not isinstance(source, str):
        if data_dir is not None:
            raise ValueError("a builder has its own data_dir: give data_dir with a 'tfds:NAME' only")
        return source, None
    import tensorflow_datasets as tfds

    name, *rest = source.removeprefix("tfds:").split(":")
    if rest and re.fullmatch(r"[\d.*]+", rest[0]):
        name = f"{name}:{rest.pop(0)}"
    if not name or len(rest) > 1:
        raise ValueError(f"a TFDS source is 'tfds:NAME[:VERSION][:FEATURE]', got {source!r}")
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        # The original message lists more than a thousand names.
        raise ValueError(
            f"TFDS has no set {name!r}: look it up at tensorflow.org/datasets/catalog, import the module that defines "
            "its builder, or give the data_dir where it was prepared"
        ) from None
    return builder, rest[0] if rest else None


def _prepare(builder, download: bool) -> None:
    name, directory = builder.info.full_name, builder.data_dir
    if builder.data_path.exists():
        return
    if not download:
        raise FileNotFoundError(
            f"the TFDS set {name} is not in {directory}: call with download=True on a machine with a network, "
            "or copy its directory there from one that has it (prepared as array_record)"
        )
    _log.warning(
        "preparing the TFDS set %s in %s; if it has to be downloaded and there is no network, TFDS tries for about "
        "four minutes before it gives up",
        name,
        directory,
    )
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # whatever the set's own code and the network throw
        raise RuntimeError(
            f"the TFDS set {name} could not be prepared in {directory}: {type(error).__name__}: {error}. Without a "
            "network use an offline source ('pysrc', a text file), or copy a directory prepared elsewhere"
        ) from error


def _text_feature(builder, feature: str | None) -> str:
    import tensorflow_datasets as tfds

    texts = sorted(name for name, kind in builder.info.features.items() if isinstance(kind, tfds.features.Text))
    if feature is None and ("text" in texts or len(texts) == 1):
        return "text" if "text" in texts else texts[0]
    if feature is not None and feature in texts:
        return feature
    raise ValueError(
        f"{builder.info.full_name} has the text features {texts}, asked for was {feature}: name one, as in "
        "'tfds:NAME:FEATURE' or tfds_documents(..., feature=FEATURE)"
    )
