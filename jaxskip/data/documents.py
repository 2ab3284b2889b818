"""Batches packed from shuffled documents, through Grain."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxskip.data.tokenization import Tokenizer, encode_documents
from jaxskip.data.tokens import fingerprint
from jaxskip.data.windows import Batch, BatchIterator, check_state, local_rows, to_batch


class GrainBatches(BatchIterator):
    """Documents shuffled, tokenised and packed end to end into windows, epoch after epoch, each in a new order.

    ``documents``: random access to texts, a list or ``tfds_documents``; Grain reads and tokenises them ahead in
    threads. Each document is followed by the tokenizer's end-of-text token if it has one; the stream is cut every
    ``context_length`` + 1 tokens and windows cross documents. ``batch_size``: rows of the global batch; each of
    ``process_count`` processes reads its own documents of every epoch (so, unlike ``TokenWindows``, a state can be
    resumed only on the same number of processes). ``seed``: 0 to 2**32 - 1.

    Raises ImportError without Grain, ValueError for no documents, fewer documents than processes, documents that are
    all empty, and settings out of range.

    >>> from jaxskip.data import ByteTokenizer
    >>> batches = GrainBatches(["to be", "or not to be"], ByteTokenizer(), batch_size=2, context_length=8)
    >>> batch, state = next(batches), batches.get_state()
    >>> batch["inputs"].shape, state["offset"] > 0
    ((2, 8), True)
    """

    def __init__(
        self,
        documents: Sequence[str],
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        context_length: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if context_length < 1:
            raise ValueError(f"context_length must be at least 1, got {context_length}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be between 0 and 2**32 - 1, got {seed}")
        rows = local_rows(batch_size, process_index, process_count)
        if len(documents) < process_count:
            raise ValueError(f"{len(documents)} documents are too few for {process_count} processes")

        def encode(text: str) -> np.ndarray:
            return next(encode_documents([text], tokenizer))

        self._window_shape = (rows.stop - rows.start, context_length + 1)
        self._vocab_size, self._num_documents = tokenizer.vocab_size, len(documents)
        self._settings = {
            "seed": seed,
            "batch_size": batch_size,
            "context_length": context_length,
            "process_index": process_index,
            "process_count": process_count,
            "num_documents": len(documents),
            "fingerprint": fingerprint(encode(documents[0]), encode(documents[len(documents) - 1])),
        }
        dataset = _grain().MapDataset.source(documents).shuffle(seed=seed)[process_index::process_count]
        self._iterator = iter(dataset.map(encode).repeat().to_iter_dataset())
        # The document being packed, how much of it is packed, and Grain's state before it was read: Grain itself has
        # read ahead of that.
        self._document, self._offset = np.zeros(0, np.uint8), 0
        self._before = self._iterator.get_state()

    def __next__(self) -> Batch:
        rows, length = self._window_shape
        return to_batch(self._take(rows * length).reshape(rows, length), self._vocab_size)

    def get_state(self) -> dict[str, Any]:
        return {"grain": self._before, "offset": self._offset, **self._settings}

    def set_state(self, state: dict[str, Any]) -> None:
        check_state(state, self._settings)
        self._iterator.set_state(state["grain"])
        self._document, self._before, self._offset = self._document[:0], state["grain"], state["offset"]
        if self._offset:
            self._document = next(self._iterator)

    def _take(self, count: int) -> np.ndarray:
        pieces = []
        while count:
            if self._offset == len(self._document):
                self._read_document()
            piece = self._document[self._offset : self._offset + count]
            pieces.append(piece)
            self._offset += len(piece)
            count -= len(piece)
        return np.concatenate(pieces)

    def _read_document(self) -> None:
        # Two epochs without a token mean that there is none, for ever.
        for _ in range(2 * self._num_documents):
            self._before, self._offset = self._iterator.get_state(), 0
            self._document = next(self._iterator)
            if len(self._document):
                return
        raise ValueError(f"all {self._num_documents} documents are empty")


def _grain():
    try:
        import grain
    except ImportError as error:
        raise ImportError('GrainBatches needs the grain package: pip install "jaxskip[data]"') from error
    return grain
