import dataclasses
import json
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli
from experiments import coordinate_clipping as experiment
from experiments.claims import Report

SMOKE = experiment.PRESETS["smoke"]


@pytest.mark.slow
def test_the_smallest_run_from_command_line_to_picture(tmp_path):
    flags = ["--preset", "smoke", "--runs", str(tmp_path)]
    cli.run(experiment.main, experiment.Config, experiment.PRESETS, args=flags)
    (folder,) = (tmp_path / "coordinate_clipping").iterdir()
    report = Report.load(folder)
    assert set(report.tables) == {"sharpness along adam's trajectory", "sharpness along sgd's trajectory", "training"}
    for trainer in ("adam", "sgd"):
        rows = report.tables[f"sharpness along {trainer}'s trajectory"].rows
        assert [row[1] for row in rows] == list(SMOKE.directions)
        assert abs(rows[0][3]) == 1 and np.all(np.isfinite([row[2:] for row in rows]))
    assert len(report.claims) == 6
    assert (folder / "sharpness.png").read_bytes().startswith(b"\x89PNG")
    assert len((folder / "training.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", get_args(experiment.Rule))
def test_every_rule_goes_downhill_from_zero(name):
    """The first update of each is against the gradient, and its size goes with the learning rate."""
    params = {"w": jnp.full((3, 2), 0.5)}
    grads = {"w": jnp.array([[1.0, -2.0], [3.0, -4.0], [5.0, 0.5]])}
    tx = experiment.make_rule(name, 0.5)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert np.all(np.sign(updates["w"]) == -np.sign(grads["w"]))
    once = experiment.make_rule(name, 1.0)
    np.testing.assert_allclose(2 * updates["w"], once.update(grads, once.init(params), params)[0]["w"], rtol=1e-6)


def test_the_clipped_rules_differ_from_the_plain_ones():
    params = {"w": jnp.full(20, 0.5)}
    grads = {"w": jnp.linspace(0.1, 2.0, 20)}
    first = {}
    for name in get_args(experiment.Rule):
        tx = experiment.make_rule(name, 1.0)
        _, state = tx.update(grads, tx.init(params), params)
        first[name] = np.asarray(tx.update({"w": grads["w"][::-1]}, state, params)[0]["w"])
    for clip, plain in (
        ("sgd_clip", "sgd"),
        ("normalized_sgd_clip", "normalized_sgd"),
        ("adam_clip", "adam"),
        ("adam_clip_update", "adam"),
        ("adafactor_clip", "adafactor"),
        ("lion_clip_update", "lion"),
    ):
        assert not np.allclose(first[clip], first[plain], rtol=1e-3), clip


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    done = []

    def work(job):
        done.append(job)
        if len(done) == 2:
            raise KeyboardInterrupt
        return {"value": job[0]}

    path, jobs = tmp_path / "rows.jsonl", [(1,), (2,), (3,)]
    with pytest.raises(KeyboardInterrupt):
        experiment._resumed(path, jobs, work)
    rows = experiment._resumed(path, jobs, work)
    assert done == [(1,), (2,), (2,), (3,)]
    assert rows == [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["value"] for row in rows] == [1, 2, 3]


def probed(sgd, sgd_clip, adam, adam_clip, drop=0.1, clip_drop=0.2):
    rules = {
        name: {"sharpness": value, "cos": 0.1, "best_drop": clip_drop if name == "sgd_clip" else drop, "best_step": 1.0}
        for name, value in {"sgd": sgd, "sgd_clip": sgd_clip, "adam": adam, "adam_clip": adam_clip}.items()
    }
    return [{"job": [trainer, 0], "probes": [{"step": 20, "rules": rules}]} for trainer in ("adam", "sgd")]


@pytest.mark.parametrize(
    ("arguments", "verdicts"),
    [
        ({"sgd": 2.0, "sgd_clip": 1.0, "adam": 0.5, "adam_clip": -0.1}, [True] * 5),
        ({"sgd": -2.0, "sgd_clip": 1.5, "adam": 1.2, "adam_clip": 1.3, "clip_drop": 0.0}, [False] * 5),
    ],
)
def test_sharpness_claims_can_fail(arguments, verdicts):
    assert [claim.holds for claim in experiment._sharpness_claims(probed(**arguments))] == verdicts


def test_training_claims_compare_best_rates_on_every_seed():
    config = dataclasses.replace(SMOKE, train_steps=6)
    losses = {("sgd", 0.1): [3.0, 3.0], ("sgd", 1.0): [2.0, float("nan")], ("sgd_clip", 1.0): [2.5, 3.5]}
    rows = [
        {"job": [name, rate, seed], "losses": [9.0] * 5 + [value]}
        for (name, rate), values in losses.items()
        for seed, value in enumerate(values)
    ]
    best = experiment._best_rates(config, rows)
    assert best["sgd"]["rate"] == 0.1
    (claim,) = experiment._training_claims(best)
    assert not claim.holds and claim.measured.startswith("2.500 against 3.000; 3.500 against 3.000")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"directions": ("sgd", "adam")}, r"leaves out \['adam_clip', 'sgd_clip'\]"),
        ({"probes": ()}, "probes is"),
        ({"seeds": 0}, "seeds is 0; it must be at least 1"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMOKE, **changes)


def test_what_a_user_can_put_right_is_said_at_once(tmp_path):
    with pytest.raises(cli.UserError, match="nowhere"):
        experiment.main(dataclasses.replace(SMOKE, data=str(tmp_path / "nowhere")), cli.Run(tmp_path, False, "smoke"))


def test_the_paper_preset_has_the_papers_rules():
    """The ten of the official convergence list, all twelve of its landscape list, batches of 32 sequences."""
    c = experiment.PRESETS["paper"]
    assert dict(c.trained) == {
        "sgd": 1e-3,
        "sgd_clip": 5e-3,
        "adam": 2e-3,
        "adam_clip": 3e-3,
        "adafactor": 1e-2,
        "adafactor_clip": 3e-2,
        "lion": 2e-3,
        "sign_sgd": 2e-3,
        "normalized_sgd": 5e-4,
        "normalized_sgd_clip": 6e-4,
    }
    assert (c.batch_size, c.sgd_learning_rate, len(c.directions)) == (32, 2e-4, 12)
