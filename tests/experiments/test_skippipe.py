import dataclasses

import numpy as np
import pytest

from experiments import cli, skippipe
from experiments.claims import Report

SMOKE = skippipe.PRESETS["smoke"]


@pytest.mark.slow
@pytest.mark.multidevice
def test_the_smallest_run_from_command_line_to_picture(tmp_path):
    flags = ["--preset", "smoke", "--runs", str(tmp_path), "--nodes", "12"]
    cli.run(skippipe.main, skippipe.Config, skippipe.PRESETS, args=flags)
    (folder,) = (tmp_path / "skippipe").iterdir()
    report = Report.load(folder)
    for name in ("makespans", "timeline_full", "timeline_skippipe", "scheduler_cost", "convergence"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert [row[0] for row in report.tables["validation loss"].rows] == [skippipe.FULL, skippipe.SKIP, skippipe.SWAP]
    assert len(report.tables["backends"].rows) == 2
    held = {claim.statement: claim.holds for claim in report.claims}
    sure = [holds for statement, holds in held.items() if "simulator" in statement or "order" in statement]
    sure += [holds for statement, holds in held.items() if "one device" in statement]
    assert len(sure) == 4 and all(sure)
    # A finished training is not done again, nor is it another one.
    config = dataclasses.replace(SMOKE, nodes=(12,))
    again = skippipe.train(config, cli.Run(folder, resume=True, preset="smoke"))
    losses = [list(found["loss"].values())[::-1] for found in again.values()]
    assert losses == [row[1:] for row in report.tables["validation loss"].rows]
    assert all(len(found["rows"]) == SMOKE.steps for found in again.values())


def test_published_schedules_and_plans():
    published = skippipe.run_published()
    planned = skippipe.run_planner(dataclasses.replace(SMOKE, restarts=100))
    scaling = skippipe.scheduler_cost(dataclasses.replace(SMOKE, nodes=(12,)))
    assert [row[:2] for row in scaling] == [[12, "random"], [12, "greedy"], [12, "cbs"]]
    verdicts = [claim.holds for claim in skippipe._schedule_claims(published, planned, scaling)]
    assert verdicts == [True] * 4
    slow = {**planned, "greedy": (33.5, 0.1, None)}
    swapped = {**published, "full": published["random"], "random": published["full"]}
    scaling = [[12, "greedy", 61.0, 30.0]]
    verdicts = [claim.holds for claim in skippipe._schedule_claims(swapped, slow, scaling)]
    assert verdicts == [True, False, False, False]
    off = {**published, "random": (published["random"][1] * 1.021, published["random"][1])}
    assert not skippipe._schedule_claims(off, planned, scaling)[0].holds


def test_gain_claims_can_fail():
    gains = skippipe.iteration_times(dataclasses.replace(SMOKE, restarts=5, nodes=(18,)))
    assert [(g["cluster"], g["nodes"]) for g in gains][:2] == [("12 places", 18), ("uniform", 60)]
    planned = {"full": (100.0,), "greedy": (44.0,)}
    assert [claim.holds for claim in skippipe._gain_claims(planned, gains)] == [True, True]
    as_slow = [{**g, "full": 1.0, "skip": 1.0} for g in gains]
    claims = skippipe._gain_claims({"full": (100.0,), "greedy": (46.0,)}, as_slow)
    assert [claim.holds for claim in claims] == [False, False]
    assert "(ceiling 1.50)" in claims[1].measured


def test_training_claims_can_fail():
    def trained(full, skip):
        return {
            name: {"loss": dict(zip((6, 3), losses, strict=True))}
            for name, losses in ((skippipe.FULL, full), (skippipe.SKIP, skip), (skippipe.SWAP, skip))
        }

    for full, skip, verdicts in (
        ((1.92, 2.56), (2.13, 2.18), [True] * 4),
        ((1.92, 2.20), (2.23, 2.40), [False] * 4),
    ):
        assert [c.holds for c in skippipe._training_claims(SMOKE, trained(full, skip))] == verdicts


def test_backend_claims_can_fail():
    for error, drift, verdicts in ((1e-7, 1e-6, [True, True]), (1e-4, 1e-3, [False, False])):
        backends = {"table": {"a": [8, error, 1.0]}, "losses": np.array([[1.0, 1.0], [1.0, 1.0 + drift]])}
        assert [c.holds for c in skippipe._backend_claims(SMOKE, backends)] == verdicts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 6}, "length=6, stages=6"),
        ({"layers": 7}, "layers=7; paths visit"),
        ({"warmup": 400}, "the warm-up is shorter"),
        ({"eval_sequences": 20}, "eval_sequences=20"),
        ({"nodes": (8,)}, "12 nodes or more"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        skippipe.Config(**change)


def test_the_paper_preset_has_the_papers_size():
    c = skippipe.PRESETS["paper"]
    assert (c.layers, c.embed_dim, c.num_heads, c.context_length) == (24, 1024, 16, 1024)
    assert (c.steps, c.microbatches, c.microbatch_size, c.learning_rate) == (25_000, 30, 8, 3e-4)
