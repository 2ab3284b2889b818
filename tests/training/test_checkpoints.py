import logging
import pathlib
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxskip.optim import sophia
from jaxskip.training import CheckpointError, Checkpoints, TrainState, make_mesh

TX = optax.chain(optax.clip_by_global_norm(1.0), sophia(1e-3))


def state(mesh=None, value=1.0, dtype=jnp.float32):
    params = {"layers": {"w": jnp.full((8, 64), value, dtype)}, "b": jnp.arange(4.0)}
    made = TrainState(jnp.int32(3), params, TX.init(params), jax.random.key(5))
    sharding = lambda x: P("fsdp") if x.ndim == 2 else P()  # noqa: E731
    if mesh is None:
        return made
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, sharding(x))), made)


def assert_equal(a, b):
    def same(x, y):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)

    jax.tree.map(same, a, b)


@pytest.mark.multidevice
def test_a_state_comes_back_exactly_on_another_mesh(tmp_path):
    saved, wanted = state(make_mesh(1, 8, 1)), state(make_mesh(2, 4, 1), value=0.0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, saved, {"data": {"next_batch": 3}})
    with Checkpoints(tmp_path) as checkpoints:
        step, restored, extra = checkpoints.restore(wanted)
    assert step == 3 and extra == {"data": {"next_batch": 3}}
    assert_equal(restored, saved)
    assert restored.params["layers"]["w"].sharding == wanted.params["layers"]["w"].sharding
    assert restored.params["layers"]["w"].addressable_shards[0].data.shape == (2, 64)


def test_a_donated_state_may_be_changed_at_once_and_old_steps_are_removed(tmp_path):
    change = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        current = {"w": jnp.zeros(1000)}
        for step in range(4):
            checkpoints.save(step, current, {})
            current = change(current)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]
        _, restored, _ = checkpoints.restore(current)
    assert (restored["w"] == 3).all()


def test_no_checkpoint_is_none(tmp_path):
    with Checkpoints(tmp_path / "new" / "folder") as checkpoints:
        assert checkpoints.restore(state()) is None


# Orbax leaves half-finished coroutines behind when files are damaged.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_message(tmp_path, caplog, damage):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(value=1.0), {"n": 1})
        checkpoints.save(2, state(value=2.0), {"n": 2})
    largest = max((p for p in (tmp_path / "2").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    targets = [largest, *(tmp_path / "2").rglob("manifest.ocdbt")]
    for path in targets:
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "truncated" else 0])
    with Checkpoints(tmp_path) as checkpoints, caplog.at_level(logging.WARNING):
        step, restored, extra = checkpoints.restore(state(value=0.0))
        assert (step, extra) == (1, {"n": 1})
        assert_equal(restored, state(value=1.0))
    assert "step 2" in caplog.text and "trying the one before" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_only_damaged_checkpoints_raise_instead_of_starting_over(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(), {})
    for path in (tmp_path / "1").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="step 1"):
        checkpoints.restore(state())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: state(dtype=jnp.bfloat16), r"float32\[8, 64\], wanted bfloat16\[8, 64\]"),
        (lambda: state()._replace(params={"b": jnp.zeros(4)}), "wanted not at all"),
        (lambda: state()._replace(opt_state=optax.adam(1.0).init(state().params)), "arrays differ"),
    ],
    ids=["dtype", "missing parameter", "other optimizer"],
)
def test_another_models_checkpoint_is_refused_by_name(tmp_path, other, message):
    """Orbax alone would cast the dtype without a word."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(), {})
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(other())


def test_folders_that_cannot_be_written_are_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write checkpoints"):
        Checkpoints(tmp_path / "file" / "below")


def test_too_little_room_is_said_before_training(tmp_path, monkeypatch):
    free = 10_000
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": free}))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.check_room({"w": jnp.zeros(1000), "key": jax.random.key(0)})
        with pytest.raises(CheckpointError, match="two checkpoints need"):
            checkpoints.check_room({"w": jnp.zeros(10_000)})


@pytest.mark.slow
def test_a_disk_that_fills_up_raises_and_keeps_what_was_saved(tmp_path):
    """A limit on the size of files stands in for a full disk: the writes really fail."""
    program = f"""
import signal, resource, jax.numpy as jnp, jax
from jaxskip.training import Checkpoints, CheckpointError
noise = jax.random.normal(jax.random.key(0), (100_000,))
checkpoints = Checkpoints({str(tmp_path)!r})
checkpoints.save(1, {{"w": noise}}, {{}})
checkpoints.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    checkpoints.save(2, {{"w": noise}}, {{}})
    checkpoints.wait()
except CheckpointError as error:
    print("raised", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
again = Checkpoints({str(tmp_path)!r})
step, restored, _ = again.restore({{"w": noise}})
print("restored", step, bool((restored["w"] == noise).all()))
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert "raised" in done.stdout and "could not be written" in done.stdout, done.stderr
    assert "restored 1 True" in done.stdout, done.stderr
