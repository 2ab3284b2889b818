"""The command line that all experiments share, driven by an experiment that only counts."""

import dataclasses
import json
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import cli
from experiments.claims import Claim, Report

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A part of the configuration."""

    learning_rate: float = 0.1
    gamma: float | None = None
    names: tuple[Literal["a", "b"], ...] = ("a",)


@dataclasses.dataclass(frozen=True)
class Config:
    """Counts to a number."""

    model: str = "small"
    """Which model."""
    batch_size: int = 8
    """Examples a step."""
    steps: int = 3
    clip: float = 1.0
    mesh: tuple[int, str] = (1, "data")
    data: pathlib.Path | None = None
    optimizer: Optimizer = Optimizer()
    stop: Literal["no", "ctrl-c", "bug", "data", "bare"] = "no"
    """How the run ends early."""

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {self.batch_size}")


PRESETS = {"smoke": Config(steps=1), "default": Config(), "paper": Config(model="large", steps=5)}


def main(config: Config, run: cli.Run) -> Report:
    if config.stop == "data":
        raise cli.UserError("data: no such corpus 'x'")
    checkpoint = run.directory / "checkpoint.txt"
    done = int(checkpoint.read_text()) if run.resume and checkpoint.exists() else 0
    while done < config.steps:
        done += 1
        checkpoint.write_text(str(done))
        if config.stop == "ctrl-c":
            raise KeyboardInterrupt
        if config.stop == "bug":
            raise ValueError("shapes do not match")
    if config.stop == "bare":
        return None
    small = Claim("the count is small", expected="<= 3", measured=done, holds=done <= 3, source="ours")
    return Report(claims=[small])


def run(tmp_path, *args, entry=main):
    return cli.run(entry, Config, PRESETS, name="fake", args=["--runs", str(tmp_path), *args])


def exit_code(tmp_path, *args, entry=main):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *args, entry=entry)
    return stopped.value.code


def folders(tmp_path):
    return sorted((tmp_path / "fake").iterdir())


def stored(folder):
    return json.loads((folder / "config.json").read_text())


def test_presets_and_overrides(tmp_path):
    assert run(tmp_path).config["steps"] == 3
    assert run(tmp_path, "--preset", "smoke").preset == "smoke"
    report = run(tmp_path, "--preset=paper", "--batch-size=4", "--steps", "2", "--optimizer.learning-rate", "0.5")
    assert (report.config["model"], report.config["batch_size"], report.config["steps"]) == ("large", 4, 2)
    assert report.config["optimizer"]["learning_rate"] == 0.5
    assert run(tmp_path, "--batch_size", "5").config["batch_size"] == 5
    assert len(folders(tmp_path)) == 4


def test_run_folder_holds_configuration_and_report(tmp_path, capsys):
    report = run(tmp_path, "--preset", "smoke", "--model", "tiny")
    (folder,) = folders(tmp_path)
    assert {path.name for path in folder.iterdir()} == {"config.json", "checkpoint.txt", "report.json", "report.md"}
    config = stored(folder)
    assert (config["experiment"], config["preset"], config["config"]["model"]) == ("fake", "smoke", "tiny")
    assert config["argv"] == ["--runs", str(tmp_path), "--preset", "smoke", "--model", "tiny"]
    assert Report.load(folder).to_dict() == report.to_dict()
    assert (report.experiment, report.preset) == ("fake", "smoke") and report.duration >= 0
    printed = capsys.readouterr().out
    assert f"run folder: {folder}" in printed and f"written: {folder / 'report.md'}" in printed
    assert "1 of 1 claims hold" in printed


def test_configuration_is_stored_before_main_starts(tmp_path):
    seen = []

    def look(config, this_run):
        seen.append(stored(this_run.directory)["config"]["steps"])
        return main(config, this_run)

    run(tmp_path, "--steps", "2", entry=look)
    assert seen == [2]


def test_failed_claim_is_a_result(tmp_path, capsys):
    report = run(tmp_path, "--steps", "4")  # returns: the process would end with 0
    assert report.held == 0
    assert "FAILED  the count is small" in capsys.readouterr().out
    assert Report.load(folders(tmp_path)[0]).held == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batchsize", "3"], "--batch-size"),
        (["--prset", "smoke"], "--preset"),
        (["--preset", "huge"], "'smoke', 'default', 'paper'"),
        (["--steps", "many"], "--steps"),
        (["--batch-size", "0"], "error: batch_size must be positive, got 0"),
    ],
)
def test_bad_flags_stop_with_2_and_leave_nothing(tmp_path, capsys, args, message):
    assert exit_code(tmp_path, *args) == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.out + captured.err).split())
    assert list(tmp_path.iterdir()) == []


def test_resume_takes_the_newest_unfinished_run_and_its_configuration(tmp_path):
    assert exit_code(tmp_path, "--stop", "ctrl-c", "--steps", "2") == 130
    assert exit_code(tmp_path, "--preset", "paper", "--stop", "ctrl-c", "--steps", "3", "--clip", "inf") == 130
    older, newer = folders(tmp_path)
    run(tmp_path, "--preset", "smoke")  # newest, but finished

    def note(config, this_run):
        assert this_run == cli.Run(newer, resume=True, preset="paper")
        assert config == dataclasses.replace(PRESETS["paper"], stop="ctrl-c", steps=3, clip=float("inf"))
        return main(dataclasses.replace(config, stop="no"), this_run)

    report = run(tmp_path, "--resume", entry=note)
    assert report.claims[0].measured == 3 and report.preset == "paper"
    assert report.notes == ["resumed: the duration is that of the last session"]
    assert (newer / "report.json").exists() and not (older / "report.json").exists()
    assert exit_code(tmp_path, "--resume") == 130  # the older one is left, and is told to stop again
    assert (older / "checkpoint.txt").read_text() == "2"  # it went on from 1


def test_resume_takes_a_folder(tmp_path):
    assert exit_code(tmp_path, "--stop", "ctrl-c", "--steps", "1") == 130
    assert exit_code(tmp_path, "--stop", "ctrl-c") == 130
    older, _ = folders(tmp_path)
    run(tmp_path, "--resume", str(older))
    assert (older / "report.json").exists()


def test_resume_refuses_what_it_cannot_continue(tmp_path, capsys):
    def error(*args):
        assert exit_code(tmp_path, *args) == 2
        return capsys.readouterr().err

    assert "no unfinished run of fake" in error("--resume")
    run(tmp_path)
    assert "no unfinished run of fake" in error("--resume")
    (finished,) = folders(tmp_path)
    assert "is finished" in error("--resume", str(finished))
    assert "has no config.json" in error("--resume", str(tmp_path))
    (finished / "report.json").unlink()
    for flags in (["--steps", "9"], ["--preset=smoke"], ["--run_dir", str(tmp_path)]):
        assert f"leave out {flags[0]}" in error("--resume", *flags)
    config = stored(finished)
    (finished / "config.json").write_text(json.dumps(config | {"experiment": "other"}))
    assert "is a run of other, not of fake" in error("--resume")
    (finished / "config.json").write_text(json.dumps(config | {"config": {"steps": 3}}))
    assert "from another version of the code" in error("--resume")
    (finished / "config.json").write_text("{}")
    assert "was not written by an experiment" in error("--resume", str(finished))


def test_unwritable_folder_is_one_line(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    for flags in (["--runs", str(blocked / "runs")], ["--run-dir", str(blocked)], ["--runs", "/proc/no/such"]):
        with pytest.raises(SystemExit) as stopped:
            cli.run(main, Config, PRESETS, name="fake", args=flags)
        assert stopped.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("error: cannot use the run folder") and message.count("\n") == 1


def test_report_that_cannot_be_written_is_printed_all_the_same(tmp_path, capsys):
    def block(config, this_run):
        report = main(config, this_run)
        (this_run.directory / "report.md").mkdir()
        return report

    assert exit_code(tmp_path, entry=block) == 2
    captured = capsys.readouterr()
    assert "1 of 1 claims hold" in captured.out
    assert captured.err.startswith("error: the report above cannot be written to")


def test_user_error_is_one_line_and_leaves_no_run(tmp_path, capsys):
    assert exit_code(tmp_path, "--stop", "data") == 2
    assert capsys.readouterr().err == "error: data: no such corpus 'x'\n"
    assert folders(tmp_path) == []


def test_other_exceptions_keep_their_traceback_and_the_run(tmp_path):
    with pytest.raises(ValueError, match="shapes do not match") as caught:
        run(tmp_path, "--stop", "bug")
    (folder,) = folders(tmp_path)
    assert caught.value.__notes__ == [
        f"Once the cause is removed, continue with: python -m experiments.fake --resume {folder}"
    ]
    with pytest.raises(TypeError, match="main must return a Report, got NoneType"):
        run(tmp_path, "--stop", "bare")


def test_ctrl_c_tells_how_to_continue(tmp_path, capsys):
    assert exit_code(tmp_path, "--stop", "ctrl-c") == 130
    (folder,) = folders(tmp_path)
    assert f"continue with: python -m experiments.fake --resume {folder}" in capsys.readouterr().err


def test_run_dir_is_shared_by_equal_processes_only(tmp_path):
    shared = tmp_path / "shared"
    first = cli.start("fake", Config(), run_dir=shared)
    assert cli.start("fake", Config(), run_dir=shared) == first == cli.Run(shared, resume=False, preset="default")
    for other in (Config(steps=4), Config(batch_size=9)):
        with pytest.raises(cli.UserError, match="holds another run"):
            cli.start("fake", other, run_dir=shared)
    with pytest.raises(cli.UserError, match="holds another run"):
        cli.start("other", Config(), run_dir=shared)
    cli.execute(main, Config(), first, "fake")
    with pytest.raises(cli.UserError, match="holds another run"):
        cli.start("fake", Config(), run_dir=shared)


def test_runs_started_together_get_folders_of_their_own(tmp_path):
    made = [cli.start("fake", Config(), runs=tmp_path).directory for _ in range(20)]
    assert len(set(made)) == 20
    assert made == sorted(made)


def test_configuration_that_json_would_change_is_refused(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Bad:
        sizes: list[int] = dataclasses.field(default_factory=lambda: [1, 2])

    with pytest.raises(TypeError, match="does not survive JSON"):
        cli.start("fake", Bad(), runs=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_presets_are_the_three(tmp_path):
    with pytest.raises(ValueError, match="presets must be exactly"):
        cli.run(main, Config, {"default": Config()}, args=[])


numbers = st.floats(allow_nan=False)
configs = st.builds(
    Config,
    model=st.text() | st.just("NaN"),
    batch_size=st.integers(min_value=1),
    clip=numbers,
    mesh=st.tuples(st.integers(), st.text(max_size=3)),
    data=st.none() | st.just(pathlib.Path("some/folder")),
    optimizer=st.builds(
        Optimizer, learning_rate=numbers, gamma=st.none() | numbers, names=st.lists(st.sampled_from("ab")).map(tuple)
    ),
)


@settings(deadline=None, max_examples=25)
@given(configs)
def test_any_configuration_comes_back_on_resume(tmp_path_factory, config):
    runs = tmp_path_factory.mktemp("runs")
    started = cli.start("fake", config, preset="paper", runs=runs)
    seen = []

    def look(config, this_run):
        seen.extend((config, this_run))
        return Report(claims=[])

    run(runs, "--resume", entry=look)
    assert seen == [config, cli.Run(started.directory, resume=True, preset="paper")]


@pytest.fixture
def script(tmp_path):
    """An experiment in a file of its own, as a user runs it."""
    path = tmp_path / "counting.py"
    path.write_text(
        textwrap.dedent("""
        import dataclasses, os, sys, time
        from experiments import cli
        from experiments.claims import Claim, Report

        @dataclasses.dataclass(frozen=True)
        class Config:
            '''Counts.'''
            wait: bool = False
            '''Wait for Ctrl-C.'''
            bug: bool = False
            processes: int = 1
            coordinator: str | None = None

        def main(config, run):
            assert "jax" not in sys.modules
            if config.processes > 1:
                import jax
                jax.distributed.initialize(config.coordinator, config.processes, int(os.environ["PROCESS"]))
            if config.wait:
                print("waiting", flush=True)
                time.sleep(60)
            if config.bug:
                raise IndexError("off by one")
            return Report(claims=[Claim("never", expected=1, measured=2, holds=False, source="ours")])

        if __name__ == "__main__":
            try:
                cli.run(main, Config, {"smoke": Config(), "default": Config(), "paper": Config()})
            finally:
                print("jax loaded:", "jax" in sys.modules)
        """)
    )

    def command(*args):
        return dict(
            args=[sys.executable, str(path), *args],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return command


def test_process_with_a_failed_claim_ends_with_0(script, tmp_path):
    done = subprocess.run(**script())
    assert done.returncode == 0, done.stderr
    assert "FAILED  never" in done.stdout
    (folder,) = (tmp_path / "runs" / "counting").iterdir()
    assert Report.load(folder).experiment == "counting"


def test_process_with_a_bug_ends_with_1(script):
    done = subprocess.run(**script("--bug"))
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "IndexError: off by one" in done.stderr
    assert "continue with: python -m experiments.counting --resume runs/counting/" in done.stderr


@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--wiat", 2)])
def test_help_and_bad_flags_do_not_load_jax(script, flag, code):
    done = subprocess.run(**script(flag))
    assert done.returncode == code
    assert "--wait" in done.stdout + done.stderr
    assert "jax loaded: False" in done.stdout


def test_full_disk_stops_before_main(script):
    process = script("--wait")
    process["args"] = ["sh", "-c", 'ulimit -f 0 && exec "$@"', "sh", *process["args"]]  # no file may grow
    done = subprocess.run(**process)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot use the run folder") and done.stderr.count("\n") == 1
    assert "waiting" not in done.stdout


def test_real_ctrl_c(script, tmp_path):
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        pytest.skip("a shell's background job ignores SIGINT, and so do its children")
    process = subprocess.Popen(**script("--wait"))
    while "waiting" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    (folder,) = (tmp_path / "runs" / "counting").iterdir()
    assert f"continue with: python -m experiments.counting --resume runs/counting/{folder.name}" in stderr
    assert "Traceback" not in stderr


def test_two_processes_share_a_run_and_one_reports(script, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = []
    for number in range(2):
        process = script("--run-dir", "shared", "--processes", "2", "--coordinator", address)
        process["env"]["PROCESS"] = str(number)
        processes.append(subprocess.Popen(**process))
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "FAILED  never" in outputs[0][0] and "written: shared/report.md" in outputs[0][0]
    assert outputs[1][0] == "jax loaded: True\n"
    assert {path.name for path in (tmp_path / "shared").iterdir()} == {"config.json", "report.json", "report.md"}
