"""Where text comes from: Python's own standard library, text files, TensorFlow Datasets."""

import math
import os
import pathlib
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator

from jaxskip.data.tfds_text import is_tfds, tfds_texts

PYSRC_MAX_BYTES = 8_000_000
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def load_texts(
    source="pysrc",
    *,
    validation_fraction: float = 0.1,
    max_bytes: int | None = None,
    data_dir: str | os.PathLike | None = None,
    download: bool = True,
) -> tuple[list[str], list[str]]:
    """Training and validation documents of a source.

    ``source``: ``"pysrc"``, the source code of Python's standard library (tests and installed packages left out, files
    in the order of their relative paths, each decoded by its coding cookie, the first 8,000,000 UTF-8 bytes unless
    ``max_bytes`` says otherwise); the path of a UTF-8 text file, or of a directory of them (``*.txt``, at any depth);
    ``"tfds:NAME[:VERSION][:FEATURE]"`` or a ``tfds.core.DatasetBuilder`` (see ``tfds_documents`` for ``data_dir`` and
    ``download``).

    Ten documents or more are split by document: evenly spaced ones, ``validation_fraction`` of them, are validation, so
    no file stands on both sides. Fewer are one text, whose last ``validation_fraction`` (in characters) is validation.
    A TFDS set with a validation split uses that. ``max_bytes`` keeps only the first UTF-8 bytes of the source (of each
    split, where it has its own) and cuts the last document there. Empty documents are left out.

    Raises FileNotFoundError for a missing path, ValueError for text that is not UTF-8 and for numbers out of range.

    >>> train, validation = load_texts("pysrc", max_bytes=500_000)
    >>> "import" in train[0], not set(train) & set(validation)
    (True, True)
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, got {validation_fraction}")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
    if is_tfds(source):
        train, validation = tfds_texts(source, data_dir=data_dir, download=download)
        if validation is not None:
            return _capped(train, max_bytes), _capped(validation, max_bytes)
        return split_texts(_capped(train, max_bytes), validation_fraction)
    if source == "pysrc":
        documents = _capped(_stdlib_texts(), max_bytes or PYSRC_MAX_BYTES)
    else:
        documents = _capped(map(_read_utf8, _text_files(pathlib.Path(source))), max_bytes)
    return split_texts(documents, validation_fraction)


def split_texts(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """(train, validation), by document when there are ten and the fraction is one of them, else within the text."""
    if len(documents) >= 10 and math.floor(len(documents) * fraction):
        held_out = [math.floor((i + 1) * fraction) > math.floor(i * fraction) for i in range(len(documents))]
        train = [text for text, held in zip(documents, held_out, strict=True) if not held]
        return train, [text for text, held in zip(documents, held_out, strict=True) if held]
    total = sum(map(len, documents))
    left = total - math.floor(total * fraction)
    train, validation = [], []
    for text in documents:
        train.append(text[:left])
        validation.append(text[left:])
        left = max(left - len(text), 0)
    return [text for text in train if text], [text for text in validation if text]


def stdlib_files() -> list[tuple[str, pathlib.Path]]:
    """(relative POSIX path, path) of the standard library's modules in the order of the former as strings."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, subfolders, names in os.walk(root):
        # config-* and _sysconfigdata* record how this very interpreter was built: not the same text elsewhere.
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        paths = [pathlib.Path(folder, name) for name in names if name.endswith(".py")]
        files += [(path.relative_to(root).as_posix(), path) for path in paths if "_sysconfigdata" not in path.name]
    if not files:
        raise ValueError(f"this Python has no source files under {root}: give another source, a text file for instance")
    return sorted(files)


def read_source(path: pathlib.Path) -> str:
    """A Python source file, decoded as Python decodes it (coding cookie, else UTF-8), line ends as ``\\n``."""
    with tokenize.open(path) as file:
        return file.read()


def _stdlib_texts() -> Iterator[str]:
    return (read_source(path) for _, path in stdlib_files())


def _text_files(path: pathlib.Path) -> list[pathlib.Path]:
    if not path.exists():
        raise FileNotFoundError(f"no such text source: {str(path)!r} is not a path, nor 'pysrc', nor 'tfds:NAME'")
    if path.is_file():
        return [path]
    files = sorted(path.rglob("*.txt"), key=lambda file: file.relative_to(path).as_posix())
    if not files:
        raise ValueError(f"the directory {path} holds neither .txt files nor nanoGPT's train.bin and val.bin")
    return files


def _read_utf8(path: pathlib.Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}. Convert the file first, for "
            "instance with `iconv -f LATIN1 -t UTF-8`; token files are given by their directory"
        ) from error


def _capped(texts: Iterable[str], max_bytes: int | None) -> list[str]:
    if max_bytes is None:
        return [text for text in texts if text]
    kept, left = [], max_bytes
    for text in texts:
        encoded = text.encode()
        kept.append(text if len(encoded) <= left else encoded[:left].decode(errors="ignore"))
        left -= len(encoded)
        if left <= 0:
            break
    return [text for text in kept if text]
