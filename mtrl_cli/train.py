"""`mtrl train` and `mtrl resume`: one run, from its configuration to its end."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from mtrl_cli import build, evaluator, files, hardware, settling, throughput
from mtrl_cli import config as configuration
from mtrl_cli.checkpoint import CheckpointStore, NoCheckpoint
from mtrl_cli.display import Display, evaluation_table, say
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
        _resume_as_asked(Path(run_dir), config, command)
        return
    with StopRequest() as stop:
        with stop.interruptible():
            if run_dir is not None:
                RunFolder.check_new(Path(run_dir))
            config, run = _prepared(config)
            loop = run.open_loop()
            loop.begin()
            folder = RunFolder.create(Path(run_dir)) if run_dir else RunFolder.create_default(run.pack.name, run.seed)
        with folder:
            folder.write("config.yaml", configuration.dump(config | {"run_dir": str(folder.path)}))
            store = build.make_store(config, folder.checkpoints)
            _Training(folder, config, run, loop, store, stop, command).work()


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
    folder.lock()
    with folder, StopRequest() as stop:
        with stop.interruptible():  # until the run goes on, what is on disk stays as it was
            record, store = folder.read_record(), build.make_store(config, folder.checkpoints)
            store.recover()
            step, state = 0, None
            try:
                step, state = store.load("latest", warn=say)
            except NoCheckpoint:
                lost = "has lost its checkpoints" if record.get("status") == "completed" else "has no checkpoint yet"
                say(f"{folder.path} {lost}: starting it anew")
            if state is not None and record.get("status") == "completed" and step >= config["steps_per_task"]:
                more = f"mtrl resume {shlex.quote(str(folder.path))} steps_per_task={2 * step}"
                say(f"{folder.path} is completed ({step:,} steps per task); to train on: {more}")
                return
            config, run = _prepared(config)
            loop = run.open_loop()
            training = _Training(folder, config, run, loop, store, stop, command)
            if state is None:
                loop.begin()
            else:
                training.restore(step, state)
        folder.write("config.yaml", configuration.dump(config))
        training.work()


def _resume_as_asked(run_path: Path, asked: dict[str, Any], command: list[str]) -> None:
    """`--or-resume` with a run that is there: its own configuration counts, but for what a resume may change."""
    trusted = [f"trusted_packages=[{','.join(asked['trusted_packages'])}]"] if asked["trusted_packages"] else []
    own = dict(configuration.flat(configuration.load_run(run_path, trusted)))
    free = {*_NOT_COMPARED, *settling.scaled_keys(asked)}  # those a budget decides on, as auto would
    wanted = {key: value for key, value in configuration.flat(asked) if value not in ("auto", None) and key not in free}
    overrides = [*trusted]
    if asked["steps_per_task"] > own["steps_per_task"]:
        overrides.append(f"steps_per_task={asked['steps_per_task']}")
    if asked["device"] not in ("auto", own["device"]):
        overrides.append(f"device={asked['device']}")
    given = {override.partition("=")[0] for override in overrides}
    different = [key for key, value in wanted.items() if own.get(key) != value and key not in given]
    if different:
        say(f"{run_path} goes on as it was started; not taken from this command: {', '.join(different)}")
    resume(run_path, overrides, command=command)


def _prepared(config: dict[str, Any]) -> tuple[dict[str, Any], build.Run]:
    """Settle the configuration and build the run, telling what it is made of and what it takes before it is taken."""
    pack = build.make_pack(config)
    config = settling.settle(config, pack, say)
    for line in settling.describe(config, pack):
        say(line)
    return config, build.make_run(config, pack, say)


# What a command and the run that it resumes may differ in without a word.
_NOT_COMPARED = ("run_dir", "device", "trusted_packages")


class _Training:
    """One process's work on a run.

    Args:
        folder: locked.
        config: kept with the run's figures.
        run, loop: what is trained; the loop has begun, or `restore` is called.
        store: the run's checkpoints.
        stop: whether a signal has come.
        command: the command line.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: dict[str, Any],
        run: build.Run,
        loop: Loop,
        store: CheckpointStore,
        stop: StopRequest,
        command: list[str],
    ):
        self.folder, self.config, self.run, self.loop, self.command = folder, config, run, loop, command
        self.store, self.stop = store, stop
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

    def restore(self, step: int, state: dict[str, Any]) -> None:
        """Take a checkpoint's state.

        Raises:
            UserError: it is not of this configuration. RunError: the environments did not repeat themselves.
        """
        what = f"checkpoint {step} of {self.folder.path}"
        build.check_tasks(state.get("tasks"), self.run.pack, self.folder.path)
        build.load_weights(self.run.agent.network, state, what)
        try:
            rows_restored = self.store.load_replay(step, self.run.replay)
            self.run.learner.optimizer.load_state_dict(state["optimizer"])
            self.run.agent.load_state_dict(state["agent"])
            self.loop.load_state_dict(state["loop"], rows_restored)
            progress = state["progress"]
            self.evaluated_at, self.logged_at = int(progress["evaluated_at"]), int(progress["logged_at"])
            self.seconds_before = float(progress["seconds"])
        except (RunError, UserError):
            raise
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            first_line = str(error).strip().split("\n")[0][:200]
            raise UserError(f"{what} does not fit its configuration: {type(error).__name__}: {first_line}") from error
        self.resumed_at = self.saved_at = step
        self.row_step, self.row_updates = self.loop.step, self.run.learner.updates
        say(f"going on from step {step:,}" + ("" if rows_restored else ", without a replay: gathering anew before learning goes on"))

    def work(self) -> None:
        """Train to the end, a signal or a failure, and write which it was."""
        try:
            self.folder.begin(command=self.command, device=str(self.run.device))
            self.store.discard_after(-1 if self.resumed_at is None else self.resumed_at)
            tasks = [task.name for task in self.run.pack.tasks]
            with closing(Logger(self.folder.path, resume_at=self.resumed_at)) as self.logger:
                with Display(tasks, self.run.intervals.total, self._frames_per_step) as self.display:
                    if self.resumed_at is None:
                        self._log_parameters()
                    self._warm_up()
                    self._train()
                self._finish()
        except Stopped as stopped:
            stopped.told = True
            self.folder.finish("stopped", seconds=self.seconds)
            say(f"stopped at step {self.loop.step:,} and saved; go on with: mtrl resume {shlex.quote(str(self.folder.path))}")
            raise
        except Exception as error:
            with suppress(OSError, UserError):  # of a full disk, say: what failed first is what the user must hear
                self.folder.finish("failed", seconds=self.seconds, error=str(error))
            raise
        finally:
            self.loop.close()

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
        seconds = time.perf_counter() - begun
        self.display.message(f"compiled in {seconds:.0f} s")
        step, figures = self.loop.step, {"perf/seconds/compile": seconds}
        self.logger.row(step, step * self._frames_per_step, self.seconds, self.run.learner.updates, figures)

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
            self.display.update(self.loop.step, {}, seconds=self.seconds)
            if _due(self.loop.step, self.logged_at, intervals.log, self.loop.step >= intervals.total):
                with self.loop.clock.time("log"):
                    self._log_row()
            if self.run.diagnostics.due(self.loop.step, self.loop.step >= intervals.total):
                self._diagnose()

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
            self._log_pictures(games)
            self.display.update(step, figures, seconds=self.seconds)
            self._save(evaluator.ranking(self.summary))

    def _save(self, score: float | None = None) -> None:
        self.run.learner.check_finite()
        if not self.folder.config.exists():
            raise RunError(f"{self.folder.path} was removed while the run was working on it: there is nowhere to save")
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
        names = [task.name for task in tasks]
        figures = self.loop.statistics.row() | self.run.learner.row()
        recent = self.loop.statistics.recent()
        for task in tasks:
            if task.name in recent:
                score = normalised(recent[task.name], task.random_score, task.reference_score)
                figures |= {} if score is None else {f"train/score/{task.name}": score}
        figures |= {f"epsilon/{name}": float(value) for name, value in zip(names, self.run.agent.epsilon(step), strict=True)}
        figures |= {
            "perf/steps_per_second": per_second,
            "perf/frames_per_second": per_second * self._frames_per_step,
            "perf/updates_per_second": (updates - self.row_updates) / seconds,
            "perf/memory": float(hardware.resident_memory()),
        }
        spent = self.loop.clock.read()
        figures |= {f"perf/seconds/{part}": value for part, value in spent.items()}
        if self.run.device.type == "cpu":  # a GPU works while the host's clock shows something else: mtrl bench tells
            steps, each = (step - self.row_step) * len(tasks), self.run.learner.steps_per_update * len(tasks)
            figures |= throughput.of_a_row(spent, steps, (updates - self.row_updates) * each, each, per_second)
        self.logger.row(step, step * self._frames_per_step, self.seconds, updates, figures)
        # A row's own episodes are few: the table shows the mean of the last hundred.
        self.display.update(step, figures | {f"train/return/{name}": value for name, value in recent.items()}, seconds=self.seconds)
        self.logged_at = step
        self.row_began, self.row_excluded, self.row_step, self.row_updates = now, 0.0, step, updates

    def _diagnose(self) -> None:
        self.run.learner.check_finite()
        step, begun = self.loop.step, time.perf_counter()
        with self._aside():
            report = self.run.diagnostics.report(step)
            figures = report.figures | {"perf/seconds/diagnostics": time.perf_counter() - begun}
            self.logger.row(step, step * self._frames_per_step, self.seconds, self.run.learner.updates, figures)
            for name, picture in report.pictures.items():
                self.logger.image(name, picture, step)

    def _log_pictures(self, games: evaluator.Games) -> None:
        """For TensorBoard: the spread of each task's returns, and what its first environment shows."""
        step = self.loop.step
        newest_KN = self.loop.newest_frames
        for k, task in enumerate(self.run.pack.tasks):
            self.logger.histogram(f"eval/returns/{task.name}", games.returns[task.name], step)
            if task.observation_shape[0] in (1, 3) and len(task.observation_shape) == 3:
                channels_last = newest_KN[k, 0, : task.observation_shape[0]].movedim(0, -1)
                self.logger.image(f"frame/{task.name}", channels_last.contiguous().cpu().numpy(), step)

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
        trusted = self.config["trusted_packages"]
        also = " " + shlex.quote(f"trusted_packages=[{','.join(trusted)}]") if trusted else ""
        say(f"run folder   {self.folder.path}")
        say(f"look at it   tensorboard --logdir {quoted}")
        say(f"evaluate     mtrl eval {quoted} eval.episodes=10 video=true{also}")
        say(f"train on     mtrl resume {quoted} steps_per_task={2 * self.run.intervals.total}{also}")
        if full := _full_run(self.command):
            say(f"a full run   {full}")


def _full_run(command: list[str]) -> str | None:
    """The command without what made its run a small one; None if there is nothing to leave out."""
    small = ("experiment=", "steps_per_task=", "run_dir=", "agent.learning_starts=", "eval.", "checkpoint.", "log.", "--")
    kept = [word for word in command if not word.startswith(small)]
    shortened = any(word.startswith(("experiment=", "steps_per_task=")) for word in command)
    return shlex.join(kept) if command[1:2] == ["train"] and shortened else None


def _due(step: int, last: int, every: int, finished: bool) -> bool:
    """Whether something that happens every so many steps (0: only at the end) is due at a step, once."""
    if step == last:
        return False
    return finished or (every > 0 and step // every > max(last, 0) // every)
