"""What the public functions accept: shapes, dtypes and options are checked here, before any work is traced."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.linear_cross_entropy.noise import Draw, key_words
from pallas_kernels.linear_cross_entropy.reference import Spec

_DTYPES = ("bfloat16", "float16", "float32", "float64")


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def arrays(
    embeddings: Any, classifier: Any, bias: Any, classifier_layout: str
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Embeddings [..., D], classifier and bias as JAX arrays that fit together."""
    choice("classifier_layout", classifier_layout, ("vd", "dv"))
    named = {"embeddings": embeddings, "classifier": classifier, "bias": bias}
    named = {name: jnp.asarray(x) for name, x in named.items() if x is not None}
    for name, x in named.items():
        if x.dtype.name not in _DTYPES:
            raise TypeError(f"{name} must have one of the dtypes {_DTYPES}, got {x.dtype}")
    e, c, b = named["embeddings"], named["classifier"], named.get("bias")
    if e.ndim < 1 or c.ndim != 2:
        raise ValueError(f"embeddings must be [..., D] and classifier a matrix, got shapes {e.shape} and {c.shape}")
    width, vocabulary = (c.shape[classifier_layout.index(letter)] for letter in "dv")
    if width != e.shape[-1]:
        raise ValueError(
            f"embeddings {e.shape} end in D={e.shape[-1]}, but classifier {c.shape} with "
            f"classifier_layout={classifier_layout!r} has D={width}"
        )
    if vocabulary == 0 or width == 0:
        raise ValueError(f"classifier must not be empty, got shape {c.shape}")
    if b is not None and b.shape != (vocabulary,):
        raise ValueError(f"bias must have shape ({vocabulary},), one entry per class, got {b.shape}")
    return e, c, b


def spec(
    implementation: str,
    operands: tuple[jax.Array, jax.Array, jax.Array | None],
    classifier_layout: str,
    softcap: float | None,
    block_sizes: tuple[int, int] | None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    classes: int | None = None,
    filter_eps: float | str = 0.0,
    filter_embeddings: bool = True,
    filter_classifier: bool = True,
) -> Spec:
    """The static options, checked."""
    e, c, b = operands
    if filter_eps == "auto":
        filter_eps = float(jnp.finfo(e.dtype).eps) / 32
    filter_eps = _number("filter_eps", filter_eps, lambda x: 0 <= x < 1, 'in [0, 1), or "auto"')
    if filter_eps and label_smoothing and softcap is not None:
        raise ValueError(
            f"filter_eps={filter_eps}: with softcap and label_smoothing together no entry of the gradient is small; "
            "use filter_eps=0"
        )
    if b is not None or not (filter_embeddings or filter_classifier):
        filter_eps = 0.0  # the bias gradient is a sum over every entry: computing it saves nothing
    if softcap is not None:
        softcap = _number("softcap", softcap, lambda x: 0 < x < math.inf, "positive, or None")
    if block_sizes is not None:
        if implementation in ("reference", "mosaic_gpu"):
            raise ValueError(
                f"block_sizes={block_sizes}: implementation={implementation!r} has no tiles to choose; use None"
            )
        if len(block_sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in block_sizes):
            raise ValueError(f"block_sizes must be two positive ints (rows, vocabulary entries), got {block_sizes!r}")
        block_sizes = (block_sizes[0], block_sizes[1])  # a list would not be hashable
    return Spec(
        implementation=implementation,
        target=dispatch.target(),
        dtypes=(e.dtype, c.dtype, None if b is None else b.dtype),
        classifier_layout=classifier_layout,
        softcap=softcap,
        label_smoothing=_number("label_smoothing", label_smoothing, lambda x: 0 <= x < 1, "in [0, 1)"),
        z_loss=_number("z_loss", z_loss, lambda x: 0 <= x < math.inf, "at least 0"),
        classes=c.shape[classifier_layout.index("v")] if classes is None else classes,
        filter_eps=filter_eps,
        filter_embeddings=bool(filter_embeddings),
        filter_classifier=bool(filter_classifier),
        block_sizes=block_sizes,
    )


def labels(values: Any, shape: tuple[int, ...], vocabulary: int, ignore_index: int, shift: int) -> jax.Array:
    """Signed labels of ``shape``, shifted; concrete ones are known to be in [0, vocabulary) or ``ignore_index``."""
    if not isinstance(shift, int) or shift < 0:
        raise ValueError(f"shift must be an int of at least 0, got {shift!r}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    if not isinstance(values, jax.Array):
        values = np.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {values.dtype}")
    if values.shape != shape:
        raise ValueError(f"labels must have the shape of embeddings without its last axis, {shape}, got {values.shape}")
    if shift and not shape:
        raise ValueError(f"shift={shift} needs a token axis; embeddings have none")
    if isinstance(values, np.ndarray) or (not isinstance(values, jax.core.Tracer) and values.is_fully_addressable):
        used = np.asarray(values)[..., shift:]
        wrong = used[(used != ignore_index) & ((used < 0) | (used >= vocabulary))]
        if wrong.size:
            raise ValueError(
                f"labels must be in [0, {vocabulary}) or ignore_index={ignore_index}; {wrong.size} are not, "
                f"the first is {wrong[0]}"
            )
    values = jnp.asarray(values)
    values = values.astype(jnp.int64 if values.dtype.itemsize == 8 else jnp.int32)
    return shifted(values, shift, ignore_index)


def shifted(x: jax.Array, shift: int, fill: int) -> jax.Array:
    """x[..., t + shift] at position t, ``fill`` where there is none."""
    if shift == 0:
        return x
    x_left = x[..., shift:]
    return jnp.pad(x_left, [(0, 0)] * (x.ndim - 1) + [(0, x.shape[-1] - x_left.shape[-1])], constant_values=fill)


def token_weights(values: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    values = jnp.asarray(values)
    if values.shape != shape:
        raise ValueError(f"token_weights must have one weight per token, shape {shape}, got {values.shape}")
    return values.astype(dtype)


def draw(key: jax.Array, token_ids: Any, shape: tuple[int, ...]) -> Draw:
    """The noise of tokens of ``shape``, flattened."""
    if token_ids is None:
        return Draw(key_words(key), jnp.arange(math.prod(shape), dtype=jnp.uint32))
    token_ids = jnp.asarray(token_ids)
    if token_ids.shape != shape or not jnp.issubdtype(token_ids.dtype, jnp.integer):
        raise ValueError(
            f"token_ids must be integers of shape {shape}, one per token, got {token_ids.dtype} {token_ids.shape}"
        )
    return Draw(key_words(key), token_ids.astype(jnp.uint32).reshape(-1))


def _number(name: str, value: Any, legal: Any, text: str) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a Python number, it is part of the program, got {value!r}")
    if not legal(value):
        raise ValueError(f"{name} must be {text}, got {value!r}")
    return float(value)
