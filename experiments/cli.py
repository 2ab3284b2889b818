"""The command line of every experiment.

An experiment is a module with a frozen dataclass ``Config`` (a docstring under each field becomes its help), three
presets of it, and ``main(config, run)`` that returns a `claims.Report`::

    PRESETS = {"smoke": Config(steps=2), "default": Config(), "paper": Config(model="gpt2-small", steps=100_000)}

    if __name__ == "__main__":
        cli.run(main, Config, PRESETS)

``--preset`` picks the base and every other flag overrides one field. The configuration is in the run's folder before
JAX starts, and the report when the experiment ends. Exit codes: 0, also when a claim fails; 2 for what the user can
put right (a flag, a folder, a `UserError`), told in one line; 1 with a traceback for any other exception; 130 for
Ctrl-C. A notebook does the same with `start` and `execute`.

With several processes, give all of them the same ``--run-dir`` (later, to continue, the same ``--resume RUN_DIR``):
each calls ``main``, and process 0 alone prints and writes the report. Their configurations must be equal, so the number
of a process is not a field of ``Config``: ``jax.distributed.initialize()`` finds it in the cluster's environment.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import tyro

from experiments import claims

CONFIG_FILE = "config.json"
_NEWEST = "newest"

Preset = Literal["smoke", "default", "paper"]
ConfigT = TypeVar("ConfigT")


class UserError(ValueError):
    """Something that the user can put right; the command line prints the message alone, without a traceback."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Where one run of an experiment lives, whether it continues earlier work there, and its preset."""

    directory: pathlib.Path
    resume: bool
    preset: str


@dataclasses.dataclass(frozen=True)
class _Flags:
    preset: Preset = "default"
    """What the other flags change. smoke: seconds; default: minutes on a CPU; paper: the paper's own setting."""
    runs: pathlib.Path = pathlib.Path("runs")
    """Folder of all runs; this one gets RUNS/EXPERIMENT/TIME."""
    run_dir: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of this run; the same for each process of a multi-process run."""
    resume: Annotated[str | None, tyro.conf.arg(metavar="[RUN_DIR]")] = None
    """Continue a run with the configuration it was started with; by default the newest unfinished one."""


def run(
    main: Callable[[ConfigT, Run], claims.Report],
    config_class: type[ConfigT],
    presets: Mapping[str, ConfigT],
    name: str | None = None,
    args: Sequence[str] | None = None,
) -> claims.Report:
    """Parses the command line (or ``args``), runs ``main``, prints and writes its report, and returns it.

    ``presets`` maps exactly "smoke", "default" and "paper" to a ``config_class``; ``name`` is by default that of the
    file in which ``main`` is defined. Raises SystemExit with the exit codes that the module's docstring lists.
    """
    if set(presets) != set(typing.get_args(Preset)):
        raise ValueError(f"presets must be exactly {typing.get_args(Preset)}, got {tuple(presets)}")
    name = name or pathlib.Path(main.__code__.co_filename).stem
    args = _name_the_newest(sys.argv[1:] if args is None else args)
    try:
        config, this_run = _prepare(config_class, presets, name, args)
    except (ValueError, OSError) as error:
        _fail(error)
    try:
        return execute(main, config, this_run, name)
    except KeyboardInterrupt:
        print(f"\nstopped; continue with: {_resume_command(name, this_run)}", file=sys.stderr)
        raise SystemExit(130) from None
    except UserError as error:
        if not this_run.resume:
            _discard_if_unused(this_run.directory)
        _fail(error)
    except Exception as error:
        error.add_note(f"Once the cause is removed, continue with: {_resume_command(name, this_run)}")
        raise


def start(
    name: str,
    config: Any,
    preset: str = "default",
    runs: str | os.PathLike = "runs",
    run_dir: str | os.PathLike | None = None,
    argv: Sequence[str] = (),
) -> Run:
    """Makes a new run folder, ``runs/name/time`` or ``run_dir``, and writes its ``config.json``.

    Raises TypeError where ``config`` would not come back from JSON as it is, UserError where ``run_dir`` holds
    something else already, OSError where the folder cannot be written.
    """
    stored = claims.to_json(config)
    if _restore(type(config), stored) != config:
        raise TypeError(f"{config} does not survive JSON: use int, float, bool, str, None, pathlib.Path, and tuples or "
                        "frozen dataclasses of these")  # fmt: skip
    directory = _new_directory(pathlib.Path(runs) / name) if run_dir is None else pathlib.Path(run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    mine = {"experiment": name, "preset": preset, "config": stored}
    others = [path.name for path in directory.iterdir() if not path.name.startswith(f".{CONFIG_FILE}")]
    # Another process of this run may have been here first: then its config.json is the only file, and equal.
    if others and (others != [CONFIG_FILE] or not mine.items() <= _read_config(directory).items()):
        raise UserError(f"{directory} holds another run: take a new folder, or --resume {directory} to continue it")
    started = claims.utc_now().isoformat()
    text = json.dumps(mine | {"argv": list(argv), "started": started}, indent=2, allow_nan=False)
    claims.write_atomic(directory / CONFIG_FILE, text + "\n")
    return Run(directory, resume=False, preset=preset)


def execute(main: Callable[[ConfigT, Run], claims.Report], config: ConfigT, this_run: Run, name: str) -> claims.Report:
    """Calls ``main``, completes its report with name, preset, configuration and duration, prints and writes it."""
    begin = time.monotonic()
    report = main(config, this_run)
    if not isinstance(report, claims.Report):
        raise TypeError(f"main must return a Report, got {type(report).__name__}")
    notes = [*report.notes, "resumed: the duration is that of the last session"] if this_run.resume else report.notes
    report = dataclasses.replace(
        report,
        experiment=name,
        preset=this_run.preset,
        config=claims.to_json(config),
        duration=time.monotonic() - begin,
        notes=notes,
    )
    import jax

    if jax.process_index() == 0:
        claims.print_report(report)
        try:
            report.write(this_run.directory)
        except OSError as error:
            raise UserError(f"the report above cannot be written to {this_run.directory}: {error.strerror}") from error
        print(f"written: {this_run.directory / 'report.md'}")
    return report


def _prepare(config_class: type[ConfigT], presets: Mapping[str, ConfigT], name: str, args: Sequence[str]):
    """The configuration and the run that the command line asks for."""
    prog = f"python -m experiments.{name}"
    flags, rest = tyro.cli(_Flags, args=args, return_unknown_args=True, add_help=False, prog=prog)

    def everything(
        flags: Annotated[_Flags, tyro.conf.arg(name="")],
        config: Annotated[config_class, tyro.conf.arg(name="")] = presets[flags.preset],
    ):
        return config

    asks_for_help = "-h" in rest or "--help" in rest
    if flags.resume is None or asks_for_help:
        config = tyro.cli(everything, args=args, prog=prog, description=config_class.__doc__)
        this_run = start(name, config, flags.preset, flags.runs, flags.run_dir, args)
    else:
        given = [arg for arg in args if arg.partition("=")[0].replace("_", "-") in ("--preset", "--run-dir")]
        if given or rest:
            raise UserError(f"--resume takes the stored configuration: leave out {' '.join([*given, *rest])}")
        config, this_run = _reopen(config_class, name, flags.runs, flags.resume)
    if flags.run_dir is None and flags.resume in (None, _NEWEST):  # else several processes may each say this
        shown = " ".join(f"{key}={value}" for key, value in claims.to_json(config).items())
        print(f"{name}, preset {this_run.preset}: {shown}\nrun folder: {this_run.directory}", flush=True)
    return config, this_run


def _reopen(config_class: type[ConfigT], name: str, runs: pathlib.Path, resume: str) -> tuple[ConfigT, Run]:
    if resume == _NEWEST:
        folders = [path.parent for path in (runs / name).glob(f"*/{CONFIG_FILE}")]
        unfinished = [folder for folder in folders if not (folder / claims.REPORT_FILE).exists()]
        if not unfinished:
            raise UserError(f"no unfinished run of {name} under {runs / name}")
        directory = max(unfinished, key=lambda folder: _read_config(folder)["started"])
    else:
        directory = pathlib.Path(resume)
        if not (directory / CONFIG_FILE).is_file():
            raise UserError(f"{directory} is not the folder of a run: it has no {CONFIG_FILE}")
        if (directory / claims.REPORT_FILE).exists():
            raise UserError(f"{directory} is finished: it has a {claims.REPORT_FILE}")
    stored = _read_config(directory)
    if stored["experiment"] != name:
        raise UserError(f"{directory} is a run of {stored['experiment']}, not of {name}")
    config = _restore(config_class, stored["config"])
    return config, Run(directory, resume=True, preset=stored["preset"])


def _read_config(directory: pathlib.Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if {"experiment", "preset", "config", "started"} <= stored.keys():
            return stored
    except (ValueError, AttributeError):
        pass
    raise UserError(f"{path} was not written by an experiment")


def _restore(hint: Any, value: Any) -> Any:
    """What was stored as JSON, as the type that its annotation names."""
    if typing.get_origin(hint) is Annotated:
        return _restore(typing.get_args(hint)[0], value)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        choices = [choice for choice in typing.get_args(hint) if choice is not types.NoneType]
        return None if value is None else _restore(choices[0] if len(choices) == 1 else Any, value)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        names = {field.name for field in dataclasses.fields(hint)}
        if value.keys() != names:
            raise UserError(f"the stored configuration differs from {hint.__name__} in {sorted(value.keys() ^ names)}: "
                            "it is from another version of the code, start a new run")  # fmt: skip
        hints = typing.get_type_hints(hint, include_extras=True)
        return hint(**{key: _restore(hints[key], item) for key, item in value.items()})
    if isinstance(value, list):
        item_hints = [item for item in typing.get_args(hint) if item is not Ellipsis]
        if len(item_hints) != len(value):
            item_hints = [item_hints[0] if item_hints else Any] * len(value)
        return tuple(_restore(item_hint, item) for item_hint, item in zip(item_hints, value, strict=True))
    if isinstance(hint, type) and issubclass(hint, float | pathlib.PurePath):
        return hint(value)
    return value


def _new_directory(parent: pathlib.Path) -> pathlib.Path:
    parent.mkdir(parents=True, exist_ok=True)
    while True:  # until the clock shows a time that no other run has
        directory = parent / claims.utc_now().strftime("%Y%m%dT%H%M%S.%fZ")
        try:
            directory.mkdir()
            return directory
        except FileExistsError:
            continue


def _name_the_newest(args: Sequence[str]) -> list[str]:
    """A bare ``--resume`` becomes ``--resume newest``: tyro knows no flag whose value may be left out."""
    named = []
    for arg, following in zip(args, [*args, "-"][1:], strict=True):
        named += [arg, _NEWEST] if arg == "--resume" and following.startswith("-") else [arg]
    return named


def _discard_if_unused(directory: pathlib.Path) -> None:
    """Removes a run that never got anywhere, so that a bare ``--resume`` does not find it."""
    with contextlib.suppress(FileNotFoundError):  # another process of this run was faster
        if [path.name for path in directory.iterdir()] == [CONFIG_FILE]:
            (directory / CONFIG_FILE).unlink()
            directory.rmdir()


def _resume_command(name: str, this_run: Run) -> str:
    return f"python -m experiments.{name} --resume {this_run.directory}"


def _fail(error: Exception) -> NoReturn:
    message = f"cannot use the run folder: {error}" if isinstance(error, OSError) else str(error)
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2) from None
