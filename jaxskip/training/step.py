"""One training step as a pure function, compiled with donation and sharding."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxskip.optim import update_hessian
from jaxskip.training.sharding import (
    BATCH_AXES,
    REPLICATE,
    Rules,
    constrain,
    optimizer_state_shardings,
    param_shardings,
    replicated,
)

Batch = Mapping[str, jax.Array]
# (params, batch, key) -> (mean loss, further scalars to log)
LossFn = Callable[[Any, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
# (params, batch, key) -> Hessian diagonal, a tree like params
CurvatureFn = Callable[[Any, Batch, jax.Array], Any]


class TrainState(NamedTuple):
    """Everything that a step changes and a checkpoint must hold, besides the position in the data."""

    step: Any  # int32 scalar, steps taken
    params: Any
    opt_state: Any
    key: Any  # typed key, the run's PRNG key, constant: step n uses fold_in(key, n)


def init_state(
    init_params: Callable[[jax.Array], Any],
    tx: optax.GradientTransformation,
    key: jax.Array,
    mesh: Mesh,
    rules: Rules = REPLICATE,
) -> TrainState:
    """A first `TrainState` whose parameters and optimizer state are created already sharded.

    Args:
      init_params: key -> parameters; runs inside jit, so no device ever holds the whole tree.
      tx: the optimizer.
      key: seed of the initialisation and, folded, of every step.
      mesh, rules: where parameters lie, see `param_shardings`.

    >>> from jaxskip.training import make_mesh
    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> state = init_state(lambda key: {"w": jax.random.normal(key, (3,))}, optax.sgd(0.1), jax.random.key(0), mesh)
    >>> int(state.step), state.params["w"].shape
    (0, (3,))
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(init_params, tx, mesh, rules))

    def create(key):
        params = init_params(jax.random.fold_in(key, 0))
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jax.random.fold_in(key, 1))

    with jax.set_mesh(mesh):
        return jax.jit(create, out_shardings=shardings)(key)


def abstract_state(
    init_params: Callable[[jax.Array], Any], tx: optax.GradientTransformation, mesh: Mesh, rules: Rules = REPLICATE
) -> TrainState:
    """`init_state` as ShapeDtypeStructs with shardings: to compile ahead of time, or to restore a checkpoint into.

    >>> from jaxskip.training import make_mesh
    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> abstract_state(lambda key: {"w": jnp.ones(3)}, optax.sgd(0.1), mesh).params["w"].shape
    (3,)
    """
    key = jax.eval_shape(jax.random.key, 0)
    params = jax.eval_shape(init_params, key)
    opt_state = jax.eval_shape(tx.init, params)
    lies = param_shardings(params, mesh, rules)
    shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state, key)
    everywhere = replicated(mesh)
    shardings = TrainState(everywhere, lies, optimizer_state_shardings(tx, params, lies, mesh), everywhere)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
    )


def _microbatches(batch: Batch, parts: int) -> Batch:
    """[B, ...] -> [parts, B / parts, ...], rows dealt out in turn so that each device keeps its own."""

    def deal(rows):
        dealt = rows.reshape(rows.shape[0] // parts, parts, *rows.shape[1:]).swapaxes(0, 1)
        return constrain(dealt, P(None, BATCH_AXES))

    return {name: deal(rows) for name, rows in batch.items()}


def value_and_gradients(loss_fn: LossFn, params, batch: Batch, key: jax.Array, accumulate: int):
    """(loss, metrics, gradients), averaged over `accumulate` micro-batches of equal weight."""
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate == 1:
        (loss, metrics), grads = grad_fn(params, batch, key)
        return loss, metrics, grads

    def body(total, microbatch_and_index):
        microbatch, index = microbatch_and_index
        (loss, metrics), grads = grad_fn(params, microbatch, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, (loss, metrics, grads)), None

    parts = _microbatches(batch, accumulate)
    one = {name: rows[0] for name, rows in parts.items()}
    (loss, metrics), grads = jax.eval_shape(grad_fn, params, one, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), (loss, metrics, grads))
    total, _ = jax.lax.scan(body, zeros, (parts, jnp.arange(accumulate)))
    loss, metrics, grads = jax.tree.map(lambda x: x / accumulate, total)
    return loss, metrics, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    state_metrics: Callable[[TrainState], dict[str, jax.Array]] = lambda state: {},
):
    """Compile `(state, batch) -> (state, metrics)`; the state is donated.

    Args:
      loss_fn: (params, batch, key) -> (mean loss, dict of scalars).
      tx: optimizer; the loss reaches it as the extra argument `value`.
      accumulate: micro-batches per step; each must weigh the same (equal number of targets).

      state_metrics: new state -> further scalars to log, such as Sophia's win rate.

    `metrics` holds float32 scalars: "loss", "grad_norm" (global, before any clipping), "skipped" (1.0 when loss or
    gradient was not finite: then parameters and optimizer state stay as they were), those of `loss_fn` and those of
    `state_metrics`.

    >>> from jaxskip.training import init_state, make_mesh
    >>> tx = optax.sgd(0.1)
    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> state = init_state(lambda key: {"w": jnp.ones(3)}, tx, jax.random.key(0), mesh)
    >>> step = make_train_step(lambda p, batch, key: (jnp.sum(p["w"] * batch["x"]), {}), tx)
    >>> state, metrics = step(state, {"x": jnp.ones(3)})
    >>> float(metrics["loss"]), state.params["w"].tolist()[0] < 1
    (3.0, True)
    """
    if accumulate < 1:
        raise ValueError(f"accumulate is {accumulate}; it must be at least 1")
    tx = optax.with_extra_args_support(tx)

    def train_step(state: TrainState, batch: Batch, n: int | None = None):
        del n  # `fit` counts the steps for those that need it on the host
        key = jax.random.fold_in(state.key, state.step)
        loss, metrics, grads = value_and_gradients(loss_fn, state.params, batch, key, accumulate)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        state = TrainState(state.step + 1, params, opt_state, state.key)
        metrics = {**metrics, **state_metrics(state), "loss": loss, "grad_norm": norm, "skipped": 1.0 - finite}
        return state, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), metrics)

    return jax.jit(train_step, donate_argnums=0)


def make_hessian_refresh(curvature_fn: CurvatureFn, *, rows: int | None = None):
    """Compile `(state, batch) -> state` that renews the Hessian diagonal inside Sophia's state; the state is donated.

    A program of its own, called every k-th step, so that its peak memory is no more than a training step's.

    Args:
      curvature_fn: (params, batch, key) -> diagonal, for instance built from `sampled_gnb_diag`.
      rows: size of the sub-batch that is used (Sophia's paper: 240 of 480 sequences for the Gauss-Newton estimate,
        32 for Hutchinson's); None uses all. Rows are taken at equal distances so that each device keeps its own.

    An estimate that is not finite would stay in the average for good: it is dropped, and the state's `num_refreshes`
    does not count it.
    """

    def refresh(state: TrainState, batch: Batch) -> TrainState:
        if rows is not None:
            total = next(iter(batch.values())).shape[0]
            if rows < 1 or total % rows:
                raise ValueError(f"a Hessian sub-batch of {rows} rows must divide the batch of {total}")
            batch = {
                name: constrain(x.reshape(rows, total // rows, *x.shape[1:])[:, 0], P(BATCH_AXES))
                for name, x in batch.items()
            }
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
        diagonal = curvature_fn(state.params, batch, key)
        finite = jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda x: jnp.isfinite(x).all(), diagonal))
        renewed = update_hessian(state.opt_state, diagonal)
        opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), renewed, state.opt_state)
        return state._replace(opt_state=opt_state)

    return jax.jit(refresh, donate_argnums=0)


def with_hessian_refresh(train_step, refresh, *, every: int, first: int = 0):
    """The step function for `fit` that calls `refresh` before the steps first, first + every, first + 2 every, ...

    `first=0` is the order of Sophia's paper, `first=every` that of the authors' code, whose refresh behind step
    every - 1 is the one before step `every`.
    """
    if every < 1:
        raise ValueError(f"every is {every}; it must be at least 1")

    def step(state: TrainState, batch: Batch, n: int):
        if n >= first and n % every == 0:
            state = refresh(state, batch)
        return train_step(state, batch, n)

    return step
