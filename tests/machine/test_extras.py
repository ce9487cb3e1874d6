"""Install commands of extras, for every source that the package can be installed from."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from mtrl_cli.errors import UserError
from mtrl_cli.machine import extras
from tests.helpers.command import ROOT


class FakeDistribution:
    def __init__(self, direct_url: dict[str, Any] | None):
        self.direct_url = direct_url

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self.direct_url is None else json.dumps(self.direct_url)


@pytest.fixture(autouse=True)
def _pip_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: str(Path(sys.executable).parent / name))


def installed_from(monkeypatch: pytest.MonkeyPatch, root: Path, direct_url: dict[str, Any] | None) -> None:
    """Simulate an installation of the package in `root` with this direct_url.json."""
    monkeypatch.setattr(extras, "ROOT", root)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: FakeDistribution(direct_url))


def test_checkout_is_named_by_a_dot_from_inside_and_by_its_path_from_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed_from(monkeypatch, ROOT, None)
    monkeypatch.chdir(ROOT)
    assert extras.install_command("plots") == "pip install '.[plots]'"
    monkeypatch.chdir(tmp_path)
    assert extras.install_command("plots") == f"pip install '{ROOT}[plots]'"


def test_editable_checkout_stays_editable(monkeypatch: pytest.MonkeyPatch) -> None:
    installed_from(monkeypatch, ROOT, {"url": ROOT.as_uri(), "dir_info": {"editable": True}})
    monkeypatch.chdir(ROOT)
    assert extras.install_command("plots") == "pip install -e '.[plots]'"
    installed_from(monkeypatch, ROOT, {"url": "file:///another/checkout", "dir_info": {"editable": True}})
    assert extras.install_command("plots") == "pip install '.[plots]'"


@pytest.mark.parametrize("name", ["mtrl_cli-1.0-py3-none-any.whl", "a folder with spaces"])
def test_wheel_or_folder_is_named_by_its_path(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / name
    source.mkdir()
    installed_from(monkeypatch, tmp_path, {"url": source.as_uri()})
    assert shlex.split(extras.install_command("video")) == ["pip", "install", f"{source}[video]"]


@pytest.mark.parametrize(
    ("direct_url", "expected"),
    [
        ({"url": "https://host/mtrl_cli-1.0.whl", "archive_info": {}}, "mtrl_cli[ray] @ https://host/mtrl_cli-1.0.whl"),
        ({"url": "https://host/mtrl", "vcs_info": {"vcs": "git", "commit_id": "abc"}}, "mtrl_cli[ray] @ git+https://host/mtrl@abc"),
    ],
)
def test_url_is_named_as_a_direct_reference(
    direct_url: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed_from(monkeypatch, tmp_path, direct_url)
    assert shlex.split(extras.install_command("ray")) == ["pip", "install", expected]


@pytest.mark.parametrize("direct_url", [None, {"url": "file:///removed/mtrl_cli-1.0.whl"}])
def test_packages_are_named_if_the_source_is_unknown_or_deleted(
    direct_url: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed_from(monkeypatch, tmp_path, direct_url)
    lines = ["numpy>=2.0", "matplotlib>=3.8; extra == 'plots'", 'cmaes>=0.10; extra == "search"', 'scipy>=1.14; extra == "search"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    assert extras.install_command("plots") == "pip install 'matplotlib>=3.8'"
    assert extras.install_command("search") == "pip install 'cmaes>=0.10' 'scipy>=1.14'"


def test_python_is_named_if_pip_on_the_path_belongs_to_another_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/pip")
    assert extras.install_command("plots").startswith(f"{shlex.quote(sys.executable)} -m pip install ")


def test_missing_module_is_refused_with_the_command() -> None:
    extras.require("video=true", "json", "video")
    with pytest.raises(UserError) as caught:
        extras.require("video=true", "no_such_module", "video")
    assert str(caught.value) == (
        f"video=true requires no_such_module, which is not installed. Install it with: {extras.install_command('video')}"
    )


def test_every_extra_in_the_code_is_defined() -> None:
    import re
    import tomllib

    defined = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    calls = r"""extras\.(?:require|missing|install_command)\([^\n]*["'](\w+)["']\)"""
    used = {name for file in (ROOT / "mtrl_cli").rglob("*.py") for name in re.findall(calls, file.read_text())}
    assert used == {"minatar", "plots", "ray", "search", "slurm", "solvers", "video"}
    assert used <= set(defined)
