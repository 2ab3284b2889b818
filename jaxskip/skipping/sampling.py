"""How the next token is drawn."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Greedy, or softmax at a temperature over the likeliest tokens. Hashable: a static argument.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: only the k likeliest tokens; None for all.
      top_p: only the fewest likeliest tokens that hold this much probability together (at least one); 1 for all.

    Both cuts are on the distribution at `temperature`, `top_k` first.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or None")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")


def sample(logits_BxV: jax.Array, key: jax.Array, sampling: Sampling = Sampling()) -> jax.Array:
    """One token a row, int32 [B].

    >>> sample(jnp.array([[0.0, 3.0, 1.0]]), jax.random.key(0), Sampling())
    Array([1], dtype=int32)
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits = logits_BxV.astype(jnp.float32) / sampling.temperature
    ids = None
    if sampling.top_k is not None:
        logits, ids = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))
    elif sampling.top_p < 1:
        logits, ids = jax.lax.top_k(logits, logits.shape[-1])
    if sampling.top_p < 1:
        probabilities = jax.nn.softmax(logits)  # falls along the row
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        logits = jnp.where(before < sampling.top_p, logits, -jnp.inf)
    choice = jax.random.categorical(key, logits)
    if ids is not None:
        choice = jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0]
    return choice.astype(jnp.int32)
