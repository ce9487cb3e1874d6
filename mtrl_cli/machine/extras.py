"""Optional dependencies: checks that they are installed, and pip commands that install them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shlex
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mtrl_cli.errors import UserError

DISTRIBUTION = "mtrl_cli"
ROOT = Path(__file__).resolve().parents[2]
"""The checkout, or the folder that packages are installed in."""


def require(feature: str, module: str, extra: str) -> None:
    """Raise UserError unless a module is installed.

    Args:
        feature: subject of the message (`mtrl report`).
        module: import name.
        extra: extra of mtrl_cli that installs the module.
    """
    if importlib.util.find_spec(module) is None:
        raise missing(feature, module, extra)


def missing(feature: str, package: str, extra: str) -> UserError:
    """Return the error for a package that is not installed, with the command that installs it."""
    return UserError(f"{feature} requires {package}, which is not installed. Install it with: {install_command(extra)}")


def install_command(extra: str) -> str:
    """Return a shell command that installs an extra from the source of this package: a checkout, a folder, a wheel or a URL.

    If the source is unknown, the command names the packages of the extra.
    """
    arguments = _from_source_tree(extra) or _from_installed(extra) or _requirements(extra)
    return f"{_pip()} install {' '.join(map(shlex.quote, arguments))}"


def _pip() -> str:
    """Return the command for the pip of this Python: `pip` if PATH leads to the same pip, else `python -m pip`."""
    found = shutil.which("pip")
    return "pip" if found and Path(found).parent == Path(sys.executable).parent else f"{shlex.quote(sys.executable)} -m pip"


def _from_source_tree(extra: str) -> list[str]:
    """Return the arguments for pip if the package is in a source tree, else []."""
    with suppress(OSError):
        if re.search(rf'^name = "{DISTRIBUTION}"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE):
            direct = _direct_url()
            editable = direct.get("dir_info", {}).get("editable", False) and direct.get("url") == ROOT.as_uri()
            return [*(["-e"] if editable else []), _target(ROOT, extra)]
    return []


def _from_installed(extra: str) -> list[str]:
    """Return the arguments for pip if the package was installed from a folder, a wheel or a URL (PEP 610), else []."""
    direct = _direct_url()
    url = str(direct.get("url", ""))
    if url.startswith("file://"):
        path = Path(unquote(urlsplit(url).path))
        return [_target(path, extra)] if path.exists() else []
    if vcs := direct.get("vcs_info"):
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    return [f"{DISTRIBUTION}[{extra}] @ {url}"] if url else []


def _requirements(extra: str) -> list[str]:
    """Return the requirements of an extra."""
    with suppress(importlib.metadata.PackageNotFoundError):
        requirements = [line.partition(";") for line in importlib.metadata.requires(DISTRIBUTION) or []]
        return [name.strip() for name, _, marker in requirements if re.search(rf"""extra == ['"]{re.escape(extra)}['"]""", marker)]
    return [f"{DISTRIBUTION}[{extra}]"]


def _direct_url() -> dict[str, Any]:
    """Return the content of direct_url.json, or {} if pip wrote none."""
    with suppress(importlib.metadata.PackageNotFoundError, ValueError):
        return dict(json.loads(importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json") or "{}"))
    return {}


def _target(path: Path, extra: str) -> str:
    with suppress(OSError):  # the current folder may have been deleted
        if path.is_dir() and path.samefile(Path.cwd()):
            return f".[{extra}]"
    return f"{path}[{extra}]"
