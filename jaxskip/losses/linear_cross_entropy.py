"""Linear layer + cross-entropy over a mesh, built on the fused op of `pallas_kernels` (arXiv 2411.09009)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels import linear_cross_entropy as kernel

# How tokens [B, T] lie on the mesh of the training loop. Positions are split over "tensor" because hidden states are
# replicated along it at the end of a decoder: no logit is computed twice, and slicing them costs no communication.
TOKEN_AXES = (("data", "fsdp"), ("tensor",))


def _over_mesh(local_sum, embeddings, classifier, *per_token, token_axes=TOKEN_AXES):
    """Sum over devices of `local_sum(embeddings, classifier, *per_token)`, each device on its own tokens.

    The classifier is gathered once and its gradient summed once, outside any loop over tiles; a partitioner left to
    itself would reduce the gradient in every iteration.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local_sum(embeddings, classifier, *per_token)
    axes = [tuple(name for name in names if name in mesh.shape) for names in token_axes]
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
        jax.shard_map, in_specs=(tokens, P(), *[tokens] * len(per_token)), out_specs=everywhere, check_vma=False
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
    **options: Any,
) -> jax.Array:
    """Cross-entropy of `embeddings @ classifier.T` against `labels`, on one device or on the mesh in force.

    Args:
      embeddings: [B, T, D], any float dtype.
      classifier: [V, D], or [D, V] with `classifier_layout="dv"`.
      labels: int [B, T]; `ignore_index` marks tokens without a target.
      reduction: "mean" over tokens with a target, or "sum".
      **options: `softcap`, `label_smoothing`, `z_loss`, `classifier_layout`, `implementation`, `block_sizes` of
        `pallas_kernels.linear_cross_entropy.linear_cross_entropy`, where they are described.

    Returns: float32 scalar. Logits are never materialised whole.

    Under `jax.set_mesh` with the axes "data", "fsdp", "tensor", rows B are split over the first two and positions T
    over the third. Raises ValueError when they do not divide, or for another reduction (the op itself has "none").

    >>> e, c = jnp.ones((2, 4, 8)), jnp.zeros((16, 8))
    >>> print(f"{linear_cross_entropy(e, c, jnp.zeros((2, 4), jnp.int32)):.4f}")  # log(16)
    2.7726
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; over a mesh it must be 'mean' or 'sum'")

    def local_sum(embeddings, classifier, labels) -> Any:
        return kernel.linear_cross_entropy(
            embeddings, classifier, labels, ignore_index=ignore_index, reduction="sum", **options
        )

    total = _over_mesh(local_sum, embeddings, classifier, labels)
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

    total = _over_mesh(local_sum, embeddings, classifier, token_ids, weights)
    return total / jnp.maximum(weights.sum(), 1.0)
