"""What the gradient filter puts in the place of the softmax entries that it leaves out.

How much probability a token leaves out is known: 1 less what it keeps. It is spread over the entries left out in
proportion to a prior, their probability for the average token: which entries are rare hardly depends on the token. No
entry gets more than the largest that was left out, so a uniform softmax stays as it is, and none changes by eps.
"""

import jax
import jax.numpy as jnp


def cap(eps: float, vocabulary: int) -> float:
    """The largest value of the prior: the even share, but at least a quarter of eps and at most half of it.

    All that was left out is below eps, and the prior's most frequent entries are hardly ever left out: uncapped they
    would take what belongs to others. A quarter was best for a GPT-2 small trained from scratch and nearly so for the
    gradients of SmolLM2; of a smaller vocabulary it would cut off what is no more frequent than the mean.
    """
    return min(max(1 / vocabulary, eps / 4), eps / 2)


def prior(spec, e, c, counts) -> tuple[jax.Array, jax.Array]:
    """(prior, prior with the slope of the softcap), float32 [V], by the average of the tokens in ``counts`` [N]."""
    v_axis = spec.classifier_layout.index("v")
    mean = jnp.where(counts[:, None], e, 0).sum(0, dtype=jnp.float32) / jnp.maximum(counts.sum(), 1)
    # A sum and no product: XLA's would have workspace.
    z = (jnp.expand_dims(mean, v_axis) * c.astype(jnp.float32)).sum(1 - v_axis)
    if spec.softcap is not None:
        z = spec.softcap * jnp.tanh(z / spec.softcap)
    share = jnp.minimum(jax.nn.softmax(z), cap(spec.filter_eps, z.size))
    return share, share if spec.softcap is None else share * (1 - (z / spec.softcap) ** 2)


def rates(cap, mass, most, entries, prior) -> tuple[jax.Array, jax.Array]:
    """(multiple of the prior, what is added to it) that each entry left out gets.

    Per token ``entries`` are left out, their probabilities ``mass`` in sum and ``most`` at the most, the sum of their
    ``prior``, which nowhere exceeds ``cap``.
    """
    entries = jnp.maximum(entries, 1).astype(jnp.float32)
    mean = mass / entries
    multiple = mass / jnp.maximum(prior, jnp.finfo(jnp.float32).tiny)
    multiple = jnp.maximum(jnp.minimum(multiple, (most - mean) / cap), 0)
    return multiple, jnp.maximum(mean - multiple * prior / entries, 0)
