"""The feed-forward block of a Llama-like decoder for a few tokens, at the rate of memory, or not at all.

Decoding reads the matrices of a block for a handful of tokens, so that what counts is how fast they are read and how
little is done around them; and a policy that leaves blocks out token by token decides on the device. ``gated_mlp`` is
the whole block, handed that decision.
"""

import importlib

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch

__all__ = ["gated_mlp"]


def gated_mlp(
    x: jax.Array,
    norm_scale: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    *,
    run: jax.Array | None = None,
    epsilon: float = 1e-5,
    implementation: str | None = None,
) -> jax.Array:
    """x + down (silu(gate n) * (up n)) with n the RMS-normalised x: a feed-forward block with its residual sum.

    Args:
        x: [B, D], bfloat16, float16, float32 or float64: tokens, one a row.
        norm_scale: [D], of the norm; any float.
        gate_up: [2, F, D] in the dtype of x, the two matrices with their outputs first.
        down: [D, F] in the dtype of x.
        run: a scalar bool, None for True; traced, so that another choice compiles nothing anew. Where it is False the
            result is exactly x and nothing of the matrices is read.
        epsilon: of the norm.
        implementation: "mosaic_gpu" (NVIDIA Hopper; 16 bits, B up to 64, D up to 16384, D and F multiples of 64), "xla"
            (a conditional, where there is ``run``), "reference" or None for the best.

    Returns:
        [B, D] in the dtype of x. Sums and silu in float32; the normalised x and the hidden values are rounded to the
        dtype of x, for "xla" products with gate and up and what is added to x as well. "mosaic_gpu" rounds
        x * norm_scale, which float16 must hold, and divides the products by the root mean square. It has no derivative.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit; the message says which.
        NotImplementedError: ``implementation`` cannot run on the device.

    Source: ours; the block is that of Llama (arXiv:2302.13971).

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels.gated_mlp import gated_mlp
        >>> x, gate_up, down = jnp.ones((1, 2)), jnp.ones((2, 4, 2)), jnp.ones((2, 4))
        >>> gated_mlp(x, jnp.ones(2), gate_up, down).round().tolist()
        [[15.0, 15.0]]
        >>> gated_mlp(x, jnp.ones(2), gate_up, down, run=jnp.bool_(False)).tolist()
        [[1.0, 1.0]]
    """
    _check(x, norm_scale, gate_up, down, run)
    chosen = _chosen(x, gate_up, implementation)
    if chosen == "mosaic_gpu":
        # Imported on first use: older versions of JAX lack what it needs.
        return importlib.import_module(f"{__name__}.mosaic_gpu").block(x, norm_scale, gate_up, down, run, epsilon)
    form = _xla if chosen == "xla" else reference
    if run is None:
        return form(x, norm_scale, gate_up, down, epsilon)
    return jax.lax.cond(run, lambda: form(x, norm_scale, gate_up, down, epsilon), lambda: x)


def reference(x, norm_scale, gate_up, down, epsilon):
    """The definition, in float32, or float64 for float64 inputs; only the result is rounded."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x_wide, scale, gate_up, down = (v.astype(wide) for v in (x, norm_scale, gate_up, down))
    return _xla(x_wide, scale, gate_up, down, epsilon).astype(x.dtype)


def _xla(x, norm_scale, gate_up, down, epsilon):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    variance = jnp.mean(jnp.square(x.astype(wide)), axis=1, keepdims=True)
    n = (x * (jax.lax.rsqrt(variance + epsilon) * norm_scale[None])).astype(x.dtype)
    gate, up = jnp.unstack(jax.lax.dot_general(n, gate_up, (((1,), (2,)), ((), ()))), axis=1)
    hidden = (jax.nn.silu(gate.astype(wide)) * up).astype(x.dtype)
    return x + jax.lax.dot_general(hidden, down, (((1,), (1,)), ((), ())))


def _chosen(x, gate_up, implementation: str | None) -> str:
    (batch, width), hidden = x.shape, gate_up.shape[1]

    def mosaic_gpu(target: dispatch.Target) -> str | None:
        if reason := dispatch.mosaic_gpu(target):
            return reason
        if x.dtype.itemsize != 2 or not 1 <= batch <= 64 or width % 64 or hidden % 64 or not 0 < width <= 16384:
            return (
                "takes 1 to 64 tokens of bfloat16 or float16, D up to 16384, D and F multiples of 64, "
                f"not {x.dtype} [{batch}, {width}] and F = {hidden}"
            )
        return None

    registry = {"mosaic_gpu": mosaic_gpu, "xla": dispatch.anywhere, "reference": dispatch.anywhere}
    return dispatch.choose("gated_mlp", implementation, registry)


def _check(x, norm_scale, gate_up, down, run):
    shapes = x.shape, norm_scale.shape, gate_up.shape, down.shape
    width = x.shape[-1] if x.ndim == 2 else None
    hidden = down.shape[-1] if down.ndim == 2 else None
    if shapes[1:] != ((width,), (2, hidden, width), (width, hidden)):
        raise ValueError(
            "x must be [B, D], norm_scale [D], gate_up [2, F, D] and down [D, F]; got shapes "
            f"{', '.join(map(str, shapes))}"
        )
    if not x.dtype == gate_up.dtype == down.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x, gate_up and down must be floats alike, not {x.dtype}, {gate_up.dtype}, {down.dtype}")
    if run is not None and (run.shape != () or run.dtype != bool):
        raise ValueError(f"run must be a scalar bool, not {run.dtype} {run.shape}")
