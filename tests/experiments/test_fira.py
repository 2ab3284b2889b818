import dataclasses

import pytest

from experiments import cli, fira
from experiments.claims import Report


def test_the_smallest_run_from_command_line_to_picture(tmp_path):
    pytest.importorskip("sklearn")
    cli.run(fira.main, fira.Config, fira.PRESETS, args=["--preset", "smoke", "--runs", str(tmp_path)])
    (folder,) = (tmp_path / "fira").iterdir()
    report = Report.load(folder)
    assert [row[0] for row in report.tables["rules"].rows] == ["Adam", "GaLore", "Fira"]
    assert (folder / "fira.png").read_bytes().startswith(b"\x89PNG")
    # The rest needs training; the memory of LLaMA's state does not: the paper's 61.1 %, and one scalar a matrix.
    assert len(report.claims) == report.held == 2
    assert "61.1%" in report.claims[0].measured


def test_the_rules_differ_where_they_should():
    """Every rule is built with the run's numbers; only Adam is not Fira's."""
    rules = fira.rules(fira.PRESETS["default"])
    assert len(rules) == 8 and set(fira._COLORS) < set(rules)
    assert all(make() is not None for make in rules.values())


@pytest.mark.slow
def test_a_llama_on_a_mesh(tmp_path, monkeypatch):
    """The `paper` preset's path with a tiny network: parameters and moments split, a checkpoint, a perplexity."""
    monkeypatch.setitem(fira.LLAMA, "llama-60m", (32, 48, 2, 2))
    monkeypatch.setattr(fira, "state_megabytes", lambda model, rank: {"Adam": 4, "GaLore": 1, "Fira": 2, "matrices": 1})
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 2000)
    config = dataclasses.replace(
        fira.PRESETS["paper"],
        data=str(text),
        rank=4,
        update_proj_gap=2,
        steps=6,
        warmup=1,
        batch_size=8,
        context_length=16,
        eval_batches=1,
        mesh=(2, 2, 2),
        dtype="float32",
    )
    report = fira.main(config, cli.Run(tmp_path / "run", False, "paper"))
    losses = {row[0]: row[1] for row in report.tables["rules"].rows}
    assert set(losses) == {"Adam", "GaLore", "Fira"} and all(0 < loss < 5.6 for loss in losses.values())
    assert losses["Fira"] != losses["GaLore"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--warmup", "12"], "shorter than the run of 12"),
        (["--model", "llama-60m"], "does not go with data 'digits'"),
        (["--data", "c4"], "does not go with data 'c4'"),
        (["--rank", "0"], "at least 1"),
    ],
)
def test_flags_that_cannot_be_end_before_anything_starts(tmp_path, capsys, flags, message):
    args = ["--preset", "smoke", "--runs", str(tmp_path), *flags]
    with pytest.raises(SystemExit) as exit_:
        cli.run(fira.main, fira.Config, fira.PRESETS, args=args)
    assert exit_.value.code == 2 and not list(tmp_path.iterdir())
    printed = capsys.readouterr()
    assert message in " ".join((printed.err + printed.out).split())


def test_data_that_is_not_there_is_said_at_once(tmp_path):
    config = dataclasses.replace(fira.PRESETS["paper"], data=str(tmp_path / "nowhere"), batch_size=8)
    with pytest.raises(cli.UserError, match="nowhere"):
        fira.main(config, cli.Run(tmp_path, False, "paper"))


def test_the_paper_preset_is_the_authors_60m_row():
    c = fira.PRESETS["paper"]
    assert (c.model, c.rank, c.alpha, c.update_proj_gap, c.learning_rate) == ("llama-60m", 128, 0.25, 200, 0.01)
    assert (c.steps, c.warmup, c.batch_size, c.context_length) == (10_000, 1_000, 512, 256)
    assert fira.LLAMA["llama-60m"] == (512, 1376, 8, 8) and fira.LLAMA["llama-1b"] == (2048, 5461, 32, 24)
