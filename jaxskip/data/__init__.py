"""Language-model text: corpora, tokenizers, and iterators of batches that resume exactly.

``import jaxskip.data`` needs NumPy alone; TensorFlow Datasets, Grain and tokenizers are imported by the functions that
use them. ``jaxskip.data.stdlib_text.StdlibText`` is the ``pysrc`` corpus as a TFDS builder that works offline.
"""

from jaxskip.data.corpus import Corpus, load_corpus
from jaxskip.data.documents import GrainBatches
from jaxskip.data.texts import load_texts
from jaxskip.data.tfds_text import tfds_documents
from jaxskip.data.token_files import write_token_files
from jaxskip.data.tokenization import BPETokenizer, ByteTokenizer, Tokenizer
from jaxskip.data.windows import Batch, BatchIterator, TokenWindows, evaluation_windows

__all__ = [
    "BPETokenizer",
    "Batch",
    "BatchIterator",
    "ByteTokenizer",
    "Corpus",
    "GrainBatches",
    "TokenWindows",
    "Tokenizer",
    "evaluation_windows",
    "load_corpus",
    "load_texts",
    "tfds_documents",
    "write_token_files",
]
