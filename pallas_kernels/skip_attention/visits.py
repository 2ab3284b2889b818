"""From masks to lists of the blocks that are worth a visit.

Whether a block is empty, partly or fully visible follows from the range of places in it, without looking at pairs of a
query and a key. What is known while tracing (NumPy arrays) is listed while tracing; the rest is listed on the device.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.skip_attention.reference import Places, Spec, Visits

EMPTY, PARTIAL, FULL = 0, 1, 2
_FEW = 64  # blocks


def lists(
    spec: Spec, places: Places, queries: int, keys: int, block_mask: Any = None, most: int | None = None
) -> tuple[Visits, Visits]:
    """(key blocks of each query block, query blocks of each key block).

    ``block_mask`` is None or bool [B or 1, Hq or 1, query blocks, key blocks], in blocks of ``spec``; ``most`` bounds
    how many key blocks of a query block it allows.
    """
    kinds = block_kinds(spec, places, queries, keys, block_mask)
    lowest, highest = spec.reach
    bounds = [kinds.shape[3] if most is None else most, kinds.shape[2]]
    if lowest is not None and highest is not None:
        span = highest - lowest
        bounds[0] = min(bounds[0], _touched(span + spec.block_q, spec.block_kv))
        bounds[1] = min(bounds[1], _touched(span + spec.block_kv, spec.block_q))
    return listed(kinds, bounds[0]), listed(kinds.swapaxes(2, 3), bounds[1])


def block_kinds(spec: Spec, places: Places, queries: int, keys: int, block_mask: Any = None) -> Any:
    """EMPTY, PARTIAL or FULL for each pair of blocks, int32 [B or 1, Hq or 1, query blocks, key blocks]."""
    shared = [x for x in places[:3] if isinstance(x, np.ndarray) and (x == x[0]).all()]
    q_len, kv_len, offset = places[:3]
    if len(shared) == 3 and not spec.segmented:
        q_len, kv_len, offset = (x[:1] for x in shared)
    xp = np if all(isinstance(x, np.ndarray) for x in jax.tree.leaves((places, block_mask))) else jnp
    q_len, kv_len, offset = (xp.asarray(x)[:, None, None] for x in (q_len, kv_len, offset))
    first_q = xp.arange(0, queries, spec.block_q, dtype=np.int32)[None, :, None]
    first_kv = xp.arange(0, keys, spec.block_kv, dtype=np.int32)[None, None, :]
    last_q = xp.minimum(first_q + spec.block_q, q_len) - 1
    last_kv = xp.minimum(first_kv + spec.block_kv, kv_len) - 1
    nearest, farthest = first_kv - last_q - offset, last_kv - first_q - offset  # keys left of their query: negative
    visible = (first_q <= last_q) & (first_kv <= last_kv)
    full = (first_q + spec.block_q <= q_len) & (first_kv + spec.block_kv <= kv_len)
    lowest, highest = spec.reach
    if lowest is not None:
        visible &= farthest >= lowest
        full &= nearest >= lowest
    if highest is not None:
        visible &= nearest <= highest
        full &= farthest <= highest
    if spec.segmented:
        low_q, high_q = _segment_range(xp, places.q_segments, spec.block_q, q_len[:, 0])
        low_kv, high_kv = _segment_range(xp, places.kv_segments, spec.block_kv, kv_len[:, 0])
        visible &= (low_q[:, :, None] <= high_kv[:, None, :]) & (low_kv[:, None, :] <= high_q[:, :, None])
        full &= False
    kinds = xp.where(visible, xp.where(full, FULL, PARTIAL), EMPTY)[:, None].astype(np.int32)
    return kinds if block_mask is None else xp.where(xp.asarray(block_mask), kinds, EMPTY)


def listed(kinds: Any, most: int) -> Visits:
    """The lists of the rows of ``kinds`` [Bm, Hm, rows, columns], none of which has more than ``most`` entries."""
    xp: Any = np if isinstance(kinds, np.ndarray) else jnp
    columns = kinds.shape[-1]
    count, full = ((kinds >= kind).sum(-1).astype(np.int32) for kind in (PARTIAL, FULL))
    if xp is np:
        most = int(count.max(initial=1))
    place = xp.arange(columns, dtype=np.int32).reshape(1, 1, 1, -1)
    key = (FULL - kinds) * columns + place  # the order of the list: what is fully visible, then what is in part
    turn = xp.arange(most, dtype=np.int32).reshape(1, 1, 1, -1)
    turn = xp.minimum(turn, xp.maximum(count - 1, 0)[..., None])
    if xp is np or columns > _FEW:
        index = xp.take_along_axis(xp.sort(key, axis=-1) % columns, turn, axis=-1)
    else:
        # By comparison: three small programs on a GPU, where a sort and a gather are many, and quick to compile.
        rank = (key[..., None, :] < key[..., :, None]).sum(-1, dtype=np.int32)
        named = rank[..., None, :] == turn[..., :, None]
        index = xp.where(named, place[..., None, :], 0).sum(-1)
    return Visits(index.astype(np.int32), full, count)


def _touched(length: int, block: int) -> int:
    """How many blocks ``length`` neighbours can lie in."""
    return (length + block - 2) // block + 1


def _segment_range(xp: Any, segments: Any, block: int, length: Any) -> tuple[Any, Any]:
    """(lowest, highest) segment of each block [B, blocks], padding left out."""
    total = segments.shape[1]
    blocks = -(-total // block)
    inside = xp.arange(total)[None] < length
    limit = np.iinfo(np.int32)
    found = []
    for fill, reduce in ((limit.max, xp.min), (limit.min, xp.max)):
        padded = xp.pad(xp.where(inside, segments, fill), ((0, 0), (0, blocks * block - total)), constant_values=fill)
        found.append(reduce(padded.reshape(-1, blocks, block), axis=-1))
    return found[0], found[1]
