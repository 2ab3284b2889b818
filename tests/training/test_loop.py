import itertools
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxskip import training
from jaxskip.data import TokenWindows

TOKENS = np.random.default_rng(0).integers(0, 64, 2000).astype(np.uint8)
MESH = training.make_mesh(devices=jax.devices()[:1])
TX = optax.adam(0.05)


def loss_fn(params, batch, key):
    """A bigram table with dropout, so that losses depend on parameters, data and key."""
    kept = params["w"] * jax.random.bernoulli(key, 0.9, params["w"].shape)
    logits = kept[batch["inputs"]]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean(), {}


STEP = training.make_train_step(loss_fn, TX)


def fit(directory, steps, step_fn=STEP, **options):
    state = training.init_state(lambda key: {"w": jnp.zeros((64, 64))}, TX, jax.random.key(0), MESH)
    batches = TokenWindows(TOKENS, batch_size=4, context_length=16, vocab_size=64)
    return training.fit(state, step_fn, batches, mesh=MESH, steps=steps, directory=directory, **options)


def losses(rows):
    return [(row["step"], row["loss"]) for row in rows]


def test_a_run_continued_from_its_checkpoint_is_the_uninterrupted_one(tmp_path):
    state, rows = fit(tmp_path / "whole", 12)
    fit(tmp_path / "parts", 5)
    continued, continued_rows = fit(tmp_path / "parts", 12)
    assert losses(continued_rows) == losses(rows)
    np.testing.assert_array_equal(continued.params["w"], state.params["w"])
    assert [row["step"] for row in rows] == list(range(1, 13)) and rows[-1]["loss"] < rows[0]["loss"]


def test_evaluation_is_logged_when_due_and_after_the_last_step(tmp_path):
    seen = []

    def evaluate(params):
        seen.append(float(params["w"].sum()))
        return {"val_loss": 1.5}

    _, rows = fit(tmp_path, 7, evaluate=evaluate, eval_every=3, tokens_per_step=64)
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 6, 7] and len(seen) == 3
    assert all(b["seconds"] > a["seconds"] for a, b in itertools.pairwise(rows))
    assert rows[-2]["tokens_per_second"] > 0


def test_finishing_twice_does_nothing(tmp_path):
    _, rows = fit(tmp_path, 4)
    _, again = fit(tmp_path, 4, step_fn=None)
    assert losses(again) == losses(rows)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_run_goes_on_unchanged(tmp_path, number):
    assert threading.current_thread() is threading.main_thread()

    def interrupted(state, batch, n):
        if n == 4:
            os.kill(os.getpid(), number)
        return STEP(state, batch)

    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match="step 5"):
        fit(tmp_path / "stopped", 9, interrupted)
    assert signal.getsignal(number) is handler
    _, rows = fit(tmp_path / "stopped", 9)
    _, whole = fit(tmp_path / "whole", 9)
    assert losses(rows) == losses(whole)


def test_steps_that_stay_non_finite_end_the_run(tmp_path):
    def broken(state, batch, n):
        state, metrics = STEP(state, batch)
        return state, metrics | {"loss": metrics["loss"] * jnp.nan, "skipped": jnp.ones(())}

    with pytest.raises(FloatingPointError, match="10th in a row"):
        fit(tmp_path, 30, broken)


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    fit(tmp_path, 2)
    state = training.init_state(lambda key: {"w": jnp.zeros((64, 64))}, TX, jax.random.key(0), MESH)
    batches = TokenWindows(TOKENS[:1000], batch_size=4, context_length=16, vocab_size=64)
    with pytest.raises(ValueError, match="num_tokens"):
        training.fit(state, STEP, batches, mesh=MESH, steps=4, directory=tmp_path)
