"""The house rules that no linter knows: which way imports run, what is loaded lazily, what may never be called, what is too long."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mtrl_cli"
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}

# Every module has a room. A folder is a room of its own.
ROOMS = {
    "cli": {"cli", "speech", "__main__"},
    "procedures": {
        *("train", "training", "initialise", "final_test", "final_words", "bench", "evaluate", "info", "listing", "completion"),
        *("transfer_study", "transfer_report"),
        *(
            "sharing_metrics",
            "sharing_comparison",
            "report_sharing",
            "sharing_pictures",
            "report_search",
            "study",
            "study_sizes",
            "compare",
        ),
        *("sweep_plan", "sweep_display", "report_parts", "report_runs"),
        *("report", "report_groups", "report_page", "report_scores", "report_pictures", "score_metrics"),
        *("sweep", "sweep_loop", "sweep_runs", "sweep_storage", "sweep_trials"),
        *("sweep_checks", "sweep_listing", "sweep_end"),
    },
    "build": {"build", "build_augmentation", "build_network", "instances", "settling"},
    "configuration": {
        *("config", "plain_yaml", "schema", "combinations", "catalogue", "sections", "signatures", "overrides", "sweep_words"),
    },
    "loop": {"freezing", "group", "loop", "learner", "rank_gradients", "resets", "evaluator", "diagnostics", "throughput"},
    "storage": {"checkpoint", "checkpoint_files", "display", "logger", "replay_segments", "rundir", "video"},
    "leaves": {
        *("budget", "distributed", "early_stopping", "frame_stack", "hardware", "heatmap", "optimizers", "pinned", "schedules", "signals"),
        *("stats", "transfer_metrics"),
    },
    "replay": {"replay", "replay_types", "rollouts"},
    "base": {
        *("locks", "parent"),
        *("__init__", "capture", "errors", "fields", "files", "generators", "state_tree", "sum_tree", "torchrun"),
    },
}
# What each room may import of ours, besides itself and `base`.
LEARNING = {"agents", "networks", "task_weights", "augmentation", "envs", "replay", "leaves"}
ARROWS = {
    "cli": {"procedures", "configuration"},
    "procedures": {"build", "configuration", "launchers", "loop", "storage", *LEARNING},
    "build": {"configuration", "loop", "storage", *LEARNING},
    "configuration": set(),
    "loop": LEARNING,  # saving, logging and signals happen to the loop from outside
    "agents": LEARNING - {"envs"},
    "augmentation": {"replay"},
    "networks": set(),
    "task_weights": set(),
    "envs": set(),
    "launchers": {"leaves"},
    "storage": {"leaves"},
    "replay": set(),
    "leaves": set(),
    "base": set(),
}


def room(module: str) -> str:
    """The room that a module lies in."""
    if "." in module:
        return module.split(".")[0]
    return next((name for name, modules in ROOMS.items() if module in modules), "nowhere")


@cache
def tree(module: str) -> ast.Module:
    """A module of ours, parsed."""
    return ast.parse(MODULES[module].read_text())


def imported(module: str) -> set[str]:
    """Full names of all that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@cache
def ours(module: str) -> frozenset[str]:
    """The modules of ours that a module imports, named from the package's root."""
    found = set()
    for name in imported(module):
        parts = name.split(".")[1:] if name.split(".")[0] == "mtrl_cli" else []
        while parts and ".".join(parts) not in MODULES:
            parts.pop()
        if parts:
            found.add(".".join(parts))
    return frozenset(found - {module})


def called(module: str) -> list[str]:
    """What a module calls, as written: `torch.load`, `eval`."""
    return [ast.unparse(node.func) for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]


def test_every_module_has_a_room() -> None:
    assert {room(module) for module in MODULES} <= set(ARROWS), "a new module needs a place in ROOMS, a new folder one in ARROWS"
    assert {module for modules in ROOMS.values() for module in modules} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    allowed = ARROWS.get(room(module), set()) | {room(module), "base"}
    wrong = sorted(name for name in ours(module) if room(name) not in allowed)
    assert wrong == [], f"{module} ({room(module)}) must not import these"


@pytest.mark.parametrize("module", sorted(ROOMS["leaves"] & set(MODULES)))
def test_leaves_do_not_import_each_other(module: str) -> None:
    assert {name for name in ours(module) if room(name) == "leaves"} == set()


def test_no_module_imports_itself_through_others() -> None:
    assert len(list(TopologicalSorter({module: ours(module) for module in MODULES}).static_order())) == len(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_only_the_upper_rooms_read_configuration(module: str) -> None:
    if room(module) in {"cli", "procedures", "build", "configuration"}:
        return
    libraries = {name.split(".")[0] for name in imported(module)} & {"hydra", "omegaconf", "yaml", "typer"}
    assert libraries == set()
    read = [node.lineno for node in ast.walk(tree(module)) if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "config"]
    assert read == []


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in {"envs", "configuration"}])
def test_packs_and_configuration_know_nothing_of_torch(module: str) -> None:
    assert not [name for name in imported(module) if name.split(".")[0] == "torch"]


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import mtrl_cli.cli", "torch hydra omegaconf gymnasium ale_py tensorboard numpy"),
        ("from mtrl_cli.cli import main; sys.argv = ['mtrl', '--help']; main()", "torch hydra omegaconf gymnasium ale_py tensorboard"),
        ("import mtrl_cli.config", "torch gymnasium ale_py tensorboard"),
        ("from mtrl_cli.cli import main; sys.argv = ['mtrl', 'train', '--dry-run']; main()", "torch tensorboard"),
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


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_unpickled_or_run_from_text(module: str) -> None:
    picklers = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    assert {name.split(".")[0] for name in imported(module)} & picklers == set()
    assert not [name for name in imported(module) if name.startswith("hydra.utils") or name.endswith(".instantiate")]
    forbidden = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "os.system"}
    calls = [name for name in called(module) if name in forbidden or name.endswith((".instantiate", ".unpickle"))]
    # Annotations in the source of our own package, in a namespace of types.
    assert calls == (["eval"] if module == "signatures" else [])
    # yaml.load takes a loader, and only a safe one may be named or derived from.
    unsafe = {"yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader", "yaml.CLoader", "yaml.full_load", "yaml.unsafe_load"}
    assert not [node for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute) and ast.unparse(node) in unsafe]


@pytest.mark.parametrize("module", MODULES)
def test_numpy_never_reads_objects_nor_a_shell_a_string(module: str) -> None:
    keywords = [word for node in ast.walk(tree(module)) if isinstance(node, ast.Call) for word in node.keywords]
    on = {word.arg for word in keywords if isinstance(word.value, ast.Constant) and word.value.value is True}
    assert on & {"allow_pickle", "shell"} == set()


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_short(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) <= 400
    functions = [node for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [node.name for node in functions if (node.end_lineno or 0) - node.lineno + 1 > 60] == []
