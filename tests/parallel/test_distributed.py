"""Ranks: settings read from torchrun's environment, and settings that ranks cannot share."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtrl_cli.build.resolve_auto import resolve
from mtrl_cli.config.compose import compose_training
from mtrl_cli.envs.gymnasium import GymnasiumPack
from mtrl_cli.errors import UserError
from mtrl_cli.parallel import torchrun
from mtrl_cli.parallel.distributed import Ranks
from mtrl_cli.parallel.torchrun import Place
from mtrl_cli.runs.run_dir import ReadOnlyRunFolder, RunFolder


def test_rank_and_world_size_are_read_from_the_variables_of_torchrun() -> None:
    given = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    assert torchrun.place(given) == Place(3, 4, 1, 2)
    assert torchrun.place({"RANK": "3", "WORLD_SIZE": "4"}) == Place()
    for name, value in (("RANK", "4"), ("WORLD_SIZE", "two"), ("LOCAL_RANK", "2")):
        with pytest.raises(UserError, match=name):
            torchrun.place(given | {name: value})


def test_ranks_cannot_be_set_on_the_command_line() -> None:
    assert compose_training(["env=classic_pack"])["ranks"] == 1
    with pytest.raises(UserError, match="torchrun --nproc-per-node=4"):
        compose_training(["env=classic_pack", "ranks=4"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [("env.num_envs=8", r"env\.num_envs must be a multiple of the number of ranks \(3\), got 8"), ("device=cuda:1", "device=cuda:1")],
)
def test_numbers_that_ranks_cannot_share_evenly_are_refused(changes: str, words: str) -> None:
    config = compose_training(["env=classic_pack", changes])
    pack = GymnasiumPack(name="classic_pack", tasks=["CartPole-v1"], num_envs=8, max_episode_steps=0)
    with pytest.raises(UserError, match=words):
        resolve(config, pack, lambda line: None, Ranks(Place(0, 3, 0, 3)))


def test_auto_capacity_is_the_total_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_training(["env=classic_pack", "device=cpu", "checkpoint.replay=false"])
    pack = GymnasiumPack(name="classic_pack", tasks=["CartPole-v1"], num_envs=8, max_episode_steps=0)
    each = 4 * 4 + 6  # CartPole's four numbers, and action, reward and flags
    monkeypatch.setattr("mtrl_cli.machine.hardware.memory_available", lambda: 2 * 1000 * each)
    of_one_machine = resolve(config, pack, lambda line: None, Ranks(Place(0, 4, 0, 4)))["replay"]["capacity"]
    of_two = resolve(config, pack, lambda line: None, Ranks(Place(0, 4, 0, 2)))["replay"]["capacity"]
    assert (of_one_machine, of_two) == (1000, 2000)


def test_other_ranks_write_run_json_only_after_the_first_rank_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtrl_cli.runs.run_dir.LOCK_TIMEOUT_SECONDS", 0.1)
    first = RunFolder.create(tmp_path / "run")
    first.write("config.yaml", "{}")
    first.begin(command=["mtrl"], device="cpu")
    others = ReadOnlyRunFolder(first.path)
    others.write("config.yaml", "other")
    others.finish("completed", seconds=1.0)
    assert not others.mark_failed(seconds=1.0, error="gone")
    assert first.read_record()["status"] == "running"
    assert first.config.read_text() == "{}"
    first.unlock()
    assert others.mark_failed(seconds=1.0, error="gone")
    assert first.read_record()["status"] == "failed"
    assert not others.mark_failed(seconds=1.0, error="gone")
