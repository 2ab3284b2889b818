"""NVIDIA Hopper: the feed-forward block of a few tokens in two kernels that read its matrices at the rate of memory.

A thread block is one warpgroup. It streams rows of a matrix, and the tokens beside them, through a ring in shared
memory. Tokens are the rows of its products (64, of which few count), so that results lie as the next product reads
them. The first kernel takes the same rows of gate and up; the second splits the width of the hidden values over thread
blocks, and XLA adds what they found to the residual stream. Where ``run`` says no, both return at once.

The root mean square of a token is known when all of it has been read: the first kernel multiplies by the scale alone,
rounds, and divides the products.
"""

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper

WIDTHS = 64  # the widths of the block are multiples of it
_SHARED_BYTES = 210 * 2**10  # of a multiprocessor
_MOST_STAGES = 16
# What follows was measured on an H200, at the shapes of Llama-1B and SmolLM2 and with 1 and 32 tokens.
_ENOUGH = 96  # thread blocks, so that wider rows are worth more than further blocks
_FEW = 8  # tokens, beside which the weights alone fill shared memory


class Split(NamedTuple):
    """How a kernel divides a matrix: each thread block takes ``rows`` and one of ``parts`` of the width, ``depth`` of
    it at a time; ``stages`` are on their way."""

    rows: int
    depth: int
    parts: int
    stages: int


def gate_up_split(batch: int, width: int, hidden: int) -> Split:
    """Of the first kernel: ``rows`` of gate and as many of up."""
    rows = next((r for r in (64, 32, 16) if hidden // r >= _ENOUGH), 8)
    depth = 2 * WIDTHS if batch <= _FEW and width % (2 * WIDTHS) == 0 else WIDTHS
    beside = 2 * _tile(depth) + 4 * width + 2 * hopper.ROWS * rows  # scaled tokens, scales, results
    together = 2 if hidden // rows > hopper.MULTIPROCESSORS else 1
    return Split(rows, depth, 1, _stages(batch, 2 * rows, depth, width // depth, beside, together))


def down_split(batch: int, width: int, hidden: int) -> Split:
    """Of the second kernel."""
    steps = hidden // WIDTHS
    splits = [(rows, parts) for rows in (64, 32, 16, 8) for parts in (1, 2, 4, 8) if steps % parts == 0]
    rows, parts = next((s for s in splits if width // s[0] * s[1] >= 1.5 * _ENOUGH), splits[-1])
    together = 3 if batch <= _FEW else 2
    return Split(rows, WIDTHS, parts, _stages(batch, rows, WIDTHS, steps // parts, 4 * hopper.ROWS * rows, together))


def _tile(depth: int) -> int:
    return 2 * hopper.ROWS * depth  # bytes


def _stages(batch: int, rows: int, depth: int, steps: int, beside: int, together: int) -> int:
    """As many as fit, with that number of thread blocks on a multiprocessor."""
    room = _SHARED_BYTES // together - beside - _tile(depth)
    fitting = room // (2 * depth * (rows + _in_eights(batch)))
    return min(steps, max(2, min(fitting, _MOST_STAGES)))


def _in_eights(batch: int) -> int:
    return -(-batch // 8) * 8


@functools.partial(jax.jit, static_argnames="epsilon")
def block(x, norm_scale, gate_up, down, run, epsilon):
    """As ``gated_mlp``."""
    batch, width, hidden = *x.shape, gate_up.shape[1]
    flag = [] if run is None else [run.reshape(1)]
    # Copies are whole 8 rows. Those past the end of a smaller array are zeros; a larger one cannot be tiled.
    tokens = x if batch < 8 else hopper.padded(x, (8, 1))
    h = _hidden(gate_up_split(batch, width, hidden), epsilon, tokens, norm_scale, gate_up, flag)
    parts = _products(down_split(batch, width, hidden), h, down, flag)
    # Rounded once, at the end: XLA may leave a rounding in between out of one program and not of another.
    out = (x.astype(jnp.float32) + parts.sum(axis=0)[:batch]).astype(x.dtype)
    return out if run is None else jnp.where(run, out, x)


def _hidden(split: Split, epsilon, x, norm_scale, gate_up, flag):
    """silu(gate n) * (up n), [B, F]."""
    (batch, width), hidden = x.shape, gate_up.shape[1]
    rows, depth, _, stages = split

    def body(x_g, scale_g, w_g, *rest, w_s, x_s, a_s, scale_s, out_s, full, scale_full):
        *flag_g, out_g = rest
        first = lax.axis_index("rows") * rows
        ring = _Ring(x_g, x_s, full, split, batch, width // depth)

        def weights(here, stage):
            for i in range(2):
                part = w_s.at[stage, pl.ds(i * rows, rows)]
                plgpu.copy_gmem_to_smem(w_g.at[i, pl.ds(first, rows), here], part, full.at[stage])

        def multiply(acc):
            def step(stage, t, squares):
                tokens = hopper.load(ring.tokens(stage), plgpu.Layout.WGMMA).astype(jnp.float32)
                by = hopper.load(scale_s.at[t], plgpu.Layout.WGMMA.reduce(0)).astype(jnp.float32)
                scaled_s = a_s.at[lax.rem(t, 2)]
                scaled_s[...] = (tokens * hopper.down(by, tokens)).astype(a_s.dtype)
                plgpu.commit_smem()
                plgpu.wgmma(acc, scaled_s, hopper.transposed(w_s.at[stage]))
                return squares + jnp.sum(tokens * tokens, axis=1)

            squares = ring.through(weights, step, hopper.row_vector(0.0))
            return acc[...], squares

        def run():
            ring.fill(weights)
            plgpu.copy_gmem_to_smem(scale_g, scale_s, scale_full)
            plgpu.barrier_wait(scale_full)
            z, squares = pl.run_scoped(multiply, plgpu.ACC((hopper.ROWS, 2 * rows), jnp.float32))
            z *= hopper.across(lax.rsqrt(squares / width + epsilon), z)
            gate, up = z[:, :rows], z[:, rows:]
            out_s[...] = (gate / (1 + jnp.exp2(gate * -hopper.LOG2E)) * up).astype(out_s.dtype)
            _write(out_s, out_g.at[:, pl.ds(first, rows)], batch)

        _where(flag_g, run)

    scale = norm_scale.reshape(-1, depth)
    scratch = {
        "w_s": _shared(x.dtype, stages, 2 * rows, depth),
        "a_s": _shared(x.dtype, 2, hopper.ROWS, depth),
        "scale_s": plgpu.SMEM(scale.shape, scale.dtype),
        "out_s": plgpu.SMEM((hopper.ROWS, rows), x.dtype),
        "full": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        "scale_full": plgpu.Barrier(),
    }
    out = jax.ShapeDtypeStruct((batch, hidden), x.dtype)
    return _kernel(body, out, scratch, split, (1, hidden // rows))(x, scale, gate_up, *flag)


def _products(split: Split, h, down, flag):
    """``down`` times hidden values [B, F], summed over each part of F: float32 [parts, B, D]."""
    (batch, hidden), width = h.shape, down.shape[0]
    rows, depth, parts, stages = split

    def body(h_g, w_g, *rest, w_s, x_s, out_s, full):
        *flag_g, out_g = rest
        first, part = lax.axis_index("rows") * rows, lax.axis_index("part")
        steps = hidden // depth // parts
        ring = _Ring(h_g, x_s, full, split, batch, steps, part * steps)

        def weights(here, stage):
            plgpu.copy_gmem_to_smem(w_g.at[pl.ds(first, rows), here], w_s.at[stage], full.at[stage])

        def multiply(acc):
            def step(stage, t, _):
                plgpu.wgmma(acc, ring.tokens(stage), hopper.transposed(w_s.at[stage]))

            ring.through(weights, step, None)
            return acc[...]

        def run():
            ring.fill(weights)
            out_s[...] = pl.run_scoped(multiply, plgpu.ACC((hopper.ROWS, rows), jnp.float32))
            _write(out_s, out_g.at[part, :, pl.ds(first, rows)], batch)

        _where(flag_g, run)

    scratch = {
        "w_s": _shared(h.dtype, stages, rows, depth),
        "out_s": plgpu.SMEM((hopper.ROWS, rows), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    }
    out = jax.ShapeDtypeStruct((parts, batch, width), jnp.float32)
    return _kernel(body, out, scratch, split, (parts, width // rows))(h, down, *flag)


class _Ring(NamedTuple):
    """Stages in shared memory: ``steps`` columns of the tokens ``x_g`` from ``first`` on, and weights beside them."""

    x_g: jax.Ref
    x_s: jax.Ref
    full: jax.Ref
    split: Split
    batch: int
    steps: int
    first: jax.Array | int = 0

    def tokens(self, stage):
        """The tokens of a stage, then what lies behind them: those rows of a product do not count."""
        return self.x_s.at[pl.ds(stage * _in_eights(self.batch), hopper.ROWS)]

    def load(self, weights, t, stage):
        """Starts the copies of a step."""
        here = pl.ds((self.first + t) * self.split.depth, self.split.depth)
        weights(here, stage)
        count = _in_eights(self.batch)
        # Known in the kernel alone: a slice that is known to leave the array would be refused.
        start = lax.axis_index("rows") * 0
        target = self.x_s.at[pl.ds(stage * count, count)]
        plgpu.copy_gmem_to_smem(self.x_g.at[pl.ds(start, count), here], target, self.full.at[stage])

    def fill(self, weights):
        for stage in range(self.split.stages):
            self.load(weights, stage, stage)

    def through(self, weights, step, carry):
        """``carry = step(stage, t, carry)``, which starts one product, for all steps; all products are done then."""
        stages = self.split.stages

        def each(t, carry):
            stage = lax.rem(t, stages)
            plgpu.barrier_wait(self.full.at[stage])
            carry = step(stage, t, carry)
            plgpu.wgmma_wait(1)  # the stage of the step before is free
            following = t - 1 + stages
            wanted = (t > 0) & (following < self.steps)
            pl.when(wanted)(lambda: self.load(weights, following, lax.rem(following, stages)))
            return carry

        carry = lax.fori_loop(0, self.steps, each, carry)
        plgpu.wgmma_wait(0)
        return carry


def _kernel(body, out, scratch, split: Split, grid):
    x_rows = (split.stages - 1) * _in_eights(out.shape[-2]) + hopper.ROWS
    dtype = scratch["w_s"].dtype
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch | {"x_s": _shared(dtype, x_rows, split.depth)},
        grid=grid,
        grid_names=("part", "rows"),
        compiler_params=hopper.PARAMS,
    )


def _write(out_s, target, batch):
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_s.at[pl.ds(0, batch)], target)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _where(flag_g, run):
    """Runs where the flag, if there is one, is set."""
    if flag_g:
        pl.when(flag_g[0][0])(run)
    else:
        run()


def _shared(dtype, *shape):
    return plgpu.SMEM(shape, dtype, transforms=hopper.TRANSFORMS)
