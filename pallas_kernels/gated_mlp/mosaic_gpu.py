"""NVIDIA Hopper: the feed-forward block of a few tokens in two kernels that read its matrices at the rate of memory.

A thread block is one warpgroup. It streams rows of a matrix, and the tokens beside them, through a ring in shared
memory; tokens are the rows of its products (64, of which a few count), so results lie as the next product reads them.
The first kernel takes the same rows of gate and up. The second splits the width of the hidden values over thread
blocks, and XLA adds what they found to the residual stream. Where ``run`` says no, both return at once.
"""

from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper

DEPTH = 64  # what products sum over, at a time
_SHARED_BYTES = 200 * 2**10  # of a multiprocessor, for rings: four times what covers the latency of memory


class Split(NamedTuple):
    """How a kernel divides a matrix: ``rows`` of it and one of ``parts`` of its width for each thread block."""

    rows: int
    parts: int
    stages: int


def gate_up_split(batch: int, width: int, hidden: int) -> Split:
    """Of the first kernel: ``rows`` of gate and as many of up."""
    rows = next((r for r in (32, 16) if hidden // r >= hopper.MULTIPROCESSORS), 8)
    return Split(rows, 1, _stages(2 * rows, width // DEPTH, hidden // rows))


def down_split(batch: int, width: int, hidden: int) -> Split:
    """Of the second kernel."""
    rows, steps = 64, hidden // DEPTH
    parts = next(p for p in (8, 4, 2, 1) if steps % p == 0 and steps // p >= 4 or p == 1)
    return Split(rows, parts, _stages(rows, steps // parts, width // rows * parts))


def _stages(rows: int, steps: int, blocks: int) -> int:
    """Of the ring: two thread blocks share a multiprocessor where there are enough of them."""
    share = _SHARED_BYTES // (2 if blocks > hopper.MULTIPROCESSORS else 1)
    return max(1, min(steps, share // ((rows + hopper.ROWS) * DEPTH * 2)))


def block(x, norm_scale, gate_up, down, run, epsilon):
    """As ``gated_mlp``; ``run`` may be None."""
    batch, width = x.shape
    hidden = gate_up.shape[1]
    flag = [] if run is None else [run.astype(jnp.int32).reshape(1)]
    scale = norm_scale.reshape(-1, DEPTH)
    h = _hidden(gate_up_split(batch, width, hidden), epsilon)(x, scale, gate_up, *flag)
    parts = _products(down_split(batch, width, hidden))(h, down, *flag)
    out = x + parts.sum(axis=0)[:batch].astype(x.dtype)
    return out if run is None else jnp.where(run, out, x)


def _whole(batch: int) -> int:
    return -(-batch // 8) * 8  # copies are whole 8 rows; those past the end of an array are zeros


def _hidden(split: Split, epsilon: float):
    """The kernel (x [B, D], norm_scale [D / 64, 64], gate_up [2, F, D], run [1]) -> hidden values [B in eights, F]."""
    rows = split.rows

    def call(x, scale, gate_up, *flag):
        batch, width = x.shape
        count, steps = _whole(batch), width // DEPTH

        def body(x_g, scale_g, w_g, *rest, x_s, w_s, a_s, scale_s, out_s, full, scale_full):
            *flag_g, out_g = rest
            first = lax.axis_index("rows") * rows

            def load(t, stage):
                here = pl.ds(t * DEPTH, DEPTH)
                for i in range(2):
                    part = w_s.at[stage, pl.ds(i * rows, rows)]
                    plgpu.copy_gmem_to_smem(w_g.at[i, pl.ds(first, rows), here], part, full.at[stage])
                _load_tokens(x_g, here, x_s.at[stage], full.at[stage], count)

            def gate():
                _fill(load, split.stages)
                plgpu.copy_gmem_to_smem(scale_g, scale_s, scale_full)
                plgpu.barrier_wait(scale_full)

                def multiply(acc):
                    def step(t, squares):
                        stage, slot = lax.rem(t, split.stages), lax.rem(t, 2)
                        plgpu.barrier_wait(full.at[stage])
                        tokens = hopper.load(x_s.at[stage], plgpu.Layout.WGMMA).astype(jnp.float32)
                        by = hopper.load(scale_s.at[t], plgpu.Layout.WGMMA.reduce(0)).astype(jnp.float32)
                        a_s[slot] = (tokens * hopper.down(by, tokens)).astype(a_s.dtype)
                        plgpu.commit_smem()
                        plgpu.wgmma(acc, a_s.at[slot], hopper.transposed(w_s.at[stage]))
                        _refill(load, t, steps, split.stages)
                        return squares + jnp.sum(tokens * tokens, axis=1)

                    squares = lax.fori_loop(0, steps, step, hopper.row_vector(0.0))
                    plgpu.wgmma_wait(0)
                    return acc[...], squares

                z, squares = pl.run_scoped(multiply, plgpu.ACC((hopper.ROWS, 2 * rows), jnp.float32))
                z *= hopper.across(lax.rsqrt(squares / width + epsilon), z)
                gate, up = z[:, :rows], z[:, rows:]
                out_s[...] = (gate / (1 + jnp.exp2(gate * -hopper.LOG2E)) * up).astype(out_s.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s.at[pl.ds(0, count)], out_g.at[:, pl.ds(first, rows)])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            _where(flag_g, gate)

        kernel = plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((count, gate_up.shape[1]), x.dtype),
            scratch_types={
                "x_s": _shared(x.dtype, split.stages, hopper.ROWS),
                "w_s": _shared(x.dtype, split.stages, 2 * rows),
                "a_s": _shared(x.dtype, 2, hopper.ROWS),
                "scale_s": plgpu.SMEM(scale.shape, scale.dtype),
                "out_s": plgpu.SMEM((hopper.ROWS, rows), x.dtype),
                "full": plgpu.Barrier(num_arrivals=3, num_barriers=split.stages),
                "scale_full": plgpu.Barrier(),
            },
            grid=(gate_up.shape[1] // rows,),
            grid_names=("rows",),
            compiler_params=hopper.PARAMS,
        )
        return kernel(x, scale, gate_up, *flag)

    return call


def _products(split: Split):
    """The kernel (hidden values [N, F], down [D, F], run [1]) -> their products in parts of F, float32 [parts, N, D]."""
    rows = split.rows

    def call(h, down, *flag):
        (count, hidden), width = h.shape, down.shape[0]
        steps = hidden // DEPTH // split.parts

        def body(h_g, w_g, *rest, h_s, w_s, out_s, full):
            *flag_g, out_g = rest
            first, part = lax.axis_index("rows") * rows, lax.axis_index("part")

            def load(t, stage):
                here = pl.ds((part * steps + t) * DEPTH, DEPTH)
                plgpu.copy_gmem_to_smem(w_g.at[pl.ds(first, rows), here], w_s.at[stage], full.at[stage])
                _load_tokens(h_g, here, h_s.at[stage], full.at[stage], count)

            def multiply(acc):
                def step(t, _):
                    stage = lax.rem(t, split.stages)
                    plgpu.barrier_wait(full.at[stage])
                    plgpu.wgmma(acc, h_s.at[stage], hopper.transposed(w_s.at[stage]))
                    _refill(load, t, steps, split.stages)

                lax.fori_loop(0, steps, step, None)
                plgpu.wgmma_wait(0)
                return acc[...]

            def down():
                _fill(load, split.stages)
                out_s[...] = pl.run_scoped(multiply, plgpu.ACC((hopper.ROWS, rows), jnp.float32))
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s.at[pl.ds(0, count)], out_g.at[part, :, pl.ds(first, rows)])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            _where(flag_g, down)

        kernel = plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((split.parts, count, width), jnp.float32),
            scratch_types={
                "h_s": _shared(h.dtype, split.stages, hopper.ROWS),
                "w_s": _shared(h.dtype, split.stages, rows),
                "out_s": plgpu.SMEM((hopper.ROWS, rows), jnp.float32),
                "full": plgpu.Barrier(num_arrivals=2, num_barriers=split.stages),
            },
            grid=(split.parts, width // rows),
            grid_names=("part", "rows"),
            compiler_params=hopper.PARAMS,
        )
        return kernel(h, down, *flag)

    return call


def _load_tokens(tokens_g, here, tile_s, full, count):
    """Starts a copy of a few columns of all tokens into the first rows of a tile; what lies in others does not matter."""
    # The start is only known in the kernel: a slice that is known to leave the array would be refused.
    start = lax.axis_index("rows") * 0
    plgpu.copy_gmem_to_smem(tokens_g.at[pl.ds(start, count), here], tile_s.at[pl.ds(0, count)], full)


def _fill(load, stages):
    for stage in range(stages):
        load(stage, stage)


def _refill(load, t, steps, stages):
    """Waits for the products of the step before ``t``, and loads into its stage what comes next there."""
    plgpu.wgmma_wait(1)
    following = t - 1 + stages
    pl.when((t > 0) & (following < steps))(lambda: load(following, lax.rem(t - 1, stages)))


def _where(flag_g, run):
    """Runs where the flag, if there is one, is set."""
    if flag_g:
        pl.when(flag_g[0][0] != 0)(run)
    else:
        run()


def _shared(dtype, *shape):
    return plgpu.SMEM((*shape, DEPTH), dtype, transforms=hopper.TRANSFORMS)
