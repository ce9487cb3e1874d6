"""`mtrl train` and `mtrl resume`: one run, from its configuration to its end."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from mtrl_cli import build, evaluator, files, hardware
from mtrl_cli import config as configuration
from mtrl_cli.checkpoint import CheckpointStore, NoCheckpoint
from mtrl_cli.display import Display, evaluation_table
from mtrl_cli.envs.scores import normalised
from mtrl_cli.errors import RunError, Stopped, UserError
from mtrl_cli.logger import Logger
from mtrl_cli.loop import Loop
from mtrl_cli.rundir import RunFolder
from mtrl_cli.signals import StopRequest


def train(config: dict[str, Any], *, command: list[str], or_resume: bool = False) -> None:
    """Train a new run.

    Args:
        config: composed and validated.
        command: the command line, kept with the run.
        or_resume: go on with the run in `run_dir` if there is one.

    Raises:
        UserError: nothing was created. RunError: the run failed. Stopped: by a signal, after saving.
    """
    run_dir = config["run_dir"]
    if or_resume and run_dir is None:
        raise UserError("--or-resume needs run_dir=PATH: which run is it to go on with?")
    if or_resume and RunFolder.is_run(Path(run_dir)):
        resume(Path(run_dir), [], command=command)
        return
    with StopRequest() as stop:
        with stop.interruptible():
            if run_dir is not None:
                RunFolder.check_new(Path(run_dir))
            config = build.settle(config, _say)
            run = _announced(config)
            loop = run.open_loop()
            loop.begin()
            folder = RunFolder.create(Path(run_dir)) if run_dir else RunFolder.create_default(config["env"]["name"], config["seed"])
        with folder:
            folder.write("config.yaml", configuration.dump(config | {"run_dir": str(folder.path)}))
            _Training(folder, config, run, loop, stop, command).work()


def resume(run_path: Path, overrides: list[str], *, command: list[str]) -> None:
    """Go on with a run from its latest whole checkpoint; without one, start it anew from its configuration.

    Args:
        run_path: the run folder.
        overrides: `steps_per_task`, `device` and `trusted_packages` only.
        command: the command line, kept with the run.

    Raises:
        UserError: it is no run, or may not be resumed so. RunError: it failed. Stopped: by a signal, after saving.
    """
    folder, which = RunFolder.open(run_path)
    if which is not None:
        raise UserError(f"{run_path} is a checkpoint; a run is resumed from its latest: mtrl resume {shlex.quote(str(folder.path))}")
    config = configuration.load_run(folder.path, overrides) | {"run_dir": str(folder.path)}
    if any(text.startswith("device=") for text in overrides):
        config["device"] = str(hardware.resolve_device(config["device"]))
    else:
        hardware.resolve_device(config["device"])
    folder.lock()
    with folder, StopRequest() as stop:
        record = folder.read_record()
        store = _store(folder, config)
        store.recover()
        step, state = 0, None
        try:
            step, state = store.load("latest", warn=_say)
        except NoCheckpoint:
            _say(f"{folder.path} has no checkpoint yet: starting it anew")
        if state is not None and record.get("status") == "completed" and step >= config["steps_per_task"]:
            _say(f"{folder.path} is completed ({step:,} steps per task); raise steps_per_task to train on")
            return
        with stop.interruptible():  # until the run goes on, what is on disk stays as it was
            run = _announced(config)
            loop = run.open_loop()
            training = _Training(folder, config, run, loop, stop, command)
            if state is None:
                loop.begin()
            else:
                training.restore(store, step, state)
        folder.write("config.yaml", configuration.dump(config))
        training.work()


def _say(line: str) -> None:
    print(line, flush=True)


def _store(folder: RunFolder, config: dict[str, Any]) -> CheckpointStore:
    return CheckpointStore(folder.checkpoints, keep=config["checkpoint"]["keep"], with_replay=config["checkpoint"]["replay"])


def _announced(config: dict[str, Any]) -> build.Run:
    """Build the run, telling what it is made of and what it takes before it is taken."""
    lines = build.describe(config)
    for line in lines:
        _say(line)
    run = build.make_run(config)
    counts = run.agent.network.parameter_counts()
    own = sorted(set(counts.per_task))
    each = f"{own[0]:,}" if len(own) == 1 else f"{own[0]:,} to {own[-1]:,}"
    _say(f"network: {counts.total:,} parameters, {counts.shared:,} shared and {each} of each task alone")
    return run


class _Training:
    """One process's work on a run.

    Args:
        folder: locked.
        config: kept with the run's figures.
        run, loop: what is trained; the loop has begun or is restored.
        stop: whether a signal has come.
        command: the command line.
    """

    def __init__(self, folder: RunFolder, config: dict[str, Any], run: build.Run, loop: Loop, stop: StopRequest, command: list[str]):
        self.folder, self.config, self.run, self.loop, self.stop, self.command = folder, config, run, loop, stop, command
        self.store = _store(folder, config)
        self.logger: Logger
        self.display: Display
        self.resumed_at: int | None = None
        self.evaluated_at, self.saved_at, self.logged_at = 0, -1, 0
        self.seconds_before, self.began = 0.0, time.perf_counter()
        self.row_began, self.row_excluded = self.began, 0.0
        self.row_step = self.row_updates = 0
        self.summary: dict[str, Any] | None = None

    @property
    def seconds(self) -> float:
        """Seconds of work over all resumes."""
        return self.seconds_before + time.perf_counter() - self.began

    def restore(self, store: CheckpointStore, step: int, state: dict[str, Any]) -> None:
        """Take a checkpoint's state.

        Raises:
            UserError: it is not of this configuration.
        """
        what = f"checkpoint {step} of {self.folder.path}"
        build.check_tasks(state.get("tasks"), self.run.pack, self.folder.path)
        build.load_weights(self.run.agent.network, state, what)
        try:
            rows_restored = store.load_replay(step, self.run.replay)
            self.run.learner.optimizer.load_state_dict(state["optimizer"])
            self.run.agent.load_state_dict(state["agent"])
            self.loop.load_state_dict(state["loop"], rows_restored)
            progress = state["progress"]
            self.evaluated_at, self.logged_at = int(progress["evaluated_at"]), int(progress["logged_at"])
            self.seconds_before = float(progress["seconds"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            first_line = str(error).strip().split("\n")[0]
            raise UserError(f"{what} does not fit its configuration: {first_line}") from error
        self.store, self.resumed_at, self.saved_at = store, step, step
        self.row_step, self.row_updates = self.loop.step, self.run.learner.updates
        _say(f"going on from step {step:,}" + ("" if rows_restored else ", without a replay: gathering anew before learning goes on"))

    def work(self) -> None:
        """Train to the end, a signal or a failure, and write which it was."""
        try:
            self.folder.begin(command=self.command, device=str(self.run.device))
            if self.resumed_at is not None:
                self.store.discard_after(self.resumed_at)
            tasks = [task.name for task in self.run.pack.tasks]
            with closing(Logger(self.folder.path, resume_at=self.resumed_at)) as self.logger:
                with Display(tasks, self.run.intervals.total, self._frames_per_step) as self.display:
                    if self.resumed_at is None:
                        self._log_parameters()
                    self._warm_up()
                    self._train()
                self._finish()
        except Stopped:
            self.folder.finish("stopped", seconds=self.seconds)
            _say(f"stopped at step {self.loop.step:,} and saved; go on with: mtrl resume {shlex.quote(str(self.folder.path))}")
            raise
        except (RunError, UserError, OSError, RuntimeError) as error:
            self.folder.finish("failed", seconds=self.seconds, error=str(error))
            raise
        finally:
            self.loop.pack.close()

    # -- the run ------------------------------------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        if not self.run.compiled:
            return
        self.display.message("compiling the update: seconds where it is cached, a minute where not")
        begun = time.perf_counter()
        try:
            with self.stop.interruptible():
                self.run.learner.warm_up()
        except Stopped:
            if self.saved_at < 0:
                self._save()
            raise
        self.display.message(f"compiled in {time.perf_counter() - begun:.0f} s")

    def _train(self) -> None:
        intervals, ticks = self.run.intervals, self.loop.ticks()
        self.row_began, self.row_excluded = time.perf_counter(), 0.0
        while True:
            step, finished = self.loop.step, self.loop.step >= intervals.total
            if _due(step, self.evaluated_at, intervals.evaluate, finished):
                self._evaluate()
            if _due(step, self.saved_at, intervals.checkpoint, finished):
                self._save()
            if finished:
                return
            if self.stop.received is not None:
                if self.saved_at != step:
                    self._save()
                self.stop.check()
            next(ticks)
            if _due(self.loop.step, self.logged_at, intervals.log, self.loop.step >= intervals.total):
                with self.loop.clock.time("log"):
                    self._log_row()

    def _evaluate(self) -> None:
        step = self.loop.step
        self.run.learner.check_finite()
        self.display.message(f"evaluating at step {step:,}")
        with self._aside():
            try:
                games = self.run.evaluator.play(self.run.agent.network, self.stop.check)
            except Stopped:
                self._save()
                raise
            self.evaluated_at = step
            self.summary = evaluator.summarise(games, self.run.pack, step, str(step))
            self.folder.write(f"eval/{step}.json", files.to_json(self.summary))
            figures = evaluator.figures(self.summary)
            self.logger.row(step, step * self._frames_per_step, self.seconds, self.run.learner.updates, figures)
            self.display.update(step, figures, seconds=self.seconds)
            self._save(evaluator.ranking(self.summary))

    def _save(self, score: float | None = None) -> None:
        self.run.learner.check_finite()
        with self._aside():
            state = {
                "tasks": [task.name for task in self.run.pack.tasks],
                "model": self.run.agent.network.state_dict(),
                "optimizer": self.run.learner.optimizer.state_dict(),
                "agent": self.run.agent.state_dict(),
                "loop": self.loop.state_dict(),
                "progress": {"evaluated_at": self.evaluated_at, "logged_at": self.logged_at, "seconds": self.seconds},
            }
            self.logger.flush()
            self.store.save(self.loop.step, state, self.run.replay, score)
            self.saved_at = self.loop.step

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Leave the time spent inside out of the speed figures."""
        begun, before = time.perf_counter(), self.row_excluded
        yield
        self.row_excluded = before + time.perf_counter() - begun

    # -- figures ------------------------------------------------------------------------------------------------------------

    @property
    def _frames_per_step(self) -> int:
        return self.run.pack.tasks[0].frames_per_step

    def _log_row(self) -> None:
        self.run.learner.check_finite()
        step, updates = self.loop.step, self.run.learner.updates
        now = time.perf_counter()
        seconds = max(1e-9, now - self.row_began - self.row_excluded)
        per_second = (step - self.row_step) * len(self.run.pack.tasks) / seconds
        tasks = self.run.pack.tasks
        figures = self.loop.statistics.row() | self.run.learner.row()
        for task in tasks:
            score = normalised(figures.get(f"train/return/{task.name}", math.nan), task.random_score, task.reference_score)
            if score is not None and math.isfinite(score):
                figures[f"train/score/{task.name}"] = score
        names = [task.name for task in tasks]
        figures |= {f"epsilon/{name}": float(value) for name, value in zip(names, self.run.agent.epsilon(step), strict=True)}
        figures |= {
            "perf/steps_per_second": per_second,
            "perf/frames_per_second": per_second * self._frames_per_step,
            "perf/updates_per_second": (updates - self.row_updates) / seconds,
            "perf/memory": float(hardware.resident_memory()),
        }
        figures |= {f"perf/seconds/{part}": value for part, value in self.loop.clock.read().items()}
        self.logger.row(step, step * self._frames_per_step, self.seconds, updates, figures)
        self.display.update(step, figures, seconds=self.seconds)
        self.logged_at = step
        self.row_began, self.row_excluded, self.row_step, self.row_updates = now, 0.0, step, updates

    def _log_parameters(self) -> None:
        counts = self.run.agent.network.parameter_counts()
        figures = {"parameters/total": float(counts.total), "parameters/shared": float(counts.shared)}
        figures |= {f"parameters/{task.name}": float(count) for task, count in zip(self.run.pack.tasks, counts.per_task, strict=True)}
        self.logger.row(0, 0, self.seconds, 0, figures)

    def _finish(self) -> None:
        final = self.summary or files.read_json(self.folder.evaluations / f"{self.loop.step}.json", self.folder.path)
        self.logger.hyperparameters(dict(configuration.flat(self.config)), evaluator.figures(final), self.loop.step)
        self.folder.finish("completed", seconds=self.seconds)
        self.display.print(evaluation_table(final, self.run.evaluator.max_steps))
        quoted = shlex.quote(str(self.folder.path))
        _say(f"run folder   {self.folder.path}")
        _say(f"look at it   tensorboard --logdir {quoted}")
        _say(f"evaluate     mtrl eval {quoted} eval.episodes=10 video=true")
        for line in build.next_steps(self.config, quoted):
            _say(line)


def _due(step: int, last: int, every: int, finished: bool) -> bool:
    """Whether something that happens every so many steps (0: only at the end) is due at a step, once."""
    if step == last:
        return False
    return finished or (every > 0 and step // every > max(last, 0) // every)
