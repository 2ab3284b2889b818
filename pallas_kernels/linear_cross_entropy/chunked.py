"""XLA only, for every device: one tile of the logits at a time, rows outside, vocabulary inside.

Beyond its outputs it holds tiles of [rows, vocabulary entries] and the float32 accumulators of the gradients.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.linear_cross_entropy.noise import PERIOD, Draw, exponential
from pallas_kernels.linear_cross_entropy.reference import Spec, logits

_Carry = TypeVar("_Carry")
# Bytes of float32 logits. Larger tiles pass over the classifier's gradient less often, for memory that lasts a tile.
_TILE_BYTES = {"cpu": 32 * 2**20, "gpu": 2**30, "tpu": 2**30}
_MIN_ROWS = 128  # fewer rows do not amortise reading the classifier: tile the vocabulary instead


def tile_sizes(spec: Spec, tokens: int, vocabulary: int, drawing: bool = False) -> tuple[int, int]:
    """(rows, vocabulary entries) of a tile: as asked for, else even tiles whose float32 logits keep to the budget."""
    if spec.block_sizes is not None:
        if drawing and spec.block_sizes[1] < vocabulary and spec.block_sizes[1] % PERIOD:
            raise ValueError(
                f"block_sizes={spec.block_sizes}: labels are drawn from vocabulary tiles of a multiple of {PERIOD} "
                f"entries, or of the whole vocabulary ({vocabulary})"
            )
        return spec.block_sizes
    tokens, budget = max(tokens, 1), _TILE_BYTES[spec.target.platform] // 4
    least = min(_MIN_ROWS, tokens)
    columns = even(vocabulary, budget // least, PERIOD)
    return even(tokens, max(budget // columns, least), 8), columns


def even(total: int, most: int, multiple: int) -> int:
    """The size of equal tiles of about ``most`` or fewer that cover ``total``, rounded up to ``multiple``."""
    if total <= most:
        return total
    size = -(-total // -(-total // most))
    return -(-size // multiple) * multiple


@functools.partial(jax.jit, static_argnums=0)
def forward(
    spec: Spec, e: jax.Array, c: jax.Array, b: jax.Array | None, target: jax.Array | Draw
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As ``reference.forward``."""
    rows, columns = _tiles(spec, e, c, target)

    def step(outputs, start, size):
        e_tile = _slice(e, start, size)
        tile_logits = functools.partial(_tile_logits, spec, e_tile, c, b)
        tile = _row_tile(spec, columns, tile_logits, e_tile, c, _target_rows(target, start, size))
        return tuple(_write(out, part, start) for out, part in zip(outputs, tile, strict=True))

    return loop_over_tiles(step, _row_outputs(spec, e), e.shape[0], rows)  # pyright: ignore[reportReturnType]


@functools.partial(jax.jit, static_argnums=0)
def backward(
    spec: Spec,
    e: jax.Array,
    c: jax.Array,
    b: jax.Array | None,
    labels: jax.Array,
    lse: jax.Array,
    g: jax.Array,
    h: jax.Array,
    scale: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Gradients of embeddings, classifier and bias, from the cotangents [N] g of the negative log likelihood and h of
    the log-sum-exp, both divided by ``scale`` so that they are of order one."""
    rows, columns = _tiles(spec, e, c, labels)

    def step(carry, start, size):
        de, sums = carry
        e_tile, *parts = (_slice(x, start, size) for x in (e, labels, lse, g, h))
        tile_logits = functools.partial(_tile_logits, spec, e_tile, c, b)
        de_tile, sums = _row_tile_gradients(spec, columns, tile_logits, e_tile, c, sums, *parts)
        return _write(de, de_tile, start), sums

    de, (dc, db) = loop_over_tiles(step, _zero_gradients(spec, e, c, b), e.shape[0], rows)
    return jax.tree.map(lambda x: x * scale, (de, dc, db))


def one_pass(*_: Any) -> bool:
    """Always: with a loss for all tokens together the gradients need no second look at the logits."""
    return True


@functools.partial(jax.jit, static_argnums=0)
def forward_backward(
    spec: Spec, e: jax.Array, c: jax.Array, b: jax.Array | None, weights: jax.Array, target: jax.Array | Draw
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array, jax.Array | None]]:
    """(loss [N], labels [N], gradients of sum(weights * loss)), loss = negative log likelihood + z_loss * lse**2.

    With one vocabulary tile, log-sum-exp and gradients share the logits: 3 matrix products, as many as with all of
    the logits in memory. With more, each tile is computed twice.
    """
    vocabulary = _vocabulary(spec, c)
    rows, columns = _tiles(spec, e, c, target)

    def step(carry, start, size):
        outputs, (de, sums) = carry
        e_tile, w = _slice(e, start, size), _slice(weights, start, size)
        z = _tile_logits(spec, e_tile, c, b, 0, vocabulary) if columns >= vocabulary else None

        def tile_logits(start, size):
            return _tile_logits(spec, e_tile, c, b, start, size) if z is None else z

        nll, lse, labels = _row_tile(spec, columns, tile_logits, e_tile, c, _target_rows(target, start, size))
        h = 2 * spec.z_loss * lse * w
        de_tile, sums = _row_tile_gradients(spec, columns, tile_logits, e_tile, c, sums, labels, lse, w, h)
        tile = (nll + spec.z_loss * lse**2, labels)
        outputs = tuple(_write(out, part, start) for out, part in zip(outputs, tile, strict=True))
        return outputs, (_write(de, de_tile, start), sums)

    loss, _, labels = _row_outputs(spec, e)
    carry = ((loss, labels), _zero_gradients(spec, e, c, b))
    (loss, labels), (de, (dc, db)) = loop_over_tiles(step, carry, e.shape[0], rows)
    return loss, labels, (de, dc, db)


def _row_tile(spec, columns, tile_logits, e, c, target):
    """(negative log likelihood, log-sum-exp, labels) of the rows e, one vocabulary tile after another."""
    drawing = isinstance(target, Draw)

    def step(carry, start, size):
        top, total, logit_sum, picked, label, best = carry
        z = tile_logits(start, size)
        # The log-sum-exp does not depend on the reference point, so no derivative flows through it.
        fixed = lax.stop_gradient(z)
        new_top = jnp.maximum(top, fixed.max(-1))
        above = jnp.exp(z - new_top[:, None])
        total = total * jnp.exp(top - new_top) + above.sum(-1)
        if spec.label_smoothing:
            logit_sum += z.sum(-1)
        if drawing:
            # argmax(z + Gumbel noise) as an exponential race: the same order, one logarithm an entry less.
            score = lax.stop_gradient(above) / exponential(target, start, size)
            tile_best, tile_label = jnp.log(score.max(-1)) + new_top, start + jnp.argmax(score, -1).astype(jnp.int32)
            better = tile_best > best
            picked = jnp.where(better, _pick(z, tile_label, start), picked)
            label, best = jnp.where(better, tile_label, label), jnp.where(better, tile_best, best)
        else:
            picked += _pick(z, label, start)
        return new_top, total, logit_sum, picked, label, best

    zero = jnp.zeros_like(e, spec.dtype, shape=e.shape[:1])
    # The least finite number, not -inf: a tile whose logits are all -inf (a bias that masks them) must not give NaN.
    top = jnp.full_like(zero, jnp.finfo(spec.dtype).min)
    label = jnp.zeros_like(e, jnp.int32, shape=e.shape[:1]) if drawing else target
    carry = (top, zero, zero, zero, label, jnp.full_like(zero, -jnp.inf))
    top, total, logit_sum, picked, label, _ = loop_over_tiles(step, carry, _vocabulary(spec, c), columns)
    lse = top + jnp.log(total)
    smoothing = spec.label_smoothing
    return lse - (1 - smoothing) * picked - smoothing / spec.classes * logit_sum, lse, label


def _row_tile_gradients(spec, columns, tile_logits, e, c, sums, labels, lse, g, h):
    """The embedding gradients of the rows e, and ``sums`` (classifier, bias) with the rows' share added."""
    layout = spec.classifier_layout
    operand = e.astype(spec.operand_dtype)

    def step(carry, start, size):
        de, (dc, db) = carry
        z = tile_logits(start, size)
        dz = jnp.exp(z - lse[:, None]) * (g + h)[:, None]
        dz -= jnp.where(_hit(labels, start, size), (1 - spec.label_smoothing) * g[:, None], 0)
        if spec.label_smoothing:
            dz -= spec.label_smoothing / spec.classes * g[:, None]
        if spec.softcap is not None:
            dz *= 1 - (z / spec.softcap) ** 2
        if db is not None:
            db = _add(db, dz.sum(0), start)
        dz = dz.astype(spec.operand_dtype)
        c_tile = _slice(c, start, size, layout.index("v")).astype(spec.operand_dtype)
        de += jnp.einsum(f"rv,{layout}->rd", dz, c_tile, preferred_element_type=spec.dtype)
        dc_tile = jnp.einsum(f"rv,rd->{layout}", dz, operand, preferred_element_type=spec.dtype)
        return de, (_add(dc, dc_tile, start, layout.index("v")), db)

    return loop_over_tiles(step, (jnp.zeros_like(e, spec.dtype), sums), _vocabulary(spec, c), columns)


def loop_over_tiles(step: Callable[[_Carry, Any, int], _Carry], carry: _Carry, total: int, tile: int) -> _Carry:
    """carry = step(carry, start, size) over [0, total). A ragged last tile is a call of its own: nothing is padded."""
    full, rest = divmod(total, tile)
    if full == 1:
        carry = step(carry, 0, tile)
    elif full:
        carry = lax.fori_loop(np.int32(0), np.int32(full), lambda i, carried: step(carried, i * tile, tile), carry)
    return step(carry, full * tile, rest) if rest else carry


def _tiles(spec, e, c, target):
    return tile_sizes(spec, e.shape[0], _vocabulary(spec, c), isinstance(target, Draw))


def _vocabulary(spec, c):
    return c.shape[spec.classifier_layout.index("v")]


def _tile_logits(spec, e, c, b, start, size):
    c = _slice(c, start, size, spec.classifier_layout.index("v"))
    return logits(spec, e, c, None if b is None else _slice(b, start, size))


def _hit(labels, start, size):
    return labels[:, None] == start + jnp.arange(size, dtype=jnp.int32)[None, :]


def _pick(z, labels, start):
    """The label's logit where this tile holds it, else 0."""
    return jnp.where(_hit(labels, start, z.shape[1]), z, 0).sum(-1)


def _target_rows(target, start, size):
    if isinstance(target, Draw):
        return target._replace(token_ids=_slice(target.token_ids, start, size))
    return _slice(target, start, size)


# zeros_like, not zeros: under shard_map a loop's carry must vary over the same mesh axes before and after.
def _row_outputs(spec, e):
    shape = e.shape[:1]
    return tuple(jnp.zeros_like(e, dtype, shape=shape) for dtype in (spec.dtype, spec.dtype, jnp.int32))


def _zero_gradients(spec, e, c, b):
    return jnp.zeros_like(e, spec.dtype), (
        jnp.zeros_like(c, spec.dtype),
        None if b is None else jnp.zeros_like(b, spec.dtype),
    )


def _slice(x, start, size, axis=0):
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def _write(x, part, start):
    return lax.dynamic_update_slice_in_dim(x, part, start, 0)


def _add(x, part, start, axis=0):
    size = part.shape[axis]
    return lax.dynamic_update_slice_in_dim(x, _slice(x, start, size, axis) + part, start, axis)
