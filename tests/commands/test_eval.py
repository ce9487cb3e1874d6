"""Train, resume and evaluate on Atari through the command line, and errors of `mtrl eval`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.command import Mtrl, MtrlHere
from tests.helpers.shared import Shared
from tests.helpers.tiny_runs import rows

TINY = [
    "env=atari_pack",
    "env.tasks=[pong,breakout]",
    "env.num_envs=2",
    "network.width=0.25",
    "network.features=16",
    "agent.learning_starts=40",
    "agent.batch_size=4",
    "agent.samples_per_step=2",
    "steps_per_task=120",
    "eval.every=60",
    "eval.episodes=2",
    "eval.max_steps=30",
    "checkpoint.every=60",
    "log.every=20",
    "device=cpu",
    "compile=false",
]


@pytest.fixture
def trained(shared: Shared) -> Path:
    return shared.run(*TINY).path


@pytest.fixture
def run(trained: Path, here: MtrlHere) -> Path:
    """A copy of the trained run that a test may change."""
    return Path(shutil.copytree(trained, here.folder / "run"))


def test_atari_trains_resumes_and_evaluates(run: Path, here: MtrlHere) -> None:
    assert json.loads((run / "run.json").read_text())["status"] == "completed"
    last = rows(run)[-1]
    assert last["frames"] == 4 * last["step"] == 480
    here("resume", "run", "steps_per_task=160")
    printed = here("eval", "run", "eval.episodes=3", "eval.max_steps=50").stdout
    assert "pong" in printed
    evaluation = json.loads((run / "eval" / "160.json").read_text())
    assert evaluation["episodes"] == 3
    assert evaluation["checkpoint"] == "160"
    # In 50 steps no episode of Pong ends, and its return is within a few points of zero.
    assert evaluation["tasks"]["pong"]["cut"] == 3
    assert all(-5 <= value <= 1 for value in evaluation["tasks"]["pong"]["returns"])


def test_evaluation_is_deterministic_and_depends_on_the_seed(run: Path, here: MtrlHere) -> None:
    results = []
    for seed in (7, 7, 8):
        here("eval", "run", "eval.episodes=4", "eval.max_steps=120", "eval.epsilon=1.0", f"eval.seed={seed}")
        results.append(json.loads((run / "eval" / "120.json").read_text())["tasks"])
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_evaluation_does_not_change_metrics(run: Path, here: MtrlHere) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    here("eval", "run", "eval.episodes=1", "eval.max_steps=5")
    assert (run / "metrics.jsonl").read_bytes() == before


def test_videos_play_in_a_browser(run: Path, here: MtrlHere) -> None:
    av = pytest.importorskip("av")
    here("eval", "run", "eval.episodes=1", "eval.max_steps=20", "video=true")
    for task in ("pong", "breakout"):
        with av.open(str(run / "videos" / f"{task}.mp4")) as video:
            stream = video.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (stream.width, stream.height) == (160, 210)
            frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(stream)]
        assert len(frames) == 21
        assert frames[0].std() > 0


@pytest.mark.parametrize("name", ["eval", "videos"])
def test_link_out_of_the_run_is_not_written_through(run: Path, here: MtrlHere, name: str) -> None:
    pytest.importorskip("av")
    elsewhere = here.folder / "elsewhere"
    elsewhere.mkdir()
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).symlink_to(elsewhere)
    refused = here("eval", "run", "eval.episodes=1", "eval.max_steps=5", "video=true", code=2)
    assert "link out of the run folder" in refused.stderr
    assert list(elsewhere.iterdir()) == []


def test_broken_pipe_loses_no_scores(run: Path, mtrl: Mtrl) -> None:
    (run / "eval" / "120.json").unlink()
    process = mtrl.start("eval", "run", "eval.episodes=1", "eval.max_steps=5")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 0)
    assert (run / "eval" / "120.json").is_file()


def test_checkpoint_is_chosen_by_option_or_path(run: Path, here: MtrlHere) -> None:
    few = ["eval.episodes=1", "eval.max_steps=5"]
    best = (run / "checkpoints" / "best").read_text().strip()
    for words, step in ((["run", "checkpoint=60"], 60), (["run/checkpoints/60"], 60), (["run", "checkpoint=best"], best)):
        assert f"/eval/{step}.json" in here("eval", *words, *few).stdout
    assert "12345" in here("eval", "run", "checkpoint=12345", code=2).stderr


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "COMPLETE").unlink(), "COMPLETE"),
        (lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1]), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x80\x04 a pickle"), "model.safetensors"),
        (lambda folder: (folder / "state.json").unlink(), "state.json"),
    ],
    ids=["unfinished", "truncated", "foreign", "incomplete"],
)
def test_damaged_checkpoint_named_explicitly_is_refused(run: Path, here: MtrlHere, damage, message: str) -> None:
    damage(run / "checkpoints" / "60")
    for words in (["run", "checkpoint=60"], ["run/checkpoints/60"]):
        refused = here("eval", *words, code=2)
        assert message in refused.stderr
        assert len(refused.stderr.strip().splitlines()) <= 2


def test_checkpoint_of_another_network_is_refused(run: Path, here: MtrlHere) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("features: 16", "features: 32"))
    for command in (["eval", "run"], ["resume", "run", "steps_per_task=200"]):
        refused = here(*command, code=2)
        assert "does not fit" in refused.stderr
        assert len(refused.stderr.strip().splitlines()) <= 2


def test_tasks_of_different_shapes_share_one_network(here: MtrlHere) -> None:
    pytest.importorskip("minatar")
    here(
        "train",
        "env=minatar_pack",
        "steps_per_task=160",
        "agent.learning_starts=80",
        "eval.episodes=1",
        "eval.max_steps=20",
        "eval.every=0",
        "device=cpu",
        "compile=false",
        "run_dir=run",
    )
    evaluation = json.loads((here.folder / "run" / "eval" / "160.json").read_text())
    assert len(evaluation["tasks"]) == 5
