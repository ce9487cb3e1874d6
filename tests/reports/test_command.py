"""`mtrl report`: files, summary and errors."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mtrl_cli.errors import UserError
from mtrl_cli.machine import extras
from mtrl_cli.reports import command as report_command
from tests.helpers.fake_runs import make_run, make_sweep

pytest.importorskip("matplotlib")
QUICK = {"evaluations": 2, "rows": 6}


def report(*words: object) -> None:
    """Run the command in this process."""
    report_command.run(*report_command.parse([str(word) for word in words]), ["mtrl", "report", *map(str, words)])


def test_command_writes_a_page_without_torch_and_prints_its_path(tmp_path: Path) -> None:
    make_sweep(tmp_path / "S", {"network/sharing": ["hard", "film"], "seed": [0, 1]}, states={3: "failed"}, **QUICK)
    code = (
        "import sys; sys.argv = ['mtrl', 'report', 'S']\nfrom mtrl_cli.cli.main import main\n"
        "try: main()\nfinally: print('loaded:', *sorted({'torch', 'tensorboard', 'gymnasium', 'ale_py'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "3 completed, 1 failed; 2 configurations" in done.stdout
    assert "S/report/index.html" in done.stdout
    assert done.stdout.splitlines()[-1].strip() == "loaded:"
    page = (tmp_path / "S" / "report" / "index.html").read_text()
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", page)
    assert "mtrl train env=minatar_pack network/sharing=film seed=0" in page


@pytest.mark.parametrize(("seeds", "caution"), [(1, "may be chance alone"), (2, "Intervals over 2 seeds are too narrow"), (5, None)])
def test_summary_cautions_about_few_seeds(seeds: int, caution: str | None, tmp_path: Path) -> None:
    make_sweep(tmp_path / "S", {"network/sharing": ["hard", "film"], "seed": list(range(seeds))}, **QUICK)
    report(tmp_path / "S")
    header = (tmp_path / "S" / "report" / "index.html").read_text().partition("</header>")[0]
    for each in ("may be chance alone", "Intervals over 2 seeds are too narrow"):
        assert (each in header) == (each == caution)


def test_sharing_comes_first_where_structures_were_compared(tmp_path: Path) -> None:
    for name, structures in {"one": ["hard"], "two": ["hard", "independent"]}.items():
        make_sweep(tmp_path / name, {"network/sharing": structures, "seed": [0, 1]}, **QUICK)
        report(tmp_path / name)
    first = {name: re.search(r'<h2 id="(\w+)"', (tmp_path / name / "report" / "index.html").read_text()) for name in ("one", "two")}
    assert {name: found and found[1] for name, found in first.items()} == {"one": "scores", "two": "sharing"}


def test_each_table_and_picture_is_a_file(tmp_path: Path) -> None:
    make_sweep(tmp_path / "S", {"network/sharing": ["hard", "film"], "seed": [0, 1]}, **QUICK)
    report(tmp_path / "S", f"out={tmp_path / 'out'}")
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*record["files"], "report.json"}
    assert len(record["runs"]) == 4
    with open(tmp_path / "out" / "scores_over_tasks.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["configuration"] for row in rows} == {"hard", "film"}
    assert all(float(row["IQM low"]) <= float(row["IQM"]) <= float(row["IQM high"]) for row in rows)
    assert (tmp_path / "out" / "scores_over_tasks.md").read_text().count("\n|") == 4
    assert (tmp_path / "out" / "curves_over_steps.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "out" / "curves_over_steps.svg").read_text()
    assert "steps per task</text>" in drawn
    assert not (tmp_path / "S" / "report").exists()


def test_no_file_contains_the_password_of_the_storage(tmp_path: Path) -> None:
    storage = "postgresql://me:PASSWORD@host/sweeps"
    make_sweep(tmp_path / "S", {"network/sharing": ["hard", "film"], "seed": [0]}, plan={"storage": storage}, **QUICK)
    command = ["mtrl", "study", "sharing", "env=minatar_pack", f"sweep.storage={storage}"]
    report_command.run([tmp_path / "S"], None, command)
    made = [path for path in (tmp_path / "S").rglob("*") if path.is_file()]
    assert (tmp_path / "S" / "report" / "report.json") in made
    assert [path for path in made if b"PASSWORD" in path.read_bytes()] == []
    assert "sweep.storage=postgresql://me:***@host/sweeps" in (tmp_path / "S" / "report" / "index.html").read_text()


def test_surrogates_in_names_are_replaced(tmp_path: Path) -> None:
    half = "\ud800"  # half of a letter, which JSON can contain and UTF-8 cannot
    sweep = make_sweep(tmp_path / "S", {"network/sharing": ["hard", "film"], "agent.n_step": [1, 3], "seed": [0, 1]}, **QUICK)
    record = (sweep / "sweep.json").read_text()
    (sweep / "sweep.json").write_text(record.replace('"hard"', '"hard\\ud800"'))
    for folder in sorted((sweep / "trials").iterdir())[:4]:
        trial = json.loads((folder / "trial.json").read_text())
        (folder / "trial.json").write_text(json.dumps(trial | {"command": half, "metric": half}))
    with open(sweep / "trials" / "0004" / "metrics.jsonl", "a") as rows:
        rows.write(json.dumps({"step": 100_000, f"eval/return/{half}": 1.0}) + "\n")
    odd_folder = tmp_path / os.fsdecode(b"odd\xff")
    make_run(odd_folder, **QUICK)
    report(sweep, odd_folder, f"out={tmp_path / 'out'}")
    report(odd_folder)
    assert "odd?" in (tmp_path / "out" / "index.html").read_text()
    for written in (tmp_path / "out").glob("*.[cmsh]*"):
        written.read_text(encoding="utf-8")
    assert (tmp_path / "out" / "slices.png").is_file()


def test_new_report_replaces_an_earlier_one_and_keeps_other_files(tmp_path: Path) -> None:
    make_sweep(tmp_path / "S", {"network/sharing": ["hard", "film"], "seed": [0]}, **QUICK)
    report(tmp_path / "S")
    folder = tmp_path / "S" / "report"
    assert (folder / "probability_of_improvement.csv").is_file()
    (folder / "notes.txt").write_text("mine")
    for trial in ("0000", "0001"):
        (tmp_path / "S" / "trials" / trial / "run.json").write_text("{")
    report(tmp_path / "S")
    assert not (folder / "probability_of_improvement.csv").exists()
    assert (folder / "notes.txt").read_text() == "mine"
    assert "2 unreadable" in (folder / "index.html").read_text()


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", **QUICK)
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(UserError, match="contains files that are not a report"):
        report(run, f"out={run}")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        report(run, f"out={tmp_path / 'file'}")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "report.json").write_text('{"files": [1]}')
    with pytest.raises(UserError, match="damaged"):
        report(run, f"out={tmp_path / 'odd'}")
    assert sorted(path.name for path in run.iterdir()) == before


def test_record_cannot_delete_files_outside_the_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", **QUICK)
    (tmp_path / "precious").write_text("kept")
    (run / "report").mkdir()
    (run / "report" / "report.json").write_text(json.dumps({"files": ["../../precious", "..", "", "nothing\0here"]}))
    report(run)
    assert (tmp_path / "precious").read_text() == "kept"


def test_report_is_not_written_through_a_link_in_a_sweep(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", **QUICK)
    (tmp_path / "elsewhere").mkdir()
    (run / "report").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="a link"):
        report(run)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_report_of_several_folders_is_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a", **QUICK)
    make_run(tmp_path / "b", seed=1, **QUICK)
    report("a", "b")
    assert len(json.loads((tmp_path / "report" / "report.json").read_text())["runs"]) == 2


def test_missing_matplotlib_is_reported_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape(extras.install_command("plots"))):
        report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["no_path", "empty_out", "no_folder", "no_run", "a_file", "a_typo", "unwritable", "no_file_system"])
def test_mistakes_are_refused_before_any_work(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    run = make_run(tmp_path / "run", **QUICK)
    before = sorted(tmp_path.rglob("*"))
    words, message = {
        "no_path": (["out=here"], "no runs given"),
        "empty_out": ([run, "out="], "out must be one folder"),
        "no_folder": ([tmp_path / "nowhere"], "nowhere is not a folder"),
        "no_run": ([tmp_path / "empty"], "no run in"),
        "a_file": ([tmp_path / "file"], "file is not a folder"),
        "a_typo": ([run, "otu=x"], "unknown key 'otu'. Did you mean 'out'?"),
        "unwritable": ([run], "is not writable"),
        "no_file_system": ([run, "out=/proc/x"], "is not writable"),
    }[kind]
    if kind == "unwritable":  # permissions do not apply to root

        def refuse(**_: object) -> str:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(report_command.tempfile, "mkdtemp", refuse)
    if kind == "no_file_system" and not Path("/proc").is_dir():
        pytest.skip("no /proc here")
    with pytest.raises(UserError, match=message):
        report(*words)
    assert sorted(tmp_path.rglob("*")) == before


def test_completed_run_whose_metrics_end_early_is_listed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", **QUICK)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(lines[0])
    report(run)
    assert "its metrics end at step 0 of 100,000" in (run / "report" / "runs.csv").read_text()
