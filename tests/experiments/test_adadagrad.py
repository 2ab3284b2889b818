import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import adadagrad, cli
from experiments.claims import Report

DIGIT_LIKE = np.random.default_rng(0)
LABELS = DIGIT_LIKE.integers(0, 10, 400).astype(np.int32)
PICTURES = (np.eye(10)[LABELS] @ DIGIT_LIKE.normal(size=(10, 64)) + DIGIT_LIKE.normal(size=(400, 64))).astype(
    np.float32
)
DATA = (PICTURES[:300].reshape(-1, 8, 8, 1), LABELS[:300], PICTURES[300:].reshape(-1, 8, 8, 1), LABELS[300:])


def test_the_smallest_run_from_command_line_to_picture(tmp_path):
    pytest.importorskip("sklearn")
    args = ["--preset", "smoke", "--runs", str(tmp_path)]
    cli.run(adadagrad.main, adadagrad.Config, adadagrad.PRESETS, args=args)
    (folder,) = (tmp_path / "adadagrad").iterdir()
    report = Report.load(folder)
    assert [row[0] for row in report.tables["schedules"].rows] == ["constant 8", "constant 64", "norm test, eta 1"]
    assert (folder / "adadagrad.png").read_bytes().startswith(b"\x89PNG")
    assert len(report.claims) == report.held == 2


@pytest.mark.slow
def test_every_schedule_on_planted_clusters(tmp_path, monkeypatch):
    """All tests of the default preset, in little: same samples, sizes that grow, programs counted and bounded."""
    monkeypatch.setattr(adadagrad, "load", lambda source: DATA)
    config = dataclasses.replace(
        adadagrad.PRESETS["default"], samples=2000, constant=(8, 64), b_max=256, etas=(1.0, 0.1), seeds=1
    )
    report = adadagrad.main(config, cli.Run(tmp_path, False, "default"))
    rows = {row[0]: row[1:] for row in report.tables["schedules"].rows}
    steps = {name: row[0] for name, row in rows.items()}
    assert steps["constant 8"] == 250 and steps["constant 64"] == 32
    assert (
        steps["norm test, eta 0.1"] <= steps["norm test, eta 0.1, growth at most 2"] < steps["norm test, eta 1"] < 250
    )
    assert all(row[-1] <= 6 for row in rows.values())
    assert rows["norm test, eta 1"][-1] == 1
    assert all(row[2] > 0.9 for row in rows.values())
    # Trap 2: with every coordinate the second batch is the largest there is.
    assert rows["every coordinate, eta 0.5"][4] == 256
    assert all(claim.holds for claim in report.claims)


def test_the_resnet_is_the_one_with_eleven_million_parameters():
    model = adadagrad.make_model(adadagrad.PRESETS["paper"], 10)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 11_173_962


def test_the_learning_rate_follows_samples():
    schedule = adadagrad._learning_rate(adadagrad.PRESETS["paper"])
    got = [float(schedule(n)) for n in (0, 1_000_000, 9_000_000, 10_000_000)]
    np.testing.assert_allclose(got, [0, 0.05, 0.005, 0.005], rtol=1e-5)


@pytest.mark.parametrize("size", [8, 64, 1024, 32_768, 50_000, 7])
def test_chunks_divide_the_batch(size):
    chunk = adadagrad._chunk(size, 2)
    assert size % chunk == 0 and chunk <= 256 and size // chunk >= 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b_max": 2048}, "a batch of 2048 exceeds the 300"),
        ({"data": "mnist"}, "must be 'digits' or 'tfds:NAME'"),
        ({"b0": 7}, "multiples of micro=2"),
        ({"etas": (0.0,)}, "eta=0.0"),
        ({"max_growth": 1.0}, "max_growth=1.0"),
    ],
)
def test_what_a_user_can_put_right_is_said_at_once(tmp_path, monkeypatch, changes, message):
    if "data" not in changes:
        monkeypatch.setattr(adadagrad, "load", lambda source: DATA)
    config = dataclasses.replace(adadagrad.PRESETS["smoke"], **{"b_max": 256, **changes})
    with pytest.raises(cli.UserError, match=message):
        adadagrad.main(config, cli.Run(tmp_path, False, "smoke"))


def test_the_paper_preset_is_the_authors_cifar_row():
    c = adadagrad.PRESETS["paper"]
    assert (c.model, c.data, c.samples, c.b0, c.b_max, c.etas) == (
        "resnet18",
        "tfds:cifar10",
        10_000_000,
        32,
        50_000,
        (0.5,),
    )
    assert (c.learning_rate, c.final_learning_rate, c.weight_decay, c.interval) == (0.05, 0.005, 5e-4, 1)
    assert c.max_growth == math.inf and c.initial_accumulator == 0
