"""Checks run by torchrun for test_torchrun.py.

- `ranks_checks.py FOLDER` writes the results of each rank to FOLDER/<rank>.json.
- `ranks_checks.py FOLDER train …` runs `mtrl train …` and writes a digest of each rank's parameters at the end.
- `ranks_checks.py FOLDER stuck` kills the second rank while the first is in a loop that no signal interrupts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

from mtrl_cli.agents.dqn import DQN
from mtrl_cli.agents.value_scale import PopArt, ReturnNorm
from mtrl_cli.augmentation.base import Pipeline
from mtrl_cli.cli import main as cli_main
from mtrl_cli.commands import trainer
from mtrl_cli.errors import RanksLost, RunError, UserError
from mtrl_cli.networks.heads import PlainHead
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.sharing import HardSharing
from mtrl_cli.networks.torsos import MLP
from mtrl_cli.parallel import distributed, torchrun
from mtrl_cli.parallel.distributed import ALONE, Ranks, meet
from mtrl_cli.replay.buffers import Batch, UniformReplay
from mtrl_cli.runs.stop_signal import StopRequest
from mtrl_cli.task_weights.tape import Tape, tape_for
from mtrl_cli.training.episode_statistics import EpisodeStatistics
from mtrl_cli.training.learner import Learner
from mtrl_cli.training.optimizers import Adam
from tests.helpers import learners
from tests.helpers.fake_tasks import stream_of, tasks_of, weights_of
from tests.helpers.replay_reference import spec

NAMES = ["t0", "t1", "t2"]
SPEC = spec(frame_shape=(5,), stack=1, num_tasks=3)
SETTINGS = {**learners.SETTINGS, "batch_size": 8}
WEIGHTINGS = ["uniform", "pcgrad", "stch", "famo", "gradnorm", "gradvac", "mgda", "imtl_g", "graddrop", "db_mtl", "random", "dwa"]


class FixedReplay(UniformReplay):
    """A replay that generates whole batches and returns a rank's part."""

    def __init__(self, ranks: Ranks):
        super().__init__(SPEC, capacity=36)
        self._ranks, self._random = ranks, torch.Generator().manual_seed(0)

    def prepare(self, step: int, batch_size: int) -> None:
        """Do nothing: batches do not depend on stored transitions."""

    def draw(self, batch_size: int) -> Batch:
        B, random = batch_size * self._ranks.size, self._random
        mine = slice(self._ranks.rank * batch_size, (self._ranks.rank + 1) * batch_size)
        # Rewards of tasks differ in scale.
        scale_K11 = torch.tensor([1.0, 3.0, 10.0])[:, None, None]
        batch = Batch(
            observation=torch.rand((3, B, 1, 5), generator=random) - 0.5,
            action=torch.randint(3, (3, B), generator=random),
            rewards=scale_K11 * (torch.rand((3, B, 3), generator=random) - 0.3),
            steps=torch.full((3, B), 3),
            terminated=torch.rand((3, B), generator=random) < 0.2,
            next_observation=torch.rand((3, B, 1, 5), generator=random) - 0.5,
            weight=(torch.rand((3, B), generator=random) < 0.9).float(),
            index=torch.zeros((3, B), dtype=torch.int64),
        )
        return Batch(**{field.name: getattr(batch, field.name)[:, mine] for field in dataclasses.fields(Batch)})


class Recording(Adam):
    """Adam that records the gradients of each step."""

    def clip_gradients(self) -> torch.Tensor:
        self.seen = torch.cat([parameter.grad.flatten() for parameter in self.parameters if parameter.grad is not None])
        return super().clip_gradients()


def learner_of(weighting: str, ranks: Ranks, taped: bool) -> tuple[Learner, Recording, PopArt]:
    torch.manual_seed(0)
    network = MultiTaskNetwork(HardSharing(MLP(hidden=[8, 6]), [(5,)] * 3), PlainHead(6, [3, 3, 3]), observation_scale=1.0)
    scale = PopArt(dataclasses.replace(stream_of(NAMES), ranks=ranks))
    agent = DQN(network, scale, NAMES, lambda function: function, **SETTINGS)
    optimizer = Recording(list(network.parameters()), lr=0.01, eps=1e-4, weight_decay=0.0, max_grad_norm=1.0)

    def make_tape() -> Tape | None:
        return tape_for(network, network.shared_parameters(), network.own_parameters(), torch.rand(3, 2, 5)) if taped else None

    learner = Learner(agent, FixedReplay(ranks), Pipeline(), weights_of(weighting), optimizer, NAMES, make_tape=make_tape, ranks=ranks)
    return learner, optimizer, scale


def relative_difference(mine: torch.Tensor, other: torch.Tensor) -> float:
    """Return the maximum difference of two tensors, relative to the largest entry of the second."""
    return float((mine - other).abs().max() / other.abs().max().clamp_min(1e-12))


def check_updates(ranks: Ranks, found: dict[str, Any]) -> None:
    for weighting in WEIGHTINGS:
        for taped in (False, True):
            (mine, seen, scale), (single, whole, one) = learner_of(weighting, ranks, taped), learner_of(weighting, ALONE, taped)
            assert (mine.ranks.size, mine._batch_size) == (2, single._batch_size // 2)
            gradients, moments = [], []
            for update in range(3):
                mine.update(update)
                single.update(update)
                gradients.append(relative_difference(seen.seen, whole.seen))
                moments.append(max(relative_difference(scale.mean_K, one.mean_K), relative_difference(scale.scale_K, one.scale_K)))
            row, expected = mine.read_metrics(), single.read_metrics()
            metrics = max(abs(row[name] - expected[name]) / max(1e-6, abs(expected[name])) for name in expected)
            digest = hashlib.sha256(torch.nn.utils.parameters_to_vector(mine.agent.network.parameters()).detach().numpy().tobytes())
            found[f"{weighting} {'taped' if taped else 'plain'}"] = {
                "gradients": gradients,
                "moments": max(moments),
                "metrics": metrics,
                "digest": digest.hexdigest(),
            }


def check_return_norm(ranks: Ranks, found: dict[str, Any]) -> None:
    mine = ReturnNorm(dataclasses.replace(stream_of(NAMES, num_envs=4), ranks=ranks))
    single = ReturnNorm(stream_of(NAMES, num_envs=4))
    random, part = torch.Generator().manual_seed(1), slice(2 * ranks.rank, 2 * ranks.rank + 2)
    for _ in range(20):
        reward, done = torch.randn((3, 4), generator=random), torch.rand((3, 4), generator=random) < 0.2
        mine.observe(reward[:, part], done[:, part])
        single.observe(reward, done)
    found["return_norm"] = relative_difference(mine.rewards(torch.ones(3, 1, 1)), single.rewards(torch.ones(3, 1, 1)))


def check_exchanges(ranks: Ranks, found: dict[str, Any]) -> None:
    rank = ranks.rank
    tensors = [torch.full((2, 3), float(rank)), torch.tensor(float(rank)), torch.arange(6.0).view(2, 3).T * rank]
    ranks.mean_(tensors)
    found["mean"] = [tensor.tolist() for tensor in tensors]
    found["joined"] = ranks.joined(torch.tensor([[rank], [10 + rank]]), 1).tolist()
    found["agreed"] = ranks.agreed(torch.tensor([rank + 1.5])).tolist()
    found["total"] = ranks.total(np.array([rank + 1, 10])).tolist()
    found["largest"] = [ranks.largest(7 * rank), ranks.largest(rank == 1)]
    statistics = EpisodeStatistics(["a", "b"], num_envs=1)
    for reward in ([2.0], [5.0, 8.0])[rank]:  # episodes of one step, only of the first task
        statistics.add(np.array([[reward], [1.0]]), np.array([[True], [False]]))
    found["recent"] = statistics.recent(ranks.total)
    found["row"] = statistics.row(ranks.total)
    found["from_first"] = ranks.from_first({"rank": rank, "text": "ü" * (rank + 1)})
    found["gather"] = [data.decode() for data in ranks.gather(f"of {rank}".encode() * 3)]
    found["raised"] = []
    for failing, kind in ((0, UserError), (1, RunError), (None, UserError)):
        try:
            with ranks.together():
                if rank == failing:
                    raise kind(f"{failing} cannot")
        except (UserError, RunError) as error:
            found["raised"].append([type(error).__name__, str(error)])


def check_failure(ranks: Ranks, found: dict[str, Any]) -> None:
    """Runs last: a failing rank ends the other ranks, and the first rank gets the reason."""
    if ranks.rank == 1:
        raise RunError("the disk is full")
    try:
        ranks.wait()
    except RanksLost as lost:
        found["lost"] = str(lost)


def stuck(folder: Path, place: torchrun.Place) -> None:
    distributed.GRACE_SECONDS = 0.5
    with StopRequest(), meet(place) as ranks:
        ranks.at_loss = lambda line: bool((folder / "lost").write_text(line))
        ranks.wait()
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(100):
            time.sleep(1.0)  # the loop continues after a signal


def write_digest_at_end(folder: Path, rank: int) -> None:
    """Make training write a digest of the rank's parameters, and the seeds and frames of its environments."""
    part = trainer.Trainer._wait_for_ranks

    def write_digest(self: trainer.Trainer) -> None:
        vector = torch.nn.utils.parameters_to_vector(self.run.agent.network.parameters()).detach()
        digest = hashlib.sha256(vector.numpy().tobytes()).hexdigest()
        seeds = [group.envs.episode_seed(0, env, 0) for group in self.loop.groups for env in range(group.envs.num_envs)]
        rewards = self.run.replay.export_rows(self.run.replay.rows - 5, self.run.replay.rows)["frames"].sum().item()
        (folder / f"{rank}.json").write_text(json.dumps({"digest": digest, "seeds": seeds, "frames": rewards}))
        part(self)

    trainer.Trainer._wait_for_ranks = write_digest  # type: ignore[method-assign]


def main() -> None:
    folder, place = Path(sys.argv[1]), torchrun.place()
    if sys.argv[2:] == ["stuck"]:
        stuck(folder, place)
    elif len(sys.argv) > 2:
        write_digest_at_end(folder, place.rank)
        sys.argv = ["mtrl", *sys.argv[2:]]
        cli_main.main()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"tasks": len(tasks_of(NAMES))}
    try:
        with meet(place) as ranks:
            check_exchanges(ranks, found)
            check_updates(ranks, found)
            check_return_norm(ranks, found)
            check_failure(ranks, found)
    except RunError:
        time.sleep(2.0)  # ranks other than the first leave printing the error to the first
    (folder / f"{place.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
