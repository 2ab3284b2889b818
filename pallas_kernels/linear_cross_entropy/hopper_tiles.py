"""What the Hopper kernels of this package share: a pipeline over tiles of the logits, and layouts.

A tile is [128 tokens, 256 vocabulary entries]. A memory warpgroup streams embeddings and classifier through shared
memory, two compute warpgroups multiply 64 tokens each and go on with the products in their registers.
"""

import math
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper import LOG2E, MULTIPROCESSORS, PARAMS, TRANSFORMS, load, padded, transposed
from pallas_kernels.linear_cross_entropy.reference import Spec
from pallas_kernels.manual_axes import varying_like

ROWS, COLUMNS = 128, 256  # of a tile of logits
_DEPTH = 64  # of the embedding width, in one stage of the pipeline
_STAGES = 4
_LEAD = 2  # steps by which the first compute warpgroup is ahead: while one reduces its tile, the other multiplies
_BANDS_TOGETHER = 16  # bands of rows at work at a time: what they read stays in the L2 cache
LOWEST = -1e30  # the logit of a vocabulary entry that does not exist


def run(spec, named, tile_at, count, compute, e_s, c_s, full, empty, lead, rows_last=False, eights=None):
    """Runs ``compute(group, tile_logits)`` in both compute warpgroups while the third feeds them ``count`` tiles.

    ``tile_at(t)`` is the (band of rows, block of columns) of the t-th tile; ``tile_logits(t)`` its products [64, 256].
    With ``rows_last`` the first operand lies as [D, rows]. With ``eights`` a tile is no band: its i-th 8 rows are those
    from row ``8 * eights(t, i)`` on.
    """
    e_g, c_g, layout = named["e_g"], named["c_g"], spec.classifier_layout
    steps = pl.cdiv(e_g.shape[0 if rows_last else 1], _DEPTH)
    group = lax.axis_index("group")

    @pl.when(group == 2)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        def load_tile(t, _):
            band, column = tile_at(t)
            rows, columns = pl.ds(band * ROWS, ROWS), pl.ds(column * COLUMNS, COLUMNS)

            def load(k, _):
                step = t * steps + k
                slot = lax.rem(step, _STAGES)

                @pl.when(step >= _STAGES)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                depth = pl.ds(k * _DEPTH, _DEPTH)
                if eights is None:
                    part = e_g.at[depth, rows] if rows_last else e_g.at[rows, depth]
                    plgpu.copy_gmem_to_smem(part, e_s.at[slot], full.at[slot])
                else:
                    starts = [eights(t, i) * 8 for i in range(ROWS // 8)]  # all read before the first copy
                    for i, start in enumerate(starts):
                        part = e_g.at[pl.ds(start, 8), depth]
                        plgpu.copy_gmem_to_smem(part, e_s.at[slot, pl.ds(i * 8, 8)], full.at[slot])
                part = c_g.at[columns, depth] if layout == "vd" else c_g.at[depth, columns]
                plgpu.copy_gmem_to_smem(part, c_s.at[slot], full.at[slot])

            lax.fori_loop(0, steps, load, None)

        lax.fori_loop(0, count, load_tile, None)
        # No barrier is left half-way: the interpreter insists on that.
        rest = jnp.maximum(count * steps - _STAGES, 0)
        lax.fori_loop(rest, count * steps, lambda step, _: plgpu.barrier_wait(empty.at[lax.rem(step, _STAGES)]), None)

    @pl.when(group < 2)
    def _():
        plgpu.set_max_registers(232, action="increase")

        def tile_logits(t):
            def multiply(acc):
                def step(k, _):
                    slot = lax.rem(t * steps + k, _STAGES)
                    plgpu.barrier_wait(full.at[slot])
                    c_tile = c_s.at[slot]
                    if layout == "vd":
                        c_tile = transposed(c_tile)
                    mine = pl.ds(group * (ROWS // 2), ROWS // 2)
                    e_tile = transposed(e_s.at[slot, :, mine]) if rows_last else e_s.at[slot, mine]
                    plgpu.wgmma(acc, e_tile, c_tile)
                    plgpu.wgmma_wait(1)

                    @pl.when((group == 0) & (t * steps + k == jnp.minimum(max(_LEAD, 1), count * steps) - 1))
                    def _():
                        plgpu.barrier_arrive(lead)

                    @pl.when(k > 0)
                    def _():
                        plgpu.barrier_arrive(empty.at[lax.rem(t * steps + k - 1, _STAGES)])

                lax.fori_loop(0, steps, step, None)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(empty.at[lax.rem(t * steps + steps - 1, _STAGES)])
                return plgpu.layout_cast(acc[...], plgpu.Layout.WGMMA)

            return pl.run_scoped(multiply, plgpu.ACC((ROWS // 2, COLUMNS), jnp.float32))

        @pl.when((group == 1) & (count > 0))
        def _():
            plgpu.barrier_wait(lead)

        compute(group, tile_logits)


def pipeline(spec: Spec, rows_last: bool = False, eights: bool = False) -> dict[str, Any]:
    """The shared memory and barriers that ``run`` needs."""
    e_shape = (_DEPTH, ROWS) if rows_last else (ROWS, _DEPTH)
    c_shape = (COLUMNS, _DEPTH) if spec.classifier_layout == "vd" else (_DEPTH, COLUMNS)
    return {
        "e_s": plgpu.SMEM((_STAGES, *e_shape), spec.operand_dtype, transforms=TRANSFORMS),
        "c_s": plgpu.SMEM((_STAGES, *c_shape), spec.operand_dtype, transforms=TRANSFORMS),
        "full": plgpu.Barrier(num_arrivals=1 + (ROWS // 8 if eights else 1), num_barriers=_STAGES),
        "empty": plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
        "lead": plgpu.Barrier(num_arrivals=1),
    }


def kernel(body, outputs, scratch, blocks):
    """A kernel of ``blocks`` thread blocks whose ``body`` calls ``run``."""
    call = plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="group",
        compiler_params=PARAMS,
    )
    return lambda *operands: varying_like(operands, call(*operands))


def own_tiles(tiles):
    """(how many of ``tiles`` this thread block takes, of one for each multiprocessor; the number of its t-th)."""
    block = lax.axis_index("block")
    return (tiles - block + MULTIPROCESSORS - 1) // MULTIPROCESSORS, lambda t: block + t * MULTIPROCESSORS


def splits(bands: int, columns: int) -> int:
    """Into how many parts the vocabulary is split, so that whole waves of thread blocks have the same work."""
    return min(columns, max(math.lcm(bands, MULTIPROCESSORS) // bands, 1))


def grouped(index, bands, others):
    """The (band, other) of a block or tile: ``_BANDS_TOGETHER`` bands take turns before the next ``other`` starts."""
    group = index // (_BANDS_TOGETHER * others)
    rest = index - group * (_BANDS_TOGETHER * others)
    together = jnp.minimum(_BANDS_TOGETHER, bands - group * _BANDS_TOGETHER)
    return group * _BANDS_TOGETHER + lax.rem(rest, together), rest // together


def operands(spec, e, c, rows_last=False):
    """The kernels' arguments. What the copy engine cannot tile (a width of 100, say) is padded, that is, copied."""
    e_tile = (_DEPTH, _DEPTH) if rows_last else (8, _DEPTH)
    c_tile = (8, _DEPTH) if spec.classifier_layout == "vd" else (_DEPTH, _DEPTH)
    return [padded(x.astype(spec.operand_dtype), tile) for x, tile in ((e, e_tile), (c, c_tile))]


def finished(spec, z, b_g, start):
    """The logits of the vocabulary entries from ``start``, from their products."""
    if b_g is not None:
        bias = load(b_g.at[pl.ds(start, z.shape[1])], plgpu.Layout.WGMMA.reduce(0))
        z += lax.broadcast_in_dim(bias, z.shape, [1])
    if spec.softcap is None:
        return z
    # tanh from one exponential: the approximate tanh instruction is not accurate enough.
    return spec.softcap - 2 * spec.softcap / (jnp.exp2(z * (2 * LOG2E / spec.softcap)) + 1)


def masked(z, start, vocabulary, value):
    """z where the vocabulary has an entry, ``value`` beyond it; ``start`` is the tile's first."""
    if vocabulary % COLUMNS == 0:
        return z
    column = plgpu.broadcasted_iota(jnp.int32, z.shape, 1, layout=plgpu.Layout.WGMMA)
    return jnp.where(column + start < vocabulary, z, value)
