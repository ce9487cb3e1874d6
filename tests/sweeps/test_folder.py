"""Folder of a sweep: creation by two processes at the same time, links to other folders, and passwords of storages."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mtrl_cli.errors import RunError, UserError
from mtrl_cli.runs.run_dir import RunFolder
from mtrl_cli.sweeps import command as sweep
from mtrl_cli.sweeps import plan as sweep_plan
from mtrl_cli.sweeps.optuna_storage import JOURNAL, cut_torn_line, reached
from mtrl_cli.sweeps.plan import Plan
from mtrl_cli.sweeps.trial_run import TrialRun
from mtrl_cli.sweeps.trial_storage import WORKERS, TrialStorage

RUN = ["env=classic_pack", "env.tasks=[CartPole-v1]", "steps_per_task=30", "eval.every=10", "agent.learning_starts=10", "device=cpu"]


@pytest.fixture(scope="module")
def words() -> Plan:
    return sweep_plan.make([*RUN, "seed=0,1"])


@pytest.fixture
def plan(words: Plan, tmp_path: Path) -> Plan:
    """A plan whose folder S does not exist yet."""
    return sweep_plan.replace(words, run_dir=tmp_path / "S")


def open_sweep(plan: Plan) -> TrialStorage:
    """Create or resume the sweep."""
    return sweep._open(plan, ["mtrl", "sweep"], 10)[2]


def contents(folder: Path) -> dict[str, bytes]:
    """Contents of all files in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


LINKS = [JOURNAL, "journal.lock", ".lock", "trials", "trials/0000", WORKERS, f"{WORKERS}/storage.lock", f"{WORKERS}/0000.lock"]


@pytest.mark.parametrize("name", LINKS)
def test_nothing_is_written_through_a_link_in_a_sweep_folder(name: str, plan: Plan, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "0000").mkdir(parents=True)
    (mine / "token").write_text("a secret without a last newline")
    (mine / "config.yaml").write_text("seed: 1\n")
    before = contents(mine)
    open_sweep(plan).close()
    link = tmp_path / "S" / name
    is_folder = name in ("trials", "trials/0000", WORKERS)
    shutil.rmtree(link) if link.is_dir() else link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(mine if is_folder else mine / "token")

    def resume() -> None:
        storage = open_sweep(plan)
        try:
            while storage.take() is not None:
                pass
        finally:
            storage.close()

    with pytest.raises((UserError, RunError), match=name):
        resume()
    assert contents(mine) == before
    assert {path.name for path in mine.iterdir()} == {"0000", "token", "config.yaml"}


def test_trial_is_not_created_in_a_linked_folder(plan: Plan, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (tmp_path / "S/trials").mkdir(parents=True)
    (tmp_path / "S/trials/0000").symlink_to(mine)
    with pytest.raises(UserError, match="got a link"):
        TrialRun(tmp_path / "S", plan, 0, {"seed": "0"}).make()
    assert list(mine.iterdir()) == []


def test_linked_journal_is_not_truncated(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    (tmp_path / JOURNAL).symlink_to(tmp_path / "token")
    with pytest.raises(OSError, match="symbolic"):
        cut_torn_line(tmp_path / JOURNAL)
    assert (tmp_path / "token").read_text() == "secret"


def test_sweep_created_by_another_process_in_the_meantime_is_joined(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    check_new = RunFolder.check_new

    def check_late(path: Path) -> None:
        monkeypatch.setattr(RunFolder, "check_new", check_new)
        open_sweep(plan).close()
        check_new(path)

    monkeypatch.setattr(RunFolder, "check_new", check_late)
    storage = open_sweep(plan)
    assert [row.state for row in storage.rows()] == ["waiting", "waiting"]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:secret@host/x", "postgresql://me:***@host/x"),
        ("postgresql://me:sec/secret @secret@host/x", "postgresql://me:***@host/x"),
        ("postgresql://host:5432/x?user=me&password=secret&a=b", "postgresql://host:5432/x?user=me&password=***&a=b"),
        ("mysql://host/x?PASSWD=secret", "mysql://host/x?PASSWD=***"),
        ("sqlite:///trials.db", "sqlite:///trials.db"),
        ("env:NAME", "env:NAME"),
    ],
)
def test_password_is_masked(url: str, shown: str, plan: Plan, tmp_path: Path) -> None:
    assert sweep_plan.without_password(url) == shown
    (tmp_path / "S").mkdir()
    sweep_plan.save(sweep_plan.replace(plan, search={**plan.search, "storage": url}), tmp_path / "S", ["mtrl", f"sweep.storage={url}"])
    written = (tmp_path / "S/sweep.json").read_text()
    assert "secret" not in written
    assert shown in written


@pytest.mark.parametrize("url", ["postgresql://me:to%2Fsecret@host/x", "mysql://host/x?user=me&password=to%2Fsecret", "sqlite:///x"])
def test_driver_error_is_shown_without_the_password(url: str) -> None:
    with pytest.raises(RunError) as caught, reached(url):
        raise OSError(f"no {url}, or to/secret of me is wrong" if "secret" in url else "no file")
    assert "secret" not in str(caught.value)


def test_storage_url_may_come_from_an_environment_variable(plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    named = sweep_plan.make([*RUN, "seed=0,1", "sweep.storage=env:TRIALS_URL", f"run_dir={plan.run_dir}"])
    monkeypatch.delenv("TRIALS_URL", raising=False)
    with pytest.raises(UserError, match=r"variable TRIALS_URL is not set"):
        open_sweep(named)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("TRIALS_URL", "me:secret@host")
    with pytest.raises(UserError, match=r"is not a URL") as caught:
        open_sweep(named)
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("TRIALS_URL", f"sqlite:///{tmp_path}/secret.db")
    open_sweep(named).close()
    assert (tmp_path / "secret.db").is_file()
    assert not any(b"secret" in content for content in contents(tmp_path / "S").values())
    with pytest.raises(UserError, match=r"not read from a folder(.|\n)*sweep\.storage=env:TRIALS_URL"):
        sweep_plan.load(tmp_path / "S")
    assert sweep_plan.load(tmp_path / "S", ["sweep.storage=env:TRIALS_URL"]).search["storage"] == "env:TRIALS_URL"
