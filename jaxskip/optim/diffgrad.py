"""diffGrad: Adam whose step is damped where the gradient hardly changes (arXiv 1909.11015)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

_WITH_STATISTICS = ("std", "variance", "sqrt_std")
_FRICTIONS = ("abs_sigmoid", "sigmoid", "wide_abs_sigmoid", *_WITH_STATISTICS)
_EPS_MODES = ("official", "optax")


class ScaleByDiffGradState(NamedTuple):
    """State of ``scale_by_diffgrad``. "float32" stands for float64 where the parameters are float64."""

    count: jax.Array  # shape=(), dtype=int32: updates done
    mu: optax.Updates  # like params, mu_dtype or float32
    nu: optax.Updates  # like params, float32
    prev_grad: optax.Updates  # like params, prev_dtype or float32
    s1: optax.Updates | None = None  # sum of the gradients so far, float32; only for "std", "variance", "sqrt_std"
    s2: optax.Updates | None = None  # sum of their squares, float32; likewise


def diffgrad_friction(
    prev: jax.Array,
    g: jax.Array,
    friction: str = "abs_sigmoid",
    *,
    diff_scale: ArrayLike = 1.0,
    mean: ArrayLike = 0.0,
    std: ArrayLike = 1.0,
) -> jax.Array:
    """The friction coefficient xi of one array, from d = diff_scale (prev - g), elementwise.

    ================== ======= ============================ ========== ======================================
    friction           version xi                           range      source
    ================== ======= ============================ ========== ======================================
    "abs_sigmoid"      0       sigmoid(abs(d))              [0.5, 1)   the paper and its code
    "sigmoid"          1       sigmoid(d)                   (0, 1)     public reimplementations
    "wide_abs_sigmoid" 2       9 sigmoid(abs(d) / 2) - 4    [0.5, 5)   public reimplementations
    "std"              3       sigmoid(std abs(d) - mean)   (0, 1)     experimental, see ``scale_by_diffgrad``
    "variance"         4       sigmoid(std^2 abs(d) - mean) (0, 1)     experimental
    "sqrt_std"         5       sigmoid(sqrt(std) abs(d) - mean) (0, 1) experimental
    ================== ======= ============================ ========== ======================================

    Log its mean before an update, ``diffgrad_friction(state.prev_grad[name], grads[name]).mean()``: at 0.5 diffGrad is
    Adam at half the learning rate.

    Args:
      prev, g: previous and present gradient, of one shape; any float dtype.
      friction: a name of the table.
      diff_scale: factor of the difference. xi depends on the scale of the loss; this undoes it.
      mean, std: statistics of past gradients, broadcast to ``g``; "std", "variance" and "sqrt_std" alone use them.

    Returns:
      Array like ``g``, float32 (float64 for float64).

    Raises:
      ValueError: unknown friction.

    Source: arXiv 1909.11015; the names are ours, the version numbers those of public reimplementations.

    >>> [round(x, 3) for x in diffgrad_friction(jnp.zeros(3), jnp.array([0.0, 1.0, -9.0])).tolist()]
    [0.5, 0.731, 1.0]
    """
    if friction not in _FRICTIONS:
        raise ValueError(f"friction={friction!r}; choose one of {_FRICTIONS}")
    dtype = jnp.promote_types(g.dtype, jnp.float32)
    d = jnp.asarray(diff_scale, dtype) * (prev.astype(dtype) - g.astype(dtype))
    if friction == "sigmoid":
        return jax.nn.sigmoid(d)
    d = jnp.abs(d)
    if friction == "abs_sigmoid":
        return jax.nn.sigmoid(d)
    if friction == "wide_abs_sigmoid":
        return 9 * jax.nn.sigmoid(d / 2) - 4
    std = jnp.asarray(std, dtype)
    slope = {"std": std, "variance": std * std, "sqrt_std": jnp.sqrt(std)}[friction]
    return jax.nn.sigmoid(slope * d - jnp.asarray(mean, dtype))


def scale_by_diffgrad(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    friction: str = "abs_sigmoid",
    eps_mode: str = "official",
    diff_scale: ArrayLike = 1.0,
    mu_dtype: Any = None,
    prev_dtype: Any = None,
) -> optax.GradientTransformation:
    """Adam's direction times the friction coefficient xi of each coordinate (``diffgrad_friction``).

    m and v are Adam's averages; xi multiplies m in the update only. The first "previous" gradient is 0, so that the
    first xi is sigmoid(abs(g)). Where gradients change by much less than 1 xi is 0.5 and the rule is Adam at half the
    learning rate: compare with that, and unscale the loss of mixed precision first (xi is not invariant to it).

    The state holds the gradient given to ``update``: under ``optax.MultiSteps`` the accumulated one, and a step that
    ``optax.apply_if_finite`` drops leaves it alone. Everything is elementwise: one pass over each array.

    ``eps_mode``: "official" has eps beside the uncorrected sqrt(v), sqrt(1 - b2^t) / (1 - b1^t) m xi / (sqrt(v) + eps);
    "optax" beside the corrected one, as ``optax.adam``. They differ by O(eps); at t = 1 official's eps counts 32-fold.

    "std", "variance" and "sqrt_std" use the mean and the standard deviation of the gradients before this one (mean 0,
    std 1 at the first). The paper's definition was not found and a public reimplementation has no consistent one: this
    one is ours, and costs two more arrays.

    Args:
      b1, b2: decay of m and v, in [0, 1).
      eps: added to the root, >= 0.
      eps_root: added under it, >= 0.
      friction, diff_scale: see ``diffgrad_friction``.
      eps_mode: "official" or "optax".
      mu_dtype: dtype that m is stored in; None: float32.
      prev_dtype: dtype that the previous gradient is stored in; None: float32. bfloat16 changes xi by at most
        2^-9 abs(diff_scale prev) for the versions 0 and 1.

    Returns:
      ``optax.GradientTransformation`` with state ``ScaleByDiffGradState``. Updates have the gradients' dtype; the
      arithmetic is float32, or float64 for float64 gradients. Numeric arguments may be traced
      (``optax.inject_hyperparams``) and are then not validated.

    Raises:
      ValueError: a concrete argument out of range, an unknown friction or eps_mode.

    Source: arXiv 1909.11015, in the form of the authors' repaired code (diffGrad_v2). The code behind the published
    numbers overwrote the previous gradient with the present one, which makes it Adam at half the learning rate.

    >>> tx = scale_by_diffgrad()
    >>> updates, state = tx.update(jnp.array([1.0, -2.0]), tx.init(jnp.zeros(2)))
    >>> [round(x, 4) for x in updates.tolist()], [round(x, 4) for x in jax.nn.sigmoid(jnp.array([1.0, 2.0])).tolist()]
    ([0.7311, -0.8808], [0.7311, 0.8808])
    """
    _validate(b1, b2, eps, eps_root, friction, eps_mode)
    with_statistics = friction in _WITH_STATISTICS

    def init_fn(params):
        def zeros(dtype=None):
            return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype or _accumulator(p)), params)

        return ScaleByDiffGradState(
            count=jnp.zeros([], jnp.int32),
            mu=zeros(mu_dtype),
            nu=zeros(),
            prev_grad=zeros(prev_dtype),
            s1=zeros() if with_statistics else None,
            s2=zeros() if with_statistics else None,
        )

    def update_fn(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)

        def leaf(g, mu, nu, prev, *sums):
            dtype = _accumulator(g)
            decay_m, decay_v = jnp.asarray(b1, dtype), jnp.asarray(b2, dtype)
            filled_m, filled_v = _filled(decay_m, count), _filled(decay_v, count)  # pyright: ignore[reportArgumentType]
            new_g = g.astype(dtype)
            new_mu = decay_m * mu.astype(dtype) + (1 - decay_m) * new_g
            new_nu = decay_v * nu + (1 - decay_v) * new_g * new_g
            new_sums, statistics = [], {}
            if with_statistics:
                s1, s2 = sums
                past = jnp.maximum(state.count, 1).astype(dtype)
                mean = s1 / past
                std = jnp.sqrt(jnp.maximum(s2 / past - mean * mean, 0))
                statistics = {"mean": mean, "std": jnp.where(state.count > 0, std, 1)}
                new_sums = [s1 + new_g, s2 + new_g * new_g]
            step = new_mu * diffgrad_friction(prev, new_g, friction, diff_scale=diff_scale, **statistics)
            plus, root = jnp.asarray(eps, dtype), jnp.asarray(eps_root, dtype)
            if eps_mode == "official":
                step = jnp.sqrt(filled_v) / filled_m * step / (jnp.sqrt(new_nu + root) + plus)
            else:
                step = step / filled_m / (jnp.sqrt(new_nu / filled_v + root) + plus)
            # Always the new gradient. XLA updates a donated array in place only where the new one is computed from the
            # old one; else it makes a new array and copies it over.
            new_prev = jnp.where(jnp.asarray(count) > 0, new_g.astype(prev.dtype), prev)
            return step.astype(g.dtype), new_mu.astype(mu.dtype), new_nu, new_prev, *new_sums

        trees = [updates, state.mu, state.nu, state.prev_grad, *([state.s1, state.s2] if with_statistics else [])]
        treedef = jax.tree.structure(updates)
        rows = treedef.flatten_up_to(jax.tree.map(leaf, *trees))
        new = [treedef.unflatten([row[i] for row in rows]) for i in range(len(trees))]
        return new[0], ScaleByDiffGradState(count, *new[1:])  # pyright: ignore[reportArgumentType]

    return optax.GradientTransformation(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


def diffgrad(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    friction: str = "abs_sigmoid",
    weight_decay: ArrayLike = 0.0,
    decoupled: bool = False,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    eps_mode: str = "official",
    diff_scale: ArrayLike = 1.0,
    mu_dtype: Any = None,
    prev_dtype: Any = None,
) -> optax.GradientTransformation:
    """diffGrad: params -= learning_rate * (Adam's direction * friction), with weight decay of either kind.

    Always compare it with Adam at ``learning_rate`` and at half of it: see ``scale_by_diffgrad``.

    Args:
      learning_rate: a number or a schedule; 1e-3 in the official code.
      b1: 0.9 in the official class, 0.95 in its notebooks.
      weight_decay: lambda. As in the official code it enters the gradient (L2), and so the previous gradient too.
      decoupled: take learning_rate * lambda * params off beside the step instead (AdamW's way; not in the paper).
      mask: pytree of bools or a function params -> such a tree; true where decay applies. Under
        ``optax.inject_hyperparams`` name a function (and the dtypes) in ``static_args``.
      b2, eps, eps_root, friction, eps_mode, diff_scale, mu_dtype, prev_dtype: see ``scale_by_diffgrad``.

    Returns:
      ``optax.GradientTransformation``; ``update`` needs params.

    Raises:
      ValueError: as ``scale_by_diffgrad``, and update without params.

    Source: arXiv 1909.11015.

    >>> params = jnp.array([3.0, -2.0])
    >>> tx = optax.chain(optax.clip_by_global_norm(1.0), diffgrad(0.1))
    >>> state = tx.init(params)
    >>> for _ in range(200):
    ...     updates, state = tx.update(2 * params, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> bool(jnp.all(jnp.abs(params) < 0.05))
    True
    """
    rule = scale_by_diffgrad(
        b1=b1,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
        friction=friction,
        eps_mode=eps_mode,
        diff_scale=diff_scale,
        mu_dtype=mu_dtype,
        prev_dtype=prev_dtype,
    )
    decay = optax.add_decayed_weights(weight_decay, mask=mask)  # pyright: ignore[reportArgumentType]
    return optax.chain(
        *((rule, decay) if decoupled else (decay, rule)),
        optax.scale_by_learning_rate(learning_rate),
    )


def _accumulator(x: jax.Array):
    return jnp.promote_types(x.dtype, jnp.float32)


def _filled(decay: jax.Array, count: jax.Array) -> jax.Array:
    """1 - decay^count; through the logarithm, because the difference would lose half of float32's digits."""
    return -jnp.expm1(count.astype(decay.dtype) * jnp.log1p(decay - 1))


def _validate(b1, b2, eps, eps_root, friction, eps_mode) -> None:
    for name, value, allowed in (("friction", friction, _FRICTIONS), ("eps_mode", eps_mode, _EPS_MODES)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}; choose one of {allowed}")
    for name, value, valid, allowed in (
        ("b1", b1, lambda v: 0 <= v < 1, "in [0, 1)"),
        ("b2", b2, lambda v: 0 <= v < 1, "in [0, 1)"),
        ("eps", eps, lambda v: v >= 0, ">= 0"),
        ("eps_root", eps_root, lambda v: v >= 0, ">= 0"),
    ):
        if not isinstance(value, jax.core.Tracer) and not valid(value):
            raise ValueError(f"{name}={value}; it must be {allowed}")
