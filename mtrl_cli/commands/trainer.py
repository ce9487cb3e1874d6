"""One process's work on a run: everything that happens to the loop from outside."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import numpy as np

from mtrl_cli.build import network as build_network
from mtrl_cli.build import run as build_run
from mtrl_cli.checkpoints.store import CheckpointStore
from mtrl_cli.commands import final_test
from mtrl_cli.commands.next_steps import print_next_steps, resume_command
from mtrl_cli.config import compose
from mtrl_cli.envs.scores import normalised
from mtrl_cli.errors import RanksLost, RunError, Stopped, UserError
from mtrl_cli.files import atomic
from mtrl_cli.machine import hardware
from mtrl_cli.parallel.distributed import Ranks
from mtrl_cli.runs.metrics_logger import Logger, NullLogger
from mtrl_cli.runs.progress import Display, NullDisplay, evaluation_table
from mtrl_cli.runs.run_dir import RunFolder
from mtrl_cli.runs.stop_signal import StopRequest
from mtrl_cli.runs.terminal import print_line
from mtrl_cli.training import evaluator, throughput
from mtrl_cli.training.loop import Loop


class Trainer:
    """One process's work on a run.

    Args:
        folder: locked.
        config: kept with the run's metrics.
        run, loop: what is trained; the loop has begun, or `restore` is called.
        store: the run's checkpoints.
        stop: whether a signal has come.
        command: the command line.
        ranks: that train together, all in step: the first writes, logs and evaluates.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: dict[str, Any],
        run: build_run.Run,
        loop: Loop,
        store: CheckpointStore,
        stop: StopRequest,
        command: list[str],
        ranks: Ranks,
    ):
        self.folder, self.config, self.run, self.loop, self.command = folder, config, run, loop, command
        self.store, self.stop, self.ranks = store, stop, ranks
        self.logger: NullLogger
        self.display: Display | NullDisplay
        self.resumed_at: int | None = None
        self.evaluated_at, self.saved_at, self.logged_at = -1 if run.intervals.evaluate_at_start else 0, -1, 0
        self.seconds_before, self.began = 0.0, time.perf_counter()
        self.row_began, self.row_excluded = self.began, 0.0
        self.row_step = self.row_updates = 0
        self.summary: dict[str, Any] | None = None
        self.test: dict[str, Any] | None = None

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
        build_run.check_tasks(state.get("tasks"), self.run.pack, self.folder.path)
        build_network.load_weights(self.run.agent.network, state, what)
        try:
            rows_restored = self.store.load_replay(step, self.run.replay)
            self.run.learner.optimizer.load_state_dict(state["optimizer"])
            self.run.agent.load_state_dict(state["agent"])
            self.loop.load_state_dict(self._of_this_rank(state), rows_restored)
            progress = state["progress"]
            self.evaluated_at, self.logged_at = int(progress["evaluated_at"]), int(progress["logged_at"])
            self.seconds_before = float(progress["seconds"])
            self._restore_early_stopping(progress)
        except (RunError, UserError):
            raise
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            first_line = str(error).strip().split("\n")[0][:200]
            raise UserError(f"{what} does not fit its configuration: {type(error).__name__}: {first_line}") from error
        self.resumed_at = self.saved_at = step
        self.row_step, self.row_updates = self.loop.step, self.run.learner.updates
        print_line(f"going on from step {step:,}" + ("" if rows_restored else ", without a replay: gathering anew before learning goes on"))

    def _restore_early_stopping(self, progress: dict[str, Any]) -> None:
        early_stopping = self.run.early_stopping
        if early_stopping.metric is None or "early_stopping" not in progress:
            return
        early_stopping.load_state_dict(progress["early_stopping"])
        if early_stopping.stopped and int(progress["total"]) < self.run.intervals.total:
            early_stopping.begin_anew()

    def _of_this_rank(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of the loop that this rank saved, of a checkpoint's."""
        first: dict[str, Any] = state["loop"]
        if self.ranks.is_first:
            return first
        mine: dict[str, Any] = state["others"][str(self.ranks.rank)]["loop"]
        return mine | {"learner": mine["learner"] | {"task_weights": first["learner"]["task_weights"]}}

    def work(self) -> None:
        """Train to the end, a signal or a failure, and write which it was."""
        self.ranks.at_loss = self._bury
        try:
            with self.ranks.together():
                if self.ranks.is_first:
                    self.folder.begin(command=self.command, device=str(self.run.device))
                    self.store.discard_after(-1 if self.resumed_at is None else self.resumed_at)
                self.logger = Logger(self.folder.path, resume_at=self.resumed_at) if self.ranks.is_first else NullLogger()
            with closing(self.logger):
                with self._make_display() as self.display:
                    if self.resumed_at is None:
                        self._log_parameters()
                    self._warm_up()
                    self._train()
                    self._test()
                if self.ranks.is_first:
                    self._finish()
            self._part()
        except Stopped as stopped:
            stopped.told = True
            self.folder.finish("stopped", seconds=self.seconds)
            print_line(f"stopped at step {self.loop.step:,} and saved; go on with: {resume_command(self.folder, self.ranks.size)}")
            self._part()
            raise
        except RanksLost as lost:
            told = RanksLost(
                f"{lost}\nThe run has failed at step {self.loop.step:,}; go on from its last checkpoint with: "
                f"{resume_command(self.folder, self.ranks.size)}"
            )
            told.is_ours_to_tell = self._bury(str(lost))
            raise told from None
        except Exception as error:
            with suppress(OSError, UserError):  # of a full disk, say: what failed first is what the user must hear
                self.folder.finish("failed", seconds=self.seconds, error=str(error))
            raise
        finally:
            self.loop.close()

    def _make_display(self) -> Display | NullDisplay:
        tasks = [task.name for task in self.run.pack.tasks]
        return Display(tasks, self.run.intervals.total, self._frames_per_step) if self.ranks.is_first else NullDisplay()

    def _part(self) -> None:
        """End together: torchrun ends the others where one ends by a signal, and the first must have written and said all by then."""
        with suppress(RanksLost):
            self.ranks.wait()

    def _bury(self, line: str) -> bool:
        """Write that the run failed for want of another rank; returns whether it is for this rank to tell."""
        with suppress(OSError, UserError):
            return self.folder.mark_failed(seconds=self.seconds, error=line)
        return self.ranks.is_first

    # -- the run ------------------------------------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        if not self.run.compiled:
            return
        self.display.message("compiling the update: seconds where it is cached, a minute where not")
        begun = time.perf_counter()
        with suppress(Stopped), self.stop.interruptible():  # whoever asked to stop is heard in a moment, with the other ranks
            self.run.learner.warm_up()
            seconds = time.perf_counter() - begun
            self.display.message(f"compiled in {seconds:.0f} s")
            step, metrics = self.loop.step, {"perf/seconds/compile": seconds}
            self.logger.row(step, step * self._frames_per_step, self.seconds, self.run.learner.updates, metrics)

    def _train(self) -> None:
        intervals, ticks = self.run.intervals, self.loop.ticks()
        self.row_began, self.row_excluded = time.perf_counter(), 0.0
        while True:
            step, finished = self.loop.step, self.loop.step >= intervals.total
            if self.evaluated_at < 0 or _due(step, self.evaluated_at, intervals.evaluate, finished):
                self._evaluate()
            finished = finished or self.run.early_stopping.stopped
            if _due(step, self.saved_at, intervals.checkpoint, finished):
                self._save()
            if finished:
                return
            # A signal comes to each rank at another moment, or to one alone.
            if asked := self.ranks.largest(self.stop.received or 0):
                if self.saved_at != step:
                    self._save()
                raise Stopped(asked)
            stage = self.run.learner.freezing.stage
            next(ticks)
            for thaw in range(stage, self.run.learner.freezing.stage):
                self.display.message(self.run.learner.freezing.what_thawed(thaw + 1))
            self.display.update(self.loop.step, {}, seconds=self.seconds)
            if _due(self.loop.step, self.logged_at, intervals.log, self.loop.step >= intervals.total):
                with self.loop.clock.time("log"):
                    self._log_row()
            if self.ranks.is_first and self.run.diagnostics.due(self.loop.step, self.loop.step >= intervals.total):
                self._diagnose()

    def _evaluate(self) -> None:
        step = self.loop.step
        self.run.learner.check_finite()
        self.display.message(f"evaluating at step {step:,}")
        with self._aside():
            asked, score, metric = self.ranks.from_first(self._play() if self.ranks.is_first else None)
            if asked:
                self._save()
                raise Stopped(asked)
            self.evaluated_at = step
            self.run.early_stopping.hear(step, metric)
            self._save(score)

    def _play(self) -> tuple[int, float | None, float | None]:
        """The validation's games: which signal ended them (0: none), the score by which checkpoints are compared, and early stopping's."""
        step = self.loop.step
        try:
            games = self.run.evaluator.play(self.run.agent.network, self.stop.check)
        except Stopped as stopped:
            return stopped.signal_number, None, None
        self.summary = evaluator.summarise(games, self.run.pack, step, str(step), seed=self.run.evaluator.seed)
        self.folder.write(f"eval/{step}.json", atomic.to_json(self.summary))
        metrics = evaluator.metrics(self.summary)
        self.logger.row(step, step * self._frames_per_step, self.seconds, self.run.learner.updates, metrics)
        self._log_pictures(games)
        self.display.update(step, metrics, seconds=self.seconds)
        return 0, evaluator.ranking(self.summary), metrics.get(self.run.early_stopping.metric or "")

    def _test(self) -> None:
        """What the last network and the best reach in games by which nothing was chosen. All is saved by now: a resume tests again."""
        if self.run.early_stopping.stopped and self.loop.step < self.run.intervals.total:
            self.display.message(f"stopped early at step {self.loop.step:,}: {self.run.early_stopping.reason}")
        if self.run.tester is None:
            return
        self.display.message(f"testing at step {self.loop.step:,}")
        if asked := self.ranks.from_first(self._play_test(self.run.tester) if self.ranks.is_first else None):
            raise Stopped(asked)

    def _play_test(self, tester: evaluator.Evaluator) -> int:
        """The test's games: which signal ended them (0: none)."""
        step = self.loop.step
        try:
            self.test = final_test.play(tester, self.run.agent.network, self.store, step, self.stop.check)
        except Stopped as stopped:
            return stopped.signal_number
        self.folder.write(final_test.FILE, atomic.to_json(self.test))
        self.logger.row(step, step * self._frames_per_step, self.seconds, self.run.learner.updates, final_test.metrics(self.test))
        return 0

    def _save(self, score: float | None = None) -> None:
        self.run.learner.check_finite()
        with self.ranks.together():
            if self.ranks.is_first and not self.folder.config.exists():
                raise RunError(f"{self.folder.path} was removed while the run was working on it: there is nowhere to save")
        with self._aside():
            self.logger.flush()
            self.store.save(self.loop.step, self._state(), self.run.replay, score)
            self.saved_at = self.loop.step

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds. The other ranks give what they have played; what was learned is the same on all."""
        if self.ranks.is_first:
            return {
                "tasks": [task.name for task in self.run.pack.tasks],
                "model": self.run.agent.network.state_dict(),
                "optimizer": self.run.learner.optimizer.state_dict(),
                "agent": self.run.agent.state_dict(),
                "loop": self.loop.state_dict(),
                "progress": {
                    "evaluated_at": self.evaluated_at,
                    "logged_at": self.logged_at,
                    "seconds": self.seconds,
                    "total": self.run.intervals.total,
                    "early_stopping": self.run.early_stopping.state_dict(),
                },
            }
        return {"loop": self.loop.own_state_dict()}

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Leave the time spent inside out of the speed metrics."""
        begun, before = time.perf_counter(), self.row_excluded
        yield
        self.row_excluded = before + time.perf_counter() - begun

    # -- metrics ------------------------------------------------------------------------------------------------------------

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
        metrics = self.loop.statistics.row(self.ranks.total) | self.run.learner.row()
        recent = self.loop.statistics.recent(self.ranks.total)
        for task in tasks:
            if task.name in recent:
                score = normalised(recent[task.name], task.random_score, task.reference_score)
                metrics |= {} if score is None else {f"train/score/{task.name}": score}
        metrics |= {f"epsilon/{name}": float(value) for name, value in zip(names, self.run.agent.epsilon(step), strict=True)}
        metrics |= {
            "perf/steps_per_second": per_second,
            "perf/frames_per_second": per_second * self._frames_per_step,
            "perf/updates_per_second": (updates - self.row_updates) / seconds,
            "perf/memory": float(self.ranks.total(np.array(hardware.resident_memory()))),
        }
        spent = self.loop.clock.read()
        metrics |= {f"perf/seconds/{part}": value for part, value in spent.items()}
        if self.run.device.type == "cpu":  # a GPU works while the host's clock shows something else: mtrl bench tells
            steps, each = (step - self.row_step) * len(tasks), self.run.learner.steps_per_update * len(tasks)
            metrics |= throughput.of_a_row(spent, steps, (updates - self.row_updates) * each, each, per_second)
        self.logger.row(step, step * self._frames_per_step, self.seconds, updates, metrics)
        # A row's own episodes are few: the table shows the mean of the last hundred.
        self.display.update(step, metrics | {f"train/return/{name}": value for name, value in recent.items()}, seconds=self.seconds)
        self.logged_at = step
        self.row_began, self.row_excluded, self.row_step, self.row_updates = now, 0.0, step, updates

    def _diagnose(self) -> None:
        self.run.learner.check_finite()
        step, begun = self.loop.step, time.perf_counter()
        with self._aside():
            report = self.run.diagnostics.report(step)
            metrics = report.metrics | {"perf/seconds/diagnostics": time.perf_counter() - begun}
            self.logger.row(step, step * self._frames_per_step, self.seconds, self.run.learner.updates, metrics)
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
        metrics = {"parameters/total": float(counts.total), "parameters/shared": float(counts.shared)}
        metrics |= {f"parameters/{task.name}": float(count) for task, count in zip(self.run.pack.tasks, counts.per_task, strict=True)}
        self.logger.row(0, 0, self.seconds, 0, metrics)

    def _finish(self) -> None:
        final = self.summary or atomic.read_json(self.folder.evaluations / f"{self.loop.step}.json", self.folder.path)
        metrics = evaluator.metrics(final) | (final_test.metrics(self.test) if self.test else {})
        self.logger.hyperparameters(dict(compose.flat(self.config)), metrics, self.loop.step)
        self.folder.finish("completed", seconds=self.seconds, early=self._stopped_early())
        self.display.print(evaluation_table(final, self.run.evaluator.max_steps))
        for of, result in final_test.titled(self.test) if self.test else ():
            self.display.print(evaluation_table(result, self.run.evaluator.max_steps, of))
        print_next_steps(self.folder, self.config, self.command, self.ranks.size)

    def _stopped_early(self) -> dict[str, Any] | None:
        """Why and at which step the run ended before its budget was used up; None if it did not."""
        step, total = self.loop.step, self.run.intervals.total
        if step >= total:
            return None
        return {"step": step, "steps_per_task": total, "reason": self.run.early_stopping.reason}


def _due(step: int, last: int, every: int, finished: bool) -> bool:
    """Whether something that happens every so many steps (0: only at the end) is due at a step, once."""
    if step == last:
        return False
    return finished or (every > 0 and step // every > max(last, 0) // every)
