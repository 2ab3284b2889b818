"""Cross-entropy of a linear classifier without the [tokens, vocabulary] logits in memory.

``linear_cross_entropy`` is the loss, ``sample_linear_categorical`` draws labels from the model's own distribution and
``sampled_linear_cross_entropy`` is the loss on such labels (the Gauss-Newton-Bartlett estimator). An implementation is
a module of this package, named as in the registries below, with some of ``forward``, ``backward`` and
``forward_backward`` (see ``chunked``); one without ``backward`` is differentiated by JAX. ``one_pass`` says for which
problems ``forward_backward`` is the better way to a loss with its gradients. ``forward_saving``, used when the gradient
filter is on, returns forward's results and a tuple that ``backward`` gets as its last arguments.
"""

import functools
import importlib
import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.linear_cross_entropy import inputs
from pallas_kernels.linear_cross_entropy.noise import Draw
from pallas_kernels.linear_cross_entropy.reference import Spec
from pallas_kernels.manual_axes import manual_axes, same_manual_axes, varying

__all__ = ["linear_cross_entropy", "sample_linear_categorical", "sampled_linear_cross_entropy"]


def linear_cross_entropy(
    embeddings: jax.Array,
    classifier: jax.Array,
    labels: jax.Array,
    *,
    bias: jax.Array | None = None,
    ignore_index: int = -100,
    shift: int = 0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weights: jax.Array | None = None,
    reduction: str = "mean",
    classifier_layout: str = "vd",
    return_lse: bool = False,
    filter_eps: float | str = 0.0,
    filter_embeddings: bool = True,
    filter_classifier: bool = True,
    vocab_axis_name: str | None = None,
    implementation: str | None = None,
    block_sizes: tuple[int, int] | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Cross-entropy of softmax(embeddings @ classifier.T + bias) with integer labels, the logits never materialised.

    Per token, with logits z (after the softcap) and lse = log sum exp z:
    ``loss = lse - (1 - label_smoothing) * z[label] - label_smoothing * mean(z) + z_loss * lse**2``.

    Args:
        embeddings: [..., D], bfloat16, float16, float32 or float64.
        classifier: [V, D] for ``classifier_layout="vd"`` (an embedding table) or [D, V] for "dv" (a Dense kernel).
            Products are computed in the wider of the two dtypes and accumulated in float32.
        labels: [...], integers in [0, V) or ``ignore_index``. Any other label raises ValueError when the labels are
            concrete; traced ones cannot raise, so the token's loss and every gradient it touches become NaN.
        bias: [V] or None.
        ignore_index: tokens with this label have loss 0 and no gradient, and do not count.
        shift: pairs the embedding of position t with the label (and weight) of t + shift along the last token axis;
            the last ``shift`` positions have no label and are ignored. Results stay at the embedding's position.
        softcap: s replaces the logits by s * tanh(logits / s).
        label_smoothing: in [0, 1), the share of the target spread evenly over the V entries.
        z_loss: weight of lse**2, at least 0.
        token_weights: [...], at least 0, multiplies each token's loss; differentiable.
        reduction: "mean" divides the sum by the number of tokens that are not ignored, or by the sum of their
            weights if there are any (0 where that is 0); "sum"; "none" gives [...].
        classifier_layout: "vd" or "dv".
        return_lse: also return lse, float32 [...], differentiable, 0 for ignored tokens.
        filter_eps: allows gradients to leave out entries of the softmax below it; what a token leaves out is spread
            over the entries left out, in proportion to the softmax of the average embedding (of all tokens of the
            call, so of each device its own), so that the gradient of its logits keeps its sum and no entry changes
            by filter_eps. "auto" is a 32nd of the embeddings' epsilon (2**-12 for bfloat16, the paper's). 0 is
            exact. What it costs: on a small pretrained model the embeddings' gradient is off by 6 times what rounding
            it to bfloat16 takes at 2**-12, by less than once at 2**-16 (left out and not spread: 26 and 7 times).
            How much is left out is up to the implementation ("chunked", "reference" and any call with a bias:
            nothing); the label's own entry never is. It pays where the softmax is peaked; with V below
            1 / filter_eps there is little to leave out.
        filter_embeddings, filter_classifier: whether that holds for the gradient of the embeddings and of the
            classifier. The paper's presets: both ("CCE-Kahan"), embeddings only ("CCE-Kahan-FullC", for training from
            scratch: rare classes keep their exact gradient), classifier only ("CCE-Kahan-FullE").
        vocab_axis_name: inside ``jax.shard_map``, the mesh axis over which the classifier (and bias) is split along V:
            each device passes its shard, and V and the labels count all shards. Results are the same on every device
            of the axis.
        implementation: "mosaic_tpu" (TPU), "mosaic_gpu" (NVIDIA Hopper), "triton" (NVIDIA Ampere, Ada; jax-triton),
            "chunked" (XLA, one tile of logits at a time), "reference" (materialised) or None for the best.
        block_sizes: (rows, vocabulary entries) of a tile; None chooses.

    Returns:
        The loss, or (loss, lse), in float32 (float64 for float64 inputs). Gradients have their inputs' dtypes.
        Reverse mode works for every implementation, forward mode over it (``jax.jvp(jax.grad(...))``) for "chunked"
        and "reference", forward mode alone only for "reference". A token axis that is sharded belongs inside
        ``jax.shard_map``: cut into tiles under plain ``jit``, it would be gathered.

    Raises:
        ValueError, TypeError: shapes, dtypes or options do not fit; the message says which.
        NotImplementedError: ``implementation`` cannot run on the device.

    Source: arXiv:2411.09009. Ours: accumulation in float32 always, the filter is off unless asked for and spreads the
    mass of what it leaves out (``spread``), ties to no order of the vocabulary.

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels.linear_cross_entropy import linear_cross_entropy
        >>> loss = linear_cross_entropy(jnp.ones((2, 3, 8)), jnp.zeros((50, 8)), jnp.zeros((2, 3), int), shift=1)
        >>> print(f"{loss:.4f}")  # log(50)
        3.9120
    """
    inputs.choice("reduction", reduction, ("mean", "sum", "none"))
    operands = inputs.arrays(embeddings, classifier, bias, classifier_layout)
    shard = operands[1].shape[classifier_layout.index("v")]
    vocabulary = shard if vocab_axis_name is None else shard * jax.lax.axis_size(vocab_axis_name)
    labels = inputs.labels(labels, operands[0].shape[:-1], vocabulary, ignore_index, shift)
    implementation = _chosen("linear_cross_entropy", implementation, operands)
    spec = inputs.spec(
        implementation,
        operands,
        classifier_layout,
        softcap,
        block_sizes,
        label_smoothing,
        z_loss,
        vocabulary,
        filter_eps,
        filter_embeddings,
        filter_classifier,
    )
    valid = labels != ignore_index
    if token_weights is None:
        weights = valid.astype(spec.dtype)
    else:
        token_weights = inputs.token_weights(token_weights, labels.shape, spec.dtype)
        weights = jnp.where(valid, inputs.shifted(token_weights, shift, 0), 0)
    known = (labels >= 0) & (labels < vocabulary)
    poison = jnp.where(valid & ~known, jnp.nan, 1).astype(spec.dtype)
    if vocab_axis_name is not None:
        labels = labels - shard * jax.lax.axis_index(vocab_axis_name)
        known &= (labels >= 0) & (labels < shard)
    target = jnp.where(valid & known, labels, -1).astype(jnp.int32).reshape(-1)
    count = weights.sum()
    loss, lse, _ = _loss(spec, reduction, return_lse, operands, weights * poison, target, count, vocab_axis_name)
    return (loss, jnp.where(valid, lse, 0)) if return_lse else loss  # pyright: ignore[reportArgumentType]


def sample_linear_categorical(
    key: jax.Array,
    embeddings: jax.Array,
    classifier: jax.Array,
    *,
    bias: jax.Array | None = None,
    softcap: float | None = None,
    classifier_layout: str = "vd",
    token_ids: jax.Array | None = None,
    implementation: str | None = None,
    block_sizes: tuple[int, int] | None = None,
) -> jax.Array:
    """Draws one label per token from softmax(embeddings @ classifier.T + bias), the logits never materialised.

    The noise of a token and a vocabulary entry depends on the key, the token's id and the entry alone: the labels are
    the same for any tiling, batching or placement of the tokens, up to rounding of the logits.

    Args:
        key: a key of ``jax.random.key`` or ``PRNGKey``; one of another implementation than threefry is converted.
        embeddings, classifier, bias, softcap, classifier_layout: as in ``linear_cross_entropy``.
        token_ids: [...], integers below 2**32 that name the tokens' random streams; default: their flat index. Give
            them when the batch is spread over devices by ``shard_map``, or every device draws the same noise.
        implementation, block_sizes: as in ``linear_cross_entropy``; a vocabulary tile smaller than V is a multiple
            of 256.

    Returns:
        int32 [...]; no gradient.

    Raises:
        As ``linear_cross_entropy``.

    Source: Gumbel-max with the counter-based generator of Salmon et al., SC 2011.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from pallas_kernels.linear_cross_entropy import sample_linear_categorical
        >>> logits = jnp.array([[0.0, 50.0, 0.0]])  # one-hot embedding, so the classifier's column is the logits
        >>> sample_linear_categorical(jax.random.key(0), jnp.ones((2, 1)), logits.T).tolist()
        [1, 1]
    """
    operands = inputs.arrays(embeddings, classifier, bias, classifier_layout)
    implementation = _chosen("sample_linear_categorical", implementation, operands)
    spec = inputs.spec(implementation, operands, classifier_layout, softcap, block_sizes)
    e, c, b = jax.lax.stop_gradient(operands)
    draw = inputs.draw(key, token_ids, e.shape[:-1])
    e_rows, c, b, draw = same_manual_axes((_rows(e), c, b, draw))
    return _module(spec).forward(spec, e_rows, c, b, draw)[2].reshape(e.shape[:-1])


def sampled_linear_cross_entropy(
    key: jax.Array,
    embeddings: jax.Array,
    classifier: jax.Array,
    *,
    bias: jax.Array | None = None,
    softcap: float | None = None,
    token_weights: jax.Array | None = None,
    reduction: str = "mean",
    classifier_layout: str = "vd",
    token_ids: jax.Array | None = None,
    implementation: str | None = None,
    block_sizes: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The cross-entropy on labels drawn from the model itself: ``sample_linear_categorical`` and its loss in one pass.

    The gradient takes the labels as constants: its square is the Gauss-Newton-Bartlett estimate of the curvature.

    Args:
        token_weights: [...], at least 0, multiplies each token's loss; 0 leaves the token out.
        reduction: "mean" divides by the sum of the weights (the number of tokens without any; 0 where that is 0),
            "sum", or "none" for [...].
        The rest as in ``sample_linear_categorical``.

    Returns:
        (loss, labels): as ``linear_cross_entropy`` and int32 [...].

    Raises:
        As ``linear_cross_entropy``.

    Source: arXiv:2305.14342, algorithm 2.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from pallas_kernels.linear_cross_entropy import sampled_linear_cross_entropy
        >>> loss, labels = sampled_linear_cross_entropy(jax.random.key(0), jnp.ones((4, 8)), jnp.zeros((50, 8)))
        >>> print(f"{loss:.4f}", labels.shape)  # log(50)
        3.9120 (4,)
    """
    inputs.choice("reduction", reduction, ("mean", "sum", "none"))
    operands = inputs.arrays(embeddings, classifier, bias, classifier_layout)
    implementation = _chosen("sampled_linear_cross_entropy", implementation, operands)
    spec = inputs.spec(implementation, operands, classifier_layout, softcap, block_sizes)
    shape = operands[0].shape[:-1]
    weights = jnp.ones(shape) if token_weights is None else token_weights
    weights = inputs.token_weights(weights, shape, spec.dtype)
    draw = inputs.draw(key, token_ids, shape)
    loss, _, labels = _loss(spec, reduction, False, operands, weights, draw, weights.sum())
    return loss, labels


def _chosen(op: str, implementation: str | None, operands: tuple[Any, Any, Any]) -> str:
    """The name of the implementation to use: a module of this package. The registry lists them best first."""
    dtype = jnp.promote_types(operands[0].dtype, operands[1].dtype)

    def mosaic_gpu(target: dispatch.Target) -> str | None:
        if reason := dispatch.mosaic_gpu(target):
            return reason
        return f"reads bfloat16 or float16, not {dtype}" if dtype.itemsize != 2 else None

    def triton(target: dispatch.Target) -> str | None:
        # It needs jax-triton too, which is optional: where that is missing, None goes on to what comes next.
        return dispatch.triton(target) or importlib.import_module(f"{__name__}.triton").unavailable(dtype, target)

    def mosaic_tpu(target: dispatch.Target) -> str | None:
        if dtype == jnp.float64:
            return "reads bfloat16, float16 or float32, not float64"
        return dispatch.mosaic_tpu(target)

    registry = {
        "mosaic_tpu": mosaic_tpu,
        "mosaic_gpu": mosaic_gpu,
        "triton": triton,
        "chunked": dispatch.anywhere,
        "reference": dispatch.anywhere,
    }
    if dtype.itemsize > 2:  # without tensor cores Triton's products are slower than XLA's: only for who asks
        registry["triton"] = registry.pop("triton")
    return dispatch.choose(op, implementation, registry)


def _loss(
    spec: Spec,
    reduction: str,
    return_lse: bool,
    operands: tuple[jax.Array, jax.Array, jax.Array | None],
    weights: jax.Array,
    target: jax.Array | Draw,
    count: jax.Array,
    vocab_axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """(reduced loss, lse [...] if asked for, labels [...]) of the weights [...] and flat labels or a flat draw."""
    e, c, b = operands
    e, w = _rows(e), weights.reshape(-1)
    module, lse = _module(spec), None
    total = reduction != "none" and not return_lse and vocab_axis_name is None
    if total and hasattr(module, "one_pass") and module.one_pass(spec, e, c, b, target):
        e, c, b, w, target = same_manual_axes((e, c, b, w, target))
        loss, labels = _total(spec, e, c, b, w, target)  # pyright: ignore[reportGeneralTypeIssues]
    else:
        if vocab_axis_name is not None:
            # In float32, so that the shards' gradients of e are added in it.
            e = varying(e.astype(spec.dtype), manual_axes(c) & {vocab_axis_name}).astype(e.dtype)
        e, c, b, target = same_manual_axes((e, c, b, target))
        forward = _per_token if hasattr(module, "backward") else module.forward
        nll, lse, labels = forward(spec, e, c, b, target)  # pyright: ignore[reportGeneralTypeIssues]
        if vocab_axis_name is not None:
            nll, lse = _over_shards(vocab_axis_name, nll, lse)
        loss = w * (nll + spec.z_loss * lse**2)
        lse = lse.reshape(weights.shape)
        loss = loss.reshape(weights.shape) if reduction == "none" else loss.sum()
    if reduction == "mean":
        loss /= jnp.where(count == 0, 1, count)
    return loss, lse, labels.reshape(weights.shape)


def _over_shards(axis_name: str, nll: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(negative log likelihood, log-sum-exp) of the whole vocabulary from each shard's own."""
    top = jax.lax.pmax(jax.lax.stop_gradient(lse), axis_name)
    whole = top + jnp.log(jax.lax.psum(jnp.exp(lse - top), axis_name))
    return whole - jax.lax.psum(lse - nll, axis_name), whole


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _per_token(spec, e, c, b, target):
    """(negative log likelihood, log-sum-exp, labels), each [N]; the backward pass computes the logits again."""
    return _module(spec).forward(spec, e, c, b, target)


def _per_token_forward(spec, e, c, b, target):
    module = _module(spec)
    if spec.filter_eps and hasattr(module, "forward_saving"):
        (nll, lse, labels), saved = dispatch.once_differentiated(spec, module.forward_saving)(e, c, b, target)
    else:
        (nll, lse, labels), saved = dispatch.once_differentiated(spec, module.forward)(e, c, b, target), ()
    return (nll, lse, labels), ((e, c, b, labels, lse), saved)


def _per_token_backward(spec, residuals, cotangents):
    g, h, _ = cotangents
    # The cotangents of a mean over many tokens are below what float16 holds: bring them to order one first.
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(g) + jnp.abs(h), initial=0))
    scale = jnp.where(scale > 0, scale, 1)
    primal, saved = residuals
    gradients = dispatch.once_differentiated(spec, _module(spec).backward)(*primal, g / scale, h / scale, scale, *saved)
    return *_cast(spec, gradients), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(spec, e, c, b, weights, target):
    """(sum of weights * loss, labels [N]); under differentiation the gradients are made in the forward pass."""
    nll, lse, labels = _module(spec).forward(spec, e, c, b, target)
    return (weights * (nll + spec.z_loss * lse**2)).sum(), labels


def _total_forward(spec, e, c, b, weights, target):
    run = dispatch.once_differentiated(spec, _module(spec).forward_backward)
    loss, labels, gradients = run(e, c, b, weights, target)
    return ((weights * loss).sum(), labels), (loss, gradients)


def _total_backward(spec, residuals, cotangents):
    loss, gradients = residuals
    gradients = jax.tree.map(lambda x: x * cotangents[0], gradients)
    return *_cast(spec, gradients), cotangents[0] * loss, None


_per_token.defvjp(_per_token_forward, _per_token_backward)
_total.defvjp(_total_forward, _total_backward)


def _cast(spec: Spec, gradients: tuple[Any, ...]) -> list[Any]:
    """The gradients in the dtypes of what they are gradients of."""
    return [None if x is None else x.astype(dtype) for x, dtype in zip(gradients, spec.dtypes, strict=True)]


def _module(spec: Spec) -> ModuleType:
    """Imported on first use: an implementation may need an optional package."""
    return importlib.import_module(f"{__name__}.{spec.implementation}")


def _rows(x: jax.Array) -> jax.Array:
    """[..., D] as [N, D]."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
