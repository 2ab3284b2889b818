"""A tiny Llama and a tiny GPT-2 that the tests of this folder share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxskip.models import Decoder, DecoderConfig

SHAPE = {
    "vocab_size": 61,
    "context_length": 128,
    "num_heads": 4,
    "embed_dim": 32,
    "dtype": jnp.float32,
    "init_std": 0.2,
}
LLAMA = DecoderConfig(
    **SHAPE,
    num_layers=4,
    num_kv_heads=2,
    mlp_dim=48,
    position="rotary",
    norm="rmsnorm",
    activation="swiglu",
    tie_embeddings=False,
)
GPT2 = DecoderConfig(**SHAPE, num_layers=3, use_bias=True)
TEXT = np.random.default_rng(0).integers(0, 61, (2, 24))


@functools.cache
def params(config):
    params = jax.jit(Decoder(config).init)(jax.random.key(0), jnp.asarray(TEXT))["params"]
    # Biases start at zero, where a forgotten one would not be noticed.
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)


@functools.partial(jax.jit, static_argnums=0)
def _apply(config, some_params, tokens):
    return Decoder(config).apply({"params": some_params}, tokens)


def logits(config, tokens, some_params=None):
    """The plain network's, float32 [B, T, V]."""
    return _apply(config, some_params or params(config), jnp.asarray(tokens))


def nats(all_logits, tokens, start):
    """Negative log-likelihood of tokens[:, start:]."""
    scores = jax.nn.log_softmax(all_logits[:, start - 1 : -1])
    return -np.take_along_axis(np.asarray(scores), tokens[:, start:, None], axis=2)[..., 0]
