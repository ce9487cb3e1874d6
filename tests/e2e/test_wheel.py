"""A wheel built like `pip install .` contains everything for training and works without the checkout."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.helpers.command import Mtrl
from tests.helpers.shared import Shared


def run(*command: object, cwd: Path) -> str:
    """Run a command and return its stdout; its exit code must be 0."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture
def wheel(root: Path, shared: Shared) -> Path:
    """The wheel, built from the unpacked source distribution, so that both must be complete."""
    return next(shared.folder("wheel", lambda folder: build(root, folder)).glob("*.whl"))


def build(root: Path, folder: Path) -> None:
    """Build the source distribution and from it the wheel."""
    run(sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", folder, cwd=root)
    (source,) = folder.glob("*.tar.gz")
    run(sys.executable, "-m", "tarfile", "-e", source, folder, cwd=root)
    unpacked = folder / source.name.removesuffix(".tar.gz")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, cwd=unpacked)


@pytest.fixture
def installed(wheel: Path, shared: Shared) -> Path:
    """A virtual environment with the wheel; all other packages come from the environment of the tests."""
    return shared.folder("installed wheel", lambda folder: install(wheel, folder / "a path with spaces")) / "a path with spaces"


def install(wheel: Path, folder: Path) -> None:
    """Install the wheel into a new virtual environment."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=wheel.parent)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=wheel.parent)
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=wheel.parent).strip()
    # Searched after the environment's own packages and without .pth files, so that an editable install of the checkout is not found.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(packages) / "borrowed.pth").write_text("".join(f"{path}\n" for path in sorted(borrowed)))


def test_wheel_contains_every_configuration_and_data_file(wheel: Path, root: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configuration = {f"mtrl_cli/{path.relative_to(root)}" for path in (root / "conf").rglob("*.yaml")}
    data = {str(path.relative_to(root)) for path in [*(root / "mtrl_cli").rglob("*.csv"), *(root / "mtrl_cli").rglob("*.jinja")]}
    code = {str(path.relative_to(root)) for path in (root / "mtrl_cli").rglob("*.py")}
    assert configuration
    assert data
    assert configuration | data | code <= names


def test_wheel_contains_no_other_file(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    strange = [name for name in names if not (name.startswith("mtrl_cli/") or ".dist-info/" in name)]
    assert strange == []
    assert {Path(name).suffix for name in names if name.startswith("mtrl_cli/")} <= {".py", ".yaml", ".csv", ".jinja"}


def test_installed_package_is_the_wheels(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "bin" / "python", "-c", "import mtrl_cli; print(mtrl_cli.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed)


def test_installed_command_lists_its_configuration(installed: Path, tmp_path: Path) -> None:
    listed = Mtrl(tmp_path, executable=installed / "bin" / "mtrl")("ls", "env").stdout
    for name in ("atari_pack", "classic_pack", "minatar_pack"):
        assert name in listed


def test_installed_command_trains(installed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    Mtrl(tmp_path, executable=installed / "bin" / "mtrl")(
        "train",
        "env=classic_pack",
        "steps_per_task=400",
        "agent.learning_starts=100",
        "eval.episodes=1",
        "eval.max_steps=50",
        "device=cpu",
        "compile=false",
        f"run_dir={run_dir}",
    )
    assert json.loads((run_dir / "run.json").read_text())["status"] == "completed"
    assert list((run_dir / "checkpoints").glob("*/model.safetensors"))
