"""The definition: materialised logits and JAX's own derivatives. Tests compare every other file with this one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.linear_cross_entropy.noise import Draw, exponential


class Spec(NamedTuple):
    """The static options that implementations see.

    ``dtypes`` are those of embeddings, classifier and bias. ``classes`` is V, also where the classifier at hand is one
    shard of it. ``filter_eps`` (0: off) allows the gradients that ``filter_embeddings`` and ``filter_classifier`` name
    to leave out softmax entries below it; an implementation that leaves out fewer, or none, is right too.
    """

    implementation: str
    target: dispatch.Target
    dtypes: tuple[Any, Any, Any]
    classifier_layout: str
    softcap: float | None
    label_smoothing: float
    z_loss: float
    classes: int
    filter_eps: float
    filter_embeddings: bool
    filter_classifier: bool
    block_sizes: tuple[int, int] | None

    @property
    def operand_dtype(self) -> Any:
        """What the matrix products read: the wider of the two inputs, so that neither loses bits."""
        return jnp.promote_types(*self.dtypes[:2])

    @property
    def dtype(self) -> Any:
        """What is accumulated in: float32, or float64 for float64 inputs."""
        return jnp.promote_types(self.operand_dtype, jnp.float32)


def logits(spec: Spec, e: jax.Array, c: jax.Array, b: jax.Array | None) -> jax.Array:
    """Logits [N, V] in ``spec.dtype`` of embeddings [N, D] with a classifier [V, D] or [D, V] and a bias [V]."""
    e, c = e.astype(spec.operand_dtype), c.astype(spec.operand_dtype)
    z = jnp.einsum(f"rd,{spec.classifier_layout}->rv", e, c, preferred_element_type=spec.dtype)
    if b is not None:
        z += b.astype(spec.dtype)[None, :]
    return z if spec.softcap is None else spec.softcap * jnp.tanh(z / spec.softcap)


def forward(
    spec: Spec, e: jax.Array, c: jax.Array, b: jax.Array | None, target: jax.Array | Draw
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(negative log likelihood, log-sum-exp, labels), each [N]. Labels of -1 stand for no entry: their logit is 0."""
    z = logits(spec, e, c, b)
    lse = jax.nn.logsumexp(z, axis=-1)
    if isinstance(target, Draw):
        labels = jnp.argmax(z - jnp.log(exponential(target, 0, z.shape[1])), axis=-1).astype(jnp.int32)
    else:
        labels = target
    hit = labels[:, None] == jnp.arange(z.shape[1], dtype=jnp.int32)[None, :]
    picked = jnp.where(hit, z, 0).sum(-1)
    nll = lse - (1 - spec.label_smoothing) * picked
    if spec.label_smoothing:
        nll -= spec.label_smoothing / spec.classes * z.sum(-1)
    return nll, lse, labels
