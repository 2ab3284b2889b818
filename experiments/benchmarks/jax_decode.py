"""The measuring process of `experiments.benchmarks.decode`: decoding loops of `jaxskip.skipping` on random weights."""

import dataclasses
import functools
import importlib
import json

import jax
import jax.numpy as jnp

from experiments.benchmarks.measuring import Program, emit, in_turns, jax_copy_rate
from jaxskip import skipping
from jaxskip.models import Decoder, DecoderConfig, fuse_projections
from jaxskip.skipping import cache as caches

_programs = importlib.import_module("jaxskip.skipping.generate")
_LLAMA = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "context_length": 4096}
SHAPES = {
    "llama-1b": DecoderConfig(
        vocab_size=128_256, num_layers=16, num_heads=32, num_kv_heads=8, embed_dim=2048, mlp_dim=8192, **_LLAMA
    ),
    "smollm2-135m": DecoderConfig(
        vocab_size=49_152, num_layers=30, num_heads=9, num_kv_heads=3, embed_dim=576, mlp_dim=1536, **_LLAMA
    ),
    "tiny": DecoderConfig(
        vocab_size=256, num_layers=4, num_heads=4, num_kv_heads=2, embed_dim=64, mlp_dim=128, **_LLAMA
    ),
}
# Row -> (how weights lie, what is skipped).
ROWS = {
    "stacked": ("stacked", "nothing"),
    "stacked, fused": ("fused", "nothing"),
    "unrolled": ("unrolled", "nothing"),
    "unrolled, fused": ("unrolled fused", "nothing"),
    "half of the layers": ("unrolled fused", "layers"),
    "feed-forward blocks, each token": ("unrolled fused", "feed-forward"),
    "feed-forward blocks, each token, stacked": ("fused", "feed-forward"),
}


def measure(task: str) -> None:
    """Measure the rows of a task, an event a line."""
    asked = json.loads(task)
    emit(framework="jax", device=jax.devices()[0].device_kind, **jax_copy_rate(asked["copy_mb"]))
    for name in asked["shapes"]:
        config, weights = _network(name, asked["dtype"])
        in_turns(
            asked,
            name,
            [
                Program(row, f"batch {batch}", functools.partial(_build, asked, config, weights, row, batch))
                for batch in asked["batches"]
                for row in asked["names"]
            ],
            jax.block_until_ready,
            functools.partial(_facts, asked, config, weights),
        )


def _network(name: str, dtype: str):
    """(config, how weights lie -> parameters); the forms share no memory, so unused ones are not made."""
    config = dataclasses.replace(SHAPES[name], dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    params = jax.jit(Decoder(config).init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]

    @functools.cache
    def weights(form: str):
        found = fuse_projections(params, config) if "fused" in form else (params, config)
        return (skipping.unstack_layers(found[0]) if "unrolled" in form else found[0]), found[1]

    return config, weights


def _policy(row: str, num_layers: int) -> skipping.Policy:
    skipped = ROWS[row][1]
    if skipped == "layers":
        return skipping.Policy(keep_layers=tuple(range(0, num_layers, 2)))
    if skipped == "feed-forward":
        # The first block runs and starts a window that takes all others, as a test on data decides.
        return skipping.FFNSkip(tau=-1.0, cold_start=0, cold_end=0, warm_up=0, window=num_layers)
    return skipping.Policy()


def _build(asked: dict, config, weights, row: str, batch: int):
    params, config = weights(ROWS[row][0])
    policy, chunk, prompt = _policy(row, config.num_layers), asked["tokens"], asked["prompt"]
    stacked = not isinstance(params["layers"], tuple)
    layout = policy.layout(config.num_layers)
    cache = caches.empty_cache(config, layout, batch, prompt, chunk, stacked)
    # Any history will do for time, but zeros are quicker than numbers.
    cache = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape, x.dtype), cache)
    lengths, token = jnp.full(batch, prompt, jnp.int32), jnp.arange(batch, dtype=jnp.int32) % 7
    held = [
        _programs.Loop(
            cache, (), token, jnp.zeros(batch, bool), jnp.zeros((config.num_layers, 2), jnp.int32), jnp.int32(0)
        )
    ]
    arguments = (
        lengths, jnp.int32(prompt), jnp.int32(1), jnp.int32(10**9), jnp.full(1, -1, jnp.int32), jax.random.key(0)
    )  # fmt: skip
    statics = (config, policy, skipping.Sampling(), chunk)
    lowered = _programs._decode_chunk.lower(*statics, params, None, held[0], *arguments)
    compiled = lowered.compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20

    def call():
        held[0], new = compiled(params, None, held[0], *arguments)
        return held[0].ran, new

    return call, temporary


def _facts(asked: dict, config, weights, program: Program, out) -> dict:
    params, config = weights(ROWS[program.row][0])
    ran = jax.device_get(out[0])
    policy, batch = _policy(program.row, config.num_layers), int(program.kind.removeprefix("batch "))
    layout = policy.layout(config.num_layers)
    slots = layout.slots(asked["prompt"], asked["tokens"])
    sizes = skipping.block_bytes(params, config)
    read = skipping.decode_bytes(sizes, config, ran, asked["tokens"], batch, layout, slots) / asked["tokens"]
    return {"tokens": asked["tokens"], "read_mb": read / 2**20, "skips": ROWS[program.row][1]}
