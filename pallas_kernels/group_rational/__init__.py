"""The group-rational activation: a learnable quotient of polynomials, one for each group of channels.

An implementation is a module of this package, named as in the registry below, with ``forward`` (see ``reference``) and
``backward`` (see ``chunked``); one without ``backward`` is differentiated by JAX. They see neither groups nor signs but
a table of every channel's coefficients, and return the gradient of that table.
"""

import functools
import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.group_rational.reference import Spec, channel_table
from pallas_kernels.manual_axes import same_manual_axes

__all__ = ["group_rational"]

_DTYPES = ("bfloat16", "float16", "float32", "float64")
_LARGEST_DEGREE = (7, 6)


def group_rational(
    x: jax.Array,
    numerator: jax.Array,
    denominator: jax.Array,
    *,
    implementation: str | None = None,
    block_sizes: tuple[int, int] | None = None,
) -> jax.Array:
    """P(x) / Q(x) with P(x) = a0 + a1 x + ... + am x^m and Q(x) = 1 + |b0| |x| + ... + |b(n-1)| |x|^n, by group.

    The D channels are G contiguous groups of D / G; channel d uses the coefficients of group d // (D / G). Q is at
    least 1: there is no pole. The derivative of |t| at 0 is +1, so that denominators of 0 learn.

    Args:
        x: [..., D], bfloat16, float16, float32 or float64, read and returned in that dtype; everything is computed
            and summed in float32 (float64 for float64).
        numerator: [G or 1, m + 1], the a of each group, m at most 7; with one row all groups share it.
        denominator: [G or 1, n], the b of each group, n at most 6; likewise.
        implementation: "mosaic_tpu" (TPU), "mosaic_gpu" (NVIDIA Hopper), "triton" (other NVIDIA GPUs; jax-triton),
            "chunked" (XLA), "reference" (XLA and its own derivatives) or None for the best.
        block_sizes: (rows, channels) of a tile; None chooses.

    Returns:
        [..., D] in the dtype of x. Gradients have their inputs' dtypes; those of the coefficients are sums of one
        order, the same in every run. The backward pass keeps x and the coefficients, nothing else. Reverse mode works
        for every implementation, forward mode over it (``jax.jvp(jax.grad(...))``) for "chunked" and "reference",
        forward mode alone for "reference". Rows or channels that are sharded belong inside ``jax.shard_map``, where
        each device passes the coefficients of its own channels.

    Raises:
        ValueError, TypeError: shapes, dtypes or options do not fit; the message says which.
        NotImplementedError: ``implementation`` cannot run on the device.

    Source: arXiv:2505.13813 (FlashKAT), of arXiv:2409.10594 (KAT). Ours: any number of groups, any degrees, no atomic
    additions, x is kept in its own dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels.group_rational import group_rational
        >>> square_over = jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[-1.0], [0.0]])  # x^2 / (1 + |x|), and x^2
        >>> group_rational(jnp.array([1.0, 2.0, 1.0, 2.0]), *square_over).tolist()
        [0.5, 1.3333333730697632, 1.0, 4.0]
    """
    x, numerator, denominator = _checked(x, numerator, denominator)
    if block_sizes is not None and (len(block_sizes) != 2 or any(size < 1 for size in block_sizes)):
        raise ValueError(f"block_sizes must be (rows, channels), both at least 1, or None, got {block_sizes}")
    spec = Spec(
        implementation=_chosen(implementation, x),
        target=dispatch.target(),
        degree=(numerator.shape[1] - 1, denominator.shape[1]),
        block_sizes=block_sizes,
    )
    channels = x.shape[-1]
    table = channel_table(numerator, denominator, channels, jnp.promote_types(x.dtype, jnp.float32))
    module = _module(spec)
    forward = functools.partial(_rational if hasattr(module, "backward") else module.forward, spec)
    # JAX sums the gradient of coefficients that all devices share over the devices, outside the custom derivative.
    return forward(*same_manual_axes((x, table)))


def _checked(x: Any, numerator: Any, denominator: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arguments as JAX arrays that fit together."""
    named = {"x": x, "numerator": numerator, "denominator": denominator}
    named = {name: jnp.asarray(array) for name, array in named.items()}
    for name, array in named.items():
        if array.dtype.name not in _DTYPES:
            raise TypeError(f"{name} must have one of the dtypes {_DTYPES}, got {array.dtype}")
    x, a, b = named.values()
    if x.ndim < 1 or x.shape[-1] < 1 or a.ndim != 2 or b.ndim != 2:
        raise ValueError(
            "x must be [..., D] with D at least 1, numerator and denominator must be matrices with a row for each "
            f"group; got shapes {x.shape}, {a.shape} and {b.shape}"
        )
    m, n = a.shape[1] - 1, b.shape[1]
    if not (0 <= m <= _LARGEST_DEGREE[0] and 1 <= n <= _LARGEST_DEGREE[1]):
        raise ValueError(
            f"numerator [groups, m + 1] needs 0 <= m <= {_LARGEST_DEGREE[0]} and denominator [groups, n] needs "
            f"1 <= n <= {_LARGEST_DEGREE[1]}, got shapes {a.shape} and {b.shape}"
        )
    groups = {a.shape[0], b.shape[0]}
    if len(groups - {1}) > 1 or 0 in groups:
        raise ValueError(
            f"numerator and denominator must have one row or one for each group, got {a.shape[0]} and {b.shape[0]} rows"
        )
    if x.shape[-1] % max(groups):
        raise ValueError(f"the {x.shape[-1]} channels of x do not split into {max(groups)} groups of the same size")
    return x, a, b


def _chosen(implementation: str | None, x: jax.Array) -> str:
    """The name of the implementation to use: a module of this package. The registry lists them best first."""

    def mosaic_gpu(target: dispatch.Target) -> str | None:
        if reason := dispatch.mosaic_gpu(target):
            return reason
        return "reads bfloat16, float16 or float32, not float64" if x.dtype == jnp.float64 else None

    def triton(target: dispatch.Target) -> str | None:
        # It needs jax-triton too, which is optional: where that is missing, None goes on to what comes next.
        return dispatch.triton(target) or importlib.import_module(f"{__name__}.triton").unavailable(x.dtype, target)

    def mosaic_tpu(target: dispatch.Target) -> str | None:
        if x.dtype == jnp.float64:
            return "reads bfloat16, float16 or float32, not float64"
        return dispatch.mosaic_tpu(target)

    registry = {
        "mosaic_tpu": mosaic_tpu,
        "mosaic_gpu": mosaic_gpu,
        "triton": triton,
        "chunked": dispatch.anywhere,
        "reference": dispatch.anywhere,
    }
    return dispatch.choose("group_rational", implementation, registry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rational(spec, x, table):
    return _run(spec, "forward")(x, table)


def _rational_forward(spec, x, table):
    return _run(spec, "forward")(x, table), (x, table)


def _rational_backward(spec, residuals, g):
    return _run(spec, "backward")(*residuals, g)


_rational.defvjp(_rational_forward, _rational_backward)


def _run(spec: Spec, name: str) -> Any:
    """``forward`` or ``backward`` of the arrays."""
    f = getattr(_module(spec), name)
    return dispatch.once_differentiated(spec, f if spec.implementation == "chunked" else dispatch.looped(f))


def _module(spec: Spec) -> ModuleType:
    """Imported on first use: an implementation may need an optional package."""
    return importlib.import_module(f"{__name__}.{spec.implementation}")
