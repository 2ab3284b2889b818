"""What the Hopper attention kernels share: who works on which tile, and the arithmetic of scores and masks.

A kernel is one thread block a multiprocessor, which takes one tile (a block of rows of one sequence and head) after
another: a memory warpgroup streams what the tile's list names through a ring in shared memory, across tiles without a
pause, and compute warpgroups of 64 rows each follow.
"""

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.skip_attention.reference import Places, Spec, Visits

_RESIDENT_BYTES = 12 * 2**20  # of what the heads at work at a time read again and again: it stays in the L2 cache
# Registers of a thread of the (compute, memory) warpgroups, by the number of the former. A thread block of n threads
# starts with 65536 / n, down to a multiple of 8, for each: more in sum than that, and the kernel waits for ever.
_REGISTERS = {1: None, 2: (232, 40)}
LOWEST = -1e30  # the score that starts a running maximum


class Schedule(NamedTuple):
    """Static sizes of a kernel's work: ``heads`` tiles of ``batch`` sequences for each of ``blocks`` rows of blocks."""

    batch: int
    heads: int
    blocks: int
    together: int  # pairs of a sequence and a head at work at a time
    share: int  # query heads of a tile

    @property
    def tiles(self) -> int:
        return self.batch * self.heads * self.blocks

    @property
    def workers(self) -> int:
        return min(self.tiles, hopper.MULTIPROCESSORS)


def whole(x):
    """x [B, T, H, K] padded to whole 8 tokens, as the copy engine wants it: a copy, if T is not a multiple of 8."""
    return hopper.padded(x, (1, 8, 1, 1))


def schedule(batch: int, heads: int, blocks: int, bytes_a_head: int, share: int = 1) -> Schedule:
    """``bytes_a_head``: of what all tiles of a head read."""
    few = -(-2 * hopper.MULTIPROCESSORS // max(blocks, 1))
    return Schedule(
        batch, heads, blocks, min(batch * heads, max(few, _RESIDENT_BYTES // max(bytes_a_head, 1), 1)), share
    )


class Lists(NamedTuple):
    """Visits as a kernel reads them: order [Bm, Hm / share, n] are the rows of blocks, longest list first."""

    order: Any
    index: Any
    full: Any
    count: Any

    def sizes(self, b, h, row):
        """(number of full blocks, of all blocks) that a row visits."""
        b, h = _shared(self.index, b, h)
        return self.full[b, h, row], self.count[b, h, row]

    def block(self, b, h, row, turn):
        """The block that a row visits at a turn."""
        b, h = _shared(self.index, b, h)
        return self.index[b, h, row, jnp.minimum(turn, self.index.shape[-1] - 1)]


def _shared(array, b, h):
    return tuple(0 if size == 1 else i for size, i in zip(array.shape[:2], (b, h), strict=True))


def lists(visits: Visits, share: int = 1) -> Lists:
    """``share`` heads in turn make up a tile."""
    count = visits.count
    xp = np if isinstance(count, np.ndarray) else jnp
    together = count.reshape(count.shape[0], -1, min(share, count.shape[1]), count.shape[2]).sum(axis=2)
    order = xp.argsort(-together, axis=-1, stable=True)
    return Lists(*(jnp.asarray(x, jnp.int32) for x in (order, *visits)))


class Tile(NamedTuple):
    """A row of blocks of a sequence and head, and the sizes of its list (of the first of several heads)."""

    b: Any
    h: Any
    row: Any
    full: Any
    count: Any


def my_tiles(work: Schedule, lists: Lists):
    """(how many tiles this thread block has, function from the number of one to the ``Tile``).

    Long tiles come first, and odd rounds run backwards, so that all thread blocks get about the same.
    """
    worker = lax.axis_index("worker")
    rounds, rest = divmod(work.tiles, work.workers)

    def position(i):
        return i * work.workers + jnp.where(lax.rem(i, 2) == 0, worker, work.workers - 1 - worker)

    count = rounds + (position(jnp.int32(rounds)) < work.tiles).astype(jnp.int32) if rest else jnp.int32(rounds)

    def tile(i):
        group_size = work.together * work.blocks
        at = position(i)
        group = lax.div(at, jnp.int32(group_size))
        inside = at - group * group_size
        together = jnp.minimum(work.together, work.batch * work.heads - group * work.together)
        pair = group * work.together + lax.rem(inside, together)
        b, h = lax.div(pair, jnp.int32(work.heads)), lax.rem(pair, jnp.int32(work.heads))
        row = lists.order[*_shared(lists.order, b, h), lax.div(inside, together)]
        return Tile(b, h, row, *lists.sizes(b, h * work.share, row))

    return count, tile


class Ring(NamedTuple):
    """Slots in shared memory that the memory warpgroup fills and the compute warpgroups empty, in turn."""

    full: Any
    empty: Any
    slots: int

    def slot(self, step):
        return lax.rem(step, jnp.int32(self.slots))

    def claim(self, step):
        """The slot of a step, once it is empty."""
        slot = self.slot(step)
        plgpu.barrier_wait(self.empty.at[slot])
        return slot

    def fill(self, step, *copies):
        """Starts the copies (source, slots) into the slot of a step, once it is empty."""
        slot = self.claim(step)
        for source, slots in copies:
            plgpu.copy_gmem_to_smem(source, slots.at[slot], self.full.at[slot])

    def wait(self, step):
        """The slot of a step, once it is full."""
        slot = self.slot(step)
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def release(self, step):
        plgpu.barrier_arrive(self.empty.at[self.slot(step)])


class Turns(NamedTuple):
    """Compute warpgroups that start their products one after another."""

    barrier: Any
    group: Any
    groups: int

    def take(self):
        plgpu.barrier_wait(self.barrier.at[self.group])

    def give(self):
        plgpu.barrier_arrive(self.barrier.at[lax.rem(self.group + 1, jnp.int32(self.groups))])


def launch(work: Schedule, groups: int, make, operands, lists: Lists, outputs, shared, rings):
    """Runs a kernel of ``groups`` compute warpgroups and one that loads.

    ``make(inputs, lists, outputs, shared, rings, turns)``, of references to ``operands`` (a tree), ``outputs`` (a list)
    and ``shared`` (a dict), a ``Ring`` for each of ``rings`` (name: (slots, copies at a time)) and ``Turns``, returns
    ``load(i, tile, step)`` and ``compute(i, tile, step)``: what the two sides do for the i-th ``Tile`` of a thread
    block, where ``step`` counts up from 0 and is what the tile before returned; then perhaps ``finish(tiles)``, what
    ``compute`` leaves to be done in the end.
    """
    flat, tree = jax.tree.flatten((operands, lists))
    registers = _REGISTERS[groups]

    def body(*refs, **scratch):
        inputs, lists = jax.tree.unflatten(tree, refs[: len(flat)])
        ring = {name: Ring(scratch.pop(f"{name}_full"), scratch.pop(f"{name}_empty"), rings[name][0]) for name in rings}
        group = lax.axis_index("group")
        turns = Turns(scratch.pop("turn"), group, groups)
        load, compute, *finish = make(inputs, lists, refs[len(flat) :], scratch, ring, turns)

        def all_tiles(handle):
            tiles, tile_at = my_tiles(work, lists)

            def each(i, carry):
                step, tile = carry
                following = tile_at(jnp.minimum(i + 1, tiles - 1))  # read before it is needed
                return handle(i, tile, step), following

            lax.fori_loop(0, tiles, each, (jnp.int32(0), tile_at(jnp.int32(0))))
            return tiles

        def all_slots(use):
            for each in ring.values():
                for slot in range(each.slots):
                    use(each.empty.at[slot])

        @pl.when(group == groups)
        def _():
            if registers is not None:
                plgpu.set_max_registers(registers[1], action="decrease")
            all_tiles(load)
            all_slots(plgpu.barrier_wait)

        @pl.when(group < groups)
        def _():
            if registers is not None:
                plgpu.set_max_registers(registers[0], action="increase")
            all_slots(plgpu.barrier_arrive)
            pl.when(group == groups - 1)(turns.give)
            tiles = all_tiles(compute)
            for each in finish:
                each(tiles)
            pl.when(group == 0)(turns.take)

    barriers = {"turn": plgpu.Barrier(num_barriers=groups)}
    for name, (slots, copies) in rings.items():
        barriers[f"{name}_full"] = plgpu.Barrier(num_arrivals=copies, num_barriers=slots)
        barriers[f"{name}_empty"] = plgpu.Barrier(num_arrivals=groups, num_barriers=slots)
    kernel = plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=shared | barriers,
        grid=(work.workers,),
        grid_names=("worker",),
        num_threads=groups + 1,
        thread_name="group",
        compiler_params=hopper.PARAMS,
    )
    return kernel(*flat)


def tiled(dtype, *shape):
    """Shared memory that the copy engine fills and the tensor cores read."""
    return plgpu.SMEM(shape, dtype, transforms=hopper.TRANSFORMS)


class Masks(NamedTuple):
    """``Places`` as a kernel reads them: segments in whole blocks, and ``place`` is 0, 1, 2 ...

    Places are read from memory, in partial blocks only: the compiler would keep computed ones in registers, everywhere.
    """

    q_len: Any
    kv_len: Any
    offset: Any
    place: Any
    q_segments: Any
    kv_segments: Any


def masks(spec: Spec, places: Places, queries: int, keys: int) -> Masks:
    """``places`` as the kernels read them: 32 bits, segments in whole blocks."""

    def blocks(segments, size):
        return jnp.pad(jnp.asarray(segments, jnp.int32), ((0, 0), (0, -segments.shape[1] % size)))

    return Masks(
        q_len=jnp.asarray(places.q_len, jnp.int32),
        kv_len=jnp.asarray(places.kv_len, jnp.int32),
        offset=jnp.asarray(places.offset, jnp.int32),
        place=jnp.arange(max(queries + spec.block_q, keys + spec.block_kv), dtype=jnp.int32),
        q_segments=blocks(places.q_segments, spec.block_q) if spec.segmented else None,
        kv_segments=blocks(places.kv_segments, spec.block_kv) if spec.segmented else None,
    )


def mask(spec: Spec, s, masks: Masks, b, first_q, first_kv, query_axis):
    """Which pairs of a tile are allowed; queries run along ``query_axis`` of ``s``."""
    key_axis = 1 - query_axis

    def along(x, axis):
        return lax.broadcast_in_dim(x, s.shape, [axis])

    def read(x, first, axis):
        return hopper.load(x.at[pl.ds(first, s.shape[axis])], plgpu.Layout.WGMMA.reduce(1 - axis))

    query, key = read(masks.place, first_q, query_axis), along(read(masks.place, first_kv, key_axis), key_axis)
    at = query + masks.offset[b]
    lowest, highest = spec.reach
    last = masks.kv_len[b] - 1
    last = jnp.full_like(query, last) if highest is None else jnp.minimum(at + highest, last)
    last = jnp.where(query < masks.q_len[b], last, -1)
    seen = key <= along(last, query_axis)
    if lowest is not None:
        seen &= key >= along(at + lowest, query_axis)
    if spec.segmented:
        own = read(masks.q_segments.at[b], first_q, query_axis)
        seen &= along(own, query_axis) == along(read(masks.kv_segments.at[b], first_kv, key_axis), key_axis)
    return seen


def capped(spec: Spec, s):
    """Scores, but for ``factor``, from products of queries and keys."""
    if spec.softcap is not None:
        # tanh from one exponential: the approximate tanh instruction is not accurate enough.
        twice = jnp.exp2(s * (2 * hopper.LOG2E * spec.scale / spec.softcap))
        return spec.softcap - 2 * spec.softcap / (twice + 1)
    return s if spec.scale > 0 else s * spec.scale


def factor(spec: Spec) -> float:
    """What turns ``capped`` products into scores: kept apart, it costs nothing before the exponential."""
    return spec.scale if spec.softcap is None and spec.scale > 0 else 1.0


def probabilities(spec: Spec, s, lse2, seen=None):
    """(probabilities, the same times the derivative of the softcap) from products; ``seen`` None is all."""
    z = capped(spec, s)
    p = jnp.exp2(z * (factor(spec) * hopper.LOG2E) - lse2)
    if seen is not None:
        p = jnp.where(seen, p, 0.0)
    return p, p if spec.softcap is None else p * (1 - (z / spec.softcap) * (z / spec.softcap))
