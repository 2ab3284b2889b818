import dataclasses
import json
import types

import numpy as np
import pytest

from experiments import cli, sophia_gpt2
from experiments.claims import Report

SMOKE = sophia_gpt2.PRESETS["smoke"]


def main(tmp_path, **changes):
    return sophia_gpt2.main(dataclasses.replace(SMOKE, **changes), cli.Run(tmp_path / "run", False, "smoke"))


@pytest.mark.slow
def test_the_smallest_run_from_command_line_to_picture(tmp_path):
    flags = ["--preset", "smoke", "--runs", str(tmp_path), "--optimizers", "adamw", "sophia_g", "--sophia-g.gamma=0.1"]
    cli.run(sophia_gpt2.main, sophia_gpt2.Config, sophia_gpt2.PRESETS, args=flags)
    (folder,) = (tmp_path / "sophia_gpt2").iterdir()
    report = Report.load(folder)
    assert [row[0] for row in report.tables["optimizers"].rows] == ["adamw", "sophia_g"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    metrics = [json.loads(line) for line in (folder / "sophia_g" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == list(range(1, 13))
    assert metrics[-1]["loss"] < metrics[0]["loss"] and 0 < metrics[-1]["win_rate"] < 1
    (theory,) = [claim for claim in report.claims if "condition number" in claim.statement]
    assert theory.holds


def test_curvature_changes_gradient_descents_steps_but_not_sophias():
    claim, table = sophia_gpt2.condition_numbers()
    steps = {name: counts for name, *counts in table.rows}
    assert claim.holds and max(steps["Sophia, exact Hessian"]) < 100
    assert steps["gradient descent"][1] > 20 * steps["gradient descent"][0]
    assert steps["gradient descent"][2:] == ["> 20000", "> 20000"]
    assert max(steps["Adam"]) - min(steps["Adam"]) <= 1


def write(path, content):
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda p: {"data": write(p / "empty.txt", b"")}, "empty"),
        (lambda p: {"data": write(p / "latin1.txt", b"abc \xe9 def" * 500)}, "UTF-8"),
        (lambda p: {"data": str(p / "nowhere")}, "nowhere"),
        (lambda p: {"data": write(p / "short.txt", b"too short " * 200)}, "windows of 32"),
        (lambda p: {"data": token_folder(p, 50_304)}, "50304"),
        (lambda p: {"batch_size": 7, "accumulate": 2}, "a batch of 7 does not split"),
        (lambda p: {"mesh": (3, 1, 1)}, "does not cover"),
        (lambda p: {"sophia_g": sophia_gpt2.Sophia(hessian_rows=4)}, "a batch of 4 does not split"),
        (lambda p: {"tokenizer": str(p / "none.json")}, "none.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_user_can_put_right_is_said_at_once(tmp_path, changes, message):
    with pytest.raises(cli.UserError, match=message):
        main(tmp_path, **{"mesh": (-1, 1, 1), "batch_size": 8, **changes(tmp_path)})


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (["--optimizers"], "optimizers is empty"),
        (["--warmup", "12"], "shorter than the run of 12"),
        (["--sophia-g.hessian-rows", "3"], "sophia_g.hessian_rows is 3; it must divide the batch of 8"),
        (["--model", "gpt3"], "gpt3"),
    ],
)
def test_flags_that_cannot_be_end_before_anything_starts(tmp_path, capsys, flag, message):
    with pytest.raises(SystemExit) as exit_:
        cli.run(
            sophia_gpt2.main,
            sophia_gpt2.Config,
            sophia_gpt2.PRESETS,
            args=["--preset", "smoke", "--runs", str(tmp_path), *flag],
        )
    assert exit_.value.code == 2 and not list(tmp_path.iterdir())
    printed = capsys.readouterr()
    assert message in " ".join((printed.err + printed.out).split())


def token_folder(path, bad_token):
    folder = path / "tokens"
    folder.mkdir()
    tokens = np.arange(20_000, dtype="<u2") % 1000
    tokens[17] = bad_token
    tokens.tofile(folder / "train.bin")
    (np.arange(20_000, dtype="<u2") % 1000).tofile(folder / "val.bin")
    return str(folder)


@pytest.mark.parametrize("name", ["sophia_g", "sophia_h"])
@pytest.mark.parametrize(("batch", "devices"), [(480, 1), (40, 8), (24, 8), (36, 4), (7, 7)])
def test_the_default_hessian_sub_batch_divides_the_batch_and_the_devices(name, batch, devices):
    config = dataclasses.replace(SMOKE, batch_size=batch)
    mesh = types.SimpleNamespace(shape={"data": devices, "fsdp": 1})
    rows = sophia_gpt2._hessian_rows(name, config, mesh)
    assert batch % rows == 0 and rows % devices == 0
    assert rows <= max(batch // (2 if name == "sophia_g" else 16), devices)


def test_an_unwritable_folder_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(cli.UserError, match="cannot write checkpoints"):
        main(tmp_path / "file", batch_size=8)


def test_the_paper_preset_is_the_authors_configuration():
    """train_gpt2_small_sophiag and _adamw of the authors' repository, to the last number (card of the method)."""
    c = sophia_gpt2.PRESETS["paper"]
    assert (c.model, c.batch_size, c.steps, c.warmup, c.grad_clip) == ("gpt2-small", 480, 100_000, 2000, 1.0)
    assert c.scale_attention_by_layer
    g = c.sophia_g
    assert (g.b1, g.b2, g.weight_decay, g.update_interval, g.refresh) == (0.965, 0.99, 0.2, 10, "after")
    assert (g.hessian_rows, g.hessian_clip, c.sophia_h.hessian_rows) == (480, 1.0, 32)
    assert sophia_gpt2.LEARNING_RATES["gpt2-small"]["sophia_g"] == (6e-4, 1.5e-5)
    assert sophia_gpt2.LEARNING_RATES["gpt2-small"]["adamw"] == (6e-4, 3e-5)
    assert sophia_gpt2.GAMMA["sophia_g"] == {
        "gpt2-tiny": 0.05,
        "gpt2-small": 0.05,
        "gpt2-medium": 0.08,
        "gpt2-large": 0.05,
    }
    assert (c.adamw.b1, c.adamw.b2, c.adamw.weight_decay) == (0.9, 0.95, 0.1)
