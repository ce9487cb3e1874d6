"""Reading and grouping of runs for reports. Unreadable runs are listed with the reason."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from mtrl_cli.errors import UserError
from mtrl_cli.reports import run_data
from mtrl_cli.reports.grouping import grouped
from tests.helpers.fake_runs import make_run, make_sweep

TASKS = ("asterix", "breakout", "freeway", "seaquest", "space_invaders")


def test_run_is_read(tmp_path: Path) -> None:
    make_run(
        tmp_path / "mine", ["env=minatar_pack", "network/sharing=film"], seed=3, reaches=[0.1, 0.2, 0.3, 0.4, 0.5], spread=0, evaluations=4
    )
    (run,) = run_data.read([tmp_path / "mine"])
    assert (run.name, run.status, run.error, run.env, run.tasks, run.seed) == ("mine", "completed", None, "minatar_pack", TASKS, 3)
    assert (run.step, run.steps_per_task) == (100_000, 100_000)
    assert run.test is not None
    assert (run.test.step, run.test.episodes) == (100_000, 1)
    assert run.command.startswith("mtrl train env=minatar_pack network/sharing=film seed=3")
    assert run.final_scores == pytest.approx(dict(zip(TASKS, [0.1, 0.2, 0.3, 0.4, 0.5], strict=True)))
    assert [each.step for each in run.evaluations] == [25_000, 50_000, 75_000, 100_000]
    assert run.evaluations[-1].returns["asterix"] == pytest.approx(100 * run.evaluations[-1].scores["asterix"])
    assert run.parameters["total"] == 300_000
    assert run.metrics["grad/conflict"] == ((25_000, 0.4), (50_000, 0.4), (75_000, 0.4), (100_000, 0.4))
    assert not any(name.startswith(("eval/", "test/", "parameters/")) for name in run.metrics)


@pytest.mark.parametrize("is_older", [False, True])
def test_last_evaluation_replaces_a_missing_or_older_test(is_older: bool, tmp_path: Path) -> None:
    path = make_run(tmp_path / "mine", tested=is_older) / "eval" / "test.json"
    if is_older:
        test = json.loads(path.read_text())
        test["last"]["step"] = 50_000
        path.write_text(json.dumps(test))
    (run,) = run_data.read([tmp_path])
    assert run.test is None
    assert run.final_scores == run.evaluations[-1].scores


def test_all_trials_of_a_sweep_are_read_including_waiting_ones(tmp_path: Path) -> None:
    states = {1: "pruned", 2: "failed", 4: "running", 5: "waiting"}
    make_sweep(tmp_path / "S", {"network/sharing": ["hard", "film"], "seed": [0, 1, 2]}, states=states, whys={2: "it was killed 3 times"})
    runs = run_data.read([tmp_path / "S"])
    assert [run.number for run in runs] == list(range(6))
    assert [run.status for run in runs] == ["completed", "pruned", "failed", "completed", "running", "waiting"]
    assert runs[2].error == "it was killed 3 times"
    assert runs[5].overrides == ("network/sharing=film", "seed=2")
    assert runs[3].command == "mtrl train env=minatar_pack network/sharing=film seed=0"


def test_trial_without_a_configuration_keeps_state_reason_and_command(tmp_path: Path) -> None:
    axes = {"network/sharing": ["hard", "film"], "seed": [0, 1]}
    sweep = make_sweep(tmp_path / "S", axes, states={1: "uncomposed", 3: "queued"}, whys={1: "optimizer.lr=-1: too small"})
    (sweep / "trials" / "0003" / "config.yaml").unlink()  # as if the trial's folder was just created
    (sweep / "trials" / "0002" / "config.yaml").write_text("{")
    runs = run_data.read([sweep])
    assert [run.status for run in runs] == ["completed", "failed", "unreadable", "running"]
    assert runs[1].error == "optimizer.lr=-1: too small"
    assert runs[1].command == "mtrl train env=minatar_pack network/sharing=hard seed=1"
    assert runs[2].command == "mtrl train env=minatar_pack network/sharing=film seed=0"
    assert runs[3].overrides == ("network/sharing=film", "seed=1")
    assert runs[3].error is None
    (sweep / "trials" / "0003" / "trial.json").unlink()
    assert run_data.read([sweep])[3].status == "waiting"


def test_runs_below_a_folder_are_found_once(tmp_path: Path) -> None:
    make_run(tmp_path / "study" / "scratch" / "s0")
    make_run(tmp_path / "study" / "fine_tuned" / "s0")
    make_sweep(tmp_path / "S", {"seed": [0, 1]})
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    runs = run_data.read([tmp_path, tmp_path / "study", tmp_path / "S" / "trials" / "0000"])
    assert sorted(run.name for run in runs) == ["0000", "0001", "fine_tuned/s0", "scratch/s0"]


def test_missing_folder_is_an_error_and_an_empty_one_has_no_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a folder"):
        run_data.read([tmp_path / "nowhere"])
    assert run_data.read([tmp_path]) == []


DAMAGES = {
    "no_config": ("config.yaml", None, "config.yaml is missing"),
    "an_interpolation": ("config.yaml", b"seed: ${oc.env:HOME}", "interpolation"),
    "anchors": ("config.yaml", b"a: &a [1]\nb: *a\n", "anchor"),
    "deep": ("config.yaml", b"a: " + b"[" * 5000, "nested deeper"),
    "keys_that_are_not_text": ("config.yaml", b"1: {2: 3}\n", "keys must be text"),
    "no_seed": ("config.yaml", b"env: {name: x}\n", "seed must be an integer, got null"),
    "a_list": ("config.yaml", b"[1, 2]", "keys and values"),
    "broken_record": ("run.json", b"{", "valid JSON"),
    "a_list_for_a_record": ("run.json", b"[]", "expected a JSON object"),
    "another_status": ("run.json", b'{"status": "<script>"}', "status must be one of"),
    "broken_test": ("eval/test.json", b"nonsense", "valid JSON"),
    "broken_trial": ("trial.json", b"\xff\xfe", "valid JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_run_is_unreadable_with_its_reason(damage: str, tmp_path: Path) -> None:
    name, content, reason = DAMAGES[damage]
    folder = make_run(tmp_path / "mine")
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content)
    (run,) = run_data.read([tmp_path])
    assert run.status == "unreadable"
    assert reason in str(run.error)
    assert "\n" not in str(run.error)


def test_links_out_of_the_run_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text('{"step": 1, "eval/return/secret": 1.0}\n')
    folder = make_run(tmp_path / "runs" / "mine")
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").symlink_to(tmp_path / "secret")
    (run,) = run_data.read([tmp_path / "runs"])
    assert run.status == "unreadable"
    os.mkfifo(tmp_path / "runs" / "pipe.json")
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    (run,) = run_data.read([tmp_path / "runs"])
    assert "not a regular file" in str(run.error)


def test_invalid_lines_of_metrics_are_skipped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "mine", evaluations=4)
    odd = (
        b'{"step": 1e9}\n[]\n{"step": true}\nnull\n{"step": 7, "perf/x": NaN, "perf/y": 1e999, "perf/z": "1"}\n'
        + b"[" * 100_000
        + b'\n{"step": 8'
    )
    (folder / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes() + odd)
    (run,) = run_data.read([folder])
    assert run.status == "completed"
    assert len(run.evaluations) == 4
    assert not {"perf/x", "perf/y", "perf/z"} & run.metrics.keys()


def test_metrics_of_many_rows_are_thinned(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "mine", evaluations=2)
    row = {f"perf/{number}": 1.0 for number in range(100)}
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step} | row) + "\n" for step in range(1000)))
    (run,) = run_data.read([folder])
    points = run.metrics["perf/7"]
    assert 50 <= len(points) <= 100
    assert points[0][0] < 20
    assert points[-1] == (999, 1.0)
    assert len({later[0] - earlier[0] for earlier, later in itertools.pairwise(points)}) == 1


# -- groups ---------------------------------------------------------------------------------------------------------------------


def labels(*folders: Path) -> dict[str, list[int]]:
    """Return the seeds of each group by label."""
    return {group.label: [run.seed for run in group.runs] for group in grouped(run_data.read(folders))}


def test_groups_of_a_sweep_are_labelled_by_its_axes(tmp_path: Path) -> None:
    make_sweep(tmp_path / "S", {"network/sharing": ["independent", "film"], "task_weights": ["uniform", "pcgrad"], "seed": [0, 1]})
    assert labels(tmp_path) == {f"{sharing}, {weights}": [0, 1] for sharing in ("independent", "film") for weights in ("uniform", "pcgrad")}


def test_single_runs_are_labelled_by_their_options(tmp_path: Path) -> None:
    words = {"film": ["network/sharing=film"], "mmoe": ["network/sharing=mmoe"], "pcgrad": ["network/sharing=mmoe", "task_weights=pcgrad"]}
    for name, own in words.items():
        for seed in (0, 1):
            make_run(tmp_path / f"{name}_{seed}", ["env=minatar_pack", *own], seed=seed)
    # The keys of mmoe (experts) follow from its name, so they are not in the label.
    assert labels(tmp_path) == {"film, uniform": [0, 1], "mmoe, pcgrad": [0, 1], "mmoe, uniform": [0, 1]}


def test_value_is_labelled_with_its_key(tmp_path: Path) -> None:
    for rate in ("1e-3", "5e-4"):
        make_run(tmp_path / rate, ["env=minatar_pack", f"optimizer.lr={rate}"])
    assert labels(tmp_path) == {"lr=0.001": [0], "lr=0.0005": [0]}


def test_values_that_depend_on_the_machine_do_not_separate_groups(tmp_path: Path) -> None:
    first, second = (make_run(tmp_path / name, seed=seed) for seed, name in enumerate("ab"))
    text = (second / "config.yaml").read_text()
    for old, new in {"device: cpu": "device: cuda", "precision: fp32": "precision: bf16", "capacity: 100000": "capacity: 5000"}.items():
        assert old in text
        text = text.replace(old, new)
    (second / "config.yaml").write_text(text)
    assert list(labels(first, second).values()) == [[0, 1]]


def test_values_set_by_the_user_separate_groups(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", ["env=minatar_pack", "replay.capacity=5000"])
    assert labels(tmp_path) == {"capacity=100000": [0], "capacity=5000": [0]}
    make_sweep(tmp_path / "S", {"precision": ["fp32", "bf16"], "seed": [0]})
    for number, precision in enumerate(("fp32", "bf16")):
        config = tmp_path / "S" / "trials" / f"{number:04d}" / "config.yaml"
        config.write_text(config.read_text().replace("precision: fp32", f"precision: {precision}"))
    assert labels(tmp_path / "S") == {"precision=fp32": [0], "precision=bf16": [0]}


def test_widths_that_follow_from_a_parameter_count_do_not_separate_groups(tmp_path: Path) -> None:
    first, second = (make_run(tmp_path / str(seed), ["env=minatar_pack", "network.parameters=300k"], seed=seed) for seed in (0, 1))
    config = (second / "config.yaml").read_text()
    assert "\n  features: 128\n" in config
    (second / "config.yaml").write_text(config.replace("\n  features: 128\n", "\n  features: 99\n"))
    assert list(labels(first, second).values()) == [[0, 1]]
    for folder in (first, second):  # without a parameter count the user chooses the width
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(text.replace("parameters: 300k", "parameters: null"))
    assert list(labels(first, second).values()) == [[0], [1]]


def test_packs_and_budgets_separate_groups(tmp_path: Path) -> None:
    make_run(tmp_path / "a", ["env=minatar_pack"])
    make_run(tmp_path / "b", ["env=classic_pack"])
    make_run(tmp_path / "c", ["env=classic_pack", "steps_per_task=200000"])
    assert len(labels(tmp_path)) == 3


def test_fractions_have_four_digits_in_labels_and_stay_distinct(tmp_path: Path) -> None:
    make_sweep(tmp_path / "S", {"optimizer.lr": ["0.0009884977525173569", "0.0002573"], "seed": [0]})
    assert labels(tmp_path / "S") == {"lr=0.0009885": [0], "lr=0.0002573": [0]}
    make_sweep(tmp_path / "T", {"optimizer.lr": ["0.00098849775", "0.00098849779"], "seed": [0]})
    assert len(labels(tmp_path / "T")) == 2


def test_equal_networks_of_a_parameter_count_and_of_widths_are_one_group(tmp_path: Path) -> None:
    def size(values: Mapping[str, str]) -> int:
        return 206_344 if values == {"network/sharing": "independent", "network.parameters": "null", "seed": values["seed"]} else 74_149

    axes = {"network/sharing": ["hard", "independent"], "network.parameters": ["74149", "null"], "seed": [0]}
    make_sweep(tmp_path / "S", axes, parameters=size)
    assert labels(tmp_path / "S") == {"hard": [0, 0], "independent (74k)": [0], "independent (206k)": [0]}
    # With other widths they are two networks, and no label contains the widths.
    for number in ("0000", "0002"):
        config = tmp_path / "S" / "trials" / number / "config.yaml"
        config.write_text(config.read_text().replace("\n  features: 128\n", "\n  features: 99\n"))
    assert not [label for label in labels(tmp_path / "S") if "features" in label]
    assert len(labels(tmp_path / "S")) == 4
