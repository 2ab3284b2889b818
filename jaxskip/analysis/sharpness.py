"""Second-order measurements on pytrees: Hessian-vector products, directional sharpness, extreme eigenvalues.

All functions jit (``loss_fn`` closed over or static) and work on parameters of any sharding. A loss is
``loss_fn(params)`` -> scalar mean loss, or, where ``batches`` are given, ``loss_fn(params, batch)``: ``batches`` is a
pytree of arrays [N, ...], batch i is their i-th slice, and the result is that of the mean of the N losses, at the
memory of one.

Measure in evaluation mode (no dropout), the same batches for all directions. The parameters are cast to float32, and
so should be the network's own arithmetic: with bfloat16 products (the default of TPUs, see
``jax.default_matmul_precision``) a small sharpness loses its sign. Products are forward over reverse: a ``custom_vjp``
needs rules that can be differentiated, so opaque kernels have to give way to a reference. The kinks of a ReLU or of a
router count for nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


class HessianEigenpairs(NamedTuple):
    """What ``hessian_eigenpairs`` returns."""

    values: jax.Array  # [k], descending; nan where the Krylov space was exhausted before
    vectors: Any  # like params with a leading axis k, unit norm over the whole tree
    residuals: jax.Array  # [k]: |H v - value v|; a true eigenvalue lies within that distance


def hvp(loss_fn: Callable[..., jax.Array], params: Any, u: Any, *, batches: Any = None) -> Any:
    """Hessian of the loss at ``params`` times ``u``; 2 to 3 times the work of a gradient.

    Args:
      loss_fn, batches: see the module.
      params, u: pytrees of float arrays of the same structure and shapes.

    Returns:
      Pytree like ``params``, at least float32.

    Raises:
      ValueError: ``u`` does not match ``params``; batches of different or no length.

    >>> hvp(lambda p: p[0] ** 2 * p[1], jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0])).tolist()
    [4.0, 2.0]
    """
    params, u = _matching(params, u)
    return _mean(lambda *batch: jax.jvp(jax.grad(lambda p: loss_fn(p, *batch)), (params,), (u,))[1], batches)


def directional_sharpness(
    loss_fn: Callable[..., jax.Array], params: Any, u: Any, *, batches: Any = None, shift: ArrayLike = 0.0
) -> jax.Array:
    """u' H u / u' u: the loss's second derivative along ``u``, whatever the size of ``u``.

    Pass the bare direction of an optimizer, without its learning rate (which would cancel) and without decoupled weight
    decay (which would not). Negative values are legitimate. nan where ``u`` is zero.

    Args:
      loss_fn, batches: see the module.
      params, u: pytrees of float arrays of the same structure and shapes.
      shift: where H is taken: ``shift`` * u / |u| away from ``params``.

    Returns:
      Scalar, at least float32.

    Raises:
      ValueError: as ``hvp``.

    Source: arXiv 2306.00204.

    >>> directional_sharpness(lambda p: 2 * p[0] ** 2 - p[1] ** 2, jnp.zeros(2), jnp.array([0.0, 3.0])).item()
    -2.0
    """
    params, u = _matching(params, u)
    square = _dot(u, u)
    params = _along(params, u, shift * jax.lax.rsqrt(square))
    return _dot(hvp(loss_fn, params, u, batches=batches), u) / square


def best_local_step(
    loss_fn: Callable[..., jax.Array], params: Any, u: Any, grid: ArrayLike | None = None, *, batches: Any = None
) -> tuple[jax.Array, jax.Array]:
    """The best of the steps ``params`` + s u / |u|, s in ``grid``.

    Args:
      loss_fn, batches: see the module.
      params, u: pytrees of float arrays of the same structure and shapes; ``u`` points downhill.
      grid: [S] lengths; None: 24 from 1e-3 to 10, each 1.49 times the one before.

    Returns:
      (drop, s): the largest decrease of the loss (negative when every step raises it) and the length that gives it.

    Raises:
      ValueError: as ``hvp``.

    Source: arXiv 2306.00204, section "landscape".

    >>> p = jnp.array([3.0, 4.0])
    >>> drop, s = best_local_step(lambda p: jnp.sum(p**2), p, -p, grid=jnp.arange(9.0))
    >>> drop.item(), s.item()
    (25.0, 5.0)
    """
    params, u = _matching(params, u)
    lengths = jnp.asarray(jnp.geomspace(1e-3, 10.0, 24) if grid is None else grid, jnp.float32)
    losses = _line(loss_fn, params, u, batches)
    drops = losses(0.0) - jax.lax.map(losses, lengths)
    best = jnp.argmax(jnp.where(jnp.isnan(drops), -jnp.inf, drops))
    return drops[best], lengths[best]


def landscape_search(
    loss_fn: Callable[..., jax.Array],
    params: Any,
    u: Any,
    eps: float = 1.0,
    *,
    distance: int = 20,
    max_retries: int = 10,
    batches: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """The authors' walk: losses at s = 0, eps, 2 eps, ... along u / |u|, up to the first that lies above the start.

    A walk of at most 3 points is repeated with eps / 5, at most ``max_retries`` times.

    Args:
      loss_fn, batches: see the module.
      params, u: pytrees of float arrays of the same structure and shapes; ``u`` points downhill.
      eps: first distance between points.
      distance: points after the start.

    Returns:
      (steps, losses), both [distance + 1]; nan behind the end of the walk. The drop is losses[0] - nanmin(losses).

    Raises:
      ValueError: as ``hvp``.

    Source: arXiv 2306.00204, official code (landscape_utils).

    >>> steps, losses = landscape_search(lambda p: p**2, jnp.array(1.0), jnp.array(-1.0), eps=0.5, distance=6)
    >>> steps.tolist(), losses.tolist()
    ([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, nan], [1.0, 0.25, 0.0, 0.25, 1.0, 2.25, nan])
    """
    params, u = _matching(params, u)
    losses = _line(loss_fn, params, u, batches)

    def walk(eps):
        start = jnp.full(distance + 1, jnp.nan).at[0].set(losses(0.0))

        def goes_on(carry):
            i, seen = carry
            return (i <= distance) & ~(seen[i - 1] > seen[0])

        _, seen = jax.lax.while_loop(goes_on, lambda c: (c[0] + 1, c[1].at[c[0]].set(losses(c[0] * eps))), (1, start))
        return seen

    def too_short(carry):
        tries, _, seen = carry
        return (tries < max_retries) & (jnp.sum(~jnp.isnan(seen)) <= 3)

    first = jnp.asarray(eps, jnp.float32)
    again = lambda c: (c[0] + 1, c[1] / 5, walk(c[1] / 5))  # noqa: E731
    _, last, seen = jax.lax.while_loop(too_short, again, (0, first, walk(first)))
    return jnp.where(jnp.isnan(seen), jnp.nan, jnp.arange(distance + 1) * last), seen


def update_report(
    loss_fn: Callable[..., jax.Array],
    params: Any,
    updates: Mapping[str, Any],
    grid: ArrayLike | None = None,
    *,
    batches: Any = None,
) -> dict[str, dict[str, jax.Array]]:
    """Compare directions from one point: sharpness, alignment with steepest descent, and what the best step gains.

    A low sharpness alone does not mean more progress: read it beside the cosine.

    Args:
      loss_fn, batches: see the module.
      params: pytree of float arrays.
      updates: name -> direction like ``params``, as an optimizer returns it (to be added to ``params``).
      grid: see ``best_local_step``.

    Returns:
      name -> {"sharpness", "cos" (with minus the gradient), "best_drop", "best_step"}, scalars.

    Raises:
      ValueError: as ``hvp``.

    Source: arXiv 2306.00204.

    >>> report = update_report(lambda p: jnp.sum(p**2), jnp.array([3.0, 4.0]), {"axis": jnp.array([-1.0, 0.0])})
    >>> {name: round(float(value), 1) for name, value in report["axis"].items()}
    {'sharpness': 2.0, 'cos': 0.6, 'best_drop': 9.0, 'best_step': 3.0}
    """
    wide = _wide(params)
    gradient = _mean(lambda *batch: jax.grad(lambda p: loss_fn(p, *batch))(wide), batches)
    report = {}
    for name, u in updates.items():
        _, u = _matching(params, u)
        drop, step = best_local_step(loss_fn, params, u, grid, batches=batches)
        report[name] = {
            "sharpness": directional_sharpness(loss_fn, params, u, batches=batches),
            "cos": -_dot(gradient, u) * jax.lax.rsqrt(_dot(u, u)) * jax.lax.rsqrt(_dot(gradient, gradient)),
            "best_drop": drop,
            "best_step": step,
        }
    return report


def hessian_eigenpairs(
    loss_fn: Callable[..., jax.Array],
    params: Any,
    key: jax.Array,
    *,
    k: int = 1,
    num_iters: int = 20,
    batches: Any = None,
) -> HessianEigenpairs:
    """The k algebraically largest eigenvalues of the Hessian ("the sharpness" for k = 1) with eigenvectors, by Lanczos.

    ``num_iters`` Hessian-vector products from a random start, each orthogonalised against all before; keeps
    ``num_iters`` + k copies of the parameters. Raise ``num_iters`` until the residuals are small enough. A repeated
    eigenvalue is found once. For the smallest negate the loss.

    Args:
      loss_fn, batches: see the module.
      params: pytree of float arrays, P entries in all.
      key: PRNG key of the start.
      k: how many, at most ``num_iters`` and P.
      num_iters: Lanczos steps; more than P are not done.

    Returns:
      ``HessianEigenpairs``, at least float32.

    Raises:
      ValueError: k out of range; batches of different or no length.

    Source: Lanczos with full orthogonalisation; for neural networks arXiv 1901.10159.

    >>> loss = lambda p: 0.5 * jnp.sum(jnp.array([5.0, -7.0, 3.0]) * p["w"] ** 2)
    >>> pairs = hessian_eigenpairs(loss, {"w": jnp.zeros(3)}, jax.random.key(0), k=2)
    >>> [round(x, 3) for x in pairs.values.tolist()]
    [5.0, 3.0]
    """
    params = _wide(params)
    steps = min(num_iters, optax.tree.size(params))
    if not 1 <= k <= steps:
        raise ValueError(f"k={k}; it must be between 1 and {steps}, the smaller of num_iters and the parameters")
    start = optax.tree.random_like(key, params, jax.random.normal)
    start = _scaled(start, jax.lax.rsqrt(_dot(start, start)))
    basis = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype).at[0].set(x), start)

    def step(i, carry):
        basis, diagonal, off_diagonal, norm, live = carry
        v = jax.tree.map(lambda b: b[i], basis)
        w = hvp(loss_fn, params, v, batches=batches)
        diagonal = diagonal.at[i].set(_dot(w, v))
        norm = jnp.maximum(norm, jnp.sqrt(_dot(w, w)))
        # Once would leave rounding errors of the size of what is left.
        w = _orthogonalized(_orthogonalized(w, basis), basis)
        rest = jnp.sqrt(_dot(w, w))
        live = live & (rest > 10 * jnp.finfo(rest.dtype).eps * norm)
        following = _scaled(w, jnp.where(live, 1 / rest, 0))
        basis = jax.tree.map(lambda b, x: b.at[i + 1].set(x, mode="drop"), basis, following)
        return basis, diagonal, off_diagonal.at[i].set(jnp.where(live, rest, 0)), norm, live

    zeros = jnp.zeros(steps, jax.tree.leaves(start)[0].dtype)
    carry = (basis, zeros, zeros, jnp.zeros([], zeros.dtype), jnp.asarray(True))
    with jax.default_matmul_precision("highest"):
        basis, diagonal, off_diagonal, norm, _ = jax.lax.fori_loop(0, steps, step, carry)
        used = jnp.concatenate([jnp.ones(1, bool), off_diagonal[:-1] > 0])
        # What was not reached goes below every true value, and is turned into nan at the end.
        diagonal = jnp.where(used, diagonal, -3 * norm - 1)
        matrix = jnp.diag(diagonal) + jnp.diag(off_diagonal[:-1], 1) + jnp.diag(off_diagonal[:-1], -1)
        values, rotation = jnp.linalg.eigh(matrix)
        values, rotation = values[::-1][:k], rotation[:, ::-1][:, :k]
        vectors = jax.tree.map(lambda b: jnp.tensordot(rotation.T, b, axes=1), basis)
    found = jnp.arange(k) < jnp.sum(used)
    residuals = jnp.abs(off_diagonal[-1] * rotation[-1])
    return HessianEigenpairs(jnp.where(found, values, jnp.nan), vectors, jnp.where(found, residuals, jnp.nan))


def _wide(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32)), tree)


def _matching(params, u):
    """Both in float32 at least, and u in the dtypes of params."""
    params = _wide(params)
    shapes, given = (jax.tree.map(jnp.shape, tree) for tree in (params, u))
    if shapes != given:
        raise ValueError(f"the direction has the shapes {given}; the parameters have {shapes}")
    return params, jax.tree.map(lambda x, p: jnp.asarray(x, p.dtype), u, params)


def _dot(a, b) -> jax.Array:
    # Not jnp.vdot, whose products are bfloat16 on TPUs.
    return jnp.asarray(sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), a, b))))


def _scaled(tree, factor):
    return jax.tree.map(lambda x: factor * x, tree)


def _orthogonalized(w, basis):
    """w without its components along the rows of the stacked basis (unit vectors, or zero)."""
    products = jax.tree.map(lambda b, x: jnp.tensordot(b, x, axes=x.ndim), basis, w)
    coordinates = jax.tree.reduce(jnp.add, products)
    return jax.tree.map(lambda x, b: x - jnp.tensordot(coordinates, b, axes=1), w, basis)


def _along(params, u, factor):
    return jax.tree.map(lambda p, x: p + factor * x, params, u)


def _line(loss_fn, params, u, batches):
    """s -> mean loss at params + s u / |u|."""
    unit = _scaled(u, jax.lax.rsqrt(_dot(u, u)))
    return lambda s: _mean(lambda *batch: _wide(loss_fn(_along(params, unit, s), *batch)), batches)


def _mean(function, batches):
    """Mean over the batches of a function that returns a pytree, one batch after the other."""
    if batches is None:
        return function()
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(batches)}
    if len(lengths) != 1 or not lengths.isdisjoint({(), (0,)}):
        raise ValueError(f"batches need one common leading axis of length 1 or more; the arrays start with {lengths}")
    first = jax.tree.map(lambda x: x[0], batches)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, first))

    def add(total, batch):
        return jax.tree.map(jnp.add, total, function(batch)), None

    total, _ = jax.lax.scan(add, zeros, batches)
    (count,) = lengths.pop()
    return jax.tree.map(lambda x: x / count, total)
