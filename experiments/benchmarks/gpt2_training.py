"""GPT-2 training steps a second: AdamW, Sophia-G and a PyTorch peer, each in a process of its own, in one run.

    python -m experiments.benchmarks.gpt2_training                      # 124M, 64 x 1024, bf16, on one GPU
    python -m experiments.benchmarks.gpt2_training --batch-size 32 --variants adamw peer_torch

Ratios are against the first variant. The floor is the model's arithmetic (6 FLOP a parameter and token, and causal
attention) at the rate of one large matrix product, measured in the same run.
"""

import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, Literal

from experiments import cli
from experiments.claims import Claim, Report, Table

Variant = Literal["adamw", "sophia_g", "peer_torch"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Time and peak memory of one training step."""

    model: Literal["gpt2-tiny", "gpt2-small", "gpt2-medium", "gpt2-large"] = "gpt2-small"
    batch_size: int = 64
    variants: tuple[Variant, ...] = ("adamw", "sophia_g", "peer_torch")
    steps: int = 20
    """Timed steps a repetition; a multiple of 10 holds whole cycles of Sophia."""
    repeats: int = 5
    """Repetitions a process."""
    rounds: int = 2
    """Processes a variant, taken in turns because a GPU's clock drifts."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: Literal["none", "dots", "full"] = "none"
    scan_unroll: int = 1000
    """Layers an iteration of the scan over layers; 1000 removes the loop."""
    loss_rows: int | None = None
    """Row tile of the loss in chunks; None lets the op choose its kernel."""


PRESETS = {
    "smoke": Config(model="gpt2-tiny", batch_size=4, variants=("adamw", "sophia_g"), steps=10, repeats=2, rounds=1),
    "default": Config(),
    "paper": Config(batch_size=32),
}


def main(config: Config, run: cli.Run) -> Report:
    """Measure each variant in a process of its own and compare."""
    measured: dict[str, dict] = {}
    variants = [name for name in config.variants if name != "peer_torch" or importlib.util.find_spec("torch")]
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(config.rounds):
            for name in variants:
                result = _in_a_process(config, name, cache)
                times = [*measured.get(name, {}).get("times", []), *result["times"]]
                summary = {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times), "times": times}
                measured[name] = {**result, **measured.get(name, {}), **summary}
    first = measured[variants[0]]
    rows = [
        [
            name,
            round(m["ms"], 2),
            f"{m['ms_min']:.2f} to {m['ms_max']:.2f}",
            round(m["tokens"] / m["ms"] * 1e3),
            round(m["ms"] / first["ms"], 3),
            m["peak_mb"],
        ]
        for name, m in measured.items()
    ]
    rows.append(["floor: arithmetic alone", round(first["floor_ms"], 2), None, None, None, None])
    header = ["variant", "ms a step", "min to max", "tokens/s", "against the first", "peak MB"]
    return Report(
        claims=_claims(measured),
        tables={"step": Table(header, rows)},
        notes=[
            f"{config.model}, {config.batch_size} sequences a step, {config.dtype}; median of {len(first['times'])} "
            f"repetitions of {config.steps} steps",
            f"one bf16 matrix product of {first['matmul_size']}^3 here: {first['matmul_tflops']:.3g} TFLOP/s",
            *[f"{name}: left out, PyTorch is not installed" for name in config.variants if name not in variants],
            *[f"{name}: first step after {m['first_step_s']:.0f} s" for name, m in measured.items()],
        ],
    )


def _claims(measured: dict[str, dict]) -> list[Claim]:
    claims = []
    adamw, sophia, torch = (measured.get(name) for name in ("adamw", "sophia_g", "peer_torch"))
    if adamw and torch:
        claims.append(
            Claim(
                "a training step is no slower than PyTorch's with torch.compile and flash attention",
                expected="<= 1.0 of its time",
                measured=round(adamw["ms"] / torch["ms"], 3),
                holds=adamw["ms"] <= torch["ms"],
                source="ours",
            )
        )
    if adamw and sophia:
        ratio = sophia["ms"] / adamw["ms"]
        claims.append(
            Claim(
                "Sophia-G with k = 10 costs at most 6 % more time a step than AdamW",
                expected="<= 1.06",
                measured=round(ratio, 3),
                holds=ratio <= 1.06,
                source="arXiv 2305.14342: about 5 % more arithmetic",
            )
        )
        if adamw["peak_mb"] is not None:
            extra = sophia["peak_mb"] - adamw["peak_mb"]
            claims.append(
                Claim(
                    "Sophia-G's peak memory is at most one gradient tree above AdamW's",
                    expected=f"<= {adamw['gradient_mb']} MB more",
                    measured=f"{extra} MB",
                    holds=extra <= adamw["gradient_mb"],
                    source="arXiv 2305.14342: state as Adam's",
                )
            )
    return claims


def _in_a_process(config: Config, name: Variant, cache: str) -> dict[str, Any]:
    code = "import sys; from experiments.benchmarks.gpt2_training import measure; measure(*sys.argv[1:])"
    command = [sys.executable, "-c", code, name, json.dumps(dataclasses.asdict(config))]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise cli.UserError(f"{name} failed with exit code {done.returncode}; its output is above")
    print(f"{name}: {done.stdout.splitlines()[-1]}", flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: Variant, config: str) -> None:
    """Measure one variant in this process and print its figures as a line of JSON."""
    function = {"adamw": _measure_jax, "sophia_g": _measure_jax, "peer_torch": _measure_torch}[name]
    print(json.dumps(function(name, Config(**json.loads(config)))))


def _timings(step: Callable[[int], None], wait: Callable[[], None], config: Config) -> dict[str, Any]:
    """Milliseconds a step in each repetition, and seconds to the first step."""
    begin = time.perf_counter()
    step(0)
    wait()
    first = time.perf_counter() - begin
    for n in range(1, 10):
        step(n)
    wait()
    times = []
    for _ in range(config.repeats):
        begin = time.perf_counter()
        for n in range(config.steps):
            step(n)
        wait()
        times.append(1e3 * (time.perf_counter() - begin) / config.steps)
    return {"times": times, "first_step_s": first}


def jax_step(name: Variant, config: Config) -> tuple[Any, Any, Callable]:
    """(model, optimizer, (state, batch, n) -> (state, metrics)): the training loop's step of the configuration."""
    import jax.numpy as jnp

    from jaxskip import training
    from jaxskip.models import Decoder, decay_mask, decoder_config

    model = Decoder(
        decoder_config(config.model, dtype=jnp.dtype(config.dtype), remat=config.remat, scan_unroll=config.scan_unroll)
    )
    tx = training.make_optimizer(name, 6e-4, weight_decay_mask=decay_mask, weight_decay=0.1)
    blocks = {}
    if config.loss_rows is not None:
        blocks = {"implementation": "chunked", "block_sizes": (config.loss_rows, model.config.vocab_size)}
    step = training.make_train_step(training.next_token_loss(model, **blocks), tx)
    if name == "sophia_g":
        refresh = training.make_hessian_refresh(
            training.gauss_newton_curvature(model, **blocks), rows=config.batch_size // 2
        )
        step = training.with_hessian_refresh(step, refresh, every=10)
    return model, tx, step


def jax_state(model, tx, mesh):
    """A first training state of the model on the mesh."""
    import jax
    import jax.numpy as jnp

    from jaxskip import training
    from jaxskip.models import DECODER_PARTITION_RULES

    def init(key):
        return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    return training.init_state(init, tx, jax.random.key(0), mesh, DECODER_PARTITION_RULES)


def jax_batch(model, rows: int, mesh) -> dict[str, Any]:
    """Random sequences of the model's full length on the mesh; more rows begin with those of fewer."""
    import numpy as np

    from jaxskip import training

    c = model.config
    tokens = np.random.default_rng(0).integers(0, c.vocab_size, (rows, c.context_length + 1)).astype(np.int32)
    return training.shard_batch({"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}, mesh)


def _measure_jax(name: Variant, config: Config) -> dict[str, Any]:
    import jax

    from jaxskip import training

    model, tx, step = jax_step(name, config)
    c = model.config
    mesh = training.make_mesh(devices=jax.devices()[:1])
    batch = jax_batch(model, config.batch_size, mesh)
    state = jax_state(model, tx, mesh)
    carried = [state]

    def one_step(n):
        carried[0], _ = step(carried[0], batch, n)

    with jax.set_mesh(mesh):
        timings = _timings(one_step, lambda: jax.block_until_ready(carried[0]), config)
        stats = mesh.devices.flat[0].memory_stats() or {}
        size = 8192 if mesh.devices.flat[0].platform != "cpu" else 512
        rate = _matmul_rate(size)
    params = sum(leaf.size for leaf in jax.tree.leaves(carried[0].params))
    count = config.batch_size * c.context_length
    flops = count * (6 * params + 6 * c.num_layers * c.embed_dim * c.context_length)
    peak = stats.get("peak_bytes_in_use")
    return {
        **timings,
        "tokens": count,
        "peak_mb": peak and round(peak / 2**20),
        "gradient_mb": round(4 * params / 2**20),
        "matmul_size": size,
        "matmul_tflops": rate / 1e12,
        "floor_ms": 1e3 * flops / rate,
    }


def _matmul_rate(size: int) -> float:
    """FLOP/s of a chain of square bf16 matrix products."""
    import jax
    import jax.numpy as jnp

    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))

    @jax.jit
    def chain(a, b):
        return jax.lax.fori_loop(0, 10, lambda i, x: (x @ b) * jnp.bfloat16(size**-0.5), a)

    jax.block_until_ready(chain(a, b))
    begin = time.perf_counter()
    jax.block_until_ready(chain(a, b))
    return 10 * 2 * size**3 / (time.perf_counter() - begin)


def _measure_torch(name: Variant, config: Config) -> dict[str, Any]:
    """The same model and batch in PyTorch: torch.compile, flash attention, autocast to bf16, fused AdamW."""
    import torch

    from experiments.benchmarks.peers import torch_gpt2
    from jaxskip.models import decoder_config

    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    c = decoder_config(config.model)
    model = torch_gpt2.GPT2(c.vocab_size, c.context_length, c.num_layers, c.num_heads, c.embed_dim).to("cuda")
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=6e-4,
        betas=(0.9, 0.95),
        fused=True,
    )
    compiled = torch.compile(model)
    tokens = torch.randint(0, c.vocab_size, (config.batch_size, c.context_length + 1), device="cuda")
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def one_step(n):
        del n
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    timings = _timings(one_step, torch.cuda.synchronize, config)
    return {
        **timings,
        "tokens": inputs.numel(),
        "peak_mb": round(torch.cuda.max_memory_allocated() / 2**20),
    }


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
