"""Two problems with a planted direction: tensor PCA and the single-index model (arXiv 2603.06028).

A problem is a pytree, so that it can be an argument of a jitted function and be batched by ``vmap``.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

PARITIES = ("odd", "even")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TensorProblem:
    """The loss -sum_j <T_j, theta^(x j)> of symmetric tensors T_j whose orders j are all odd or all even."""

    theta_star: jax.Array  # [D], unit vector
    tensors: tuple[jax.Array, ...]  # each [D, ..., D]

    @property
    def parity(self) -> str:
        """ "odd" or "even"."""
        return PARITIES[1 - self.tensors[0].ndim % 2]

    def loss(self, theta: jax.Array) -> jax.Array:
        """The loss at theta [D], a scalar."""
        return -sum(_contract(t, theta, t.ndim) for t in self.tensors)  # pyright: ignore[reportReturnType]

    def drift(self, theta: jax.Array) -> jax.Array:
        """Minus its gradient, projected onto the tangent space at theta: [D]."""
        return tangent(theta, sum(t.ndim * _contract(t, theta, t.ndim - 1) for t in self.tensors))

    def mean_drift(self) -> jax.Array:
        """What averaging sees, over uniform z: E[b(z)] [D] if odd, E[z b(z)^T + b(z) z^T] + c I [D, D] if even."""
        d = self.theta_star.size
        total = jnp.zeros((d,) if self.parity == "odd" else (d, d))
        for tensor in self.tensors:
            j, traced = tensor.ndim, tensor
            while traced.ndim > total.ndim:
                traced = jnp.trace(traced, axis1=0, axis2=1)
            if self.parity == "odd":
                total += j * _sphere_moment(j - 1, d) * (d - 1) / (d + j - 1) * traced
            elif j > 0:
                total += 2 * j * _sphere_moment(j, d) * d / (d + j) * traced
        return total


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SingleIndexProblem:
    """The loss -mean_i y_i h_k(theta . x_i) on data y_i = h_k(theta* . x_i) + noise, h_k the normalised Hermite
    polynomial, whose information exponent is k."""

    theta_star: jax.Array  # [D], unit vector
    x: jax.Array  # [N, D]
    y: jax.Array  # [N]
    k: int = dataclasses.field(metadata={"static": True})

    @property
    def parity(self) -> str:
        """ "odd" or "even"."""
        return PARITIES[1 - self.k % 2]

    def loss(self, theta: jax.Array) -> jax.Array:
        """The loss at theta [D], a scalar."""
        return -jnp.mean(self.y * hermite(self.k, _dot(self.x, theta)))

    def drift(self, theta: jax.Array) -> jax.Array:
        """Minus its gradient on all data, projected onto the tangent space at theta: [D]."""
        return tangent(theta, self._descent(theta, self.x, self.y))

    def sample_drift(self, theta: jax.Array, key: jax.Array, batch_size: int = 1) -> jax.Array:
        """Minus the gradient on ``batch_size`` examples drawn with replacement, projected: [D]."""
        rows = jax.random.randint(key, (batch_size,), 0, self.y.size)
        return tangent(theta, self._descent(theta, self.x[rows], self.y[rows]))

    def contracted(self) -> TensorProblem:
        """The same problem as tensors, for D^k < N D: a step then costs D^k instead of N D."""
        tensors = []
        for j, coefficient in enumerate(_hermite_coefficients(self.k)):
            if coefficient and j:
                scaled = self.y * coefficient / self.y.size
                outer = scaled[:, None]
                for _ in range(j - 1):
                    outer = (outer[:, :, None] * self.x[:, None, :]).reshape(self.y.size, -1)
                shape = (self.theta_star.size,) * j
                tensors.append(_dot(self.x.T, outer).reshape(shape))
        return TensorProblem(self.theta_star, tuple(tensors))

    def mean_drift(self) -> jax.Array:
        """As `TensorProblem.mean_drift`, in O(N D) or O(N D²)."""
        d, r = self.theta_star.size, jnp.linalg.norm(self.x, axis=-1)
        slope = np.polynomial.polynomial.polyder(_hermite_coefficients(self.k))
        # E of s'(r u) (1 - u²), for even k times u, over the first coordinate u of a uniform z.
        extra = 0 if self.parity == "odd" else 1
        moments = [_sphere_moment(i + extra, d) - _sphere_moment(i + extra + 2, d) for i in range(slope.size)]
        expected = sum(c * m * r**i for i, (c, m) in enumerate(zip(slope, moments, strict=True)))
        weighted = (self.y * expected)[:, None] * self.x / self.y.size
        if self.parity == "odd":
            return weighted.sum(0)
        return 2 * d / (d - 1) * _dot(self.x.T, weighted / r[:, None])

    def _descent(self, theta, x, y):
        slopes = math.sqrt(self.k) * hermite(self.k - 1, _dot(x, theta))
        return _dot(y * slopes, x) / y.size


def tensor_pca_problem(key: jax.Array, d: int, k: int, lam: ArrayLike) -> TensorProblem:
    """Tensor PCA: Y = lam theta*^(x k) + symmetrised standard normal noise, and the loss -<Y, theta^(x k)> / lam.

    lam² plays the part of a sample size. An entry of the noise with k different indices has variance 1 / k!.

    Args:
      key: PRNG key of theta* and of the noise.
      d: dimension D, at least 2.
      k: order of the tensor, at least 1; it is the information exponent. Memory is D^k floats.
      lam: strength of the signal; -lam is the same problem with the noise of opposite sign.

    Returns: a `TensorProblem` whose only tensor is Y / lam.

    Raises: ValueError for d < 2 or k < 1.

    >>> problem = tensor_pca_problem(jax.random.key(0), d=5, k=3, lam=50.0)
    >>> problem.tensors[0].shape, problem.parity
    ((5, 5, 5), 'odd')
    """
    _validate_problem(d, k)
    star_key, noise_key = jax.random.split(key)
    theta_star = unit(jax.random.normal(star_key, (d,)))
    noise = jax.random.normal(noise_key, (d,) * k)
    noise = sum(noise.transpose(axes) for axes in itertools.permutations(range(k))) / math.factorial(k)
    signal = theta_star
    for _ in range(k - 1):
        signal = signal[..., None] * theta_star.reshape((1,) * signal.ndim + (d,))
    return TensorProblem(theta_star, (signal + noise / jnp.asarray(lam, jnp.float32),))


def single_index_problem(key: jax.Array, d: int, n: int, k: int, noise: float = 0.0) -> SingleIndexProblem:
    """A single-index model: n examples x ~ N(0, I_D), y = h_k(theta* . x) + noise N(0, 1).

    Args:
      key: PRNG key of theta* and of the data.
      d: dimension D, at least 2.
      n: examples.
      k: degree of the Hermite polynomial, at least 1; it is the information exponent.
      noise: standard deviation of the label noise.

    Returns: a `SingleIndexProblem`.

    Raises: ValueError for d < 2, k < 1 or n < 1.

    >>> problem = single_index_problem(jax.random.key(0), d=5, n=100, k=3)
    >>> problem.x.shape, problem.parity
    ((100, 5), 'odd')
    """
    _validate_problem(d, k)
    if n < 1:
        raise ValueError(f"n={n}; it must be at least 1")
    star_key, x_key, noise_key = jax.random.split(key, 3)
    theta_star = unit(jax.random.normal(star_key, (d,)))
    x = jax.random.normal(x_key, (n, d))
    y = hermite(k, _dot(x, theta_star)) + noise * jax.random.normal(noise_key, (n,))
    return SingleIndexProblem(theta_star, x, y, k)


def partial_trace(problem: TensorProblem | SingleIndexProblem) -> jax.Array:
    """The unit vector [D] that averaging finds in the limit of long time and weak drift: its oracle.

    For tensor PCA the partial trace: Y(I, ..., I, .) normalised if k is odd, the top eigenvector of Y(I, ..., I, ., .)
    if it is even (the sign means nothing). For a single-index model the same expectation over the sphere.

    >>> problem = tensor_pca_problem(jax.random.key(0), d=5, k=3, lam=200.0)
    >>> bool(partial_trace(problem) @ problem.theta_star > 0.9)
    True
    """
    average = problem.mean_drift()
    return unit(average) if problem.parity == "odd" else jnp.linalg.eigh(average)[1][:, -1]


def hermite(k: int, z: jax.Array) -> jax.Array:
    """He_k(z) / sqrt(k!), orthonormal under N(0, 1): z, (z² - 1) / sqrt 2, (z³ - 3z) / sqrt 6, ...

    >>> print(hermite(2, jnp.array([1.0, 3.0])))
    [0.       5.656854]
    """
    before, now = jnp.zeros_like(z), jnp.ones_like(z)
    for degree in range(k):
        before, now = now, z * now - degree * before
    return now / math.sqrt(math.factorial(k))


def tangent(theta, v):
    """The part of `v` that is tangent to the sphere at the unit vector `theta`, both [D]."""
    return v - jnp.sum(v * theta) * theta


def unit(v):
    """`v` divided by its length."""
    return v / jnp.sqrt(jnp.sum(v * v))


def _contract(tensor, theta, times):
    for _ in range(times):
        tensor = _dot(tensor, theta)
    return tensor


def _sphere_moment(power: int, d: int) -> float:
    """E u^power for the first coordinate u of a uniform point on the sphere in d dimensions."""
    if power % 2:
        return 0.0
    return math.prod((2 * i + 1) / (d + 2 * i) for i in range(power // 2))


def _hermite_coefficients(k: int) -> np.ndarray:
    """Coefficients of `hermite(k, .)`, the constant first."""
    return np.polynomial.hermite_e.herme2poly([0] * k + [1]) / math.sqrt(math.factorial(k))


def _validate_problem(d: int, k: int) -> None:
    if d < 2 or k < 1:
        raise ValueError(f"d={d}, k={k}; d must be at least 2 and k at least 1")


def _dot(a, b):
    # On TPU the default is bfloat16, and the signal is a hundredth of the noise.
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
