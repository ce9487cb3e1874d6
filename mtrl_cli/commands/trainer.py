"""Training of a run in one process: evaluation, checkpoints, metrics and signals around the training loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtrl_cli import metric_names
from mtrl_cli.build import network as build_network
from mtrl_cli.build import run as build_run
from mtrl_cli.checkpoints.store import CheckpointStore
from mtrl_cli.commands import final_test
from mtrl_cli.commands.next_steps import print_next_steps, resume_command
from mtrl_cli.config import compose
from mtrl_cli.envs.scores import normalised
from mtrl_cli.errors import RanksLost, RunError, Stopped, UserError, print_error
from mtrl_cli.files import atomic
from mtrl_cli.machine import hardware
from mtrl_cli.parallel.distributed import Ranks
from mtrl_cli.runs.metrics_logger import Logger, NullLogger
from mtrl_cli.runs.progress import Display, evaluation_table
from mtrl_cli.runs.run_dir import RunFolder
from mtrl_cli.runs.stop_signal import StopRequest
from mtrl_cli.runs.terminal import print_line
from mtrl_cli.training import evaluator, throughput
from mtrl_cli.training.every import Every
from mtrl_cli.training.loop import Loop
from mtrl_cli.training.speed import SpeedMeter


@dataclass
class Trainer:
    """Trains a run in one process.

    Args:
        folder: the locked run folder.
        config: the configuration.
        run, loop: the objects of the run. Call `loop.reset` or `restore` before `work`.
        store: the checkpoints.
        stop: pending signals.
        command: the command line.
        ranks: processes that train in step. The first rank writes, logs and evaluates.
    """

    folder: RunFolder
    config: dict[str, Any]
    run: build_run.Run
    loop: Loop
    store: CheckpointStore
    stop: StopRequest
    command: list[str]
    ranks: Ranks

    def __post_init__(self) -> None:
        config = self.config
        self.logger: NullLogger
        self.display: Display
        self.resumed_at: int | None = None
        self.total_steps: int = config["steps_per_task"]
        self.frames_per_step = self.run.pack.tasks[0].frames_per_step
        self.evaluations = Every(config["eval"]["every"], last=-1 if config["eval"]["at_start"] else 0)
        self.checkpoints = Every(config["checkpoint"]["every"], last=-1)
        self.diagnoses = Every(config["log"]["diagnostics"])
        self.rows = Every(config["log"]["every"])
        self.speed: SpeedMeter
        self.row_step = self.row_updates = 0
        self.seconds_before = 0.0
        self.started_at = time.perf_counter()
        self.summary: dict[str, Any] | None = None
        self.test: dict[str, Any] | None = None

    @property
    def seconds(self) -> float:
        """Seconds of work over all resumes."""
        return self.seconds_before + time.perf_counter() - self.started_at

    def restore(self, step: int, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint.

        Raises:
            UserError: the checkpoint does not match the configuration.
            RunError: the replayed environments show other frames than before.
        """
        what = f"checkpoint {step} of {self.folder.path}"
        build_run.check_tasks(state.get("tasks"), self.run.pack, self.folder.path)
        build_network.load_weights(self.run.agent.network, state, what)
        with build_network.must_fit(what):
            rows_restored = self.store.load_replay(step, self.run.replay)
            self.run.learner.optimizer.load_state_dict(state["optimizer"])
            self.run.agent.load_state_dict(state["agent"])
            self.loop.load_state_dict(self._of_this_rank(state), rows_restored)
            progress = state["progress"]
            self.evaluations.last = int(progress["evaluated_at"])
            self.rows.last = int(progress["logged_at"])
            self.seconds_before = float(progress["seconds"])
            early_stopping = self.run.early_stopping
            if early_stopping.metric is not None:
                early_stopping.load_state_dict(progress["early_stopping"])
                if early_stopping.stopped and int(progress["total"]) < self.total_steps:
                    early_stopping.reset_patience()
        self.resumed_at = self.checkpoints.last = self.diagnoses.last = step
        self.row_step, self.row_updates = self.loop.step, self.run.learner.updates
        print_line(
            f"resuming from step {step:,}" + ("" if rows_restored else " with an empty replay: learning continues once it is filled again")
        )

    def _of_this_rank(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the loop state of this rank from the state of a checkpoint."""
        first: dict[str, Any] = state["loop"]
        if self.ranks.is_first:
            return first
        mine: dict[str, Any] = state["others"][str(self.ranks.rank)]["loop"]
        return mine | {"learner": mine["learner"] | {"task_weights": first["learner"]["task_weights"]}}

    def work(self) -> None:
        """Train to the end, a signal or a failure, and record the outcome in run.json."""
        self.ranks.at_loss = self._mark_failed
        try:
            with self.ranks.together():
                if self.ranks.is_first:
                    self.folder.begin(command=self.command, device=str(self.run.device))
                    self.store.discard_after(-1 if self.resumed_at is None else self.resumed_at)
                self.logger = Logger(self.folder.path, resume_at=self.resumed_at) if self.ranks.is_first else NullLogger()
            with closing(self.logger):
                tasks = [task.name for task in self.run.pack.tasks]
                self.display = Display(tasks, self.total_steps, self.frames_per_step, quiet=not self.ranks.is_first)
                with self.display:
                    if self.resumed_at is None:
                        self._log_parameters()
                    self._warm_up()
                    self._train()
                    self._test()
                if self.ranks.is_first:
                    self._finish()
            self._wait_for_ranks()
        except Stopped as stopped:
            stopped.is_reported = True
            self.folder.finish("stopped", seconds=self.seconds)
            print_line(f"stopped and saved at step {self.loop.step:,}; resume with: {resume_command(self.folder, self.ranks.size)}")
            self._wait_for_ranks()
            raise
        except RanksLost as lost:
            failure = RanksLost(
                f"{lost}\nThe run failed at step {self.loop.step:,}. Resume from its last checkpoint with: "
                f"{resume_command(self.folder, self.ranks.size)}"
            )
            # Printed here, while signals are only recorded: torchrun ends this process by SIGTERM as soon as a rank is lost.
            if self._mark_failed(str(lost)):
                print_error(str(failure))
                failure.is_reported = True
            raise failure from None
        except Exception as error:
            with suppress(OSError, UserError):  # such as a full disk: the first error matters to the user
                self.folder.finish("failed", seconds=self.seconds, error=str(error))
            raise
        finally:
            self.loop.close()

    def _wait_for_ranks(self) -> None:
        """Wait for all ranks. When one rank ends by a signal, torchrun ends the others, even while the first rank is writing."""
        with suppress(RanksLost):
            self.ranks.wait()

    def _mark_failed(self, line: str) -> bool:
        """Record in run.json that the run failed because a rank was lost. Returns whether this rank prints the error."""
        with suppress(OSError, UserError):
            return self.folder.mark_failed(seconds=self.seconds, error=line)
        return self.ranks.is_first

    # -- the run ------------------------------------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        if not self.config["compile"]:
            return
        self.display.message("compiling the update: a few seconds with a warm cache, otherwise about a minute")
        start = time.perf_counter()
        with suppress(Stopped), self.stop.interruptible():  # all ranks handle the signal together, after the next tick
            self.run.learner.warm_up()
            seconds = time.perf_counter() - start
            self.display.message(f"compiled in {seconds:.0f} s")
            self._write_row({f"{metric_names.SECONDS}compile": seconds})

    def _train(self) -> None:
        ticks = self.loop.ticks()
        self.speed = SpeedMeter(self.loop.step, self.run.learner.updates, in_bursts=self.run.agent.period > 1)
        while True:
            step, finished = self.loop.step, self.loop.step >= self.total_steps
            if self.evaluations.last < 0 or self.evaluations.due(step, finished):
                self._evaluate()
            finished = finished or self.run.early_stopping.stopped
            if self.checkpoints.due(step, finished):
                self._save()
            if finished:
                return
            # Signals reach the ranks at different times, or only one of them.
            if signal_number := self.ranks.largest(self.stop.received or 0):
                if self.checkpoints.last != step:
                    self._save()
                raise Stopped(signal_number)
            was_unfrozen = self.run.freezing.is_unfrozen
            step = next(ticks)
            if self.run.freezing.is_unfrozen and not was_unfrozen:
                self.display.message(self.run.freezing.describe_unfreezing())
            is_measured = self.speed.tick(step, self.run.learner.updates)
            self.display.update(step, {}, seconds=self.seconds, is_measured=is_measured)
            if self.rows.due(step, finished=step >= self.total_steps):
                with self.loop.clock.time("log"):
                    self._log_row()
            if self.diagnoses.interval and self.diagnoses.due(step, finished=step >= self.total_steps):
                self._diagnose()

    def _evaluate(self) -> None:
        step = self.loop.step
        self.run.learner.metrics.check_finite()
        self.display.message(f"evaluating at step {step:,}")
        with self.speed.paused():
            try:
                score, metric = self._on_first_rank(self._play)
            except Stopped:
                self._save()
                raise
            self.evaluations.last = step
            self.run.early_stopping.update(step, metric)
            self._save(score)

    def _on_first_rank(self, play: Callable[..., Any], *arguments: Any) -> Any:
        """Play on the first rank, and return the result on all ranks. If a signal interrupts the first rank, all ranks raise Stopped."""
        try:
            outcome = 0, play(*arguments) if self.ranks.is_first else None
        except Stopped as stopped:
            outcome = stopped.signal_number, None
        signal_number, result = self.ranks.from_first(outcome)
        if signal_number:
            raise Stopped(signal_number)
        return result

    def _play(self) -> tuple[float | None, float | None]:
        """Evaluate the network. Returns the score that ranks checkpoints, and the metric of early stopping."""
        step = self.loop.step
        episodes = self.run.evaluator.run(self.run.agent.network, self.stop.check)
        self.summary = evaluator.summarise(episodes, self.run.pack, step, str(step), seed=self.run.evaluator.seed)
        self.folder.write(f"eval/{step}.json", atomic.to_json(self.summary))
        metrics = evaluator.metrics(self.summary)
        self._write_row(metrics)
        self._log_pictures(episodes)
        self.display.update(step, metrics, seconds=self.seconds)
        return evaluator.ranking(self.summary), metrics.get(self.run.early_stopping.metric or "")

    def _test(self) -> None:
        """Test the last and the best network on held-out seeds. Everything is saved before: a resumed run repeats the test."""
        if self.run.early_stopping.stopped and self.loop.step < self.total_steps:
            self.display.message(f"stopped early at step {self.loop.step:,}: {self.run.early_stopping.reason}")
        if self.run.tester is not None:
            self.display.message(f"testing at step {self.loop.step:,}")
            self._on_first_rank(self._play_test, self.run.tester)

    def _play_test(self, tester: evaluator.Evaluator) -> None:
        self.test = final_test.run(tester, self.run.agent.network, self.store, self.loop.step, self.stop.check)
        self.folder.write(final_test.FILE, atomic.to_json(self.test))
        self._write_row(final_test.metrics(self.test))

    def _save(self, score: float | None = None) -> None:
        self.run.learner.metrics.check_finite()
        with self.ranks.together():
            if self.ranks.is_first and not self.folder.config.exists():
                raise RunError(f"{self.folder.path} was removed during the run: cannot save")
        with self.speed.paused():
            self.logger.flush()
            self.store.save(self.loop.step, self._state(), self.run.replay, score)
            self.checkpoints.last = self.loop.step

    def _state(self) -> dict[str, Any]:
        """Return the state of a checkpoint: everything on the first rank, only the loop on other ranks."""
        if self.ranks.is_first:
            return {
                "tasks": [task.name for task in self.run.pack.tasks],
                "model": self.run.agent.network.state_dict(),
                "optimizer": self.run.learner.optimizer.state_dict(),
                "agent": self.run.agent.state_dict(),
                "loop": self.loop.state_dict(),
                "progress": {
                    "evaluated_at": self.evaluations.last,
                    "logged_at": self.rows.last,
                    "seconds": self.seconds,
                    "total": self.total_steps,
                    "early_stopping": self.run.early_stopping.state_dict(),
                },
            }
        return {"loop": self.loop.rank_state_dict()}

    # -- metrics ------------------------------------------------------------------------------------------------------------

    def _write_row(self, metrics: dict[str, float]) -> None:
        step = self.loop.step
        self.logger.row(step, step * self.frames_per_step, self.seconds, self.run.learner.updates, metrics)

    def _log_row(self) -> None:
        self.run.learner.metrics.check_finite()
        step, updates = self.loop.step, self.run.learner.updates
        tasks = self.run.pack.tasks
        speed = self.speed.read()
        per_second = speed.steps * len(tasks)
        names = [task.name for task in tasks]
        metrics = self.loop.statistics.row(self.ranks.total) | self.run.learner.read_metrics()
        recent = self.loop.statistics.recent(self.ranks.total)
        for task in tasks:
            if task.name in recent:
                score = normalised(recent[task.name], task.random_score, task.reference_score)
                metrics |= {} if score is None else {metric_names.TRAIN_SCORE + task.name: score}
        metrics |= {metric_names.EPSILON + name: float(value) for name, value in zip(names, self.run.agent.epsilon(step), strict=True)}
        metrics |= {
            metric_names.STEPS_PER_SECOND: per_second,
            metric_names.FRAMES_PER_SECOND: per_second * self.frames_per_step,
            metric_names.UPDATES_PER_SECOND: speed.updates,
            metric_names.MEMORY: float(self.ranks.total(np.array(hardware.resident_memory()))),
        }
        spent = self.loop.clock.read()
        metrics |= {metric_names.SECONDS + part: value for part, value in spent.items()}
        if self.run.device.type == "cpu":  # the host clock does not measure asynchronous work on a GPU: see mtrl bench
            steps, each = (step - self.row_step) * len(tasks), self.run.learner.steps_per_update * len(tasks)
            metrics |= throughput.between_rows(spent, steps, (updates - self.row_updates) * each, each, per_second)
        self._write_row(metrics)
        # Few episodes end between two rows: the table shows the mean of the last hundred.
        self.display.update(
            step, metrics | {metric_names.TRAIN_RETURN + name: value for name, value in recent.items()}, seconds=self.seconds
        )
        self.rows.last = step
        self.row_step, self.row_updates = step, updates

    def _diagnose(self) -> None:
        self.diagnoses.last = self.loop.step
        if not (self.ranks.is_first and self.run.diagnostics.ready):
            return
        self.run.learner.metrics.check_finite()
        step, start = self.loop.step, time.perf_counter()
        with self.speed.paused():
            report = self.run.diagnostics.report(step)
            self._write_row(report.metrics | {f"{metric_names.SECONDS}diagnostics": time.perf_counter() - start})
            for name, picture in report.pictures.items():
                self.logger.image(name, picture, step)

    def _log_pictures(self, episodes: evaluator.Episodes) -> None:
        """Write histograms of returns and a frame of each task to TensorBoard."""
        step = self.loop.step
        newest_KN = self.loop.newest_frames
        for k, task in enumerate(self.run.pack.tasks):
            self.logger.histogram(metric_names.EVAL_RETURNS + task.name, episodes.returns[task.name], step)
            if task.observation_shape[0] in (1, 3) and len(task.observation_shape) == 3:
                channels_last = newest_KN[k, 0, : task.observation_shape[0]].movedim(0, -1)
                self.logger.image(f"frame/{task.name}", channels_last.contiguous().cpu().numpy(), step)

    def _log_parameters(self) -> None:
        counts = self.run.agent.network.parameter_counts()
        metrics = {"parameters/total": float(counts.total), "parameters/shared": float(counts.shared)}
        metrics |= {f"parameters/{task.name}": float(count) for task, count in zip(self.run.pack.tasks, counts.per_task, strict=True)}
        self._write_row(metrics)

    def _finish(self) -> None:
        final = self.summary or atomic.read_json(self.folder.evaluations / f"{self.loop.step}.json", self.folder.path)
        metrics = evaluator.metrics(final) | (final_test.metrics(self.test) if self.test else {})
        self.logger.hyperparameters(dict(compose.flat(self.config)), metrics, self.loop.step)
        early = None
        if self.loop.step < self.total_steps:
            early = {"step": self.loop.step, "steps_per_task": self.total_steps, "reason": self.run.early_stopping.reason}
        self.folder.finish("completed", seconds=self.seconds, early=early)
        self.display.print(evaluation_table(final, self.run.evaluator.max_steps))
        for of, result in final_test.titled(self.test) if self.test else ():
            self.display.print(evaluation_table(result, self.run.evaluator.max_steps, of))
        print_next_steps(self.folder, self.config, self.command, self.ranks.size)
