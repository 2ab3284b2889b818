"""What only real processes can show: a kill, and two hosts."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
EXPERIMENT = [sys.executable, "-m", "experiments.sophia_gpt2"]
FLAGS = ["--preset", "smoke", "--steps", "60", "--save-every", "8", "--eval-every", "30"]


def environment(devices=1):
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return os.environ | cache | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}


def experiment(*flags):
    return subprocess.run([*EXPERIMENT, *flags], capture_output=True, text=True, cwd=ROOT, env=environment())


def rows(directory, optimizer):
    path = directory / optimizer / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_kill_at_a_random_step_then_resume_gives_the_uninterrupted_losses_bit_for_bit(tmp_path):
    optimizers = ["--optimizers", "adamw", "sophia_g"]
    whole = experiment(*FLAGS, *optimizers, "--run-dir", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    killed_at = random.Random(time.time_ns()).randint(2, 58)
    optimizer = random.Random(time.time_ns()).choice(["adamw", "sophia_g"])
    killed = tmp_path / "runs" / "sophia_gpt2"
    process = subprocess.Popen(
        [*EXPERIMENT, *FLAGS, *optimizers, "--runs", str(tmp_path / "runs")],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while True:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        directory = next(iter(killed.glob("*")), None)
        if directory and len(rows_if_whole(directory, optimizer)) >= killed_at:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    assert process.wait() == -signal.SIGKILL
    assert not (directory / "report.json").exists()
    resumed = experiment("--resume", "--runs", str(tmp_path / "runs"))
    assert resumed.returncode == 0, resumed.stderr
    for name in ("adamw", "sophia_g"):
        expected = [(row["step"], row["loss"], row.get("val_loss")) for row in rows(tmp_path / "whole", name)]
        got = [(row["step"], row["loss"], row.get("val_loss")) for row in rows(directory, name)]
        assert got == expected and len(got) == 60, f"killed {optimizer} at {killed_at}"


def rows_if_whole(directory, optimizer):
    try:
        return rows(directory, optimizer)
    except json.JSONDecodeError:  # read while a line was being written
        return []


WORKER = """
import json, sys
import jax
process, count, port = (int(x) for x in sys.argv[1:4])
if count > 1:
    jax.distributed.initialize(f"localhost:{port}", count, process)
import jax.numpy as jnp, numpy as np
from jaxskip import training
from jaxskip.data import TokenWindows
from jaxskip.models import DECODER_PARTITION_RULES, Decoder, decoder_config

model = Decoder(decoder_config("gpt2-tiny", embed_dim=32, context_length=16, dtype=jnp.float32))
mesh = training.make_mesh(4, 2, 1)
tx = training.make_optimizer("sophia_g", 1e-3)
step = training.make_train_step(training.next_token_loss(model), tx)
refresh = training.make_hessian_refresh(training.gauss_newton_curvature(model), rows=8)
step = training.with_hessian_refresh(step, refresh, every=2)
tokens = np.random.default_rng(0).integers(0, 64, 5000).astype(np.uint8)
for steps in (3, 6):  # the second call resumes from the checkpoint that all processes wrote together
    state = training.init_state(lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"], tx,
                                jax.random.key(0), mesh, DECODER_PARTITION_RULES)
    batches = TokenWindows(tokens, batch_size=16, context_length=16, vocab_size=256,
                           process_index=jax.process_index(), process_count=jax.process_count())
    _, rows = training.fit(state, step, batches, mesh=mesh, steps=steps, directory=sys.argv[4])
print(json.dumps(rows))
"""


@pytest.mark.slow
@pytest.mark.multidevice
def test_two_processes_of_four_devices_give_the_losses_of_one_process_of_eight(tmp_path):
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        port = sock.getsockname()[1]

    def launch(name, process, count):
        return subprocess.Popen(
            [sys.executable, "-c", WORKER, str(process), str(count), str(port), str(tmp_path / name)],
            cwd=ROOT,
            env=environment(8 // count),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(process):
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        return json.loads(out.splitlines()[-1])

    (one,) = [finish(launch("one", 0, 1))]
    two = [finish(process) for process in [launch("two", 0, 2), launch("two", 1, 2)]]
    assert [row["step"] for row in one] == list(range(1, 7)) and one[-1]["loss"] < one[0]["loss"]
    for losses in two:
        # Sums over devices in another order: float32 rounding.
        assert [row["loss"] for row in losses] == pytest.approx([row["loss"] for row in one], rel=1e-5)
