import dataclasses

import pytest

from experiments import cli, lora_drop
from experiments.claims import Report


@pytest.mark.slow
def test_the_smallest_run_from_command_line_to_picture(tmp_path):
    cli.run(lora_drop.main, lora_drop.Config, lora_drop.PRESETS, args=["--preset", "smoke", "--runs", str(tmp_path)])
    (folder,) = (tmp_path / "lora_drop").iterdir()
    report = Report.load(folder)
    rows = report.tables["adapters"].rows
    assert [row[1] for row in rows] == ["", *lora_drop.NAMES.values()]
    # A few steps from a random network: adapters that start at zero have moved, and helped.
    assert all(row[3] < row[2] for row in rows[1:])
    assert (folder / "lora_drop.png").read_bytes().startswith(b"\x89PNG")


def losses(reuse, leaving_out):
    return {((3, 5), "anchor"): reuse, ((3, 5), "identity"): leaving_out}


def test_claims_hold_and_fail_by_what_was_measured():
    found = lora_drop._trained_claims(losses((2.9, 2.1), (1.96, 1.93)))
    assert [claim.holds for claim in found] == [True, True, False]
    found = lora_drop._trained_claims(losses((2.5, 2.35), (1.96, 1.97)))
    assert [claim.holds for claim in found] == [False, False, False]
    found = lora_drop._trained_claims(losses((2.9, 1.9), (1.96, 1.93)))
    assert [claim.holds for claim in found] == [True, True, True]
    untrained = {(None, ""): 30.0, (0.25, "anchor"): 301.0, (0.25, "identity"): 91.0, (0.5, "anchor"): 1.0}
    assert [claim.holds for claim in lora_drop._untrained_claims(untrained)] == [True, False]


@pytest.mark.parametrize("change", [{"light_steps": 0}, {"drop_sets": ()}, {"ratios": ()}], ids=str)
def test_configurations_that_cannot_be_are_refused(change):
    with pytest.raises(ValueError, match="light_steps must be at least 1"):
        dataclasses.replace(lora_drop.PRESETS["smoke"], **change)
