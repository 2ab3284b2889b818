import dataclasses
import math

import pytest

from experiments import cli, langevin_averaging
from experiments.claims import Report
from experiments.langevin_averaging import Config, Phase, TensorPCA

SMOKE = langevin_averaging.PRESETS["smoke"]


@pytest.mark.slow
def test_the_smallest_run_from_command_line_to_picture(tmp_path):
    flags = ["--preset", "smoke", "--runs", str(tmp_path)]
    cli.run(langevin_averaging.main, Config, langevin_averaging.PRESETS, args=flags)
    (folder,) = (tmp_path / "langevin_averaging").iterdir()
    report = Report.load(folder)
    assert len(report.claims) == 7
    assert report.claims[0].holds, report.claims[0]
    for name in ("averages", "thresholds"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    stages = {path.stem for path in (folder / "stages").iterdir()}
    assert stages == {"odd", "weak", "even", "phase", "minibatch3"}


def test_a_stage_that_is_done_is_not_run_again(tmp_path):
    run = cli.Run(tmp_path, True, "smoke")
    runs = []

    def compute():
        runs.append(1)
        return {"first": [0.5, math.nan]}

    first, second = (langevin_averaging._stage(run, "odd", compute) for _ in range(2))
    assert len(runs) == 1 and first["first"][0] == second["first"][0] == 0.5


def test_thresholds_are_interpolated_and_their_slope_fitted():
    """Overlaps that pass 0.5 at n = 2 d² give the slope 2; a row that never passes is left out."""
    phase = Phase(dimensions=(10, 20, 40), exponents=(1.0, 2.0, 3.0))
    crossings = [2 + math.log(2) / math.log(d) for d in phase.dimensions]
    rows = [[0.0, 0.5 - (a - 2) * 0.4, 0.9 - (a - 2) * 0.4] for a in crossings]
    found = {"average": rows, "last": [[0.1] * 3] * 3, "oracle": rows}
    log_n, slope = langevin_averaging._thresholds(phase, found)
    assert slope == pytest.approx(2.0, abs=1e-6)
    assert log_n["average"] == pytest.approx([math.log(2 * d**2) for d in phase.dimensions])
    assert log_n["last"] == [None] * 3
    average, last = langevin_averaging._phase_claims(phase, found, slope)
    assert average.holds and last.holds
    assert not langevin_averaging._phase_claims(phase, found, None)[0].holds


def test_a_run_in_which_the_chains_leave_the_equator_shows_nothing():
    """Trap 1: with a strong drift plain optimisation succeeds, and the claim must fail."""
    rows = {
        "odd": {"first": [0.95], "oracle": [0.97], "iterates": [0.5]},
        "weak": {"first": [0.2], "oracle": [0.2], "iterates": [0.15]},
        "even": {"first": [0.2], "second": [0.99], "oracle": [0.99], "iterates": [0.22]},
    }
    config = Config()
    assert [claim.holds for claim in langevin_averaging._claims(config, rows)] == [False, True, True, True]
    rows["odd"]["iterates"] = [0.15]
    assert all(claim.holds for claim in langevin_averaging._claims(config, rows))
    rows["even"]["first"] = [0.8]  # trap 2: a first order that succeeds is not the claim either
    assert not langevin_averaging._claims(config, rows)[2].holds


def test_the_default_is_the_cards_table():
    config = langevin_averaging.PRESETS["default"]
    assert config.odd == TensorPCA(k=3, d=30, lam=90.0, eps=4.0, time=2000.0, dt=5e-3)
    assert (config.weak.lam, config.even.k, config.even.d, config.even.lam, config.even.eps) == (6.0, 4, 16, 48.0, 3.0)
    assert config.seeds >= 3
    paper = langevin_averaging.PRESETS["paper"]
    assert (paper.minibatch.d, paper.minibatch.orders, paper.minibatch.samples_factor) == (100, (3, 4, 5), 10)
    assert paper.phase.dimensions == (32, 64, 128) and (paper.phase.exponents[0], paper.phase.exponents[-1]) == (1, 2.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"odd": TensorPCA(k=2, d=6, lam=1.0, eps=1.0, time=1.0)}, "odd.k=2"), ({"phase": Phase(k=4)}, "odd k"),
     ({"phase": Phase(dimensions=(8,))}, "two dimensions")],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMOKE, **changes)
