"""A folder as from Hugging Face with an untrained network and a tokenizer: stands for a pretrained model."""

import jax
import jax.numpy as jnp

from experiments import smollm2
from jaxskip.data import BPETokenizer
from jaxskip.models import Decoder, DecoderConfig
from jaxskip.models.weights import save_hugging_face

CONFIG = DecoderConfig(
    vocab_size=300,
    context_length=2048,
    num_layers=6,
    num_heads=2,
    embed_dim=16,
    mlp_dim=24,
    position="rotary",
    norm="rmsnorm",
    activation="swiglu",
    init_std=0.3,
    dtype=jnp.float32,
)


def save(folder) -> str:
    """Writes it into `folder`, and returns the path as `smollm2.load` takes it."""
    params = jax.jit(Decoder(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    save_hugging_face(folder, CONFIG, params)
    BPETokenizer.train([smollm2.TEXT.read_text()], vocab_size=CONFIG.vocab_size).save(folder / "tokenizer.json")
    return str(folder)
