"""Fifty hostile run folders: each is refused in at most two lines with exit code 2.

No code of a folder is run or imported, and no folder is changed.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtrl_cli.config import compose, safe_yaml
from mtrl_cli.errors import UserError

CANARY = "canary-that-must-not-sing"
COMMAND = f"touch {CANARY}"

VALID = compose.compose_training(["device=cpu"])


def with_values(**changes: Any) -> str:
    """A valid configuration with changed keys (`network__head` is network.head)."""
    changed = copy.deepcopy(VALID)
    for key, value in changes.items():
        node = changed
        *path, last = key.split("__")
        for part in path:
            node = node[part]
        node[last] = value
    return compose.dump(changed)


def target(group: str, path: str, /, **keys: Any) -> str:
    return with_values(**{group: {"_target_": path, **keys}})


def valid() -> str:
    return compose.dump(VALID)


HOSTILE: dict[str, str | bytes | Callable[[Path], None]] = {
    # code referenced by name
    "system": target("network", "os.system", command=COMMAND),
    "hydra_arguments": target("network", "os.system", _args_=[COMMAND]),
    "subprocess": target("optimizer", "subprocess.run", args=COMMAND, shell=True),
    "eval": target("replay", "builtins.eval", _args_=[f"__import__('os').system('{COMMAND}')"]),
    "exec": target("replay", "builtins.exec", _args_=[f"open('{CANARY}','w')"]),
    "pickle": target("augmentation", "pickle.loads", _args_=["cos\nsystem\n(S'touch x'\ntR."]),
    "torch_load": target("augmentation", "torch.load", f="model.pt", weights_only=False),
    "run_path": target("env", "runpy.run_path", path_name="evil.py"),
    "instantiate": target("agent", "hydra.utils.instantiate", _args_=[{"_target_": "os.system"}]),
    "get_method": target("agent", "hydra.utils.get_method", path="os.system"),
    "foreign_package": target("task_weights", "evil.Weights"),
    "partial": target("network", "functools.partial", _partial_=True),
    # code through this package
    "import_of_an_import": target("network", "mtrl_cli.commands.train.shutil.copy", src="a", dst=CANARY),
    "import": target("network", "mtrl_cli.config.compose.os.system", command=COMMAND),
    "our_function": target("network", "mtrl_cli.files.atomic.replace", path=CANARY, chunks="x"),
    "our_entry_point": target("env", "mtrl_cli.cli.main.main"),
    "our_other_class": target("network", "mtrl_cli.runs.run_dir.RunFolder", path="."),
    "alias_in_ours": target("env", "mtrl_cli.config.compose.Path"),
    "imported_base": target("network", "mtrl_cli.networks.sharing.Torso"),
    "imported_class": target("network__sharing", "mtrl_cli.networks.network.Sharing"),
    "wrong_kind": target("network", "mtrl_cli.training.optimizers.Adam", lr=0.1, eps=0.1, weight_decay=0.0, max_grad_norm=0.0),
    "method": target("network", "mtrl_cli.networks.torsos.NatureCNN.__init__"),
    "subclasses": target("network", "mtrl_cli.networks.torsos.NatureCNN.__subclasses__"),
    "dunder": target("network", "mtrl_cli.__builtins__.eval"),
    "upwards": target("network", "mtrl_cli...evil.Torso"),
    "slashes": target("network", "mtrl_cli./../../evil.Torso"),
    "nested_target": with_values(network__head__inner={"_target_": "os.system", "command": COMMAND}),
    "target_among_values": with_values(eval={**VALID["eval"], "_target_": "os.system"}),
    "target_at_the_top": with_values(_target_="os.system", command=COMMAND),
    "target_in_a_dictionary": with_values(agent__epsilon_tasks={"_target_": "os.system"}),
    # trust granted by the folder itself
    "own_trust": with_values(trusted_packages=["os"], network={"_target_": "os.system", "command": COMMAND}),
    "own_trust_of_all": with_values(trusted_packages=["", "evil"], network={"_target_": "evil.Torso"}),
    "hydra_settings": with_values(hydra={"searchpath": ["file:///tmp"], "run": {"dir": CANARY}}),
    "defaults": with_values(defaults=[{"env": "evil"}]),
    # interpolations
    "environment": with_values(run_dir="${oc.env:HOME}"),
    "decode": with_values(seed="${oc.decode:'1'}"),
    "interpolated_target": target("network", "${run_dir}"),
    # YAML
    "python_tag": valid() + f"evil: !!python/object/apply:os.system ['{COMMAND}']\n",
    "python_name": valid() + "evil: !!python/name:os.system\n",
    "unknown_tag": valid() + "evil: !run x\n",
    "aliases": "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n" + valid(),
    "merge_key": valid().replace("network:", "network: &n", 1) + "other: {<<: *n}\n",
    "second_key": valid() + "seed: 5\n",
    "two_documents": valid() + "---\n" + valid(),
    "deep": "a: " + "[" * 5000 + "]" * 5000,
    "huge": valid() + "# " + "x" * (safe_yaml.LARGEST_FILE + 1),
    "huge_number": valid().replace("seed: 0", "seed: " + "9" * 5000),
    "binary": bytes(range(256)),
    "null_bytes": valid().encode() + b"\0",
    "escape_sequences": valid() + '"\\e[2J\\e]0;evil\\a": 1\n',
    "no_mapping": "- os.system\n",
    "empty": "",
    # not a regular file
    "named_pipe": lambda path: os.mkfifo(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link_elsewhere": lambda path: path.symlink_to("/etc/passwd"),
    "loop": lambda path: path.symlink_to(path.name),
    "folder": lambda path: path.mkdir(),
    # numbers and names
    "path_as_name": with_values(env__name="../../../tmp/evil"),
    "not_a_number": with_values(agent__gamma=float("nan")),
    "infinite": with_values(optimizer__lr=float("inf")),
    "endless": with_values(seed=10**30),
    "name_of_a_list": with_values(env__tasks={"pong": COMMAND}),
    "package_of_a_task": with_values(env__tasks=[["os", COMMAND]]),
}


def lay_out(name: str, folder: Path) -> Path:
    run = folder / name
    run.mkdir()
    content = HOSTILE[name]
    if callable(content):
        content(run / "config.yaml")
    else:
        (run / "config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    (run / "evil.py").write_text(f"open('{CANARY}', 'w')\n")
    return run


def test_there_are_fifty_variants_of_a_valid_configuration(tmp_path: Path) -> None:
    assert len(HOSTILE) >= 50
    (tmp_path / "config.yaml").write_text(valid())
    assert compose.load(tmp_path / "config.yaml") == VALID


@pytest.mark.parametrize("name", HOSTILE)
def test_refused_in_two_lines_without_importing_anything(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = lay_out(name, tmp_path)
    monkeypatch.chdir(run)
    monkeypatch.syspath_prepend(str(run))
    modules = set(sys.modules)
    with pytest.raises(UserError) as caught:
        compose.load_run(run)
    assert len(str(caught.value).splitlines()) <= 2
    assert len(str(caught.value)) < 1000
    assert set(sys.modules) <= modules
    assert sorted(os.listdir(run)) == ["config.yaml", "evil.py"]


# Running a command, loading code and network access raise audit events. The package's imports are done before the hook is set.
WATCHED = """
import contextlib, io, json, os, sys
from mtrl_cli.cli import main as cli
from mtrl_cli.commands import eval, train
from mtrl_cli.config import compose
compose.compose_evaluation([])  # imports the modules that parse overrides
WATCH = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "socket.connect", "pickle.find_class",
         "ctypes.dlopen", "exec", "compile", "import", "os.remove", "os.rename", "os.mkdir", "shutil.copyfile")
seen = []
sys.addaudithook(lambda event, args: seen.append((event, str(args)[:200])) if watching and event in WATCH else None)
watching, report = False, {}
for folder in sys.argv[1:]:
    for command in ("resume", "eval"):
        sys.argv = ["mtrl", command, folder]
        errors, seen[:], watching = io.StringIO(), [], True
        try:
            with contextlib.redirect_stderr(errors):
                cli.main()
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = repr(error)
        watching = False
        report[f"{command} {folder}"] = [code, errors.getvalue(), list(seen)]
print(json.dumps(report))
"""

HARMLESS = ("exec", "compile", "import")
"""Events that evaluating an annotation or a late import of a library also raises. The arguments of these events are checked."""


def test_commands_end_with_exit_code_2_and_change_nothing(tmp_path: Path) -> None:
    runs = [lay_out(name, tmp_path) for name in HOSTILE]
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *map(str, runs)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(compose.__file__).parents[2]), str(runs[0])])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report) == 2 * len(HOSTILE)
    for which, (code, errors, events) in report.items():
        assert code == 2, (which, code, errors)
        assert errors.startswith("mtrl: error: "), which
        assert len(errors.splitlines()) <= 2, (which, errors)
        assert errors.replace("\n", "").isprintable(), which
        for event, arguments in events:
            assert event in HARMLESS, (which, event, arguments)
            assert CANARY not in arguments, (which, event, arguments)
            assert "evil" not in arguments, (which, event, arguments)
    assert sorted(tmp_path.rglob("*")) == before
