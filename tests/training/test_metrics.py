import io
import json
import math

import pytest

from jaxskip.training import LossMonitor, MetricsLog, Progress, read_metrics
from jaxskip.training.optimizers import warmup_cosine


def test_resuming_drops_rows_after_the_step_and_a_torn_last_line(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    with MetricsLog(tmp_path, resume_step=2) as log:
        log.write(3, {"loss": 9.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_a_line_is_on_disk_at_once_and_is_json_even_for_nan(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": math.nan, "norm": math.inf})
        text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": "NaN", "norm": "Infinity"}


def test_tensorboard_events_are_written(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricsLog(tmp_path, tensorboard=True) as log:
        log.write(1, {"loss": 2.0})
    assert any("tfevents" in path.name for path in (tmp_path / "tensorboard").iterdir())


def test_monitor_reports_spikes_but_not_noise():
    monitor = LossMonitor()
    noise = [2.0 + 0.05 * (-1) ** n for n in range(30)]
    assert all(monitor.check(n, loss, 1.0, False) is None for n, loss in enumerate(noise))
    assert "jumped from 2.0" in monitor.check(30, 4.0, 12.0, False)
    assert monitor.check(31, 2.0, 1.0, False) is None


def test_monitor_gives_up_after_bad_steps_in_a_row_only():
    monitor = LossMonitor(patience=3)
    for step in range(10):
        monitor.check(step, math.nan, 1.0, step % 3 != 0)
    with pytest.raises(FloatingPointError, match="3th in a row"):
        for step in range(3):
            monitor.check(step, math.nan, math.nan, True)


def test_progress_shows_the_last_step_and_no_more_than_asked():
    stream = io.StringIO()
    with Progress("adamw", total=100, every=3600, stream=stream) as progress:
        for step in range(1, 101):
            progress.update(step, "loss 1.000")
    assert stream.getvalue() == "adamw 100/100 loss 1.000, 0s left\n"


@pytest.mark.parametrize("warmup", [-1, 10, 11])
def test_a_warm_up_as_long_as_the_run_is_refused(warmup):
    with pytest.raises(ValueError, match="shorter than the run"):
        warmup_cosine(1.0, steps=10, warmup=warmup, final=0.0)
