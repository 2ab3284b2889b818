"""What to skip besides causality, windows, lengths and segments: a choice of (query block, key block) pairs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.tree_util.register_dataclass, data_fields=["mask"], meta_fields=["block_q", "block_kv", "most"])
@dataclasses.dataclass(frozen=True)
class SkipSpec:
    """Which key blocks each query block sees; a pytree, so that it passes through ``jax.jit`` and ``jax.vmap``.

    Attributes:
        mask: bool [nq, nk], [H, nq, nk] or [B or 1, H or 1, nq, nk] of the blocks that are *kept*; NumPy (listed while
            tracing: free at run time) or a JAX array, possibly traced: another choice compiles nothing anew.
        block_q, block_kv: queries and keys of a block. Kernels work in blocks that divide these: multiples of 128 are
            fast.
        most: bound on the kept blocks of a row, where the mask is traced and the bound known; None: nk.

    Example:
        >>> import numpy as np
        >>> from pallas_kernels.skip_attention import SkipSpec
        >>> SkipSpec.from_block_mask(np.eye(2, dtype=bool), 128, 128).mask.shape
        (2, 2)
    """

    mask: Any
    block_q: int
    block_kv: int
    most: int | None = None

    @classmethod
    def from_block_mask(cls, mask: Any, block_q: int, block_kv: int) -> "SkipSpec":
        """Keeps the blocks where ``mask`` [..., nq, nk] holds."""
        if mask.ndim not in (2, 3, 4) or mask.dtype != bool:
            raise ValueError(
                f"mask must be bool [nq, nk], [H, nq, nk] or [B, H, nq, nk], got {mask.dtype} {mask.shape}"
            )
        if min(block_q, block_kv) < 1:
            raise ValueError(f"block_q and block_kv must be at least 1, got {block_q} and {block_kv}")
        return cls(mask, int(block_q), int(block_kv))

    @classmethod
    def from_lists(cls, kv_index: Any, kv_count: Any, num_kv_blocks: int, block_q: int, block_kv: int) -> "SkipSpec":
        """Keeps, for query block i, the key blocks ``kv_index[..., i, :kv_count[..., i]]`` of ``num_kv_blocks``."""
        if kv_index.ndim not in (2, 3, 4) or kv_count.shape != kv_index.shape[:-1]:
            raise ValueError(
                "kv_index must be [nq, most], [H, nq, most] or [B, H, nq, most] and kv_count the same without the last "
                f"axis, got {kv_index.shape} and {kv_count.shape}"
            )
        xp = np if isinstance(kv_index, np.ndarray) and isinstance(kv_count, np.ndarray) else jnp
        most = kv_index.shape[-1]
        kept = _named(xp, kv_index, xp.cumsum(xp.ones_like(kv_index), axis=-1) <= kv_count[..., None], num_kv_blocks)
        return cls(kept, int(block_q), int(block_kv), min(most, num_kv_blocks))

    @classmethod
    def sliding(cls, num_blocks: int, block: int, *, window: int, sink: int = 1) -> "SkipSpec":
        """The ``window`` last blocks up to the query's own and the ``sink`` first ones (arXiv:2309.17453's shape)."""
        back = _back(num_blocks)
        return cls((back >= 0) & ((back < window) | (np.arange(num_blocks)[None] < sink)), block, block)

    @classmethod
    def strided(cls, num_blocks: int, block: int, *, stride: int, local: int = 1) -> "SkipSpec":
        """The ``local`` last blocks and every ``stride``-th one before (arXiv:1904.10509's strided pattern)."""
        back = _back(num_blocks)
        return cls((back >= 0) & ((back < local) | (np.arange(num_blocks)[None] % stride == 0)), block, block)

    @classmethod
    def topk(cls, scores: jax.Array, k: int, block_q: int, block_kv: int) -> "SkipSpec":
        """The k key blocks of highest score in each row of ``scores`` [..., nq, nk]; -inf is never kept."""
        k = min(k, scores.shape[-1])
        values, index = jax.lax.top_k(scores, k)
        kept = _named(jnp, index, values > -jnp.inf, scores.shape[-1])
        return cls(kept, int(block_q), int(block_kv), k)


def _back(num_blocks: int) -> np.ndarray:
    """How many blocks a key block lies before a query block."""
    return np.arange(num_blocks)[:, None] - np.arange(num_blocks)[None, :]


def _named(xp: Any, index: Any, counts: Any, blocks: int) -> Any:
    """Bool [..., blocks]: whether ``index`` [..., most] names the block in an entry that ``counts``."""
    block = xp.arange(blocks).reshape((1,) * index.ndim + (-1,))
    return ((index[..., None] == block) & counts[..., None]).any(axis=-2)
