"""Checkpoints of a run: retention, damage, hostile files, full disks and kills."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mtrl_cli.checkpoints import format as checkpoint_format
from mtrl_cli.checkpoints.store import CheckpointStore, NoCheckpoint, parse_which
from mtrl_cli.errors import RunError, UserError
from mtrl_cli.files import atomic
from tests.helpers.checkpoints import SCORES, Ring, refuse_warning, same, state_of, store_in
from tests.helpers.command import ROOT


def _saved(run: Path, steps, keep: int = 9) -> CheckpointStore:
    store = store_in(run, keep)
    for step in steps:
        store.save(step, state_of(step))
    return store


def _step_model(state: dict) -> float:
    return state["model"]["torso.weight"][0, 0].item()


# -- saving and loading ----------------------------------------------------------------------------------------------------------


def test_loaded_state_equals_the_saved_state(tmp_path):
    _saved(tmp_path, [5])
    step, state = store_in(tmp_path).load("latest", warn=refuse_warning)
    assert step == 5
    assert same(state, state_of(5))
    folder = tmp_path / "checkpoints" / "5"
    assert sorted(os.listdir(folder)) == ["COMPLETE", "arrays.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert json.loads((folder / "state.json").read_text())["format"] == checkpoint_format.FORMAT
    assert (tmp_path / "checkpoints" / "latest").read_text() == "5\n"


def test_loaded_tensors_are_writable_and_independent_of_their_files(tmp_path):
    _saved(tmp_path, [5])
    _, state = store_in(tmp_path).load(5)
    shutil.rmtree(tmp_path / "checkpoints")
    state["model"]["torso.weight"] += 1
    state["envs"]["episode"] += 1
    assert _step_model(state) == 6.0


def test_equal_models_give_equal_bytes(tmp_path):
    values = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.uint8), "c": torch.zeros(0)}
    strided = dict(reversed([(name, torch.stack([value, value])[1]) for name, value in values.items()]))
    strided["a"] = values["a"].T.contiguous().T
    for name, model in (("one", values), ("two", strided)):
        store_in(tmp_path / name).save(1, {"model": model})
    first, second = (tmp_path / name / "checkpoints/1/model.safetensors" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


def test_tied_parameters_are_saved(tmp_path):
    shared = torch.arange(4.0)
    model = {"a": shared, "b": shared, "c": shared[1:3], "d": shared.view(2, 2)}
    store_in(tmp_path).save(1, {"model": model})
    assert same(store_in(tmp_path).load(1)[1]["model"], model)


# -- retention ----------------------------------------------------------------------------------------------------------------


def test_newest_checkpoints_and_the_best_are_kept(tmp_path):
    store = store_in(tmp_path, keep=2)
    for step, score in [(1, 0.1), (2, 0.9), (3, None), (4, 0.9), (5, float("nan"))]:
        store.save(step, state_of(step), score=score)
    assert store.steps() == [2, 4, 5]
    assert (store.latest(), store.best()) == (5, 2)
    assert store_in(tmp_path).load("best")[0] == 2


def test_best_score_of_zero_or_below_survives_a_restart(tmp_path):
    store_in(tmp_path).save(1, state_of(1), score=-0.5)
    store_in(tmp_path).save(2, state_of(2), score=0.0)
    store_in(tmp_path).save(3, state_of(3), score=-0.1)
    assert store_in(tmp_path).best() == 2


def test_saving_a_step_again_replaces_it_and_keeps_its_score(tmp_path):
    store = store_in(tmp_path)
    store.save(1, state_of(1), score=0.5)
    store.save(1, state_of(8) | {"step": 8})
    assert store.steps() == [1]
    assert store.best() == 1
    assert _step_model(store_in(tmp_path).load("best")[1]) == 8.0
    store.save(2, state_of(2), score=0.6)
    store.save(2, state_of(2), score=0.1)
    assert store.best() == 1


def test_killed_replacement_leaves_a_complete_checkpoint(tmp_path):
    _saved(tmp_path, [1])
    folder = tmp_path / "checkpoints"
    (folder / "1").rename(folder / ".replaced-1")
    (folder / ".saving-1").mkdir()
    assert store_in(tmp_path).load("latest", warn=refuse_warning)[0] == 1
    store_in(tmp_path).recover()
    assert sorted(os.listdir(folder)) == ["1", "latest"]
    assert store_in(tmp_path).load("latest", warn=refuse_warning)[0] == 1


def test_discard_after_rewinds_latest_and_best(tmp_path):
    store = store_in(tmp_path, keep=9)
    for step, score in [(1, 0.1), (2, 0.3), (3, 0.9), (4, None)]:
        store.save(step, state_of(step), score=score)
    store.discard_after(2)
    assert (store.steps(), store.latest(), store.best()) == ([1, 2], 2, 2)
    store.discard_after(-1)
    assert (store.steps(), store.latest(), store.best()) == ([], None, None)
    with pytest.raises(NoCheckpoint):
        store.load("latest")
    store_in(tmp_path / "nothing").discard_after(3)


def test_parse_which():
    assert [parse_which(text) for text in ("latest", "best", "0", "1000", 7)] == ["latest", "best", 0, 1000, 7]
    for text in ("newest", "-1", "1.5", "", "../1", "01", "9" * 30, True):
        with pytest.raises(UserError, match="latest, best or a step"):
            parse_which(text)


# -- damage ---------------------------------------------------------------------------------------------------------------------


def _remove(path: Path) -> None:
    path.unlink()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _lead_outside(path: Path) -> None:
    outside = path.parents[2] / f"outside-{path.name}"
    path.rename(outside)
    path.symlink_to(outside)


def _make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = [_remove, _truncate, _empty, _flip, _lead_outside, _make_pipe]


@pytest.mark.parametrize("name", [*checkpoint_format.FILES, "COMPLETE"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def test_every_damage_is_detected(tmp_path, name, damage):
    _saved(tmp_path, [1, 2, 3])
    damage(tmp_path / "checkpoints" / "3" / name)
    warnings: list[str] = []
    step, state = store_in(tmp_path).load("latest", warn=warnings.append)
    assert step == 2
    assert same(state, state_of(2))
    assert len(warnings) == 1
    assert warnings[0].endswith("falling back to checkpoint 2")
    assert "\n" not in warnings[0]
    with pytest.raises(UserError) as caught:
        store_in(tmp_path).load(3)
    assert "checkpoint 3 cannot be loaded" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fallback_skips_all_damaged_checkpoints(tmp_path):
    _saved(tmp_path, [1, 2, 3])
    _truncate(tmp_path / "checkpoints/3/model.safetensors")
    _remove(tmp_path / "checkpoints/2/COMPLETE")
    warnings: list[str] = []
    assert store_in(tmp_path).load("latest", warn=warnings.append)[0] == 1


@pytest.mark.parametrize("text", ["", "7\n", "../1\n", "one\n", "\xff" * 99, None])
def test_damaged_pointer_falls_back_to_the_newest_checkpoint(tmp_path, text):
    _saved(tmp_path, [1, 2])
    pointer = tmp_path / "checkpoints" / "latest"
    if text is None:
        pointer.unlink()
        pointer.symlink_to("/etc/passwd")
    else:
        pointer.write_text(text)
    warnings: list[str] = []
    assert store_in(tmp_path).load("latest", warn=warnings.append)[0] == 2
    assert len(warnings) == 1


def test_all_checkpoints_damaged_is_an_error_not_a_restart(tmp_path):
    _saved(tmp_path, [1, 2])
    for step in "12":
        _truncate(tmp_path / "checkpoints" / step / "model.safetensors")
    with pytest.raises(UserError, match="all checkpoints in") as caught:
        store_in(tmp_path).load("latest")
    assert not isinstance(caught.value, NoCheckpoint)


def test_unfinished_checkpoints_do_not_count(tmp_path):
    _saved(tmp_path, [1])
    (tmp_path / "checkpoints/1/COMPLETE").unlink()
    with pytest.raises(NoCheckpoint):
        store_in(tmp_path).load("latest")
    store = store_in(tmp_path)
    store.discard_after(-1)
    store.save(1, state_of(1))
    assert store.load("latest", warn=refuse_warning)[0] == 1


def test_missing_checkpoint_error_lists_available_ones(tmp_path):
    for which in ("latest", "best"):
        with pytest.raises(NoCheckpoint):
            store_in(tmp_path).load(which)
    _saved(tmp_path, [1, 2])
    with pytest.raises(UserError, match=r"has no checkpoint 5; available: 1, 2"):
        store_in(tmp_path).load(5)
    with pytest.raises(UserError, match="no best checkpoint"):
        store_in(tmp_path).load("best")


def _forge(folder: Path, name: str, data: bytes) -> None:
    """Replace a file and update its checksum in COMPLETE, as an attacker would."""
    (folder / name).write_bytes(data)
    complete = json.loads((folder / "COMPLETE").read_text())
    complete[name] = hashlib.sha256(data).hexdigest()
    (folder / "COMPLETE").write_text(json.dumps(complete))


@pytest.mark.parametrize("other", ["1", "3", '"2"', "true"])
def test_another_format_is_refused_without_falling_back_to_an_older_checkpoint(tmp_path, other):
    _saved(tmp_path, [1, 2])
    path = tmp_path / "checkpoints/2/state.json"
    path.write_text(path.read_text().replace('"format": 2', f'"format": {other}'))
    for which in ("latest", 2):
        with pytest.raises(UserError, match="reads only format 2"):
            store_in(tmp_path).load(which, warn=refuse_warning)


FORGERIES = {
    "no format": lambda header: header.pop("format"),
    "format is text": lambda header: header.update(format="1"),
    "format is true": lambda header: header.update(format=True),
    "another step": lambda header: header.update(step=3),
    "no state": lambda header: header.pop("state"),
    "state is a list": lambda header: header.update(state=[1]),
    "state is a mark": lambda header: header.update(state={"$": "tensor"}),
    "an unnamed tensor": lambda header: header["state"].pop("model"),
    "a tensor that is not there": lambda header: header["state"].update(x={"$": "tensor"}),
    "a path as a tensor": lambda header: header["state"]["model"].update({"../../x": {"$": "tensor"}}),
    "nested": lambda header: b'{"format":2,"step":1,"state":' + b'{"a":' * 3000 + b"1" + b"}" * 3001,
    "nested absurdly": lambda header: b'{"format":2,"step":1,"state":' + b"[" * 500_000,
    "huge number": lambda header: b'{"format": ' + b"9" * 9999 + b"}",
    "replay is a path": lambda header: header.update(replays=["../../etc"]),
    "replay segments lead outside": lambda header: header.update(
        replays=[{"rows": 8, "capacity_rows": 8, "segments": {"../../8.safetensors": 0}}]
    ),
    "score is absurd": lambda header: header.update(score=10**400, state=5),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_checkpoint_is_refused_in_one_line(tmp_path, name):
    _saved(tmp_path, [1])
    header = json.loads((tmp_path / "checkpoints/1/state.json").read_text())
    changed = FORGERIES[name](header)
    _forge(tmp_path / "checkpoints/1", "state.json", changed if isinstance(changed, bytes) else json.dumps(header).encode())
    for which in (1, "latest"):
        with pytest.raises(UserError) as caught:
            store_in(tmp_path, with_replay=True).load(which)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600
    store = store_in(tmp_path)
    store.recover()
    store.save(5, state_of(5), score=1.0)
    assert store.best() == 5


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x04.", b"\xff" * 8 + b"{}", (2**40).to_bytes(8, "little") + b"{}", b"PK\x03\x04" + b"\0" * 50]
)
def test_files_that_are_not_safetensors_are_refused(tmp_path, data):
    _saved(tmp_path, [1])
    _forge(tmp_path / "checkpoints/1", "model.safetensors", data)
    with pytest.raises(UserError, match="not a safetensors file"):
        store_in(tmp_path).load(1)


def test_links_out_of_the_run_are_refused(tmp_path):
    _saved(tmp_path / "other", [1])
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "other" / "checkpoints")
    with pytest.raises(UserError, match="link out of"):
        store_in(run)
    (run / "checkpoints").unlink()
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "1").symlink_to(tmp_path / "other" / "checkpoints" / "1")
    with pytest.raises(UserError, match="link out of"):
        store_in(run).load(1)
    store_in(run).discard_after(-1)
    assert store_in(tmp_path / "other").load(1)[0] == 1
    (run / "checkpoints" / "replay").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match="link out of"):
        store_in(run)


# -- replay ---------------------------------------------------------------------------------------------------------------------


def _restored(run: Path, which, ring: Ring) -> Ring:
    store = store_in(run, with_replay=True)
    step, _ = store.load(which, warn=refuse_warning)
    other = Ring(ring.capacity_rows)
    assert store.load_replay(step, other)
    return other


def test_replay_is_kept_for_the_newest_checkpoints_only(tmp_path):
    ring, store = Ring(8), store_in(tmp_path, keep=2, with_replay=True)
    for step in range(1, 12):
        ring.add(3)
        store.save(step, state_of(step), replay=ring, score=-step)
        assert torch.equal(_restored(tmp_path, "latest", ring).data, ring.data)
    assert store.steps() == [1, 10, 11]
    # Rows 25 to 33 for step 11, 22 to 30 for step 10.
    assert sorted(os.listdir(tmp_path / "checkpoints" / "replay")) == [f"{start}-{start + 3}.safetensors" for start in range(21, 33, 3)]
    assert store_in(tmp_path).load("best")[0] == 1, "evaluation needs no replay"


def test_no_replay_files_without_replay(tmp_path):
    ring, store = Ring(8), store_in(tmp_path)
    ring.add(3)
    store.save(1, state_of(1), replay=ring)
    assert not (tmp_path / "checkpoints" / "replay").exists()
    assert store.load_replay(store.load("latest")[0], ring) is False


def test_damaged_segment_causes_fallback_and_the_run_continues(tmp_path):
    ring, store = Ring(8), store_in(tmp_path, keep=3, with_replay=True)
    for step in (1, 2, 3):
        ring.add(4)
        store.save(step, state_of(step), replay=ring)
        if step == 2:
            at_two = ring.data.clone()
    _flip(tmp_path / "checkpoints/replay/8-12.safetensors")
    warnings: list[str] = []
    store = store_in(tmp_path, keep=3, with_replay=True)
    store.recover()
    step, _ = store.load("latest", warn=warnings.append)
    assert step == 2
    assert "8-12.safetensors" in warnings[0]
    store.discard_after(step)
    rewound = Ring(8)
    rewound.rows = 8
    assert store.load_replay(step, rewound)
    assert torch.equal(rewound.data, at_two)
    assert not (tmp_path / "checkpoints/replay/8-12.safetensors").exists()
    rewound.add(4)
    store.save(3, state_of(3), replay=rewound)
    assert torch.equal(_restored(tmp_path, "latest", ring).data, ring.data)


def test_recover_removes_leftovers_of_a_killed_process(tmp_path):
    ring, store = Ring(8), store_in(tmp_path, with_replay=True)
    ring.add(4)
    store.save(1, state_of(1), replay=ring, score=1.0)
    folder = tmp_path / "checkpoints"
    before = sorted(str(path) for path in folder.rglob("*"))
    (folder / ".saving-2").mkdir()
    (folder / ".saving-2" / "model.safetensors").write_text("half")
    (folder / ".removed-0").mkdir()
    (folder / f"{atomic.TEMPORARY}9-latest").write_text("")
    (folder / "replay" / "4-8.safetensors").write_text("complete, but unused")
    (folder / "replay" / f"{atomic.TEMPORARY}9-8-12.safetensors").write_text("half")
    (folder / "best").unlink()
    store_in(tmp_path, with_replay=True).recover()
    assert sorted(str(path) for path in folder.rglob("*")) == before
    store_in(tmp_path / "nothing").recover()


# -- full disks and kills -------------------------------------------------------------------------------------------------------


def _listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("fails_at", range(8))
def test_full_disk_at_any_file_leaves_the_last_checkpoint_intact(tmp_path, monkeypatch, fails_at):
    ring, store = Ring(8), store_in(tmp_path, with_replay=True)
    ring.add(4)
    store.save(1, state_of(1), replay=ring, score=0.5)
    before, whole = _listing(tmp_path), atomic.write_synced
    count = itertools.count()

    def write(path, chunks):
        if next(count) == fails_at:
            path.write_bytes(b"incomplete")
            path.unlink()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(path, chunks)

    monkeypatch.setattr(atomic, "write_synced", write)
    ring.add(4)
    with pytest.raises(RunError) as caught:
        store.save(2, state_of(2), replay=ring, score=0.9)
    good = 1 if fails_at < 7 else 2  # the eighth file is `best`, after `latest` was updated
    assert "no space left on device while saving step 2" in str(caught.value)
    assert str(caught.value).endswith(f"the last good checkpoint is {good}")
    if fails_at < 6:
        assert _listing(tmp_path) == before
    assert store_in(tmp_path, with_replay=True).load("latest", warn=refuse_warning)[0] == good
    monkeypatch.undo()
    store.save(2, state_of(2), replay=ring, score=0.9)
    assert torch.equal(_restored(tmp_path, "latest", ring).data, ring.data)
    assert store.best() == 2


def test_file_size_limit_is_a_run_error(tmp_path):
    """A real error of the system, by RLIMIT_FSIZE."""
    _saved(tmp_path, [1])
    before = _listing(tmp_path)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14))
            store_in(tmp_path).save(2, state_of(2) | {"large": np.zeros(2**16)})
        except RunError as error:
            code = 0 if "File too large".lower() in str(error).lower() and "checkpoint is 1" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert _listing(tmp_path) == before


def test_exception_during_saving_leaves_nothing_behind(tmp_path, monkeypatch):
    _saved(tmp_path, [1])
    before = _listing(tmp_path)
    with pytest.raises(TypeError):
        store_in(tmp_path).save(2, state_of(2) | {"odd": object()})
    monkeypatch.setattr(atomic, "sync_folder", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store_in(tmp_path).save(2, state_of(2))
    assert _listing(tmp_path) == before


VICTIM = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
import os
from pathlib import Path
from tests.helpers.checkpoints import go_on_saving
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        go_on_saving(Path(sys.argv[1]))
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


def test_kill_at_a_random_moment_leaves_latest_and_best_complete(tmp_path):
    moments = random.Random(int.from_bytes(os.urandom(4)))
    parent = subprocess.Popen([sys.executable, "-c", VICTIM, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdin is not None
    assert parent.stdout is not None
    reached, longest = 0, 0.15
    for _ in range(40):
        parent.stdin.write("\n")
        parent.stdin.flush()
        child = int(parent.stdout.readline())
        time.sleep(moments.uniform(0.0, longest))
        os.kill(child, signal.SIGKILL)
        assert parent.stdout.readline() == "ended\n"
        store = store_in(tmp_path, keep=2, with_replay=True)
        if store.latest() in (None, reached):
            longest = min(2.0, 1.2 * longest)  # a busy machine makes less progress
        if store.latest() is None:
            continue
        step, state = store.load("latest", warn=refuse_warning)
        assert step >= reached
        reached = step
        assert same(state, state_of(step))
        ring, expected = Ring(30), Ring(30)
        expected.add(7 * step)
        assert store.load_replay(step, ring)
        assert torch.equal(ring.data, expected.data)
        best = store_in(tmp_path).best()
        assert best is not None or step == 1
        if best is not None:
            assert same(store_in(tmp_path).load("best")[1], state_of(best))
            assert SCORES[best] >= max(SCORES[1:step], default=0.0)
    parent.stdin.close()
    parent.wait()
    parent.stdout.close()
    assert reached > 5
    store_in(tmp_path, with_replay=True).recover()
    assert not [name for name in _listing(tmp_path) if Path(name).name.startswith(".")]


def test_first_checkpoint_is_found_if_killed_before_latest_was_written(tmp_path):
    store_in(tmp_path).save(1, state_of(1))
    (tmp_path / "checkpoints" / "latest").unlink()
    step, state = store_in(tmp_path).load("latest", warn=refuse_warning)
    assert step == 1
    assert same(state, state_of(1))
