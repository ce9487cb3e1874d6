"""The `mtrl` commands: parse arguments, call the module that does the work, and convert errors to exit codes.

Imports are inside the functions, so that `--help` and completion start fast.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from mtrl_cli import __version__
from mtrl_cli.cli.output import broken_pipe_ignored, is_first_rank, print_error_of_rank, print_result
from mtrl_cli.errors import RunError, Stopped, UserError

app = typer.Typer(
    help="""Train one Q-network on many tasks, and compare it with independent networks.

\b
Examples:
  mtrl ls env                               list the packs of tasks
  mtrl train env=atari_pack                 train one network on eight Atari games
  mtrl train env=classic_pack --dry-run     print the resolved configuration
  mtrl resume runs/atari_pack/…             resume a run
  mtrl eval runs/atari_pack/… video=true    evaluate a checkpoint and record videos
  mtrl sweep env=classic_pack seed=1,2,3    run a grid or a search, locally or on a cluster
  mtrl study sharing env=minatar_pack       compare sharing structures at equal parameter count
  mtrl transfer runs/classic_pack/… env=…   measure transfer to other tasks
  mtrl report runs/sweeps/…                 write an HTML report
  mtrl compare runs/mine runs/yours         compare two runs
  mtrl bench env=atari_pack                 measure the training speed on this machine

Details: mtrl COMMAND --help.""",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

studies = typer.Typer(help="Run a complete experiment and write its report.", rich_markup_mode=None)
app.add_typer(studies, name="study")

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""Errors of the file system that are reported in one line, without a traceback."""


def _complete_overrides(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    from mtrl_cli.cli import completion

    return completion.complete_word(ctx.info_name or "", ctx.params.get("overrides") or [], incomplete)


def _complete_groups(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    from mtrl_cli.config import options

    return [(name, "") for name in options.groups([options.conf_folder()], None) if name.startswith(incomplete)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides in Hydra's grammar.", autocompletion=_complete_overrides, show_default=False),
]
ListTrials = Annotated[bool, typer.Option("--dry-run", help="List the trials and the progress of started trials.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)]
RunOrCheckpoint = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run or of its checkpoint.", show_default=False)]
RunOrSweep = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run or sweep.", show_default=False)]


@app.callback(invoke_without_command=True)
def _top(ctx: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print_result(f"mtrl {__version__}")
        raise typer.Exit
    _print_help_without_command(ctx)


@studies.callback(invoke_without_command=True)
def _print_help_without_command(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        print_result(ctx.get_help())
        raise typer.Exit


@app.command()
def train(
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and exit.")] = False,
    or_resume: Annotated[bool, typer.Option("--or-resume", help="Resume if run_dir contains a run.")] = False,
) -> None:
    """Train one network on a pack of tasks.

    \b
    GROUP=OPTION chooses an option of a group (see mtrl ls); KEY=VALUE sets a value.
    Step counts are per task. A step is one agent decision in one environment.

    \b
    Examples:
      mtrl train env=atari_pack experiment=quickstart
      mtrl train env=atari_pack network=impala agent.n_step=5 seed=1
      mtrl train env=atari_pack 'env.tasks=[pong,breakout]' steps_per_task=1000000
      mtrl train env=minatar_pack network/sharing=independent
      mtrl train env=classic_pack run_dir=runs/mine --or-resume
      mtrl train env=mine 'hydra.searchpath=[file:///home/me/conf]'
    """
    from mtrl_cli.config import compose

    composed = compose.compose_training(overrides or [])
    if dry_run:
        print_result(compose.dump(composed).rstrip("\n"))
        return
    from mtrl_cli.commands import train

    train.run(composed, command=_command(), or_resume=or_resume)


@app.command()
def resume(run: RunOrSweep, overrides: Overrides = None) -> None:
    """Resume a run or a sweep.

    \b
    On a CPU, a resumed run is bit-identical to an uninterrupted one.
    Run: steps_per_task may be raised; device and trusted_packages may be changed.
    Sweep: sweep.trials may be raised; sweep.retries, launcher= and launcher.* may be changed.

    \b
    Examples:
      mtrl resume runs/atari_pack/2025-01-01_12-00-00_s0
      mtrl resume runs/mine steps_per_task=5000000 device=cuda:1
      mtrl resume runs/sweeps/mine launcher.jobs=2 sweep.trials=100
    """
    if os.path.lexists(run.expanduser() / "sweep.json"):
        from mtrl_cli.sweeps import command

        command.resume(run.expanduser(), overrides or [], command=_command())
        return
    from mtrl_cli.commands import train

    train.resume(run, overrides or [], command=_command())


@app.command()
def sweep(overrides: Overrides = None, dry_run: ListTrials = False) -> None:
    """Train many runs: a grid or a hyperparameter search.

    \b
    Accepts the overrides of mtrl train, with several values per key:
      a,b,c or range(5)      grid: one run per combination
      interval(1e-5,1e-3)    search: sweep.trials runs, chosen by sweep.sampler=tpe|cmaes|gp|random
    sweep.pruner=median|hyperband|halving stops unpromising trials early.
    launcher= selects where runs execute (see mtrl ls launcher); launcher.jobs= limits the number of concurrent runs.

    \b
    A sweep is a folder of runs. To resume a sweep, repeat the command with the same run_dir, or use mtrl resume.
    A second process on the same folder works as a second worker.

    \b
    Examples:
      mtrl sweep env=minatar_pack network/sharing=independent,hard,film 'seed=range(5)' run_dir=runs/sweeps/sharing
      mtrl sweep env=classic_pack 'optimizer.lr=tag(log,interval(1e-5,1e-3))' sweep.trials=50 sweep.pruner=hyperband
      mtrl sweep env=classic_pack agent.n_step=1,3,5 launcher.jobs=2 --dry-run
    """
    from mtrl_cli.sweeps import plan

    planned = plan.make(overrides or [])
    if dry_run:
        from mtrl_cli.sweeps.dry_run import list_sweep

        print_result(list_sweep(planned))
        return
    from mtrl_cli.sweeps import command

    command.run(planned, command=_command())


@app.command()
def transfer(run: RunOrCheckpoint, overrides: Overrides = None, dry_run: ListTrials = False) -> None:
    """Measure transfer from a trained run to other tasks.

    \b
    For each seed: evaluate the source network on the new tasks (zero-shot), fine-tune the source network, and train from scratch with the
    same budget. Then write a report. Overrides: those of mtrl sweep, and seeds=3 (number of seeds). The network is that of the source
    unless network=, network/sharing= or network/head= is given. transfer.* applies to the fine-tuned runs only.
    To resume, repeat the command.

    \b
    Examples:
      mtrl transfer runs/mine env=minatar_pack 'env.tasks=[asterix,seaquest]'
      mtrl transfer runs/mine/checkpoints/best env=classic_pack transfer.freeze=none,torso seeds=5 launcher.jobs=2 --dry-run
    """
    from mtrl_cli.studies import transfer

    _run_study(transfer.make(run, overrides or []), dry_run)


@studies.command("sharing")
def study_sharing(overrides: Overrides = None, dry_run: ListTrials = False) -> None:
    """Compare sharing structures at equal parameter count.

    \b
    Train every structure with several seeds, and two baselines that share nothing: independent networks with the same total number of
    parameters, and independent networks of full width. Then write a report. Overrides: those of mtrl sweep, and:
      seeds=3                  number of seeds
      network/sharing=A,B      only these structures
      network.parameters=N     size of the shared network (default: that of hard sharing)
    To resume, repeat the command.

    \b
    Examples:
      mtrl study sharing env=minatar_pack
      mtrl study sharing env=classic_pack network/sharing=hard,film seeds=5 launcher.jobs=2
      mtrl study sharing env=minatar_pack task_weights=uniform,pcgrad steps_per_task=200000 --dry-run
    """
    from mtrl_cli.studies import sharing

    _run_study(sharing.make(overrides or []), dry_run)


def _run_study(study: Any, dry_run: bool) -> None:
    from mtrl_cli.studies import engine

    print_result(study.listing()) if dry_run else engine.run(study, command=_command())


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUNS", help="Folders of runs, sweeps or studies, or parent folders of runs.", show_default=False),
    ],
) -> None:
    """Write an HTML report of runs.

    \b
    Runs that differ only in their seed form one group. The page is self-contained and works offline.
    Each table is also written as CSV and Markdown, each plot as SVG and PNG.
    The report is written to report/ in the given folder (./report for several folders), or to out=PATH.

    \b
    Examples:
      mtrl report runs/sweeps/mine
      mtrl report runs/minatar_pack out=~/reports/minatar
      mtrl report runs/one runs/another
    """
    from mtrl_cli.reports import command

    paths, out = command.parse(runs)
    command.run(paths, out, command=_command())


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="Folder of the first run.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="Folder of the second run.", show_default=False)],
) -> None:
    """Compare configuration, scores and speed of two runs.

    \b
    Examples:
      mtrl compare runs/mine runs/yours
      mtrl compare runs/sweeps/sharing/trials/0000 runs/sweeps/sharing/trials/0001
    """
    from mtrl_cli.reports import compare

    print_result(compare.compare([first, second]))


@app.command("eval")
def evaluate(run: Run, overrides: Overrides = None) -> None:
    """Evaluate a checkpoint of a run.

    \b
    Scores are printed and written to the run's folder. Overrides:
      checkpoint=latest|best|STEP, video=true, device, trusted_packages,
      eval.episodes, eval.max_steps, eval.epsilon, eval.seed
    All other values come from the run.

    \b
    Examples:
      mtrl eval runs/mine
      mtrl eval runs/mine eval.episodes=100 checkpoint=best
      mtrl eval runs/mine eval.episodes=1 video=true
    """
    from mtrl_cli.config import compose

    options = compose.compose_evaluation(overrides or [])
    from mtrl_cli.commands import eval

    with broken_pipe_ignored():  # the scores are written before they are printed
        eval.run(run, options)


@app.command()
def bench(
    overrides: Overrides = None,
    seconds: Annotated[
        float,
        typer.Option("--seconds", min=0.1, help="Approximate measuring time, without startup and compilation."),
    ] = 15.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the training speed on this machine.

    \b
    Measure emulators, acting and learning separately, then the complete loop, each at least once. Overrides: those of mtrl train.
    The limit of the loop follows from the parts: on a CPU, their times add up; with a GPU, the slower of the two
    sets the limit.
    Nothing is written. run_dir, eval.*, checkpoint.*, log.* and agent.learning_starts have no effect.

    \b
    Examples:
      mtrl bench env=atari_pack
      mtrl bench env=atari_pack network=impala device=cuda
      mtrl bench env=classic_pack --seconds 5 --json
    """
    from mtrl_cli.config import compose

    composed = compose.compose_training(overrides or [])
    from mtrl_cli.commands import bench

    with broken_pipe_ignored():
        bench.run(composed, seconds=seconds, as_json=as_json)


@app.command()
def ls(
    group: Annotated[
        str | None,
        typer.Argument(metavar="GROUP", help="For example env or network/sharing.", autocompletion=_complete_groups, show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="hydra.searchpath; for network groups, any override of mtrl train.", show_default=False),
    ] = None,
) -> None:
    """List the configuration groups, or the options of one group.

    \b
    For network, network/sharing and network/head, the list shows the number of parameters and the multiply-adds of a forward pass.

    \b
    Examples:
      mtrl ls
      mtrl ls env
      mtrl ls network/sharing env=minatar_pack network.parameters=300k
      mtrl ls env 'hydra.searchpath=[file:///home/me/conf]'
    """
    from mtrl_cli.cli import ls

    print_result(ls.run([each for each in (group, *(overrides or [])) if each]))


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Print versions and devices for a bug report."""
    from mtrl_cli.cli import info

    print_result(info.run(as_json))


def _command() -> list[str]:
    return ["mtrl", *sys.argv[1:]]


def main() -> NoReturn:
    """Run the command and exit: 0 done, 1 failed while running, 2 wrong input, 130 and 143 stopped by a signal."""
    code = 1
    try:
        result = typer.main.get_command(app).main(prog_name="mtrl", standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except typer.TyperException as error:
        code = getattr(error, "exit_code", 2)
        print_error_of_rank(_in_one_line(error))
    except (UserError, RunError) as error:
        code = error.exit_code
        if not getattr(error, "is_reported", False):
            print_error_of_rank(str(error))
    except Stopped as stopped:
        code = stopped.exit_code
        if not stopped.is_reported and is_first_rank():
            print("mtrl: stopped; nothing was changed", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        code = RunError.exit_code
        print_error_of_rank(f"{error.filename or 'writing'}: {error.strerror}")
    with broken_pipe_ignored():
        if sys.stdout is not None:  # None if the caller closed it
            sys.stdout.flush()
    sys.exit(code)


def _in_one_line(error: typer.TyperException) -> str:
    context: Any = getattr(error, "ctx", None)
    message = " ".join(error.format_message().split()).rstrip(".")
    return f"{message} (see {context.command_path if context else 'mtrl'} --help)"
