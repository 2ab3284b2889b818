"""The measuring process of `experiments.benchmarks.skip_attention`."""

import functools
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.measuring import Program, emit, in_turns, jax_copy_rate
from pallas_kernels.skip_attention import SkipSpec, attention, decode_attention

BLOCK = 128


def measure(task: str) -> None:
    """Measure the rows of a task, an event a line."""
    asked = json.loads(task)
    emit(framework="jax", device=jax.devices()[0].device_kind, **jax_copy_rate(asked["copy_mb"]))
    if asked["decode"]:
        programs, facts = _decoding(asked)
        in_turns(asked, "decode", programs, jax.block_until_ready, facts, turns=1)
    programs, facts = _sequences(asked)
    in_turns(asked, "sequences", programs, jax.block_until_ready, facts, turns=asked["turns"])


def kept_blocks(heads: int, blocks: int, skipped: float, causal: bool = True, seed: int = 0) -> np.ndarray:
    """Bool [heads, blocks, blocks]: of the triangle (or square), all but the share ``skipped``; the diagonal stays."""
    rng = np.random.default_rng(seed)
    mask = np.tile(
        np.tril(np.ones((blocks, blocks), bool)) if causal else np.ones((blocks, blocks), bool), (heads, 1, 1)
    )
    free = mask[0] & ~np.eye(blocks, dtype=bool)
    count = round(skipped * mask[0].sum())
    for head in range(heads):
        mask[head][tuple(rng.permutation(np.argwhere(free))[:count].T)] = False
    return mask


def _sequences(asked: dict):
    batch, length, heads, width = asked["sequences"]
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (jax.random.normal(key, (batch, length, heads, width), asked["dtype"]) for key in keys)
    sizes = [q.nbytes, q.nbytes * 2]  # outputs of the forward pass, gradients of keys and values beside

    def dense(causal):
        mask = jnp.ones((1, 1), bool)
        return lambda q, k, v, _: attention(q, k, v, is_causal=causal), mask

    def masked(share, causal):
        mask = kept_blocks(heads, -(-length // BLOCK), share, causal)

        def f(q, k, v, mask):
            return attention(q, k, v, skip=SkipSpec.from_block_mask(mask, BLOCK, BLOCK), is_causal=causal)

        return f, jnp.asarray(mask)

    def peer(row, causal):
        if row == "cudnn":
            f = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        elif row == "xla":
            f = functools.partial(jax.nn.dot_product_attention, implementation="xla")
        else:
            f = importlib.import_module("tokamax").dot_product_attention
        return lambda q, k, v, _: f(q, k, v, is_causal=causal), jnp.ones((1, 1), bool)

    @functools.cache
    def compiled(row, masking, causal, backward):
        """A mask is an argument: one program for all shares."""
        f = (masked(0.5, causal) if masking else dense(causal) if row == "ours" else peer(row, causal))[0]
        if backward:
            run = lambda q, k, v, m, g: jax.vjp(lambda *x: f(*x, m), q, k, v)[1](g)  # noqa: E731
        else:
            run = lambda q, k, v, m, g: f(q, k, v, m)  # noqa: E731
        shape = (heads, -(-length // BLOCK), -(-length // BLOCK)) if masking else (1, 1)
        made = jax.jit(run).lower(q, k, v, jax.ShapeDtypeStruct(shape, bool), g).compile()
        return made, made.memory_analysis().temp_size_in_bytes / 2**20

    def build(row, share, causal, backward):
        made, temporary = compiled(row, share > 0, causal, backward)
        mask = (masked(share, causal) if share else dense(causal))[1]
        return functools.partial(made, q, k, v, mask, g), temporary

    programs, described = [], {}
    for causal in (True, False):
        for backward in (False, True):
            for row in asked["names"]:
                for share in (0.0, *asked["skipped"]) if row == "ours" else (0.0,):
                    if not causal and (row != "ours" or backward or share not in (0.0, 0.75)):
                        continue
                    kind = _kind(causal, share, backward)
                    described[row, kind] = causal, share, backward
                    programs.append(Program(row, kind, functools.partial(build, row, share, causal, backward)))

    def facts(program, out):
        causal, share, backward = described[program.row, program.kind]
        kept = (1 - share) * 4 * batch * heads * width * length**2 / (2 if causal else 1)
        error = (
            None if backward else _error(q, k, v, out, kept_blocks(heads, -(-length // BLOCK), share, causal), causal)
        )
        return {"flops": kept * (3.5 if backward else 1), "share": share, "error": error, "output_mb": sizes[0] / 2**20}

    return programs, facts


def _kind(causal: bool, share: float, backward: bool) -> str:
    return ", ".join(
        [
            "causal" if causal else "not causal",
            *([f"{share:.0%} of the blocks skipped"] if share else []),
            "forward + backward" if backward else "forward",
        ]
    )


def _error(q, k, v, out, mask, causal, rows=32) -> float:
    """Largest difference from float32 arithmetic in some rows of the first sequence."""
    length = q.shape[1]
    some = np.sort(np.random.default_rng(1).permutation(length)[:rows])
    seen = np.repeat(mask[:, some // BLOCK], BLOCK, axis=2)[:, :, :length]
    if causal:
        seen &= np.arange(length) <= some[:, None]
    q, k, v, out = (x[0].astype(jnp.float32) for x in (q[:1, some], k[:1], v[:1], out[:1, some]))
    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("thd,shd->hts", q, k) * q.shape[-1] ** -0.5
        want = jnp.einsum("hts,shd->thd", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1), v)
    return float(jnp.abs(out - want).max())


def _decoding(asked: dict):
    batch, slots, groups, heads, width = asked["decode"]
    keys = jax.random.split(jax.random.key(1), 3)
    query = jax.random.normal(keys[0], (batch, heads, width), asked["dtype"])
    cache = [jax.random.normal(key, (batch, slots, groups, width), asked["dtype"]) for key in keys[1:]]

    @functools.cache
    def compiled(row):
        implementation = None if row == "ours" else "xla"

        def f(query, keys, values, active):
            lengths = jnp.full(batch, slots)
            return decode_attention(query, keys, values, lengths=lengths, active=active, implementation=implementation)

        made = jax.jit(f).lower(query, *cache, jax.ShapeDtypeStruct((batch,), bool)).compile()
        return made, made.memory_analysis().temp_size_in_bytes / 2**20

    def build(row, share):
        made, temporary = compiled(row)
        # Spread, so that neighbours in the grid differ.
        active = (np.arange(batch) * share) % 1 + share >= 1
        return functools.partial(made, query, *cache, jnp.asarray(active)), temporary

    programs = [
        Program(row, f"{share:.0%} of the sequences", functools.partial(build, row, share))
        for row in asked["names"]
        if row in ("ours", "xla")
        for share in asked["active"]
    ]

    def facts(program, _):
        share = float(program.kind.split("%")[0]) / 100
        return {"share": share, "read_mb": share * sum(x.nbytes for x in cache) / 2**20}

    return programs, facts
