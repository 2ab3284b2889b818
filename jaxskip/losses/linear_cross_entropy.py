"""Linear layer + cross-entropy over a mesh, built on the fused op of `pallas_kernels` (arXiv 2411.09009)."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels import linear_cross_entropy as kernel

# How tokens [B, T] lie on the mesh of the training loop. Positions are split over "tensor" because hidden states are
# replicated along it at the end of a decoder: no logit is computed twice, and slicing them costs no communication.
TOKEN_AXES = (("data", "fsdp"), ("tensor",))


def _over_mesh(local_sum, embeddings, classifier, *per_token, classifier_spec):
    """Sum over devices of `local_sum(embeddings, classifier, *per_token)`, each device on its own tokens.

    The classifier is gathered once (or is split along an axis of its own, by `classifier_spec`) and its gradient summed
    once, outside any loop over tiles; a partitioner left to itself would reduce the gradient in every iteration.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local_sum(embeddings, classifier, *per_token)
    axes = [tuple(a for a in names if a in mesh.shape and a not in classifier_spec) for names in TOKEN_AXES]
    for i, names in enumerate(axes):
        shards = functools.reduce(lambda n, a: n * mesh.shape[a], names, 1)
        if embeddings.shape[i] % shards:
            raise ValueError(
                f"axis {i} of embeddings {embeddings.shape} does not split over {shards} devices (mesh axes {names}); "
                f"make it a multiple of {shards}"
            )
    tokens = P(*axes)
    everywhere = P(tuple(a for names in axes for a in names))

    # Partial sums leave as a sharded vector and are added outside: with unchecked replication this is the form whose
    # transpose needs no extra reduction.
    @functools.partial(
        jax.shard_map,
        in_specs=(tokens, classifier_spec, *[tokens] * len(per_token)),
        out_specs=everywhere,
        check_vma=False,
    )
    def partial_sums(embeddings, classifier, *per_token):
        return local_sum(embeddings, classifier, *per_token)[None]

    return partial_sums(embeddings, classifier, *per_token).sum()


def linear_cross_entropy(
    embeddings: jax.Array,
    classifier: jax.Array,
    labels: jax.Array,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    vocab_axis_name: str | None = None,
    **options: Any,
) -> jax.Array:
    """Cross-entropy of `embeddings @ classifier.T` against `labels`, on one device or on the mesh in force.

    Args:
      embeddings: [B, T, D], any float dtype.
      classifier: [V, D], or [D, V] with `classifier_layout="dv"`.
      labels: int [B, T]; `ignore_index` marks tokens without a target.
      reduction: "mean" over tokens with a target, or "sum".
      vocab_axis_name: the mesh axis over which the classifier stays split along V (which it must divide), instead of
        being gathered on every device; tokens are then not split over it.
      **options: `softcap`, `label_smoothing`, `z_loss`, `filter_eps`, `filter_embeddings`, `filter_classifier`,
        `classifier_layout`, `implementation`, `block_sizes` of
        `pallas_kernels.linear_cross_entropy.linear_cross_entropy`, where they are described.

    Returns: float32 scalar. Logits are never materialised whole.

    Under `jax.set_mesh` with the axes "data", "fsdp", "tensor", rows B are split over the first two and positions T
    over the third. Raises ValueError when they do not divide, for a mesh without `vocab_axis_name`, or for
    another reduction (the op itself has "none").

    >>> e, c = jnp.ones((2, 4, 8)), jnp.zeros((16, 8))
    >>> print(f"{linear_cross_entropy(e, c, jnp.zeros((2, 4), jnp.int32)):.4f}")  # log(16)
    2.7726
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; over a mesh it must be 'mean' or 'sum'")

    mesh = jax.sharding.get_abstract_mesh()
    if vocab_axis_name is not None and vocab_axis_name not in mesh.shape:
        raise ValueError(f"vocab_axis_name={vocab_axis_name!r} is no axis of the mesh in force, {dict(mesh.shape)}")
    vocab_axis_name = None if mesh.size == 1 else vocab_axis_name
    by_class = {"vd": P(vocab_axis_name, None), "dv": P(None, vocab_axis_name)}

    def local_sum(embeddings, classifier, labels) -> Any:
        return kernel.linear_cross_entropy(
            embeddings,
            classifier,
            labels,
            ignore_index=ignore_index,
            reduction="sum",
            vocab_axis_name=vocab_axis_name,
            **options,
        )

    spec = by_class.get(options.get("classifier_layout", "vd"), P())
    total = _over_mesh(local_sum, embeddings, classifier, labels, classifier_spec=spec)
    if reduction == "sum":
        return total
    return total / jnp.maximum(jnp.sum(labels != ignore_index), 1).astype(total.dtype)


def sampled_linear_cross_entropy(
    key: jax.Array, embeddings: jax.Array, classifier: jax.Array, mask: jax.Array | None = None, **options: Any
) -> jax.Array:
    """Mean cross-entropy on labels drawn from the model itself: what Sophia-G's Gauss-Newton estimate differentiates.

    The same drawing whatever the tiles and however tokens [B, T] are spread over devices: the noise of a token
    depends on the key and on the token's place in the batch alone. The labels carry no gradient.

    Args:
      key: PRNG key.
      embeddings, classifier, **options: as in `linear_cross_entropy`.
      mask: bool [B, T], True where a token counts; None counts all.

    Returns: float32 scalar.

    >>> e, c = jnp.ones((2, 4, 8)), jnp.zeros((16, 8))
    >>> print(f"{sampled_linear_cross_entropy(jax.random.key(0), e, c):.4f}")  # log(16), whatever is drawn
    2.7726
    """
    shape = embeddings.shape[:2]
    token_ids = jnp.arange(shape[0] * shape[1], dtype=jnp.uint32).reshape(shape)
    weights = jnp.ones(shape, jnp.float32) if mask is None else mask.astype(jnp.float32)

    def local_sum(embeddings, classifier, token_ids, weights):
        loss, _ = kernel.sampled_linear_cross_entropy(
            key, embeddings, classifier, token_ids=token_ids, token_weights=weights, reduction="sum", **options
        )
        return loss

    total = _over_mesh(local_sum, embeddings, classifier, token_ids, weights, classifier_spec=P())
    return total / jnp.maximum(weights.sum(), 1.0)


class LinearCrossEntropy(nn.Module):
    """The last layer of a language model and its loss in one: logits are never materialised whole.

    Attributes:
      vocabulary: V, the rows of a classifier of its own, a parameter [V, D] named "classifier"; None when every call
        brings one (tied embeddings: `nn.Embed.embedding`).
      options: keyword arguments of `linear_cross_entropy`, `classifier_layout` excepted.

    `__call__(embeddings [B, T, D], labels int [B, T], classifier=None)` returns the float32 scalar of
    `linear_cross_entropy`. Raises ValueError unless exactly one of `vocabulary` and `classifier` is given.

    >>> layer = LinearCrossEntropy(vocabulary=16, options={"z_loss": 1e-4})
    >>> e, labels = jnp.ones((2, 4, 8)), jnp.zeros((2, 4), jnp.int32)
    >>> params = layer.init(jax.random.key(0), e, labels)
    >>> params["params"]["classifier"].shape, layer.apply(params, e, labels).shape
    ((16, 8), ())
    """

    vocabulary: int | None = None
    options: Mapping[str, Any] | None = None

    @nn.compact
    def __call__(self, embeddings: jax.Array, labels: jax.Array, classifier: jax.Array | None = None) -> jax.Array:
        if (self.vocabulary is None) == (classifier is None):
            raise ValueError(
                f"give either vocabulary={self.vocabulary} or a classifier with each call, "
                f"which was {'not given' if classifier is None else 'given'}"
            )
        if classifier is None:
            shape = (self.vocabulary, embeddings.shape[-1])
            classifier = self.param("classifier", nn.initializers.normal(0.02), shape)
        return linear_cross_entropy(embeddings, classifier, labels, **(self.options or {}))
