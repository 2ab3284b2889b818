"""GR-KAN, the layer of the Kolmogorov-Arnold Transformer (arXiv 2409.10594, 2505.13813): learned rational activations.

Shape letters: D channels, G groups of D / G channels each, m and n the degrees of numerator and denominator.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.group_rational import group_rational

Activation = str | Callable[[jax.Array], jax.Array]

# (a0..a5, b0..b3), by `fit_rational` on [-3, 3].
_FITTED = {
    "identity": ((0.0, 1.0, 0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)),
    "swish": (
        (3.0750623e-07, 0.500000762, 0.249997811, 0.0532659521, 0.0058028803, 0.000275175186),
        (3.90988287e-06, 0.106528593, 1.14173432e-06, 0.000550211843),
    ),
    "gelu": (
        (-0.00100411167, 0.498614249, 0.406119542, 0.108661955, 0.0107513047, 0.00047784979),
        (0.0, 0.210445997, 0.0050035062, 0.0),
    ),
    # The method's repository fitted these for 1 + |b0 x + b1 x^2 + ...|, which is not what its kernels or ours compute:
    # off by 1.5 on [-3, 3]. For loading its checkpoints, nothing else.
    "gelu_repo": (
        (-0.00153969, 0.51692871, 0.44075827, 0.0972553, -0.00884418, -0.00378675),
        (-0.14171056, -0.06481231, -0.0444695, 0.01283776),
    ),
}
_FUNCTIONS: dict[str, Callable] = {
    "identity": lambda x: x,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}
_POINTS = 2001


def fit_rational(
    fn: Callable[[jax.Array], jax.Array], degree: tuple[int, int] = (5, 4), interval: tuple[float, float] = (-3.0, 3.0)
) -> tuple[np.ndarray, np.ndarray]:
    """The coefficients (a [m + 1], b [n], float64) of the rational that is nearest to `fn` in least squares.

    The rational is that of `pallas_kernels.group_rational`, (a0 + a1 x + ...) / (1 + |b0| |x| + |b1| x^2 + ...), with
    every b at least 0; 2001 points of the interval count alike. `fn` takes and returns a float32 array. Raises
    ValueError for an empty interval and for a function that is not finite on it.

    >>> a, b = fit_rational(jnp.tanh)
    >>> x = np.linspace(-3, 3, 7)
    >>> bool(np.abs(rational(x, a, b) - np.tanh(x)).max() < 1e-3)
    True
    """
    from scipy.optimize import least_squares, lsq_linear

    m, n = degree
    if not interval[0] < interval[1]:
        raise ValueError(f"interval is {interval}; it must be (low, high) with low < high")
    x = np.linspace(*interval, _POINTS)
    with jax.ensure_compile_time_eval():
        y = np.asarray(fn(jnp.asarray(x, jnp.float32)), np.float64)
    if y.shape != x.shape or not np.isfinite(y).all():
        raise ValueError(f"the function must give a finite number for each x of {interval}")
    # P - y (Q - 1) = y is linear; what it weighs wrongly, by Q, the second step puts right.
    powers = np.stack([x**i for i in range(m + 1)], 1)
    sizes = np.stack([np.abs(x) ** (j + 1) for j in range(n)], 1)
    low = np.r_[np.full(m + 1, -np.inf), np.zeros(n)]
    start = lsq_linear(np.concatenate([powers, -y[:, None] * sizes], 1), y, (low, np.inf)).x
    start[m + 1 :] = np.maximum(start[m + 1 :], 1e-6)

    def quotient(c):
        return powers @ c[: m + 1], 1 + sizes @ c[m + 1 :]

    def error(c):
        p, q = quotient(c)
        return p / q - y

    def slope(c):
        p, q = quotient(c)
        return np.concatenate([powers / q[:, None], -(p / q**2)[:, None] * sizes], 1)

    tolerances = {"xtol": 1e-12, "ftol": 1e-12, "gtol": 1e-12, "max_nfev": 500}
    found = least_squares(error, start, slope, (low, np.inf), **tolerances).x  # pyright: ignore[reportArgumentType]
    return found[: m + 1], found[m + 1 :]


def rational(x: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The rational with the coefficients a [m + 1] and b [n] at x, in NumPy.

    >>> float(rational(np.array(2.0), np.array([0.0, 1.0]), np.array([-0.5])))
    1.0
    """
    p, size = np.polyval(a[::-1], x), np.abs(x)
    return p / (1 + size * np.polyval(np.abs(b)[::-1], size))


def initial_coefficients(activation: Activation, degree: tuple[int, int] = (5, 4)) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) of "identity", "swish", "gelu", a function of its own, or "gelu_repo" (see the trap in `GroupRational`).

    >>> a, b = initial_coefficients("identity", degree=(2, 1))
    >>> a.tolist(), b.tolist()
    ([0.0, 1.0, 0.0], [0.0])
    """
    if not isinstance(activation, str):
        return fit_rational(activation, degree)
    if activation not in _FITTED:
        raise ValueError(f"activation is {activation!r}; it must be one of {sorted(_FITTED)} or a function")
    if degree == (5, 4):
        a, b = _FITTED[activation]
        return np.array(a), np.array(b)
    if activation == "identity" and degree[0] >= 1:
        return np.eye(degree[0] + 1)[1], np.zeros(degree[1])
    if activation not in _FUNCTIONS:
        raise ValueError(f"activation {activation!r} has degree (5, 4), not {degree}")
    return fit_rational(_FUNCTIONS[activation], degree)


def variance_gain(activation: Activation, degree: tuple[int, int] = (5, 4)) -> float:
    """1 / E[F(x)^2] for x ~ N(0, 1): the paper's squared gain, by which weights behind F are larger than 1 / fan-in.

    >>> round(variance_gain("identity"), 6)
    1.0
    """
    x = np.linspace(-8, 8, 8 * _POINTS)
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return float(1 / np.sum(rational(x, *initial_coefficients(activation, degree)) ** 2 * density * (x[1] - x[0])))


class GroupRational(nn.Module):
    """The activation P(x) / Q(x) with learned coefficients for each of G groups of channels; see `group_rational`.

    Attributes:
      num_groups: G; the D channels of the input must be a multiple.
      share_numerator: one numerator for all groups, as in the published models, which then have 6 + 4 G parameters.
      initial: "identity", "swish", "gelu", or a function to fit on [-3, 3]. "gelu_repo" are the coefficients that the
        method's repository calls gelu: they were fitted for another denominator and are off by 1.5.
      degree: (m, n), at most (7, 6).
      dtype: of input and output; None keeps the input's. Computed in float32 whatever it is.
      param_dtype: of the coefficients.
      implementation: of `group_rational`.

    Outside [-3, 3] the rational goes its own way (swish is off by 2 % at 10) and grows like x: feed it normalised
    inputs, and leave its coefficients out of weight decay (`rational_decay_mask`), which would drive the denominators
    to 1 and leave a polynomial of degree m. Raises ValueError as `group_rational` does. Source: arXiv 2505.13813.

    >>> layer = GroupRational(num_groups=2)
    >>> x = jnp.array([[1.0, -2.0, 3.0, 0.5]])
    >>> params = layer.init(jax.random.key(0), x)
    >>> jax.tree.map(jnp.shape, params["params"])
    {'denominator': (2, 4), 'numerator': (1, 6)}
    >>> layer.apply(params, x).tolist()
    [[1.0, -2.0, 3.0, 0.5]]
    """

    num_groups: int = 8
    share_numerator: bool = True
    initial: Activation = "identity"
    degree: tuple[int, int] = (5, 4)
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def coefficients(which, groups):
            def make(key):
                del key
                row = initial_coefficients(self.initial, self.degree)[which]
                return jnp.tile(jnp.asarray(row, self.param_dtype)[None], (groups, 1))

            return make

        a = self.param("numerator", coefficients(0, 1 if self.share_numerator else self.num_groups))
        b = self.param("denominator", coefficients(1, self.num_groups))
        return group_rational(x.astype(self.dtype or x.dtype), a, b, implementation=self.implementation)


class GRKAN(nn.Module):
    """Two rounds of activation, dropout, linear map: what stands in a Kolmogorov-Arnold Transformer for the MLP.

    Attributes:
      features, hidden_features: channels of the output and between the maps.
      num_groups, implementation, dtype, param_dtype: as in `GroupRational`; dtype None takes the parameters' and the
        input's.
      act_init: how the two activations start.
      dropout_rate: before both maps; needs the random stream "dropout" when `deterministic` is False.
      kernel_init: "variance_preserving" draws weights with variance 1 / (fan-in * E[F(x)^2]), as the paper says;
        "trunc_normal_002" draws N(0, 0.02^2), as the released code does, whose truncation at +-2 cuts nothing.

    Takes [..., C] with C a multiple of G, as must be hidden_features; returns [..., features]. Raises ValueError for
    other channels or an unknown `kernel_init`. Source: arXiv 2409.10594.

    >>> layer = GRKAN(features=16, hidden_features=32)
    >>> params = layer.init(jax.random.key(0), jnp.ones((1, 16)))
    >>> layer.apply(params, jnp.ones((5, 16))).shape
    (5, 16)
    """

    features: int
    hidden_features: int
    num_groups: int = 8
    act_init: tuple[Activation, Activation] = ("identity", "swish")
    dropout_rate: float = 0.0
    kernel_init: Literal["variance_preserving", "trunc_normal_002"] = "variance_preserving"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        if self.kernel_init not in ("variance_preserving", "trunc_normal_002"):
            raise ValueError(
                f"kernel_init is {self.kernel_init!r}; it must be 'variance_preserving' or 'trunc_normal_002'"
            )
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for number, (initial, features) in enumerate(
            zip(self.act_init, (self.hidden_features, self.features), strict=True), 1
        ):
            x = GroupRational(
                self.num_groups, initial=initial, implementation=self.implementation, name=f"act{number}", **dtypes
            )(x)
            x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
            if self.kernel_init == "variance_preserving":
                kernel_init = nn.initializers.variance_scaling(variance_gain(initial), "fan_in", "normal")
            else:
                kernel_init = nn.initializers.normal(0.02)
            x = nn.Dense(features, kernel_init=kernel_init, name=f"fc{number}", **dtypes)(x)
        return x


def rational_decay_mask(params):
    """For `optax.add_decayed_weights(mask=...)`: False for the coefficients of every `GroupRational` and for vectors.

    >>> params = GRKAN(8, 8).init(jax.random.key(0), jnp.ones((1, 8)))["params"]
    >>> mask = rational_decay_mask(params)
    >>> mask["fc1"], mask["act1"]
    ({'bias': False, 'kernel': True}, {'denominator': False, 'numerator': False})
    """

    def decays(path, leaf):
        return leaf.ndim > 1 and path[-1].key not in ("numerator", "denominator")

    return jax.tree_util.tree_map_with_path(decays, params)
