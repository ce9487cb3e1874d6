"""Rules of the code base that no linter checks. The import layers are import-linter contracts in pyproject.toml."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mtrl_cli"
TESTS = Path(__file__).resolve().parent
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
READERS = ("build", "cli", "commands", "config", "reports", "studies", "sweeps")
"""The folders that may read configuration values."""


@cache
def tree(path: Path) -> ast.Module:
    """A parsed source file."""
    return ast.parse(path.read_text())


def imported(path: Path) -> set[str]:
    """Full names of everything that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_only_upper_layers_read_configuration_values() -> None:
    found = [
        f"{module}:{node.lineno}"
        for module, path in MODULES.items()
        if module.split(".")[0] not in READERS
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "config"
    ]
    assert found == []


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import mtrl_cli.cli.main", "torch hydra omegaconf gymnasium ale_py tensorboard numpy"),
        ("from mtrl_cli.cli.main import main; sys.argv = ['mtrl', '--help']; main()", "torch hydra omegaconf gymnasium ale_py tensorboard"),
        ("import mtrl_cli.config.compose", "torch gymnasium ale_py tensorboard"),
        ("from mtrl_cli.cli.main import main; sys.argv = ['mtrl', 'train', '--dry-run']; main()", "torch tensorboard"),
    ],
)
def test_heavy_packages_are_imported_only_when_needed(statement: str, heavy: str, tmp_path: Path) -> None:
    code = f"""
import sys
try:
    {statement}
except SystemExit as ended:
    assert not ended.code, ended.code
print("loaded:", *sorted(set({heavy.split()}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "loaded:"


def test_no_module_unpickles_or_executes_text() -> None:
    picklers = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    forbidden = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "os.system"}
    unsafe = {"Loader", "FullLoader", "UnsafeLoader", "CLoader", "full_load", "unsafe_load"}
    found = []
    for module, path in MODULES.items():
        names = imported(path)
        found += [f"{module}: {name}" for name in names if name.split(".")[0] in picklers]
        found += [f"{module}: {name}" for name in names if name.startswith("hydra.utils")]
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in forbidden or called.endswith((".instantiate", ".unpickle")):
                    found.append(f"{module}: {called}")
            elif isinstance(node, ast.Attribute) and node.attr in unsafe and ast.unparse(node.value) == "yaml":
                found.append(f"{module}: yaml.{node.attr}")
    # Evaluates annotations in the source of mtrl_cli, in a namespace of types.
    assert found == ["config.introspection: eval"]


def test_metric_names_are_written_in_one_module() -> None:
    name = re.compile(r"(train/(return|length|score)|eval/(returns?|score)|loss|weight|epsilon|q/mean|perf)/|grad/(norm|conflict|cosine)")
    found = []
    for module, path in MODULES.items():
        prose = {id(node.value) for node in ast.walk(tree(path)) if isinstance(node, ast.Expr)}
        constants = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Constant) and id(node) not in prose]
        found += [f"{module}:{node.lineno}" for node in constants if isinstance(node.value, str) and name.match(node.value)]
    assert [place for place in found if not place.startswith("metric_names:")] == []


def test_numpy_reads_no_objects_and_no_shell_reads_a_string() -> None:
    found = [
        f"{module}:{node.lineno} {word.arg}"
        for module, path in MODULES.items()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        for word in node.keywords
        if word.arg in ("allow_pickle", "shell") and isinstance(word.value, ast.Constant) and word.value.value is True
    ]
    assert found == []


def test_modules_that_use_optuna_read_no_private_attributes() -> None:
    found = [
        f"{module}:{node.lineno} {ast.unparse(node)}"
        for module, path in MODULES.items()
        if any(name.split(".")[0] == "optuna" for name in imported(path))
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr) and ast.unparse(node.value) not in ("self", "cls")
    ]
    assert found == []


def test_files_and_functions_are_short() -> None:
    assert [module for module, path in MODULES.items() if len(path.read_text().splitlines()) > 400] == []
    functions = [
        (f"{module}.{node.name}", (node.end_lineno or 0) - node.lineno + 1)
        for module, path in MODULES.items()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [name for name, lines in functions if lines > 60] == []


@pytest.mark.parametrize("folder", sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()))
def test_tests_mirror_the_package(folder: str) -> None:
    assert list((TESTS / folder).glob("test_*.py")), f"tests/{folder} holds the tests of mtrl_cli/{folder}"


def test_no_test_module_imports_another() -> None:
    found = [
        f"{path.relative_to(TESTS)}: {name}"
        for path in sorted(TESTS.rglob("*.py"))
        for name in imported(path)
        if name.startswith("tests.") and any(part.startswith("test_") for part in name.split(".")[:-1])
    ]
    assert found == [], "shared test code belongs in tests/helpers"
