"""Storage of trials: each trial runs once despite killed processes, samplers and pruners, and which process owns a trial."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from mtrl_cli.errors import RunError, UserError
from mtrl_cli.sweeps import trial_storage
from mtrl_cli.sweeps.optuna_storage import JOURNAL, cut_torn_line, open_storage
from mtrl_cli.sweeps.plan import Choices
from mtrl_cli.sweeps.trial_storage import Assignment, TrialStorage
from tests.helpers.command import ROOT
from tests.helpers.trials import GRID, grid, plan, storage_in


def metric(values: Mapping[str, str]) -> float:
    """Return a metric whose maximum, 0, is at lr=1e-3, n_step=4 and film."""
    distance = abs(math.log10(float(values["optimizer.lr"])) + 3) + abs(int(values["agent.n_step"]) - 4)
    return -distance - (values["network/sharing"] != "film")


def complete(storage: TrialStorage) -> list[Assignment]:
    """Take and complete all remaining trials."""
    taken = []
    while (each := storage.take()) is not None:
        taken.append(each)
        storage.finish(each.number, "completed", metric(each.values) if "optimizer.lr" in each.values else 1.0)
    return taken


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "gp"])
def test_sampler_draws_within_its_axes_and_identically_when_each_trial_is_taken_by_a_new_process(sampler: str, tmp_path: Path) -> None:
    if sampler == "cmaes":
        pytest.importorskip("cmaes")
    sweep = plan(sampler=sampler, trials=13)
    with_one = complete(storage_in(tmp_path / "one", sweep))
    with_many = []
    for _ in range(13):
        each = storage_in(tmp_path / "many", sweep)
        taken = each.take()
        assert taken is not None
        each.finish(taken.number, "completed", metric(taken.values))
        each.close()
        with_many.append(taken)
    assert with_one == with_many
    assert [each.number for each in with_one] == list(range(13))
    for each in with_one:
        assert 1e-5 <= float(each.values["optimizer.lr"]) <= 1e-1
        assert int(each.values["agent.n_step"]) in range(1, 10)
        assert each.values["network/sharing"] in ("hard", "film", "null")
    assert len({each.values["optimizer.lr"] for each in with_one}) == 13
    other = complete(storage_in(tmp_path / "other", plan(sampler=sampler, trials=2, seed=1)))
    assert other[0].values != with_one[0].values


def test_tpe_improves_with_completed_trials(tmp_path: Path) -> None:
    values = [metric(each.values) for each in complete(storage_in(tmp_path, plan(trials=40)))]
    assert sum(values[20:]) / 20 > sum(values[:10]) / 10


def test_grid_trials_are_its_points_in_order(tmp_path: Path) -> None:
    assert [dict(each.values) for each in complete(storage_in(tmp_path, grid()))] == [dict(point) for point in GRID]
    assert storage_in(tmp_path, grid()).take() is None


def test_number_of_trials_may_be_raised_later(tmp_path: Path) -> None:
    assert len(complete(storage_in(tmp_path, plan(trials=2)))) == 2
    assert [each.number for each in complete(storage_in(tmp_path, plan(trials=5)))] == [2, 3, 4]


@pytest.mark.parametrize("storage", ["journal", "database"])
def test_process_with_a_lower_number_of_trials_does_not_take_the_others(storage: str, tmp_path: Path) -> None:
    url = None if storage == "journal" else f"sqlite:///{tmp_path}/trials.db"
    few, more = (storage_in(tmp_path / "S", plan(trials=count, storage=url)) for count in (3, 6))
    assert [each.number for each in complete(few)] == [0, 1, 2]
    assert [row.state for row in more.rows()] == ["completed"] * 3 + ["waiting"] * 3
    assert [each.number for each in complete(more)] == [3, 4, 5]
    assert len(more.rows()) == 6


def test_machine_that_is_too_late_for_the_last_trial_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The surplus Optuna trial of the late machine is used once the sweep has more trials."""
    sweep = plan(trials=2, storage=f"sqlite:///{tmp_path}/trials.db")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    late, early = (storage_in(tmp_path / name / "S", sweep) for name in ("a", "b"))
    seen = late._current()
    complete(early)
    monkeypatch.setattr(late, "_current", lambda: seen)
    assert late.take() is None
    raised = storage_in(tmp_path / "b" / "S", dataclasses.replace(sweep, search={**sweep.search, "trials": 4}))
    assert [row.state for row in raised.rows()] == ["completed", "completed", "running", "waiting"]
    assert raised._is_interrupted(2, raised._current()[2]) is False, "its process may be about to claim it"
    now = time.monotonic() + trial_storage.UNCLAIMED_SECONDS + 1
    monkeypatch.setattr(trial_storage.time, "monotonic", lambda: now)
    assert [each.number for each in complete(raised)] == [2, 3]


def journals_after_kill(journal: bytes) -> list[bytes]:
    """Return the states of a journal after a kill: complete lines, and partial last lines."""
    ends = [0, *(at + 1 for at, byte in enumerate(journal) if byte == 10)]
    return [journal[:end] for begin, stop in itertools.pairwise(ends) for end in (begin, begin + 1, (begin + stop) // 2, stop)]


def test_each_trial_runs_once_after_a_kill_at_any_write_of_the_journal(tmp_path: Path) -> None:
    """At every write: creating the study, adding trials, taking a trial, setting its values, finishing it."""
    (made := storage_in(tmp_path / "made", plan())).take()
    made.finish(0, "completed", 1.0)
    made.take()
    made.close()
    whole = (tmp_path / "made" / JOURNAL).read_bytes()
    values = [dict(row.values) for row in storage_in(tmp_path / "made", plan()).rows()]
    for number, journal in enumerate(journals_after_kill(whole)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / JOURNAL).write_bytes(journal)
        again = storage_in(folder, plan())
        finished = [row.number for row in again.rows() if row.state == "completed"]
        taken = complete(again)
        assert sorted([*finished, *(each.number for each in taken)]) == [0, 1, 2, 3], number
        assert [row.state for row in again.rows()] == ["completed"] * 4
        assert {each.number for each in taken if each.is_retry} <= {0, 1}
        assert dict(again.rows()[0].values) == values[0], "stored values are kept, the others are drawn identically"
        for line in (folder / JOURNAL).read_bytes().splitlines():
            json.loads(line)


def test_only_an_incomplete_last_line_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    for whole in (b"", b"a\n", b"a\nbc\n", b"x" * 100 + b"\n"):
        for torn in (b"", b"{", b"y" * 50):
            path.write_bytes(whole + torn)
            cut_torn_line(path, block=7)
            assert path.read_bytes() == whole


def test_damaged_journal_is_an_error(tmp_path: Path) -> None:
    storage_in(tmp_path, plan()).close()
    journal = tmp_path / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([lines[0], b"{nonsense}\n", *lines[1:]]))
    with pytest.raises(RunError, match=r"journal\.log"):
        storage_in(tmp_path, plan())


TAKES = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.helpers.trials import plan, storage_in
storage = storage_in(Path(sys.argv[2]), plan(trials=12))
print("ready", flush=True)
sys.stdin.readline()
while (taken := storage.take()) is not None:
    print(taken.number, flush=True)
    if "hold" in sys.argv:
        time.sleep(600)
    storage.finish(taken.number, "completed", 1.0)
"""


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start a process that takes trials as soon as it receives a line."""
    arguments = [sys.executable, "-c", TAKES, str(ROOT), str(folder), *words]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_processes_take_each_trial_once(tmp_path: Path) -> None:
    processes = [start(tmp_path) for _ in range(2)]
    for each in processes:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in processes:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    printed = [each.communicate(timeout=120)[0] for each in processes]
    assert [each.returncode for each in processes] == [0, 0]
    assert sorted(int(number) for text in printed for number in text.split()) == list(range(12))


def test_trial_is_retried_only_after_its_process_was_killed(tmp_path: Path) -> None:
    holder = start(tmp_path, "hold")
    try:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert [holder.stdout.readline(), holder.stdout.readline()] == ["ready\n", "0\n"]
        mine = storage_in(tmp_path, plan(trials=12))
        taken = mine.take()
        assert (taken and taken.number, taken and taken.is_retry) == (1, False)
        assert [row.state for row in mine.rows()][:3] == ["running", "running", "waiting"]
        values = mine.rows()[0].values
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate(timeout=60)
    again = mine.take()
    assert again == Assignment(0, dict(values), is_retry=True)


def test_released_trial_is_taken_again_with_its_reports(tmp_path: Path) -> None:
    first = storage_in(tmp_path, plan())
    assert (taken := first.take()) is not None
    first.report(0, 100, 0.5)
    first.close()
    second = storage_in(tmp_path, plan())
    assert second.take() == Assignment(0, taken.values, is_retry=True)
    before = (tmp_path / JOURNAL).read_bytes()
    second.report(0, 100, 0.5)
    assert (tmp_path / JOURNAL).read_bytes() == before, "each step is reported once"


# -- pruners ----------------------------------------------------------------------------------------------------------------------


def pruned_at(storage: TrialStorage, curve: Mapping[int, float]) -> int | None:
    """Take a trial and report its evaluations. Return the step at which it was pruned, or None if it completed."""
    taken = storage.take()
    assert taken is not None
    for step, value in curve.items():
        if storage.report(taken.number, step, value):
            storage.finish(taken.number, "pruned", value)
            return step
    storage.finish(taken.number, "completed", list(curve.values())[-1])
    return None


def flat(value: float) -> dict[int, float]:
    """A curve of nine evaluations."""
    return dict.fromkeys(range(100, 1000, 100), value)


def test_median_pruner_prunes_trials_below_the_median_after_five_trials(tmp_path: Path) -> None:
    storage = storage_in(tmp_path, plan(pruner="median", trials=9))
    assert [pruned_at(storage, flat(value)) for value in (5, 1, 4, 2, 3)] == [None] * 5
    assert pruned_at(storage, flat(2.9)) == 100
    assert pruned_at(storage, {104: 2.9}) == 104
    assert pruned_at(storage, {104: 3.1, 200: 2.9, 304: 2.9, 400: 2.9}) is None, "steps are compared in whole intervals"
    assert pruned_at(storage, flat(9) | {300: 0.0}) is None, "the best value so far counts"


def test_halving_promotes_only_the_best_of_a_rung(tmp_path: Path) -> None:
    """Li et al. 2020, reduction 4: rungs at 100 and 400 steps; of fewer than eight trials, only the best continues."""
    storage = storage_in(tmp_path, plan(pruner="halving", trials=5))
    assert pruned_at(storage, {50: 0.0} | flat(2.0)) is None, "no trial to compare with, and no pruning before the first rung"
    assert pruned_at(storage, flat(1.0)) == 100
    assert pruned_at(storage, flat(3.0)) is None
    assert pruned_at(storage, flat(4.0) | {400: 1.0}) == 400


def test_hyperband_prunes_at_the_rungs_of_its_brackets(tmp_path: Path) -> None:
    """Li et al. 2018, reduction 3, from 100 to 900 steps: brackets start at 100, 300 and 900."""
    storage = storage_in(tmp_path, plan(pruner="hyperband", trials=40))
    ends = [pruned_at(storage, flat(10.0 - 0.1 * number)) for number in range(40)]
    assert set(ends) >= {100, 300}
    assert set(ends) <= {100, 300, 900, None}
    assert ends[0] is None


def test_no_trial_is_pruned_without_a_pruner(tmp_path: Path) -> None:
    storage = storage_in(tmp_path, plan(trials=8))
    assert [pruned_at(storage, flat(-value)) for value in range(8)] == [None] * 8


# -- other storages ---------------------------------------------------------------------------------------------------------------


def test_database_stores_several_sweeps_by_folder_name(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/trials.db"
    one, two = (storage_in(tmp_path / name, plan(storage=url, trials=2)) for name in ("one", "two"))
    assert [each.number for each in complete(one)] == [0, 1]
    assert [row.state for row in two.rows()] == ["waiting", "waiting"]
    one.close()
    assert [row.state for row in storage_in(tmp_path / "one", plan(storage=url, trials=2)).rows()] == ["completed", "completed"]
    assert not (tmp_path / "one" / JOURNAL).exists()


def test_machines_with_one_database_and_separate_folders_share_a_sweep_and_retry_only_their_own_trials(tmp_path: Path) -> None:
    sweep = plan(storage=f"sqlite:///{tmp_path}/trials.db", trials=4)
    machines = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        machines.append(storage_in(tmp_path / name / "sweep", sweep))
    first, second = machines
    assert (taken := first.take()) is not None
    first.close()  # as when a process dies
    assert [each.number for each in complete(second)] == [1, 2, 3]
    assert [row.is_here for row in second.rows()] == [False, True, True, True]
    again = storage_in(tmp_path / "a" / "sweep", sweep)
    assert again.take() == Assignment(0, taken.values, is_retry=True)


def test_trial_killed_before_it_was_claimed_is_taken_by_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = plan(storage=f"sqlite:///{tmp_path}/trials.db", trials=1)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = (storage_in(tmp_path / name / "S", sweep) for name in ("a", "b"))

    first._study.ask()  # and is killed before it writes its location
    assert [(row.state, row.is_here) for row in second.rows()] == [("running", True)], "the machine waits for the trial"
    now = time.monotonic()
    monkeypatch.setattr(trial_storage.time, "monotonic", lambda: now)
    assert second.take() is None, "its process may be about to claim it"
    now += trial_storage.UNCLAIMED_SECONDS + 1
    assert (taken := second.take()) is not None
    assert (taken.number, taken.is_retry) == (0, True)
    again = storage_in(tmp_path / "a" / "S", sweep)
    assert [row.is_here for row in again.rows()] == [False]
    now += trial_storage.UNCLAIMED_SECONDS + 1
    assert again.take() is None


def test_database_with_another_sweep_of_the_same_name_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/trials.db"
    storage_in(tmp_path / "sweep", plan(storage=url)).close()
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(UserError, match="of another sweep"):
        storage_in(tmp_path / "elsewhere" / "sweep", plan({"seed": Choices(("0", "1"))}, storage=url))


@pytest.mark.parametrize(
    "url", ["sqlite:////no/such/folder/trials.db", "nonsense://me:secret@host/x", "postgresql://me:secret@localhost:1/x"]
)
def test_storage_that_cannot_be_opened_is_a_one_line_error_without_the_password(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sweep\.storage=") as refused:
        open_storage(tmp_path, url)
    assert "secret" not in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
