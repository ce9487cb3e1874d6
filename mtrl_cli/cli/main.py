"""The command line: parses, hands over, and turns what went wrong into a line and an exit code. Imports lazily, decides nothing."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from mtrl_cli import __version__
from mtrl_cli.cli.output import is_first, reader_may_leave, show, tell_error
from mtrl_cli.errors import RunError, Stopped, UserError

app = typer.Typer(
    help="""One Q-network learns many games, and tells you what sharing it cost and gained.

\b
Examples:
  mtrl ls env                               what there is to learn
  mtrl train env=atari_pack                 eight Atari games, one network
  mtrl train env=classic_pack --dry-run     the configuration of a run, without running it
  mtrl resume runs/atari_pack/…             go on where a run stopped
  mtrl eval runs/atari_pack/… video=true    play whole games with what was learned
  mtrl sweep env=classic_pack seed=1,2,3    many runs: grids and searches, here or on a cluster
  mtrl study sharing env=minatar_pack       what sharing the network is worth, on one page
  mtrl transfer runs/classic_pack/… env=…   what was learned, used again for other tasks
  mtrl compare runs/mine runs/yours         two runs side by side
  mtrl bench env=atari_pack                 how fast this machine trains, and what holds it back

Every command tells more: mtrl train --help.""",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

studies = typer.Typer(help="Many runs that answer one question, then the report.", rich_markup_mode=None, no_args_is_help=True)
app.add_typer(studies, name="study")

QUIET_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""What the disk may do to a run: the user's to repair, so a line says it all."""


def _completions(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    from mtrl_cli.cli import completion

    command = ctx.info_name or ""
    typed = completion.words_of_bash()
    if typed is None:
        return completion.complete(command, ctx.params.get("overrides") or [], incomplete)
    given, word = typed
    before = word[: len(word) - len(incomplete)]  # bash keeps what stands before its own word
    return [(found.removeprefix(before), line) for found, line in completion.complete(command, given, word)]


def _groups(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    from mtrl_cli.config import options as catalogue

    return [(name, "") for name in catalogue.groups([catalogue.conf_folder()], None) if name.startswith(incomplete)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="What to set, in Hydra's grammar.", autocompletion=_completions, show_default=False),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.", show_default=False)]


@app.callback(invoke_without_command=True)
def _top(ctx: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        show(f"mtrl {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        show(ctx.get_help())
        raise typer.Exit


@app.command()
def train(
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and exit.")] = False,
    or_resume: Annotated[bool, typer.Option("--or-resume", help="Go on with run_dir if a run is there already.")] = False,
) -> None:
    """Train one network on a pack of tasks.

    \b
    Choose an option of a group with GROUP=OPTION (mtrl ls), set a value with KEY=VALUE.
    Counts of steps are per task; a step is one decision in one environment.

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
        show(compose.dump(composed).rstrip("\n"))
        return
    from mtrl_cli.commands.train import train as run

    run(composed, command=_command(), or_resume=or_resume)


@app.command()
def resume(run: Run, overrides: Overrides = None) -> None:
    """Go on with a run that stopped, exactly as if it had not; or with a sweep.

    \b
    A run's configuration stays; steps_per_task may be raised, device and trusted_packages may be given.
    A sweep's trials stay; launcher=, launcher.* and sweep.retries may be given, sweep.trials may be raised.

    \b
    Examples:
      mtrl resume runs/atari_pack/2025-01-01_12-00-00_s0
      mtrl resume runs/mine steps_per_task=5000000 device=cuda:1
      mtrl resume runs/sweeps/mine launcher.jobs=2 sweep.trials=100
    """
    if os.path.lexists(run.expanduser() / "sweep.json"):
        from mtrl_cli.sweeps.command import go_on as go_on_with_sweep

        go_on_with_sweep(run.expanduser(), overrides or [], command=_command())
        return
    from mtrl_cli.commands.train import resume as go_on

    go_on(run, overrides or [], command=_command())


@app.command()
def sweep(
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would run, and how far it is and how long it took where it has begun.")
    ] = False,
) -> None:
    """Train many runs: seeds, structures, weights, learning rates.

    \b
    Takes what mtrl train takes, and several values of a key: a grid of a,b,c and range(5), or, of intervals, sweep.trials of them that
    a sampler chooses (sweep.sampler=tpe|cmaes|gp|random). sweep.pruner=median|hyperband|halving ends trials that promise nothing.
    A sweep is a folder of runs. The same command with its run_dir, or mtrl resume, goes on where it was; a second one at the same time
    is a second worker. launcher= says where runs are worked on (mtrl ls launcher), launcher.jobs= how many at a time.

    \b
    Examples:
      mtrl sweep env=minatar_pack network/sharing=independent,hard,film 'seed=range(5)' run_dir=runs/sweeps/sharing
      mtrl sweep env=classic_pack 'optimizer.lr=tag(log,interval(1e-5,1e-3))' sweep.trials=50 sweep.pruner=hyperband
      mtrl sweep env=classic_pack agent.n_step=1,3,5 launcher.jobs=2 --dry-run
    """
    from mtrl_cli.sweeps import plan as sweep_plan

    plan = sweep_plan.make(overrides or [])
    if dry_run:
        from mtrl_cli.sweeps import dry_run as sweep_listing

        show(sweep_listing.list_sweep(plan))
        return
    from mtrl_cli.sweeps.command import sweep as run

    run(plan, command=_command())


StudyDryRun = Annotated[bool, typer.Option("--dry-run", help="List the trials, with their progress where the study has begun.")]


@app.command()
def transfer(run: Run, overrides: Overrides = None, dry_run: StudyDryRun = False) -> None:
    """Fine-tune a run's network on other tasks and compare with training from scratch.

    \b
    A study: a sweep of fine-tuned runs and runs from scratch over seeds, then the report, with zero-shot scores, jump-start, steps to the
    final score of training from scratch and area ratio. Takes what mtrl sweep takes (launcher=, run_dir=), and seeds=3. The network is the
    source's unless network=, network/sharing= or network/head= is given; transfer.* applies to the fine-tuned runs. If it is stopped, the
    same command resumes.

    \b
    Examples:
      mtrl transfer runs/mine env=minatar_pack 'env.tasks=[asterix,seaquest]'
      mtrl transfer runs/mine/checkpoints/best env=classic_pack transfer.freeze=torso seeds=5 run_dir=runs/transfer/mine
      mtrl transfer runs/mine env=minatar_pack transfer.freeze=none,torso launcher.jobs=2 --dry-run
    """
    from mtrl_cli.studies import transfer as transfer_study

    _study(transfer_study.make(run, overrides or []), dry_run)


@studies.command("sharing")
def study_sharing(overrides: Overrides = None, dry_run: StudyDryRun = False) -> None:
    """Compare sharing architectures at equal parameter count, over seeds, then write the report.

    \b
    The baselines are independent networks: of the same total size, and one full network per task. Takes what mtrl sweep takes (launcher=,
    run_dir=, several values of other keys to compare each structure with), seeds=3, network/sharing=NAME,NAME for some structures only, and
    network.parameters=N; the default is the parameter count of hard sharing. If it is stopped, the same command resumes.

    \b
    Examples:
      mtrl study sharing env=minatar_pack
      mtrl study sharing env=classic_pack network/sharing=hard,film seeds=5 launcher.jobs=2
      mtrl study sharing env=minatar_pack task_weights=uniform,pcgrad steps_per_task=200000 --dry-run
    """
    from mtrl_cli.studies import sharing as sharing_study

    _study(sharing_study.make(overrides or []), dry_run)


def _study(study: Any, dry_run: bool) -> None:
    from mtrl_cli.studies import engine

    if dry_run:
        show(study.listing())
    else:
        engine.run(study, command=_command())


@app.command()
def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUNS...", help="Folders of runs, sweeps or studies, or any with runs below.", show_default=False)
    ],
) -> None:
    """Make one page of what runs have reached, with its metrics beside it.

    \b
    Runs that differ in their seeds alone are put together. The page works from its file and loads nothing from a network; each table is
    there as CSV and Markdown, each picture as SVG and PNG. It lies in report/ of the folder given, or in out=PATH; of several folders in
    ./report.

    \b
    Examples:
      mtrl report runs/sweeps/mine
      mtrl report runs/minatar_pack out=~/reports/minatar
      mtrl report runs/one runs/another
    """
    from mtrl_cli.reports import command as procedure

    paths, out = procedure.parse(runs)
    procedure.report(paths, out, command=_command())


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="The one run's folder.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="The other's.", show_default=False)],
) -> None:
    """Show two runs side by side: what was chosen differently, what they score, how fast they were.

    \b
    Examples:
      mtrl compare runs/mine runs/yours
      mtrl compare runs/sweeps/sharing/trials/0000 runs/sweeps/sharing/trials/0001
    """
    from mtrl_cli.reports.compare import compare as side_by_side

    show(side_by_side([first, second]))


@app.command("eval")
def evaluate(run: Run, overrides: Overrides = None) -> None:
    """Play whole games with what a run has learned.

    \b
    The scores go into the run's folder. What can be set: eval.episodes, eval.max_steps, eval.epsilon, eval.seed, video=true,
    checkpoint=latest|best|STEP, device, trusted_packages. The rest is as in the run.

    \b
    Examples:
      mtrl eval runs/mine
      mtrl eval runs/mine eval.episodes=100 checkpoint=best
      mtrl eval runs/mine eval.episodes=1 video=true
    """
    from mtrl_cli.config import compose

    options = compose.compose_evaluation(overrides or [])
    from mtrl_cli.commands.eval import evaluate_run

    with reader_may_leave():  # what it prints comes last: the scores are written by then
        evaluate_run(run, options)


@app.command()
def bench(
    overrides: Overrides = None,
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds", min=0.1, help="About how long to measure, besides starting and compiling; a round does each part once at least."
        ),
    ] = 15.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure how fast a run would be on this machine, part by part, and how near its limit.

    \b
    Takes what mtrl train takes, and measures the emulators alone, acting alone, learning alone and the whole loop. The limit follows
    from the parts: where they share the same cores their times add up; with a GPU the slower side decides.
    Nothing is kept or waited for: run_dir, eval.*, checkpoint.*, log.* and agent.learning_starts must be valid, and change nothing.

    \b
    Examples:
      mtrl bench env=atari_pack
      mtrl bench env=atari_pack network=impala device=cuda
      mtrl bench env=classic_pack --seconds 5 --json
    """
    from mtrl_cli.config import compose

    composed = compose.compose_training(overrides or [])
    from mtrl_cli.commands.bench import bench as measure

    with reader_may_leave():
        measure(composed, seconds=seconds, as_json=as_json)


@app.command()
def ls(
    group: Annotated[
        str | None, typer.Argument(metavar="[GROUP]", help="Such as env or network/sharing.", autocompletion=_groups, show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Folders of your own; for a network's sizes, any of a run.", show_default=False),
    ] = None,
) -> None:
    """List what there is to choose: the groups, or the options of one.

    \b
    network, network/sharing and network/head tell the parameters of each and the multiply-adds of a forward.

    \b
    Examples:
      mtrl ls
      mtrl ls env
      mtrl ls network/sharing env=minatar_pack network.parameters=300k
      mtrl ls env 'hydra.searchpath=[file:///home/me/conf]'
    """
    from mtrl_cli.cli import ls as listing

    words = [word for word in (group, *(overrides or [])) if word]
    show(listing.list_words(words))


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions and devices, for bug reports."""
    import json

    from mtrl_cli.cli import info as facts

    collected = facts.collect()
    show(json.dumps(collected, indent=2) if as_json else facts.as_text(collected))


def _command() -> list[str]:
    return ["mtrl", *sys.argv[1:]]


def main() -> NoReturn:
    """The entry point of `mtrl`: run the command, and exit with what the design promises."""
    code = 1
    try:
        result = typer.main.get_command(app).main(prog_name="mtrl", standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except typer.TyperException as error:  # the parser's own
        code = tell_error(_in_one_line(error), getattr(error, "exit_code", 2))
    except (UserError, RunError) as error:
        code = tell_error(str(error), error.exit_code, is_ours=getattr(error, "is_ours_to_tell", False))
    except Stopped as stopped:
        code = stopped.exit_code
        if not stopped.told and is_first():
            print("mtrl: stopped; nothing was changed", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except OSError as error:
        if error.errno not in QUIET_ERRORS:
            raise
        code = tell_error(f"{error.filename or 'writing'}: {error.strerror}", RunError.exit_code)
    with reader_may_leave():
        if sys.stdout is not None:  # closed before we began
            sys.stdout.flush()
    sys.exit(code)


def _in_one_line(error: typer.TyperException) -> str:
    context: Any = getattr(error, "ctx", None)
    message = " ".join(error.format_message().split()).rstrip(".")
    return f"{message} (see {context.command_path if context else 'mtrl'} --help)"
