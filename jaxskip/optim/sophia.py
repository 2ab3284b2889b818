"""Sophia: sign momentum made Newton-like by a clipped, occasionally refreshed diagonal curvature (arXiv 2305.14342)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

_REFRESH = ("before", "after", "optax")


class ScaleBySophiaState(NamedTuple):
    """State of ``scale_by_sophia``."""

    count: jax.Array  # shape=(), dtype=int32: updates done
    key: jax.Array  # shape=(), typed PRNG key; refresh t draws from fold_in(key, t), the key itself never changes
    mu: optax.Updates  # like params, mu_dtype or float32
    h: optax.Updates  # like params, float32
    b2: jax.Array  # shape=(), dtype=float32: what update_hessian uses
    num_refreshes: jax.Array  # shape=(), dtype=int32
    win_rate: jax.Array  # shape=(), dtype=float32: share of coordinates the last update did not clip


def scale_by_sophia(
    b1: ArrayLike = 0.965,
    b2: ArrayLike = 0.99,
    eps: ArrayLike = 1e-12,
    gamma: ArrayLike = 0.05,
    clip_threshold: ArrayLike = 1.0,
    update_interval: ArrayLike = 10,
    mu_dtype: Any = None,
    refresh: str = "before",
    bias_correct_h: bool = False,
    seed: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """The direction clip(m / max(gamma h, eps), -clip_threshold, clip_threshold) of Sophia.

    m is the moving average of the gradients (b1) and h that of an estimate of the Hessian's diagonal (b2), taken every
    ``update_interval`` = k updates. Where h <= 0 the direction is sign(m) * clip_threshold. h fills slowly: after t
    updates it is at 1 - b2^(t/k) of its level, so short runs live in the sign regime (``bias_correct_h`` corrects it).

    The estimate comes in one of two ways:

    * inside: ``update(grads, state, params, hessian_diag_fn=fn)`` with ``fn(params, key)`` -> pytree like params, for
      example ``lambda p, key: gnb_diag(logits_fn, p, x, key)``. A ``lax.cond`` on the count runs it on every k-th
      update only, under ``jit`` and ``scan`` too. With a state batched by ``vmap`` the cond becomes a select and the
      estimator runs on every update (a ``vmap`` around a whole run, init included, keeps the saving); under
      ``optax.MultiSteps`` it runs on every micro-step of a refreshing update; under ``optax.masked`` ``fn`` is given
      params with holes: let it ignore them and close over the whole params (what is masked is dropped here).
    * outside: without ``hessian_diag_fn`` h is used as it stands, and the training loop calls ``update_hessian`` on
      every k-th step. This always saves the work, and costs its own small program instead of a branch.

    ``refresh`` chooses the convention, count being the number of updates done so far (0 at the first):

    * "before" (paper): h is refreshed at count % k == 0, 0 included, before the same update uses it.
    * "after" (official code): that code refreshes *behind* the parameter step of 0-based iterations k-1, 2k-1, ...
      Nothing lies between there and the next update, so it is the same as refreshing before the update at
      count % k == 0, count > 0, at the same params; the first k updates are pure sign momentum. The denominator is
      gamma max(h, 0) + eps, the official eps being 1e-15 (that code has h >= 0; a sum with a negative h could be
      arbitrarily small and would leave the clip with the wrong sign).
    * "optax" (optax.contrib 0.2.8): m is bias-corrected, h is refreshed at count % k == 0, and acts one update later.

    Args:
      b1: decay of m, in [0, 1).
      b2: decay of h per refresh, in [0, 1).
      eps: smallest denominator, > 0.
      gamma: scale of h, > 0. Paper: 0.05 for the Gauss-Newton-Bartlett estimate, 0.01 for Hutchinson's. Raise it when
        the win rate (``sophia_win_rate``) stays below 0.1.
      clip_threshold: largest magnitude of the direction per coordinate, > 0.
      update_interval: k, an integer >= 1.
      mu_dtype: dtype m is stored in; float32 if None. All arithmetic is float32.
      refresh: "before", "after" or "optax".
      bias_correct_h: divide h by 1 - b2^(number of refreshes). Not in the paper.
      seed: integer seed of the keys given to ``hessian_diag_fn``.

    Returns:
      ``optax.GradientTransformationExtraArgs`` with state ``ScaleBySophiaState``. Updates have the gradients' dtype.
      All numeric arguments may be traced (``optax.inject_hyperparams``; with bf16 params give it
      ``hyperparam_dtype=jnp.float32``, or b2 is rounded to 8 bits), and are then not validated.

    Raises:
      ValueError: a concrete argument out of range; update with ``hessian_diag_fn`` but without params; an estimate that
        does not match the params.

    Source: arXiv 2305.14342, algorithm 3 ("after": the authors' repository).

    >>> tx = scale_by_sophia(gamma=1.0, b1=0.0, b2=0.0)
    >>> params = {"w": jnp.ones(2)}
    >>> hessian = lambda p, key: {"w": jnp.array([8.0, -1.0])}
    >>> updates, _ = tx.update({"w": jnp.full(2, 2.0)}, tx.init(params), params, hessian_diag_fn=hessian)
    >>> updates["w"].tolist()
    [0.25, 1.0]
    """
    _validate(b1, b2, eps, gamma, clip_threshold, update_interval, refresh)
    mu_dtype = mu_dtype or jnp.float32

    def init_fn(params):
        return ScaleBySophiaState(
            count=jnp.zeros([], jnp.int32),
            key=jax.random.key(seed),
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            h=optax.tree.zeros_like(params, dtype=jnp.float32),
            b2=jnp.asarray(b2, jnp.float32),
            num_refreshes=jnp.zeros([], jnp.int32),
            win_rate=jnp.zeros([], jnp.float32),
        )

    def maybe_refresh(state, params, hessian_diag_fn):
        if hessian_diag_fn is None:
            return state.h, state.num_refreshes
        if params is None:
            raise ValueError(
                "hessian_diag_fn needs the current value of the parameters, but `params` was not passed to `update`."
            )
        due = state.count % jnp.asarray(update_interval, jnp.int32) == 0
        if refresh == "after":
            due &= state.count > 0

        def estimate():
            diag = hessian_diag_fn(params, jax.random.fold_in(state.key, state.count))
            return _blend(state.h, diag, state.b2), state.num_refreshes + 1

        return jax.lax.cond(due, estimate, lambda: (state.h, state.num_refreshes))

    def update_fn(updates, state, params=None, *, hessian_diag_fn=None, **extra_args):
        del extra_args
        # Converted here and not in the factory: building an optimizer must not start a device.
        decay_m, decay_h, floor, scale, clip = (
            jnp.asarray(x, jnp.float32) for x in (b1, b2, eps, gamma, clip_threshold)
        )
        state = state._replace(b2=decay_h)
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda g, m: (1 - decay_m) * g.astype(jnp.float32) + decay_m * m, updates, state.mu)
        h, num_refreshes = maybe_refresh(state, params, hessian_diag_fn)

        m_used, h_used, n_used = mu, h, num_refreshes
        if refresh == "optax":
            m_used = optax.tree.bias_correction(mu, decay_m, count)
            h_used, n_used = state.h, state.num_refreshes
        if bias_correct_h:
            filled = jnp.where(n_used > 0, 1 - decay_h**n_used, 1)
            h_used = jax.tree.map(lambda a: a / filled, h_used)

        def direction(m, a, g):
            denominator = scale * jnp.maximum(a, 0) + floor if refresh == "after" else jnp.maximum(scale * a, floor)
            return jnp.clip(m / denominator, -clip, clip).astype(g.dtype)

        # Compared with gamma h rather than with the denominator, so that dead coordinates (m = h = 0) do not count.
        wins = jax.tree.map(lambda m, a: jnp.sum(jnp.abs(m) < clip * scale * a, dtype=jnp.float32), m_used, h_used)
        new_state = state._replace(
            count=count,
            mu=optax.tree.cast(mu, mu_dtype),
            h=h,
            num_refreshes=num_refreshes,
            # A float, because an int above 2^31 would not pass as a JAX scalar.
            win_rate=jnp.asarray(optax.tree.sum(wins) / float(max(optax.tree.size(h), 1)), jnp.float32),
        )
        return jax.tree.map(direction, m_used, h_used, updates), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def sophia(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.965,
    b2: ArrayLike = 0.99,
    eps: ArrayLike = 1e-12,
    gamma: ArrayLike = 0.05,
    clip_threshold: ArrayLike = 1.0,
    update_interval: ArrayLike = 10,
    weight_decay: ArrayLike = 0.2,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    mu_dtype: Any = None,
    refresh: str = "before",
    bias_correct_h: bool = False,
    seed: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """Sophia with decoupled, unclipped weight decay: params -= learning_rate * (direction + weight_decay * params).

    The paper shrinks the parameters first and steps afterwards; both terms use the old parameters, so the sum is the
    same. Clip the gradients first as the paper does: ``optax.chain(optax.clip_by_global_norm(1.0), sophia(...))``.
    ``scale_by_sophia`` explains the two ways to feed the curvature (``hessian_diag_fn`` or ``update_hessian``); with
    neither h stays zero and this is sign momentum. The official code is ``refresh="after", eps=1e-15`` with
    ``gnb_diag(..., max_norm=1.0)``.

    Args:
      learning_rate: a number or a schedule. GPT-2 in the paper: 6e-4 (125M), 7e-4 (355M), 3e-4 (770M), about AdamW's.
      weight_decay: twice AdamW's is advised.
      weight_decay_mask: pytree of bools or a function params -> such a tree; true where decay applies. Under
        ``optax.inject_hyperparams`` name a function (and a ``mu_dtype``) in ``static_args``, or it is taken for a
        schedule.
      b1, b2, eps, gamma, clip_threshold, update_interval, mu_dtype, refresh, bias_correct_h, seed: see
        ``scale_by_sophia``.

    Returns:
      ``optax.GradientTransformationExtraArgs``; ``update`` needs params.

    Raises:
      ValueError: as ``scale_by_sophia``, and update without params.

    Source: arXiv 2305.14342, algorithm 3. Independent comparisons with a tuned AdamW find smaller gains than the paper.

    >>> from jaxskip.optim import hutchinson_diag
    >>> loss = lambda p: jnp.sum(jnp.array([1.0, 100.0]) * p**2)
    >>> tx = sophia(0.1, weight_decay=0.0)
    >>> params = jnp.ones(2)
    >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params,
    ...                            hessian_diag_fn=lambda p, key: hutchinson_diag(loss, p, key))
    >>> (updates / 0.1).tolist()
    [-1.0, -1.0]
    """
    return optax.chain(
        scale_by_sophia(
            b1=b1,
            b2=b2,
            eps=eps,
            gamma=gamma,
            clip_threshold=clip_threshold,
            update_interval=update_interval,
            mu_dtype=mu_dtype,
            refresh=refresh,
            bias_correct_h=bias_correct_h,
            seed=seed,
        ),
        optax.add_decayed_weights(weight_decay, mask=weight_decay_mask),  # pyright: ignore[reportArgumentType]
        optax.scale_by_learning_rate(learning_rate),
    )


def update_hessian(opt_state: optax.OptState, hessian_diag: optax.Params) -> optax.OptState:
    """Feed one estimate of the curvature to every Sophia state in ``opt_state``: h <- b2 h + (1 - b2) hessian_diag.

    For loops that refresh outside of the update: call it on every ``update_interval``-th step, before the update
    (paper; before its first micro-step under ``MultiSteps``), as its own program, which can donate the state:
    ``jax.jit(lambda s, p, x, key: update_hessian(s, gnb_diag(logits_fn, p, x, key)), donate_argnums=0)``.

    Args:
      opt_state: any Optax state (chain, ``inject_hyperparams``, ``MultiSteps``, ``masked``, ``partition``, ...).
      hessian_diag: pytree like params, any float dtype. Where ``optax.masked`` left a hole in the state, what stands
        there is ignored.

    Returns:
      ``opt_state`` with the new h; nothing else changes but the count of refreshes.

    Raises:
      ValueError: no ``ScaleBySophiaState`` inside, or a tree or shape that does not match the params.

    >>> tx = sophia(1e-3)
    >>> state = update_hessian(tx.init(jnp.ones(2)), jnp.array([100.0, -50.0]))
    >>> [round(x, 4) for x in state[0].h.tolist()]
    [1.0, -0.5]
    """
    _sophia_states(opt_state)

    def fed(node):
        if not isinstance(node, ScaleBySophiaState):
            return node
        return node._replace(h=_blend(node.h, hessian_diag, node.b2), num_refreshes=node.num_refreshes + 1)

    return jax.tree.map(fed, opt_state, is_leaf=_is_sophia_state)


def sophia_win_rate(opt_state: optax.OptState) -> jax.Array:
    """Share of coordinates with |m| < clip_threshold * gamma * h at the last update: those whose step was not clipped.

    It should peak early and stay in 0.1 to 0.5; raise gamma when it is lower. Several Sophia states
    (``optax.partition``) are averaged by their number of coordinates.

    Args:
      opt_state: any Optax state.

    Returns:
      float32 scalar in [0, 1]; 0 before the first update.

    Raises:
      ValueError: no ``ScaleBySophiaState`` inside.

    >>> sophia_win_rate(sophia(1e-3).init(jnp.ones(2))).item()
    0.0
    """
    states = _sophia_states(opt_state)
    sizes = [optax.tree.size(s.h) for s in states]
    total = max(sum(sizes), 1)
    return jnp.asarray(sum((size / total) * s.win_rate for size, s in zip(sizes, states, strict=True)))


def _is_sophia_state(node) -> bool:
    return isinstance(node, ScaleBySophiaState)


def _sophia_states(opt_state: optax.OptState) -> list[ScaleBySophiaState]:
    states = [s for s in jax.tree.leaves(opt_state, is_leaf=_is_sophia_state) if _is_sophia_state(s)]
    if not states:
        raise ValueError(
            f"no ScaleBySophiaState in this optimizer state ({jax.tree.structure(opt_state)}); "
            "pass the state of an optimizer that contains sophia or scale_by_sophia"
        )
    return states


def _blend(h: optax.Updates, diag: optax.Params, b2: jax.Array) -> optax.Updates:
    """b2 h + (1 - b2) diag in float32, leaving the holes of ``optax.masked`` as they are."""

    def is_hole(node):
        return isinstance(node, optax.MaskedNode)

    paths, treedef = jax.tree.flatten_with_path(h, is_leaf=is_hole)
    wrong_tree = f"the Hessian diagonal must have the params' tree {treedef}; got {jax.tree.structure(diag)}"
    try:
        diag_leaves = treedef.flatten_up_to(diag)
    except (ValueError, TypeError) as error:
        raise ValueError(wrong_tree) from error
    blended = []
    for (path, a), d in zip(paths, diag_leaves, strict=True):
        if is_hole(a):
            blended.append(a)
        elif not jax.tree_util.all_leaves([d]):
            raise ValueError(wrong_tree)
        elif jnp.shape(d) != a.shape:
            where = jax.tree_util.keystr(path)
            raise ValueError(f"the Hessian diagonal at {where!r} has shape {jnp.shape(d)}; the params have {a.shape}")
        else:
            blended.append(b2 * a + (1 - b2) * jnp.asarray(d, jnp.float32))
    return treedef.unflatten(blended)


def _validate(b1, b2, eps, gamma, clip_threshold, update_interval, refresh) -> None:
    if refresh not in _REFRESH:
        raise ValueError(f"refresh={refresh!r}; choose one of {_REFRESH}")
    for name, value, valid, allowed in (
        ("b1", b1, lambda v: 0 <= v < 1, "in [0, 1)"),
        ("b2", b2, lambda v: 0 <= v < 1, "in [0, 1)"),
        ("eps", eps, lambda v: v > 0, "> 0"),
        ("gamma", gamma, lambda v: v > 0, "> 0"),
        ("clip_threshold", clip_threshold, lambda v: v > 0, "> 0"),
        ("update_interval", update_interval, lambda v: v >= 1 and v == int(v), "an integer >= 1"),
    ):
        if not isinstance(value, jax.core.Tracer) and not valid(value):
            raise ValueError(f"{name}={value}; it must be {allowed}")
