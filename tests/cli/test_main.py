"""The command line: output, exit codes, and imports."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtrl_cli import __version__
from mtrl_cli.cli import main as cli_main
from mtrl_cli.commands import bench, eval, train
from mtrl_cli.config import compose
from mtrl_cli.config import options as catalogue
from mtrl_cli.errors import RunError, Stopped, UserError
from mtrl_cli.sweeps import command as sweep_command
from mtrl_cli.sweeps import plan as sweep_plan

Outcome = tuple[int, str, str]


@pytest.fixture(autouse=True)
def _no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-settings"))


@pytest.fixture
def mtrl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Outcome]:
    """Run a command line in this process, in an empty folder: exit code, stdout, stderr."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*words: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["mtrl", *words])
        with pytest.raises(SystemExit) as ended:
            cli_main.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replace the functions that the commands call, and record the arguments."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(train, "run", lambda config, *, command, or_resume: calls.append(("train", config, command, or_resume)))
    monkeypatch.setattr(train, "resume", lambda run, overrides, *, command: calls.append(("resume", run, overrides, command)))
    monkeypatch.setattr(eval, "run", lambda run, options: calls.append(("eval", run, options)))
    monkeypatch.setattr(bench, "run", lambda config, *, seconds, as_json: calls.append(("bench", config, seconds, as_json)))
    return calls


def process(code: str, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python code in a separate process that can import the package."""
    path = os.pathsep.join([str(Path(cli_main.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code, *words], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False, **options
    )


IMPORTED = """
import atexit, json, sys
from mtrl_cli.cli.main import main
atexit.register(lambda: print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr))
main()
"""


@pytest.mark.parametrize(
    ("words", "forbidden"),
    [
        (["--help"], ["torch", "hydra", "omegaconf", "gymnasium", "ale_py", "numpy", "rich"]),
        (["bench", "--help"], ["torch", "hydra", "omegaconf", "gymnasium", "ale_py", "numpy", "rich"]),
        (["transfer", "--help"], ["torch", "hydra", "omegaconf", "gymnasium", "ale_py", "numpy", "rich", "matplotlib"]),
        (["sweep", "--help"], ["torch", "hydra", "omegaconf", "gymnasium", "ale_py", "numpy", "rich", "optuna"]),
        (["sweep", "--dry-run", "env=classic_pack", "seed=1,2"], ["torch", "optuna", "gymnasium", "ale_py", "minatar"]),
        (["train", "--help"], ["torch", "hydra", "omegaconf", "gymnasium", "ale_py", "numpy", "rich"]),
        (["ls"], ["torch", "hydra", "gymnasium", "ale_py", "numpy"]),
        (["ls", "env"], ["torch", "hydra", "gymnasium", "ale_py", "numpy"]),
        (["ls", "task_weights"], ["torch", "hydra", "gymnasium", "ale_py", "numpy"]),
        (["train", "--dry-run", "network.parameters=1.7M"], ["torch", "gymnasium", "ale_py", "numpy", "minatar"]),
        (["train", "--dry-run", "env=classic_pack"], ["torch", "hydra", "omegaconf", "gymnasium", "ale_py", "numpy", "minatar"]),
        (["train", "--dry-run", "env=minatar_pack"], ["torch", "hydra", "omegaconf", "gymnasium", "ale_py", "numpy", "minatar"]),
    ],
)
def test_slow_imports_are_avoided(words: list[str], forbidden: list[str]) -> None:
    done = process(IMPORTED, *words)
    assert done.returncode == 0, done.stderr
    assert not set(forbidden) & set(json.loads(done.stderr))


@pytest.mark.parametrize("words", [[], ["study"]])
def test_without_a_command_the_help_is_printed(mtrl: Callable[..., Outcome], words: list[str]) -> None:
    code, out, err = mtrl(*words)
    assert (code, err) == (0, "")
    assert out.startswith("Usage: mtrl")
    assert "Commands:" in out


def test_help_shows_commands_and_examples(mtrl: Callable[..., Outcome]) -> None:
    code, out, err = mtrl("--help")
    assert (code, err) == (0, "")
    for word in ("train", "resume", "eval", "bench", "ls", "info", "transfer", "sweep", "--version", "mtrl train env=atari_pack"):
        assert word in out
    assert mtrl()[:2] == (0, out)
    for command in ("train", "resume", "eval", "transfer", "bench", "ls", "sweep"):
        code, out, err = mtrl(command, "--help")
        assert (code, err) == (0, "")
        assert f"  mtrl {command}" in out, "one example per line"


def test_version_option(mtrl: Callable[..., Outcome]) -> None:
    assert mtrl("--version") == (0, f"mtrl {__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nope"], "No such option: --nope (see mtrl --help)"),
        (["train", "--nope"], "No such option: --nope (see mtrl train --help)"),
        (["trian"], "Did you mean 'train', 'transfer'? (see mtrl --help)"),
        (["resume"], "Missing argument 'RUN' (see mtrl resume --help)"),
        (["eval"], "Missing argument 'RUN' (see mtrl eval --help)"),
        (["transfer"], "Missing argument 'RUN' (see mtrl transfer --help)"),
        (["train", "netwrok=mlp"], "unknown key 'netwrok'. Did you mean 'network'?"),
        (["train", "env=atari_pak"], "Did you mean 'env=atari_pack'?"),
        (["train", "env.tasks=[pong,breakot]", "--dry-run"], "Did you mean 'breakout'?"),
        (["train", "steps_per_task=0"], "steps_per_task must be a positive integer, got 0"),
        (["train", "agent.n_step=a", "--dry-run"], "agent.n_step must be a positive integer, got 'a'"),
        (["train", "nonsense"], "'nonsense' is not an override. Expected KEY=VALUE"),
        (["train", "launcher=local"], "launcher is a key of mtrl sweep"),
        (["sweep", "env=classic_pack"], "no key has several values"),
        (["sweep", "env=classic_pack", "seed=range(2)", "sweep.trails=1"], "Did you mean 'sweep.trials'?"),
        (["sweep", "env=classic_pak", "seed=1,2"], "Did you mean 'env=classic_pack'?"),
        (["sweep", "env=classic_pack", "seed=glob(*)", "--dry-run"], "glob is not supported"),
        (["eval", "nowhere", "eval.episode=3"], "Did you mean 'eval.episodes'?"),
        (["ls", "netwrk"], "Did you mean 'network'?"),
        (["ls", "env", "network"], "mtrl ls accepts one group, got env network"),
        (["ls", "env=atari_pack"], "expected a group"),
        (["ls", "agent", "env=atari_pack"], "expected a group or hydra.searchpath=[file:///home/me/conf], got env=atari_pack"),
        (["ls", "network", "network=mlp"], "mtrl ls network lists all options of network. Remove network=mlp"),
        (["ls", "network/head", "env=atari_pak"], "Did you mean 'env=atari_pack'?"),
        (["ls", "network/head", "network.parameters=lots"], "network.parameters must be a number of parameters"),
        (["ls", "network/head", "agent.n_stp=3"], "Did you mean 'agent.n_step'?"),
    ],
)
def test_invalid_input_is_one_error_with_exit_code_2_and_creates_nothing(
    mtrl: Callable[..., Outcome], words: list[str], message: str
) -> None:
    code, out, err = mtrl(*words)
    assert (code, out) == (2, "")
    assert err.startswith("mtrl: error: ")
    assert message in err
    assert len(err.splitlines()) <= 2
    assert os.listdir() == []


def test_dry_run_prints_the_configuration_of_the_run(mtrl: Callable[..., Outcome]) -> None:
    overrides = ["env=atari_pack", "network=impala", "agent.n_step=5", "seed=1"]
    code, out, err = mtrl("train", *overrides, "--dry-run")
    assert (code, err) == (0, "")
    assert yaml.safe_load(out) == compose.compose_training(overrides)
    assert os.listdir() == []


def test_commands_pass_plain_values(mtrl: Callable[..., Outcome], calls: list[tuple[Any, ...]]) -> None:
    assert mtrl("train", "env=classic_pack", "--or-resume", "run_dir=r")[0] == 0
    assert mtrl("resume", "r", "device=cpu")[0] == 0
    assert mtrl("eval", "r", "eval.episodes=10", "video=true")[0] == 0
    assert mtrl("bench", "env=classic_pack", "--seconds", "3", "--json")[0] == 0
    trained, resumed, evaluated, benched = calls
    assert benched == ("bench", compose.compose_training(["env=classic_pack"]), 3.0, True)
    assert trained == (
        "train",
        compose.compose_training(["env=classic_pack", "run_dir=r"]),
        ["mtrl", "train", "env=classic_pack", "--or-resume", "run_dir=r"],
        True,
    )
    assert resumed == ("resume", Path("r"), ["device=cpu"], ["mtrl", "resume", "r", "device=cpu"])
    assert evaluated[:2] == ("eval", Path("r"))
    assert evaluated[2]["eval"]["episodes"] == 10
    assert evaluated[2]["video"] is True


def test_sweep_passes_a_plan(mtrl: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(sweep_command, "run", lambda plan, *, command: calls.append((plan, command)))
    monkeypatch.setattr(sweep_command, "resume", lambda folder, overrides, *, command: calls.append((folder, overrides, command)))
    assert mtrl("sweep", "env=classic_pack", "seed=1,2", "run_dir=s")[0] == 0
    Path("s").mkdir()
    Path("s/sweep.json").write_text("{}")
    assert mtrl("resume", "s", "launcher.jobs=2")[0] == 0
    (plan, command), resumed = calls
    assert plan == sweep_plan.make(["env=classic_pack", "seed=1,2", "run_dir=s"])
    assert command == ["mtrl", "sweep", "env=classic_pack", "seed=1,2", "run_dir=s"]
    assert resumed == (Path("s"), ["launcher.jobs=2"], ["mtrl", "resume", "s", "launcher.jobs=2"])


@pytest.mark.parametrize(
    ("raised", "code", "printed"),
    [
        (UserError("the run is wrong\nfix it"), 2, "mtrl: error: the run is wrong\nfix it\n"),
        (RunError("the loss is not finite"), 1, "mtrl: error: the loss is not finite\n"),
        (Stopped(signal.SIGINT), 130, "mtrl: stopped; nothing was changed\n"),
        (Stopped(signal.SIGTERM), 143, "mtrl: stopped; nothing was changed\n"),
        (KeyboardInterrupt(), 130, ""),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 1, "mtrl: error: runs/x: No space left on device\n"),
        (UserError("red \x1b[31m\x07"), 2, "mtrl: error: red ?[31m?\n"),
    ],
)
def test_exceptions_become_exit_codes(
    mtrl: Callable[..., Outcome],
    calls: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    code: int,
    printed: str,
) -> None:
    def end(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(train, "run", end)
    assert mtrl("train") == (code, "", printed)


def test_other_exceptions_keep_their_traceback(calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(train, "run", fail)
    monkeypatch.setattr(sys, "argv", ["mtrl", "train"])
    with pytest.raises(ZeroDivisionError):
        cli_main.main()


def test_ls_lists_groups_and_describes_options(mtrl: Callable[..., Outcome]) -> None:
    folders = [catalogue.conf_folder()]
    code, out, err = mtrl("ls")
    assert (code, err) == (0, "")
    for group in catalogue.groups(folders, None):
        assert f"\n{group} " in out
    for group in catalogue.groups(folders, None):
        code, out, err = mtrl("ls", group)
        assert (code, err) == (0, "")
        for name, file in catalogue.options(group, folders).items():
            line = next(line for line in out.splitlines() if line[2:].split()[:1] == [name])
            assert catalogue.description(file) in line
    assert "* atari_pack" in mtrl("ls", "env")[1]


def row(out: str, option: str) -> list[str]:
    """Return the cells of an option's row."""
    line = next(line for line in out.splitlines() if line[2:].split()[:1] == [option])
    return [cell.strip() for cell in line[2:].split("  ") if cell.strip()]


def test_ls_shows_network_sizes(mtrl: Callable[..., Outcome]) -> None:
    # The eight games have 6, 4, 6, 18, 9, 6, 9 and 3 actions; a dueling head has (512 + 1) (1 + actions) parameters.
    shared, heads = 1_684_128, 513 * (8 + 6 + 4 + 6 + 18 + 9 + 6 + 9 + 3)
    torso = 20 * 20 * 32 * 256 + 9 * 9 * 64 * 512 + 7 * 7 * 64 * 576 + 512 * 3136
    sizes = [f"{shared + heads:,}", f"{shared:,}", f"{513 * 4:,} to {513 * 19:,}", f"{(torso + 512 * 19 + 18) / 1e6:.2f}M", "atari_pack"]
    out = mtrl("ls", "network")[1]
    assert row(out, "nature")[1:6] == sizes
    assert {name: row(out, name)[5] for name in ("impala", "mlp", "minatar")} == {
        "impala": "atari_pack", "mlp": "classic_pack", "minatar": "minatar_pack",
    }  # fmt: skip
    out = mtrl("ls", "network/head")[1]
    assert row(out, "dueling")[1:6] == sizes
    assert row(out, "plain")[1] == f"{shared + heads - 8 * 513:,}"
    out = mtrl("ls", "network.sharing")[1]
    assert row(out, "hard")[1:6] == sizes
    independent = f"{shared + 513 * 4:,} to {shared + 513 * 19:,}"
    assert row(out, "independent")[1:5] == [f"{8 * shared + heads:,}", "0", independent, sizes[3]]


def test_ls_applies_overrides_and_explains_missing_sizes(mtrl: Callable[..., Outcome]) -> None:
    code, out, err = mtrl("ls", "network/sharing", "env=classic_pack", "env.tasks=[CartPole-v1,Acrobot-v1]", "network.parameters=30k")
    assert (code, err) == (0, "")
    for name in ("hard", "independent"):
        cells = row(out, name)
        assert abs(int(cells[1].replace(",", "")) / 30_000 - 1) <= 0.02
        assert cells[5] == "classic_pack"
    code, out, err = mtrl("ls", "network", "env=classic_pack")
    assert (code, err) == (0, "")
    assert row(out, "mlp")[5] == "classic_pack"
    assert row(out, "nature")[1:5] == ["-"] * 4
    assert (
        "(not counted: network=NatureCNN requires image observations, and env=classic_pack has vector observations"
        in row(out, "nature")[-1]
    )


def test_ls_shows_the_other_sizes_if_a_package_is_missing(mtrl: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minatar", None)
    code, out, err = mtrl("ls", "network")
    assert (code, err) == (0, "")
    assert "(not counted: env=minatar_pack requires minatar, which is not installed. Install it" in row(out, "minatar")[-1]
    assert row(out, "nature")[5] == "atari_pack"


def test_ls_lists_user_folders(mtrl: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "own" / "env").mkdir(parents=True)
    (tmp_path / "own" / "env" / "mine.yaml").write_text("# @package _global_\n# My own games\nenv: {}\n")
    code, out, _ = mtrl("ls", "env", f"hydra.searchpath=[file://{tmp_path}/own]")
    assert code == 0
    assert "  mine          My own games" in out


def test_info_shows_versions_and_locations(mtrl: Callable[..., Outcome]) -> None:
    code, out, err = mtrl("info", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["versions"]["mtrl_cli"] == __version__
    assert {"python", "torch", "gymnasium", "ale-py", "hydra-core"} <= set(facts["versions"])
    assert facts["configuration"] == str(catalogue.conf_folder())
    assert facts["cores"] >= 1
    assert facts["devices"][0] == "cpu"
    code, out, err = mtrl("info")
    assert (code, err) == (0, "")
    assert f"{facts['configuration']}\n" in out


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_broken_pipe_is_no_error(unbuffered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    done = process(
        "import subprocess, sys\n"
        "p = subprocess.Popen([sys.executable, '-m', 'mtrl_cli', 'train', '--dry-run'], stdout=subprocess.PIPE, stderr=subprocess.PIPE)\n"
        "p.stdout.close()\n"
        "print(p.stderr.read().decode(), p.wait())"
    )
    assert done.stdout == " 0\n"


def test_python_m_mtrl_cli_is_the_command() -> None:
    done = process("import runpy, sys; sys.argv[0] = 'mtrl'; runpy.run_module('mtrl_cli', run_name='__main__')", "--version")
    assert (done.returncode, done.stdout) == (0, f"mtrl {__version__}\n")


@pytest.mark.skipif(os.name != "posix", reason="closes a descriptor as a shell does")
@pytest.mark.parametrize("words", [["ls"], ["--version"], ["info", "--json"]])
def test_closed_stdout_is_no_error(words: list[str], tmp_path: Path) -> None:
    command = shlex.join([sys.executable, "-m", "mtrl_cli", *words]) + " >&-"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
