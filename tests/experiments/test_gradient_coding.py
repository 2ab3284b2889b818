import dataclasses

import numpy as np
import pytest

from experiments import cli, gradient_coding
from experiments.claims import Report

SMOKE = gradient_coding.PRESETS["smoke"]
TINY = dataclasses.replace(SMOKE, workers=8, jobs=6, max_lam=3, max_window=2, max_delay=2)


@pytest.mark.slow
def test_the_smallest_run_from_command_line_to_picture(tmp_path):
    pytest.importorskip("sklearn")
    flags = ["--preset", "smoke", "--runs", str(tmp_path), "--jobs", "8", "--training-jobs", "6"]
    cli.run(gradient_coding.main, gradient_coding.Config, gradient_coding.PRESETS, args=flags)
    (folder,) = (tmp_path / "gradient_coding").iterdir()
    report = Report.load(folder)
    assert len(report.tables["completion time"].rows) == 2 * 2 * 5
    for name in ("completion_time", "load", "training"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    held = {claim.statement: claim.holds for claim in report.claims}
    assert all(holds for statement, holds in held.items() if "where compute" not in statement)


def test_simulations_compare_all_schemes_on_both_traces(tmp_path):
    rows = gradient_coding.simulate_all(TINY)
    assert len(rows) == 2 * 2 * 5
    for row in rows:
        assert row["probe"] >= 6 and row["fresh"] >= 6
    trace = tmp_path / "trace.csv"
    np.savetxt(trace, np.ones((8, 8)), delimiter=",")
    config = dataclasses.replace(TINY, trace=str(trace), alphas=(2.2,))
    chosen = {row["scheme"]: row for row in gradient_coding.simulate_all(config)}
    # Without stragglers no coding is best: a second a round, and 2.2 / 8 of work.
    assert chosen["no coding"]["probe"] == pytest.approx(6 * (1 + 2.2 / 8))
    assert all(row["probe"] >= chosen["no coding"]["probe"] - 1e-9 for row in chosen.values())
    np.savetxt(trace, np.ones((8, 7)), delimiter=",")
    with pytest.raises(ValueError, match=r"has \[8, 7\] delays; 8 workers and 8 rounds are needed"):
        gradient_coding.simulate_all(config)


def test_the_fitted_source_gives_the_papers_order_and_the_claims_can_fail():
    paper = gradient_coding.paper_simulation(SMOKE)
    assert [claim.holds for claim in gradient_coding._paper_claims(paper)] == [True, True]
    paper["M-SGC"]["seconds"] = paper["GC"]["seconds"] * 1.01
    assert [claim.holds for claim in gradient_coding._paper_claims(paper)] == [False, False]
    assert [claim.holds for claim in gradient_coding._load_claims()] == [True, True]


@pytest.mark.parametrize(
    ("high", "low", "verdicts"),
    [
        ((1, 2, 3, 4), (3, 1, 2, 4), [True, True, True]),
        ((2, 1, 3, 4), (1, 2, 3, 4), [False, False, False]),
        ((1, 2, 4, 4), (3, 1, 2, 4), [False, False, True]),
    ],
)
def test_order_claims_can_fail(high, low, verdicts):
    names = ("M-SGC", "SR-SGC", "GC", "no coding")
    rows = [
        {"alpha": alpha, "seed": seed, "scheme": name, "probe": seconds, "fresh": seconds}
        for alpha, times in ((20.0, high), (2.2, low))
        for seed in range(2)
        for name, seconds in zip(names, times, strict=True)
    ]
    assert [claim.holds for claim in gradient_coding._order_claims(SMOKE, rows)] == verdicts


def test_training_and_process_claims_can_fail():
    plain = np.ones((2, 3))
    for shift, verdicts in ((1e-7, [True, True]), (1e-4, [False, False])):
        training = {"plain": plain, "M-SGC": plain + shift, "drop stragglers": plain + (1e-2 if shift < 1e-5 else 0)}
        assert [claim.holds for claim in gradient_coding._training_claims(training)] == verdicts
    good = {"GC, s=1": (0.1, 0.0), "no coding": (1.0, 0.0)}
    assert [c.holds for c in gradient_coding._process_claims(good)] == [True, True]
    assert [c.holds for c in gradient_coding._process_claims(good | {"GC, s=1": (0.9, 1e-3)})] == [False, False]


def test_what_a_user_can_put_right_is_said_at_once(tmp_path):
    with pytest.raises(cli.UserError, match="nowhere.csv"):
        gradient_coding.main(dataclasses.replace(TINY, trace="nowhere.csv"), cli.Run(tmp_path, False, "smoke"))
    with pytest.raises(ValueError, match="seeds is 1; it must be at least 2"):
        gradient_coding.Config(seeds=1)
    with pytest.raises(ValueError, match="alphas is"):
        gradient_coding.Config(alphas=())


def test_the_paper_preset_has_the_papers_size():
    c = gradient_coding.PRESETS["paper"]
    assert (c.workers, c.jobs, c.mu) == (256, 480, 1.0)
    assert 2.2013 in c.alphas
