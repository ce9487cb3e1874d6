"""Run folders: creation, lookup, lock and run.json."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mtrl_cli.errors import UserError
from mtrl_cli.runs import run_dir
from mtrl_cli.runs.run_dir import RunFolder

COMMAND = ["mtrl", "train", "env=atari_pack", "env.tasks=[pong, breakout]"]


def _run(path: Path) -> RunFolder:
    folder = RunFolder.create(path)
    folder.write("config.yaml", "seed: 0\n")
    folder.begin(command=COMMAND, device="cpu")
    return folder


def test_new_and_empty_folders_are_accepted(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "a" / "b" / "new", tmp_path / "empty"):
        _run(path).unlock()
        assert json.loads((path / "run.json").read_text())["status"] == "running"


def test_non_empty_folder_is_refused_and_unchanged(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"not empty \(it contains thesis.tex\)"):
        RunFolder.create(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_existing_run_is_refused_with_the_resume_command(tmp_path):
    _run(tmp_path / "run").unlock()
    with pytest.raises(UserError, match=f"mtrl resume {tmp_path}/run"):
        RunFolder.create(tmp_path / "run")


def test_leftovers_of_a_process_killed_at_its_start_are_ignored(tmp_path):
    (tmp_path / ".lock").write_text("1 host\n")
    (tmp_path / ".writing-1-config.yaml").write_text("se")
    assert not RunFolder.is_run(tmp_path)
    _run(tmp_path).unlock()
    assert sorted(os.listdir(tmp_path)) == [".lock", "config.yaml", "run.json"]


@pytest.mark.parametrize("path", ["file", "file/run", "file/a/b", "dangling", "/proc/nothing/run", "/dev/null"])
def test_folder_that_cannot_be_created_is_refused(tmp_path, path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match="run_dir="):
        RunFolder.create(tmp_path / path)
    assert sorted(os.listdir(tmp_path)) == before


def test_failed_creation_leaves_no_parent_folder(tmp_path):
    with pytest.raises(UserError, match="cannot be created"):
        RunFolder.create(tmp_path / "a" / "b" / ("x" * 300))
    assert os.listdir(tmp_path) == []


def test_unwritable_parent_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match=f"{tmp_path} is not writable"):
        RunFolder.check_new(tmp_path / "a" / "run")


def test_creation_that_fails_under_the_lock_removes_only_created_folders(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    checks = iter([None, UserError("used by another process")])

    def check_new(path: Path) -> None:
        if (error := next(checks)) is not None:
            raise error

    monkeypatch.setattr(RunFolder, "check_new", check_new)
    with pytest.raises(UserError, match="used by another process"):
        RunFolder.create(tmp_path / "a" / "b" / "c")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "a"]


def test_default_names_are_unique(tmp_path):
    made = [RunFolder.create_default("atari_pack", 3, runs=tmp_path / "runs") for _ in range(5)]
    assert len({folder.path for folder in made}) == 5
    for folder in made:
        assert folder.path.parent == tmp_path / "runs" / "atari_pack"
        assert "_s3" in folder.path.name
        folder.unlock()


def test_unusual_pack_name_stays_inside_the_runs_folder(tmp_path):
    folder = RunFolder.create_default("../../etc", 0, runs=tmp_path / "runs")
    assert folder.path.parent.parent == tmp_path / "runs"
    folder.unlock()


HOLD = """
import sys, time
from pathlib import Path
from mtrl_cli.runs.run_dir import RunFolder
folder, _ = RunFolder.open(Path(sys.argv[1]))
folder.lock()
print("locked", flush=True)
time.sleep(600)
"""


def test_lock_is_exclusive_and_released_when_its_process_dies(tmp_path):
    folder = _run(tmp_path / "run")
    folder.unlock()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder.path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=rf"in use by process {holder.pid} on "):
        folder.lock()
    with pytest.raises(UserError, match="not empty"):
        RunFolder.create(folder.path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    folder.lock()
    folder.unlock()


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOLCK, "no file locks"), (errno.ENOSYS, "no file locks"), (errno.EIO, "I/O|Input")]
)
def test_file_system_without_locks_is_refused_and_nothing_is_left(tmp_path, monkeypatch, number, message):
    def flock(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=message):
        RunFolder.create(tmp_path / "run")
    assert os.listdir(tmp_path) == []


def test_record_has_command_versions_and_status(tmp_path):
    folder = _run(tmp_path / "run")
    record = folder.read_record()
    assert record["command"] == "mtrl train env=atari_pack 'env.tasks=[pong, breakout]'"
    assert record["versions"]["mtrl_cli"]
    assert record["versions"]["torch"]
    assert record["device"] == "cpu"
    assert record["ended"] is None
    folder.finish("failed", seconds=12.5, error="the loss of pong is not finite")
    ended = folder.read_record()
    assert (ended["status"], ended["seconds"], ended["error"]) == ("failed", 12.5, "the loss of pong is not finite")
    assert ended["ended"] >= ended["started"]
    folder.unlock()


def test_link_out_of_the_run_is_not_written_through(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (folder.path / "eval").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError) as refused:
        folder.write("eval/1.json", "{}")
    assert "link out of the run folder" in str(refused.value)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_killed_run_has_status_running_and_resume_keeps_its_command(tmp_path):
    folder = _run(tmp_path / "run")
    folder.unlock()  # as the kernel does when the process is killed
    again, _ = RunFolder.open(tmp_path / "run")
    with again:
        again.lock()
        assert again.read_record()["status"] == "running"
        again.begin(command=["mtrl", "resume", "run"], device="cuda:0")
        record = again.read_record()
    assert record["command"].startswith("mtrl train")
    assert [entry["command"] for entry in record["resumed"]] == ["mtrl resume run"]
    assert (record["status"], record["device"], record["ended"]) == ("running", "cuda:0", None)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": "odd"}', '{"status": {"a": 1}}', '{"status": ["running"]}', "[" * 100_000])
def test_damaged_record_is_refused_in_one_line(tmp_path, text):
    folder = _run(tmp_path / "run")
    folder.record.write_text(text)
    with pytest.raises(UserError) as caught:
        folder.begin(command=["x"], device="cpu")
    assert "run.json" in str(caught.value)
    assert "\n" not in str(caught.value)
    folder.unlock()


def test_run_killed_before_its_record_was_written_can_be_resumed(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    folder.write("config.yaml", "seed: 0\n")
    assert folder.read_record() == {}
    folder.begin(command=["mtrl", "resume", "run"], device="cpu")
    assert folder.read_record()["status"] == "running"
    folder.unlock()


def test_run_is_opened_by_its_path_or_a_checkpoint_path(tmp_path, monkeypatch):
    _run(tmp_path / "run").unlock()
    path = tmp_path / "run"
    for given, which in ((path, None), (path / "checkpoints" / "400", 400), (path / "checkpoints" / "best", "best")):
        folder, found = RunFolder.open(given)
        assert (folder.path, found) == (path, which)
    (path / "checkpoints").mkdir()
    monkeypatch.chdir(path / "checkpoints")
    folder, found = RunFolder.open(Path("400"))
    assert folder.path.samefile(path)
    assert found == 400
    folder, found = RunFolder.open(Path(".."))
    assert found is None


def test_anything_but_a_run_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "strange" / "config.yaml").mkdir(parents=True)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "config.yaml").symlink_to("/etc/passwd")
    for name in ("file", "empty", "strange", "linked", "missing", "file/checkpoints/5", "missing/checkpoints/best", "x" * 300):
        with pytest.raises(UserError) as caught:
            RunFolder.open(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_git_revision_is_that_of_the_checkout_or_none(tmp_path):
    package = tmp_path / "mtrl_cli"
    package.mkdir()
    assert run_dir.git_revision(package) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    found = run_dir.git_revision(package)
    assert found is not None
    assert len(found["revision"]) == 40
    assert found["changed"] is False
