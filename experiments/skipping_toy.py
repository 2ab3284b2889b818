"""An eight-layer byte language model that the skipping experiments train in seconds, and fine-tune under a policy.

Its text is the source code of Python's standard library and the prose of `pydoc_data.topics`, half of each batch.
"""

import dataclasses
import functools
import pathlib
from typing import Any

KINDS = ("code", "prose")


@dataclasses.dataclass(frozen=True)
class Toy:
    """The network and how its base is trained; a field of an experiment's ``Config``."""

    num_layers: int = 8
    width: int = 48
    heads: int = 4
    context: int = 64
    batch_size: int = 16
    """Windows, half of them code and half prose."""
    steps: int = 500
    learning_rate: float = 3e-3
    """Of Adam, falling to zero on a cosine."""
    code_bytes: int = 1_000_000
    """How much of the standard library is read."""
    validation_windows: int = 256

    def __post_init__(self):
        if self.batch_size % 2 or self.validation_windows % 2:
            raise ValueError("batch_size and validation_windows are half code and half prose: give even numbers")


def decoder_config(toy: Toy):
    """A Llama in small: rotary positions, RMSNorm, SwiGLU; float32 throughout."""
    import jax.numpy as jnp

    from jaxskip.models import DecoderConfig

    return DecoderConfig(
        vocab_size=256,
        context_length=toy.context,
        num_layers=toy.num_layers,
        num_heads=toy.heads,
        embed_dim=toy.width,
        mlp_dim=8 * toy.width // 3,
        position="rotary",
        norm="rmsnorm",
        activation="swiglu",
        init_std=0.1,
        dtype=jnp.float32,
    )


@functools.cache
def corpora(code_bytes: int) -> dict[str, Any]:
    """kind -> `jaxskip.data.Corpus` of bytes; a tenth of the files, and of the topics, is for validation."""
    from pydoc_data.topics import topics

    import numpy as np

    from jaxskip.data import Corpus, load_corpus
    from jaxskip.data.texts import split_texts

    def tokens(texts):
        return np.frombuffer("\n".join(texts).encode(), np.uint8)

    train, validation = split_texts([topics[name] for name in sorted(topics)], 0.1)
    prose = Corpus(tokens(train), tokens(validation), vocab_size=256, name="pydoc_data.topics")
    return {"code": load_corpus("pysrc", max_bytes=code_bytes), "prose": prose}


class Batches:
    """Endless batches {"inputs", "targets"} int32 [B, T], rows of code before rows of prose; a `BatchIterator`."""

    def __init__(self, toy: Toy, seed: int):
        from jaxskip.data import TokenWindows

        self._parts = {
            kind: TokenWindows(
                corpora(toy.code_bytes)[kind].train,
                batch_size=toy.batch_size // 2,
                context_length=toy.context,
                vocab_size=256,
                seed=2 * seed + number,
            )
            for number, kind in enumerate(KINDS)
        }

    def __iter__(self):
        return self

    def __next__(self):
        import numpy as np

        code, prose = (next(self._parts[kind]) for kind in KINDS)
        return {name: np.concatenate([code[name], prose[name]]) for name in code}

    def get_state(self) -> dict:
        return {kind: part.get_state() for kind, part in self._parts.items()}

    def set_state(self, state: dict) -> None:
        for kind, part in self._parts.items():
            part.set_state(state[kind])


def validation(toy: Toy) -> dict[str, Any]:
    """Held-out windows {"inputs", "targets"} int32 [N, T], code first; the same ones every time."""
    import numpy as np

    from jaxskip.data import evaluation_windows

    half = toy.validation_windows // 2
    parts = [
        next(
            evaluation_windows(
                corpora(toy.code_bytes)[kind].validation,
                batch_size=half,
                context_length=toy.context,
                num_batches=1,
                vocab_size=256,
            )
        )
        for kind in KINDS
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def train(loss_fn, params, toy: Toy, directory: pathlib.Path, *, steps: int, learning_rate: float, seed: int = 0):
    """`params` (any pytree: a network, routers, adapters) after Adam on a cosine; kept in `directory`, and resumed.

    `loss_fn(params, batch, key) -> (loss, dict of scalars)` as `jaxskip.training.make_train_step` takes it; the same
    function object again is not compiled again. `params` may be a function of a key.
    """
    import jax

    from jaxskip import training

    mesh = training.make_mesh(1, devices=jax.devices()[:1])
    tx, step = _compiled(loss_fn, steps, learning_rate)
    start = params if callable(params) else lambda key: params
    state, _ = training.fit(
        training.init_state(start, tx, jax.random.key(seed), mesh),
        step,
        Batches(toy, seed),
        mesh=mesh,
        steps=steps,
        directory=directory,
        title=directory.name,
    )
    return state.params


@functools.lru_cache(maxsize=4)
def _compiled(loss_fn, steps: int, learning_rate: float):
    import optax

    from jaxskip import training

    tx = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    return tx, training.make_train_step(loss_fn, tx)


def base(toy: Toy, directory: pathlib.Path, seed: int = 0):
    """(config, params) of the network trained with every layer; kept in `directory`."""
    import jax.numpy as jnp

    from jaxskip.models import Decoder
    from jaxskip.training import next_token_loss

    config = decoder_config(toy)
    model = Decoder(config)
    return config, train(
        next_token_loss(model),
        lambda key: model.init(key, jnp.zeros((1, 8), jnp.int32))["params"],
        toy,
        directory / f"base-{seed}",
        steps=toy.steps,
        learning_rate=toy.learning_rate,
        seed=seed,
    )


@functools.lru_cache(maxsize=16)
def skipping_loss(config, policy):
    """`loss_fn(params, batch, key)`: mean cross-entropy in nats with `policy` in force at every position."""
    import optax

    from jaxskip.skipping import forward

    def loss_fn(params, batch, key):
        logits, _, _ = forward(config, params, batch["inputs"], policy=policy)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean(), {}

    return loss_fn


def validation_loss(config, params, toy: Toy, policy=None) -> float:
    """Mean cross-entropy in nats over `validation`, with `policy` in force at every position."""
    from jaxskip.skipping import Policy

    return float(_evaluation(config, policy or Policy())(params, validation(toy)))


@functools.lru_cache(maxsize=16)
def _evaluation(config, policy):
    import jax

    loss_fn = skipping_loss(config, policy)
    return jax.jit(lambda params, batch: loss_fn(params, batch, None)[0])
