import dataclasses

import numpy as np
import pytest

from experiments import cli, first_router
from experiments.claims import Report

SMOKE = first_router.PRESETS["smoke"]


@pytest.mark.slow
def test_the_smallest_run_from_command_line_to_picture(tmp_path):
    flags = ["--preset", "smoke", "--runs", str(tmp_path), "--lora-steps", "2", "--target-keep", "0.7"]
    cli.run(first_router.main, first_router.Config, first_router.PRESETS, args=flags)
    (folder,) = (tmp_path / "first_router").iterdir()
    report = Report.load(folder)
    rows = report.tables["routers"].rows
    assert [row[:3] for row in rows[:2]] == [["straight-through", 0.01, 0], ["straight-through", 0.04, 0]]
    assert rows[2][0] == "aimed at 2.1 layers"
    # Three steps at this rate leave every router open: the whole network's loss, in every column.
    assert all(row[3] == 3 and row[4] == row[5] for row in rows)
    assert [row[0] for row in report.tables["adapters"].rows] == ["FiRST", "no skipping", "random sets", "even set"]
    (gradient,) = [claim for claim in report.claims if "cancels" in claim.statement]
    assert gradient.holds
    assert (folder / "routers.png").read_bytes().startswith(b"\x89PNG")


def trained(penalty, seed, kept, loss, first=1.0):
    """Routers of 4 layers that keep `kept` of them on average over 100 rows."""
    g = np.zeros((4, 100), bool)
    g[0] = np.arange(100) < round(100 * first)
    rest = round(100 * (kept - first))
    g[1:].reshape(-1)[:rest] = True
    return first_router.Trained("straight-through", penalty, seed, None, g, loss)


SETS = {
    2: [(2.0, (0, 1)), (2.2, (0, 3)), (2.6, (2, 3))],
    3: [(1.5, (0, 1, 2)), (1.7, (0, 2, 3)), (2.1, (1, 2, 3))],
    4: [(1.0, (0, 1, 2, 3))],
}


def claims(*runs):
    config = dataclasses.replace(SMOKE, penalties=(0.01, 0.02), seeds=(0, 1))
    study = first_router.Study(config, "", None, None, None, {}, (), 1.0)
    return first_router._penalty_claims(study, runs, SETS)


def test_claims_hold_for_what_they_say():
    runs = [trained(p, s, kept, loss) for s in (0, 1) for p, kept, loss in ((0.01, 3.5, 1.2), (0.02, 2.5, 1.8))]
    assert [claim.holds for claim in claims(*runs)] == [True, True, True, True, True]
    # Halfway between the even sets of 3 layers (0, 2, 3) and of 4, and between (0, 3) and (0, 2, 3).
    assert first_router._even_loss(SETS, 3.5) == pytest.approx(1.35)
    assert first_router._even_loss(SETS, 2.5) == pytest.approx(1.95)


@pytest.mark.parametrize(
    ("index", "run", "verdicts"),
    [
        (1, (0.02, 0, 3.5, 1.8), [False, False, True, True, False]),  # the larger penalty keeps no fewer on one seed
        (1, (0.02, 0, 2.5, 1.1), [False, False, True, True, True]),  # its loss is lower on one seed
        (3, (0.02, 1, 2.5, 1.8, 0.9), [True, True, False, True, True]),  # the first layer goes
        (1, (0.02, 0, 2.5, 2.7), [True, True, True, False, False]),  # worse than every set
        (1, (0.02, 0, 2.5, 2.0), [True, True, True, True, False]),  # worse than the even one
    ],
)
def test_each_claim_can_fail(index, run, verdicts):
    runs = [trained(p, s, kept, loss) for s in (0, 1) for p, kept, loss in ((0.01, 3.5, 1.2), (0.02, 2.5, 1.8))]
    runs[index] = trained(*run)
    assert [claim.holds for claim in claims(*runs)] == verdicts


def test_a_batch_reads_the_union_of_its_rows():
    config = dataclasses.replace(SMOKE, seeds=(0,))
    study = first_router.Study(config, "", None, None, None, {}, (), 1.0)
    g = np.ones((2, 32), bool)
    g[1] = np.arange(32) < 1
    (row,) = first_router._batch_table(study, [first_router.Trained("soft", 0.1, 0, None, g, 1.0)]).rows
    assert row[2:] == [1.03, 1.12, 1.5]  # of 1 + 1/32, 1 + 1/8, 1 + 1/2


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"prompt_tokens": 32}, "window of 32"), ({"penalties": ()}, "one value"), ({"seeds": ()}, "one value")],
)
def test_configurations_that_cannot_run_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMOKE, **changes)


def test_a_model_that_is_not_there_is_said_at_once():
    with pytest.raises(cli.UserError, match="nowhere is no file or folder"):
        first_router.prepare(dataclasses.replace(SMOKE, model="nowhere"), None)
