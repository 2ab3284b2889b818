"""The catalog says only what is real."""

import dataclasses
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

from experiments import catalog, claims

ROOT = pathlib.Path(__file__).resolve().parents[2]
FRAME = {
    "__init__",
    "__main__",
    "catalog",
    "claims",
    "cli",
    "generate",
    "gradient_filter",
    "skip_attention",
    "skipping_frontier",
    "skipping_toy",
    "skippipe_schedules",
    "smollm2",
}
READY = [system for system in catalog.CATALOG if system.state == "ready"]
PLANNED = [system for system in catalog.CATALOG if system.state == "planned"]


def _report(name, created, preset="default", holds=True, **changes):
    claim = claims.Claim("it works", "yes", "yes", holds, "ours")
    config = claims.to_json(importlib.import_module(f"experiments.{name}").PRESETS[preset])
    return claims.Report([claim], experiment=name, preset=preset, created=created, config=config | changes)


def test_one_row_for_each_of_the_38_systems():
    assert len(catalog.CATALOG) == len(READY) + len(PLANNED) == 38
    for column in ("name", "title", "paper", "home", "claim"):
        assert len({getattr(system, column) for system in catalog.CATALOG}) == 38, column


@pytest.mark.parametrize("system", catalog.CATALOG, ids=lambda system: system.name)
def test_row_is_well_formed(system):
    assert system.name.isidentifier() and system.name not in FRAME
    assert re.fullmatch(r"\d{4}\.\d{5}", system.paper)
    assert re.fullmatch(r"(jaxskip|pallas_kernels)(/[a-z_]+)+(\.py)?", system.home)
    assert system.claim.endswith(".") and len(system.claim) > 40


def test_ready_rows_import():
    for system in READY:
        assert (ROOT / system.experiment).is_file(), f"{system.name} is ready without {system.experiment}"
        assert (ROOT / system.home).exists(), f"{system.name} is ready without {system.home}"
        importlib.import_module(f"experiments.{system.name}")
        importlib.import_module(system.home.removesuffix(".py").replace("/", "."))


def test_planned_rows_have_no_experiment():
    assert [system.name for system in PLANNED if (ROOT / system.experiment).exists()] == []


def test_every_experiment_has_a_row():
    modules = {path.stem for path in (ROOT / "experiments").glob("*.py")}
    assert modules - FRAME <= {system.name for system in catalog.CATALOG}


def test_readme_has_the_current_table():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert catalog.with_systems_table(readme) == readme, "run: python -m experiments.catalog --write-readme"


def test_systems_table_replaces_what_is_between_the_markers():
    readme = f"# Top\n{catalog.BEGIN}\nold\n{catalog.END}\nbottom\n"
    written = catalog.with_systems_table(readme)
    assert written == f"# Top\n{catalog.BEGIN}\n{catalog.markdown_table()}\n{catalog.END}\nbottom\n"
    assert catalog.with_systems_table(written) == written
    assert all(f"`{system.name}`" in written for system in catalog.CATALOG)


@pytest.mark.parametrize("readme", ["", catalog.BEGIN, f"{catalog.END} {catalog.BEGIN}"])
def test_systems_table_needs_both_markers_in_order(readme):
    with pytest.raises(ValueError, match="needs the line"):
        catalog.with_systems_table(readme)


def test_last_report_is_the_newest_of_its_preset(tmp_path):
    assert catalog.last_report("fira", tmp_path) is None
    _report("fira", "2026-01-02T00:00:00+00:00").write(tmp_path / "fira" / "b")
    _report("fira", "2026-01-03T00:00:00+00:00", preset="smoke").write(tmp_path / "fira" / "a")
    assert catalog.last_report("fira", tmp_path).preset == "smoke"
    assert catalog.last_report("fira", tmp_path, preset="default").created.startswith("2026-01-02")
    assert catalog.last_report("fira", tmp_path, preset="paper") is None


def test_a_run_that_changed_its_preset_is_no_run_of_it(tmp_path):
    changed = _report("fira", "2026-01-03T00:00:00+00:00", seeds=7)
    changed.write(tmp_path / "fira" / "b")
    assert catalog.last_report("fira", tmp_path).config["seeds"] == 7
    assert catalog.last_report("fira", tmp_path, preset="default") is None
    _report("fira", "2026-01-02T00:00:00+00:00").write(tmp_path / "fira" / "a")
    assert catalog.last_report("fira", tmp_path, preset="default").created.startswith("2026-01-02")
    older_code = {name: value for name, value in changed.config.items() if name != "seeds"}
    dataclasses.replace(changed, config=older_code).write(tmp_path / "diffgrad" / "a")
    assert catalog.last_report("diffgrad", tmp_path, preset="default") is None


def test_write_results_without_runs_is_an_error(tmp_path):
    command = [sys.executable, "-m", "experiments.catalog", "--write-results", "--runs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: no default run of any system has a report under {tmp_path}\n"


def test_write_results_lists_default_runs_and_names_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(catalog, "ROOT", tmp_path)
    (tmp_path / "experiments").mkdir()
    runs = tmp_path / "runs"
    _report("fira", "2026-01-02T00:00:00+00:00", holds=False).write(runs / "fira" / "a")
    _report("diffgrad", "2026-01-02T00:00:00+00:00", preset="smoke").write(runs / "diffgrad" / "a")
    monkeypatch.setattr(sys, "argv", ["catalog", "--write-results", "--runs", str(runs)])
    catalog.main()
    text = (tmp_path / "experiments" / "RESULTS.md").read_text()
    assert "## fira" in text and "FAILED" in text and "diffgrad" not in text
    missing = [system.name for system in READY if system.name != "fira"]
    ending = f"1 of 38 systems; ready but not run with the default configuration: {missing or 'none'}\n"
    assert capsys.readouterr().out.endswith(ending)


def test_python_m_experiments_prints_every_row_and_the_last_result(tmp_path):
    _report("fira", "2026-01-02T00:00:00+00:00", holds=False).write(tmp_path / "runs" / "fira" / "a")
    (tmp_path / "runs" / "glad" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "glad" / "a" / "report.json").write_text("{}")
    command = [sys.executable, "-m", "experiments"]
    environment = {"PYTHONPATH": str(ROOT), "COLUMNS": "400"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    blocks = re.split(r"\n(?=\S)", done.stdout.rstrip())
    assert len(blocks) == 38
    for system, block in zip(catalog.CATALOG, blocks, strict=True):
        for column in (system.name, system.title, system.paper, system.home, system.experiment, system.state):
            assert column in block
        assert system.claim in block
    results = {block.split(":")[0]: block.rsplit("last result: ", 1)[1] for block in blocks}
    assert results["fira"] == "0 of 1 claims hold (default, 2026-01-02)"
    assert "is not a report of this version of jaxskip" in results["glad"]
    assert results["gcond"] == "none"


def test_python_m_experiments_refuses_what_is_not_ready():
    names = ["no_such_system", *(system.name for system in PLANNED[:1])]
    for name in names:
        command = [sys.executable, "-m", "experiments", name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert f"invalid choice: '{name}'" in done.stderr


@pytest.mark.skipif(not READY, reason="no system is ready yet")
def test_python_m_experiments_forwards_to_the_experiment():
    command = [sys.executable, "-m", "experiments", READY[0].name, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"python -m experiments.{READY[0].name}" in done.stdout
    assert "--preset" in done.stdout
