"""Shell completion, through the protocol of each shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtrl_cli.cli import completion
from mtrl_cli.cli import main as cli_main
from mtrl_cli.config import compose, options, schema
from tests.helpers.fake_tasks import ALL_WEIGHTS

CONF = options.conf_folder()


@pytest.fixture(autouse=True)
def _no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-settings"))


def completions(command: str, incomplete: str, *given: str) -> list[str]:
    return [word for word, _ in completion.complete(command, given, incomplete)]


def test_empty_word_completes_to_groups_and_top_level_keys() -> None:
    words = completions("train", "")
    assert {f"{group}=" for group in options.groups([CONF])} < set(words)
    assert "steps_per_task=" in words
    assert not any("." in word for word in words)


def test_options_have_descriptions() -> None:
    found = dict(completion.complete("train", [], "env=ata"))
    assert set(found) == {"env=atari_pack", "env=atari_26", "env=atari_57"}
    assert found["env=atari_26"] == options.description(CONF / "env" / "atari_26.yaml")
    sharings = sorted(path.stem for path in (CONF / "network" / "sharing").glob("*.yaml"))
    assert completions("train", "network/sharing=") == [f"network/sharing={name}" for name in sharings]
    assert completions("train", "task_w") == [f"task_weights={name}" for name in ALL_WEIGHTS]


NETWORK = ("layer_norm", "dropout", "spectral_norm", "features", "width", "parameters")


@pytest.mark.parametrize(
    ("incomplete", "words"),
    [
        ("agent.n_", ["agent.n_step=", "agent.n_step=3"]),
        ("agent.epsilon_s", ["agent.epsilon_start=", "agent.epsilon_steps="]),
        ("agent.double=", ["agent.double=true", "agent.double=false"]),
        ("precision=", ["precision=auto", "precision=fp32", "precision=tf32", "precision=bf16"]),
        ("env.protocol=n", ["env.protocol=nature"]),
        ("replay.capacity=", ["replay.capacity=auto"]),
        ("netw", ["network=", "network/sharing=", "network/head=", *(f"network.{key}=" for key in NETWORK)]),
        ("env.tasks=[pong,brea", ["env.tasks=[pong,breakout]", "env.tasks=[pong,breakout,"]),
        ("nothing", []),
        ("nothing=", []),
        ("agent.nothing=", []),
    ],
)
def test_keys_and_values_come_from_the_schema(incomplete: str, words: list[str]) -> None:
    assert completions("train", incomplete) == words


def test_keys_depend_on_the_options_given_before() -> None:
    assert "network.hidden=" in completions("train", "network.", "env=classic_pack")
    assert "network.hidden=" not in completions("train", "network.")
    assert "env.tasks=[asterix" in completions("train", "env.tasks=", "env=minatar_pack")
    assert "network.features=" in completions("train", "network.", "env=no_such"), "an invalid option elsewhere is ignored"


def test_user_folders_are_completed(tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "mine.yaml").write_text("# Mine\n")
    assert sorted(completions("train", "env=m", f"hydra.searchpath=[{tmp_path}]")) == ["env=minatar_pack", "env=mine"]


def test_other_commands_complete_their_own_keys() -> None:
    assert completions("bench", "agent.n_") == completions("train", "agent.n_") != []
    assert completions("bench", "env=cl") == ["env=classic_pack"]
    assert completions("resume", "") == ["launcher=", *(f"{key}=" for key in compose.RESUMABLE)]
    assert completions("resume", "sweep.") == ["sweep.trials=", "sweep.retries="]
    assert completions("eval", "eval.epi") == ["eval.episodes="]
    assert completions("eval", "video=") == ["video=true", "video=false"]
    assert completions("eval", "checkpoint=") == ["checkpoint=latest", "checkpoint=best"]


def test_sweep_completes_the_keys_of_runs_and_its_own() -> None:
    assert {*completions("train", ""), "launcher="} == set(completions("sweep", ""))
    assert "launcher=" not in completions("train", "")
    assert completions("train", "sweep.") == completions("train", "launcher") == []
    assert completions("sweep", "sweep.") == [f"sweep.{key}=" for key in schema.keys_of(schema.Search)]
    assert completions("sweep", "sweep.pruner=h") == ["sweep.pruner=hyperband", "sweep.pruner=halving"]
    assert completions("sweep", "launcher=") == [f"launcher={name}" for name in options.options("launcher", [CONF])]
    assert "launcher.jobs=" in completions("sweep", "launcher.", "env=classic_pack", "launcher=local")
    assert completions("sweep", "env=cl", "seed=range(3)") == ["env=classic_pack"]
    assert completions("sharing", "env=cl") == ["env=classic_pack"]  # mtrl study sharing
    # With several options, the keys are those of the first.
    assert "network.hidden=" in completions("sweep", "network.", "env=classic_pack,minatar_pack", "sweep.trials=3")
    assert "network.hidden=" not in completions("sweep", "network.", "env=minatar_pack,classic_pack")


def completion_output(shell: str, line: str, position: int | None = None) -> list[str]:
    """Return the output of the real program for a shell's completion function."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cli_main.__file__).parents[2]), "_MTRL_COMPLETE": f"complete_{shell}"}
    if shell == "bash":
        words = line.split(" ")
        environment |= {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1 if position is None else position)}
    else:
        environment |= {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = subprocess.run([sys.executable, "-m", "mtrl_cli"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")


def test_bash_completes_words_split_at_the_equals_sign() -> None:
    assert completion_output("bash", "mtrl train env = mina") == ["minatar_pack", ""]
    assert "atari_pack" in completion_output("bash", "mtrl train env =", 3)
    assert completion_output("bash", "mtrl train env = classic_pack agent.n_") == ["agent.n_step=", "agent.n_step=5", ""]
    assert completion_output("bash", "mtrl tr") == ["train", "transfer", ""]
    assert completion_output("bash", "mtrl ls network/h") == ["network/head", ""]


def test_zsh_and_fish_complete_whole_words() -> None:
    assert "env=minatar_pack" in completion_output("zsh", "mtrl train env=mina")[0]
    assert completion_output("fish", "mtrl train env=mina")[0].startswith("env=minatar_pack\t")


@pytest.mark.parametrize(
    ("words", "position", "expected"),
    [
        ("mtrl train env = at", 4, (["mtrl", "train"], "env=at")),
        ("mtrl train env =", 3, (["mtrl", "train"], "env=")),
        ("mtrl train env = a seed = 1 ", 8, (["mtrl", "train", "env=a", "seed=1"], "")),
        ("mtrl train 'env.tasks = [pong", 2, (["mtrl", "train"], "env.tasks = [pong")),
        ("mtrl train", 1, (["mtrl"], "train")),
    ],
)
def test_bash_words_are_joined(words: str, position: int, expected: tuple[list[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(position))
    assert completion.bash_words() == expected


def test_bash_words_are_none_in_other_shells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMP_WORDS", raising=False)
    assert completion.bash_words() is None
