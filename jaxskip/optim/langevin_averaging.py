"""Langevin dynamics whose time average finds what no single iterate does (arXiv 2603.06028).

On the sphere, as analysed: `spherical_langevin` (continuous time, whole data set) and `minibatch_averaging` (SGD on
one example at a time); the problems of the theory are in `planted_problems`. For other models, as an extension without
a theorem: the Optax pieces `add_langevin_noise`, `running_average`, `project_tangent`, `project_to_sphere` and
`spherical_sgd`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxskip.optim.perpgrad import orthogonalize_to_params
from jaxskip.optim.planted_problems import PARITIES, tangent, unit

_ORDERS = ("first", "second", "both")
# Sums are taken over so many iterates in float32 before they are averaged: a plain sum of 1e7 would lose the signal.
_BLOCK = 1000


class LangevinResult(NamedTuple):
    """Time averages of one or several chains; time runs over blocks of about a thousand iterates."""

    mean: jax.Array  # [D], average of theta over time and chains
    second_moment: jax.Array | None  # [D, D], average of theta theta^T, or None
    last: jax.Array  # [chains, D], where the chains stand now
    block_means: jax.Array  # [blocks, D], average of theta in each block over chains
    snapshots: jax.Array  # [blocks, chains, D], theta at the end of each block

    def estimate(self, parity: str) -> jax.Array:
        """The unit vector [D] that the averages point at: "odd" normalises the mean, "even" takes the second moment's
        top eigenvector, whose sign means nothing.

        Raises ValueError for another parity, and for "even" without second moment.
        """
        if parity not in PARITIES:
            raise ValueError(f"parity={parity!r}; choose one of {PARITIES}")
        if parity == "odd":
            return unit(self.mean)
        if self.second_moment is None:
            raise ValueError("parity='even' needs the second moment: run with order='second' or order='both'")
        return jnp.linalg.eigh(self.second_moment)[1][:, -1]

    def trace_overlap(self, theta_star: jax.Array) -> jax.Array:
        """<average so far, theta*> / ||average so far|| after each block: [blocks]."""
        so_far = jnp.cumsum(self.block_means, axis=0)
        return (so_far @ theta_star) / jnp.linalg.norm(so_far, axis=-1)


def spherical_langevin(
    drift: Callable[[jax.Array], jax.Array],
    key: jax.Array,
    d: int,
    eps: ArrayLike,
    T: float,
    dt: float = 5e-3,
    order: str = "first",
    chains: int = 1,
    thin: int = 1,
    burn_in: float = 0.0,
    start: jax.Array | None = None,
) -> LangevinResult:
    """Spherical Brownian motion with a weak drift, and its averages over time.

    In continuous time d theta = (-(D-1)/2 theta + eps b(theta)) dt + (I - theta theta^T) dW with unit-variance noise:
    the generator is half the Laplacian. (Where the noise has variance 2 the temperature is twice as high: halve eps.)
    A step moves by eps b dt + sqrt(dt) N(0, I), both projected onto the tangent space first, and returns to the sphere
    by normalising, which is what makes the term -(D-1)/2 theta.

    The averages find theta* while theta itself stays on the equator (mean overlap sqrt(2 / (pi D))); with eps too
    large theta leaves it, and then this is plain optimisation. Take the largest eps that leaves ||mean|| <= 0.2. T must
    be of order D^k / eps². Nothing is compiled but the loop: wrap calls in ``jax.jit`` with the problem as an argument.
    ``vmap`` over keys or problems runs thousands of chains in one program; keys spread over a mesh spread the chains.

    Args:
      drift: theta [D] -> b(theta) [D], minus the gradient of the loss; projected here if it is not tangent.
      key: PRNG key; iterate n of a chain uses fold_in(its key, n).
      d: D, at least 2.
      eps: strength of the drift.
      T: time of each chain. Chains are averaged: m of length T / m do as well as one as long as T / m >> 2 / (D-1).
      dt: time step, at most 0.5 / D; keep it below 0.2 / D.
      order: "first" averages theta (odd problems), "second" theta theta^T as well (even problems; D² more work a
        step); "both" is the same as "second", since the mean costs nothing beside it.
      chains: independent chains, averaged. For even problems their means may cancel, their second moments do not.
      thin: average every thin-th iterate. 1 / (D dt) loses little: theta forgets itself in 2 / (D-1).
      burn_in: share of T, in [0, 1), that is run but not averaged; the paper has none.
      start: [chains, D] unit vectors to start from; None draws them uniformly.

    Returns:
      `LangevinResult`. T is rounded up to whole blocks (less than 1 part in 500).

    Raises:
      ValueError: an argument out of range, or a start of another shape.

    Source: arXiv 2603.06028, algorithm 1; the discretisation is ours.

    >>> from jaxskip.optim import tensor_pca_problem
    >>> problem = tensor_pca_problem(jax.random.key(0), d=10, k=3, lam=100.0)
    >>> result = spherical_langevin(problem.drift, jax.random.key(1), d=10, eps=3.0, T=100.0, dt=0.02)
    >>> bool(result.estimate("odd") @ problem.theta_star > 0.9)
    True
    """
    if not 0 < dt * d <= 0.5:
        raise ValueError(f"dt={dt} with d={d}: dt * d is {dt * d:.3g}; it must be in (0, 0.5], better below 0.2")
    _validate_chain(d, order, chains, thin, burn_in, start, T=T)

    def step(theta, key):
        noise = math.sqrt(dt) * jax.random.normal(key, theta.shape, theta.dtype)
        return _move(theta, eps * dt * drift(theta) + noise)

    return _run_chains(step, key, d, round(T / dt), order != "first", chains, thin, burn_in, start)


def minibatch_averaging(
    sample_drift: Callable[[jax.Array, jax.Array], jax.Array],
    key: jax.Array,
    d: int,
    learning_rate: ArrayLike,
    steps: int,
    order: str = "first",
    chains: int = 1,
    thin: int = 1,
    burn_in: float = 0.0,
    start: jax.Array | None = None,
) -> LangevinResult:
    """SGD on the sphere with no noise but that of sampling, and its averages: theta <- (theta + lr b) / ||.||.

    For lr << D^(-1/2) this is near to Langevin dynamics with eps = 1 / lr; a small lr gives gradient flow, a large one
    Brownian motion. That its average does as well is the paper's conjecture, and what its figures show.

    Args:
      sample_drift: (theta [D], key) -> minus the gradient of the loss on a random part of the data, [D]; projected
        onto the tangent space here. For example ``problem.sample_drift``.
      learning_rate: step size.
      steps: SGD steps of each chain.
      key, d, order, chains, thin, burn_in, start: see `spherical_langevin`.

    Returns:
      `LangevinResult`.

    Raises:
      ValueError: an argument out of range, or a start of another shape.

    Source: arXiv 2603.06028, simulations.

    >>> from jaxskip.optim import single_index_problem
    >>> problem = single_index_problem(jax.random.key(0), d=8, n=400, k=1)
    >>> result = minibatch_averaging(problem.sample_drift, jax.random.key(1), d=8, learning_rate=0.1, steps=400)
    >>> bool(result.estimate("odd") @ problem.theta_star > 0.9)
    True
    """
    _validate_chain(d, order, chains, thin, burn_in, start, steps=steps)

    def step(theta, key):
        return _move(theta, learning_rate * sample_drift(theta, key))

    return _run_chains(step, key, d, steps, order != "first", chains, thin, burn_in, start)


# The Optax pieces


def project_tangent() -> optax.GradientTransformation:
    """Removes from each update its component along the parameters: u - <u,w> / <w,w> w, one array at a time.

    Behind whatever adds noise: noise that is not tangent moves w along itself by more than the retraction takes back.
    Update raises ValueError without params.

    >>> tx = project_tangent()
    >>> tx.update(jnp.array([1.0, 2.0]), tx.init(None), jnp.array([1.0, 0.0]))[0].tolist()
    [0.0, 2.0]
    """

    def update(updates, params):
        return orthogonalize_to_params(updates, _required(params, "project_tangent"), rescale=False)

    return optax.stateless(update)


def project_to_sphere() -> optax.GradientTransformation:
    """Ends a chain so that every array of parameters, taken as one vector, has length 1 after the update.

    Update raises ValueError without params.

    >>> tx = project_to_sphere()
    >>> w = jnp.array([1.0, 0.0])
    >>> (w + tx.update(jnp.array([0.0, 0.75]), tx.init(w), w)[0]).tolist()
    [0.800000011920929, 0.6000000238418579]
    """

    def update(updates, params):
        def retract(u, w):
            wide = u.astype(jnp.promote_types(u.dtype, jnp.float32))
            moved = wide + w
            return (moved / jnp.sqrt(jnp.sum(moved * moved)) - w).astype(u.dtype)

        return jax.tree.map(retract, updates, _required(params, "project_to_sphere"))

    return optax.stateless(update)


def spherical_sgd(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """SGD of unit vectors: w <- (w - lr P g) / ||.||, P the projection onto the tangent space; each array is a vector.

    With gradients of one example and `running_average` around it, this is the paper's algorithm (`minibatch_averaging`
    runs the same in one scan). Update raises ValueError without params.

    Source: arXiv 2603.06028, simulations.

    >>> tx = spherical_sgd(0.75)
    >>> w = jnp.array([1.0, 0.0])
    >>> updates, _ = tx.update(jnp.array([5.0, -1.0]), tx.init(w), w)
    >>> (w + updates).tolist()
    [0.800000011920929, 0.6000000238418579]
    """
    return optax.chain(project_tangent(), optax.sgd(learning_rate), project_to_sphere())


class AddLangevinNoiseState(NamedTuple):
    """State of `add_langevin_noise`."""

    count: jax.Array  # shape=(), dtype=int32: updates done
    key: jax.Array  # shape=(), typed PRNG key; update n draws from fold_in(key, n)


def add_langevin_noise(variance: optax.ScalarOrSchedule, seed: ArrayLike = 0) -> optax.GradientTransformation:
    """Adds N(0, variance) to every coordinate of the update.

    Behind the learning rate: then a time step dt of dynamics with the generator half the Laplacian (as in
    `spherical_langevin`) is ``variance=dt``, and Langevin dynamics at temperature t is ``variance=2 * lr * t``. On the
    sphere `project_tangent` and `project_to_sphere` follow it. For networks an extension: no theorem covers it.

    Args:
      variance: a number >= 0 or a schedule of the update count.
      seed: integer seed.

    Returns: ``optax.GradientTransformation`` with state `AddLangevinNoiseState`; updates keep their dtypes.

    Raises: ValueError for a negative variance.

    >>> tx = optax.chain(optax.sgd(0.1), add_langevin_noise(2 * 0.1 * 1e-4))
    >>> updates, _ = tx.update(jnp.zeros(1000), tx.init(jnp.zeros(1000)))
    >>> bool(abs(updates.std() / (2e-5) ** 0.5 - 1) < 0.1)
    True
    """
    if isinstance(variance, int | float) and variance < 0:
        raise ValueError(f"variance={variance}; it must be >= 0")

    def init_fn(params):
        del params
        return AddLangevinNoiseState(jnp.zeros([], jnp.int32), jax.random.key(seed))

    def update_fn(updates, state, params=None):
        del params
        scale = jnp.sqrt(jnp.asarray(variance(state.count) if callable(variance) else variance, jnp.float32))
        key = jax.random.fold_in(state.key, state.count)
        noise = optax.tree.random_like(key, updates, dtype=jnp.float32)
        updates = jax.tree.map(lambda u, z: (u + scale * z).astype(u.dtype), updates, noise)
        return updates, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init_fn, update_fn)


class RunningAverageState(NamedTuple):
    """State of `running_average`."""

    inner: optax.OptState
    count: jax.Array  # shape=(), dtype=int32: updates done
    averaged: jax.Array  # shape=(), dtype=int32: how many of them are in the sum
    total: optax.Params  # like params, float32: sum of the parameters
    lost: optax.Params  # like params, float32: what rounding took from the sum, to be added next (Kahan)


def running_average(
    inner: optax.GradientTransformation, start: int = 0, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Lets ``inner`` update the parameters and keeps the plain average of what they become, for `params_average`.

    Every iterate weighs the same: an exponential average forgets too soon for Langevin dynamics, which has to be
    averaged over a time of order D^k. The sum is compensated, so that 1e7 terms do not drown in rounding. It must be
    the outermost part of what changes the parameters (``optax.MultiSteps`` may be around it).

    Args:
      inner: any optimizer.
      start: iterates left out at the beginning, >= 0.
      every: average every so many iterates, >= 1.

    Returns: ``optax.GradientTransformationExtraArgs`` with state `RunningAverageState`; ``update`` needs params.

    Raises: ValueError for start or every out of range, and update without params.

    >>> tx = running_average(optax.sgd(1.0))
    >>> w = jnp.array([0.0])
    >>> state = tx.init(w)
    >>> for _ in range(3):  # w becomes 1, 2, 3
    ...     updates, state = tx.update(jnp.array([-1.0]), state, w)
    ...     w = optax.apply_updates(w, updates)
    >>> params_average(state).tolist()
    [2.0]
    """
    if start < 0 or every < 1:
        raise ValueError(f"start={start}, every={every}; they must be at least 0 and 1")
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
        count = jnp.zeros([], jnp.int32)
        return RunningAverageState(inner.init(params), count, count, zeros, zeros)

    def update_fn(updates, state, params=None, **extra_args):
        updates, inner_state = inner.update(updates, state.inner, _required(params, "running_average"), **extra_args)
        new_params = optax.apply_updates(params, updates)  # pyright: ignore[reportArgumentType]
        due = (state.count >= start) & ((state.count - start) % every == every - 1)
        term = jax.tree.map(lambda w, lost: w.astype(jnp.float32) + lost, new_params, state.lost)
        total = jax.tree.map(jnp.add, state.total, term)
        lost = jax.tree.map(lambda new, old, t: t - (new - old), total, state.total, term)
        total, lost = optax.tree.where(due, (total, lost), (state.total, state.lost))
        return updates, RunningAverageState(
            inner_state,
            optax.safe_increment(state.count),  # pyright: ignore[reportArgumentType]
            state.averaged + due,
            total,
            lost,  # pyright: ignore[reportArgumentType]
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def params_average(opt_state: optax.OptState) -> optax.Params:
    """The average that `running_average` has gathered: a tree like the parameters, float32; NaN before the first.

    Args:
      opt_state: any Optax state that holds one `RunningAverageState`.

    Raises: ValueError when it holds none or several.

    >>> tx = running_average(optax.sgd(1.0))
    >>> params_average(tx.init(jnp.zeros(2))).tolist()
    [nan, nan]
    """

    def is_average(node):
        return isinstance(node, RunningAverageState)

    found = [s for s in jax.tree.leaves(opt_state, is_leaf=is_average) if is_average(s)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} RunningAverageStates in this optimizer state; it must hold exactly one")
    return jax.tree.map(lambda total: total / found[0].averaged, found[0].total)


# Private


def _run_chains(step, key, d, steps, second, chains, thin, burn_in, start) -> LangevinResult:
    """Runs `step(theta, key)` and averages; sums are taken in blocks, and the blocks averaged."""
    burnt = round(burn_in * steps)
    samples = -(-(steps - burnt) // thin)
    blocks = -(-samples // _BLOCK)
    per_block = -(-samples // blocks)
    start_key, step_key = jax.random.split(key)
    if start is None:
        start = jax.vmap(unit)(jax.random.normal(start_key, (chains, d)))

    def one_chain(theta, key):
        def one_step(position, _):
            theta, n = position
            return (step(theta, jax.random.fold_in(key, n)), n + 1), None

        def advance(position, count):
            # No loop where none is needed: compiling the step takes longer than most runs.
            return one_step(position, None)[0] if count == 1 else jax.lax.scan(one_step, position, length=count)[0]

        def sample(carry, _):
            position, s1, s2 = carry
            position = advance(position, thin)
            theta = position[0]
            return (position, s1 + theta, s2 + jnp.outer(theta, theta) if second else s2), None

        def block(carry, _):
            position, moment = carry
            zeros = jnp.zeros_like(theta), jnp.zeros_like(moment)
            (position, s1, s2), _ = jax.lax.scan(sample, (position, *zeros), length=per_block)
            return (position, moment + s2 / per_block), (s1 / per_block, position[0])

        position = theta, jnp.zeros([], jnp.int32)
        if burnt:
            position = advance(position, burnt)
        moment = jnp.zeros((d, d) if second else ())
        (position, moment), (means, snapshots) = jax.lax.scan(block, (position, moment), length=blocks)
        return position[0], moment / blocks, means, snapshots

    last, moments, means, snapshots = jax.vmap(one_chain)(start, jax.random.split(step_key, chains))
    block_means = means.mean(0)
    second_moment = moments.mean(0) if second else None
    return LangevinResult(block_means.mean(0), second_moment, last, block_means, snapshots.swapaxes(0, 1))


def _move(theta, velocity):
    return unit(theta + tangent(theta, velocity))


def _required(params: Any, who: str) -> Any:
    if params is None:
        raise ValueError(f"{who} needs the current value of the parameters: pass `params` to `update`")
    return params


def _validate_chain(d, order, chains, thin, burn_in, start, **length) -> None:
    (name, value), *_ = length.items()
    if value <= 0:
        raise ValueError(f"{name}={value}; it must be > 0")
    if order not in _ORDERS:
        raise ValueError(f"order={order!r}; choose one of {_ORDERS}")
    if d < 2 or chains < 1 or thin < 1:
        raise ValueError(f"d={d}, chains={chains}, thin={thin}; they must be at least 2, 1 and 1")
    if not 0 <= burn_in < 1:
        raise ValueError(f"burn_in={burn_in}; it is a share of the time and must be in [0, 1)")
    if start is not None and start.shape != (chains, d):
        raise ValueError(f"start has shape {start.shape}; for {chains} chain(s) it must be {(chains, d)}")
