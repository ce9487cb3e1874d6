"""Metrics files of a run: rows and events, cut back to a checkpoint by a resume."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginAccumulator
from tensorboard.plugins.hparams import metadata, plugin_data_pb2

from mtrl_cli.errors import RunError, UserError
from mtrl_cli.runs.metrics_logger import EventWriter, Logger, NullLogger
from tests.helpers.tiny_runs import rows


def _tensorboard(run: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


def _scalars(run: Path, name: str) -> list[tuple[int, float]]:
    accumulator = _tensorboard(run)
    return [(event.step, event.value) for event in accumulator.Scalars(name)] if name in accumulator.Tags()["scalars"] else []


def _log(logger: Logger, steps, scale: float = 1.0) -> None:
    for step in steps:
        logger.row(step, step * 4, step / 10, step // 2, {"train/return/pong": -21 + scale * step, "loss/pong": scale / step})


def test_rows_are_in_metrics_jsonl_and_in_tensorboard(tmp_path):
    logger = Logger(tmp_path)
    _log(logger, [10, 20])
    logger.close()
    first, second = rows(tmp_path)
    assert second == {"step": 20, "frames": 80, "seconds": 2.0, "updates": 10, "train/return/pong": -1.0, "loss/pong": 0.05}
    assert list(first)[:4] == ["step", "frames", "seconds", "updates"]
    assert _scalars(tmp_path, "train/return/pong") == [(10, -11.0), (20, -1.0)]


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
    logger = Logger(tmp_path)
    logger.row(1, 4, 0.1, 0, {"a": math.nan, "b": math.inf, "c": np.float32(0.5), "d": -1e300})
    logger.close()
    (row,) = (json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (row["a"], row["b"], row["c"], row["d"]) == (None, None, 0.5, -1e300)
    assert math.isnan(_scalars(tmp_path, "a")[0][1])
    assert _scalars(tmp_path, "d") == [(1, -math.inf)]


def test_rows_are_on_disk_after_a_flush_without_closing(tmp_path):
    logger = Logger(tmp_path)
    _log(logger, [10])
    logger.flush()
    assert len(rows(tmp_path)) == 1
    assert _scalars(tmp_path, "loss/pong") == [(10, pytest.approx(0.1))]
    logger.close()
    logger.close()


def test_resume_cuts_rows_and_events_past_its_checkpoint(tmp_path):
    logger = Logger(tmp_path)
    _log(logger, range(10, 60, 10))
    logger.histogram("weights", np.arange(9.0), 50)
    logger.close()
    logger = Logger(tmp_path, resume_at=30)
    _log(logger, [40, 50], scale=2)
    logger.close()
    assert [(row["step"], row["train/return/pong"]) for row in rows(tmp_path)] == [(10, -11), (20, -1), (30, 9), (40, 59), (50, 79)]
    assert _scalars(tmp_path, "train/return/pong") == [(10, -11), (20, -1), (30, 9), (40, 59), (50, 79)]
    assert _tensorboard(tmp_path).Tags()["histograms"] == []


def test_second_resume_from_an_earlier_checkpoint_cuts_all_files(tmp_path):
    for resume_at, steps in ((None, [10, 20, 30]), (20, [30, 40]), (10, [20])):
        logger = Logger(tmp_path, resume_at)
        _log(logger, steps)
        logger.close()
    assert [row["step"] for row in rows(tmp_path)] == [10, 20]
    assert [step for step, _ in _scalars(tmp_path, "loss/pong")] == [10, 20]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_half_written_files_of_a_killed_process_are_readable_after_a_resume(tmp_path):
    logger = Logger(tmp_path)
    _log(logger, [10, 20])
    logger.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 15, "frames": 60, "sec')
    (events,) = (tmp_path / "tensorboard").iterdir()
    with open(events, "ab") as file:
        file.write(events.read_bytes()[:30])
    logger = Logger(tmp_path, resume_at=20)
    _log(logger, [30])
    logger.close()
    assert [row["step"] for row in rows(tmp_path)] == [10, 20, 30]
    assert [step for step, _ in _scalars(tmp_path, "loss/pong")] == [10, 20, 30]


def test_invalid_lines_and_event_files_are_cut(tmp_path):
    lines = ['{"step": 5}', "[]", "5", '{"step": "5"}', '{"step": true}', "[" * 50_000, "\x00", '{"step": 5, "x": null}']
    (tmp_path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1.x").write_bytes(b"\xff" * 100)
    logger = Logger(tmp_path, resume_at=10)
    _log(logger, [20])
    logger.close()
    assert [row["step"] for row in rows(tmp_path)] == [5, 5, 20]
    assert [step for step, _ in _scalars(tmp_path, "loss/pong")] == [20]


def test_new_run_removes_files_of_an_earlier_attempt(tmp_path):
    for _ in range(2):
        logger = Logger(tmp_path)
        _log(logger, [10])
        logger.close()
    assert len(rows(tmp_path)) == 1
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_nothing_is_written_through_links(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    outside.mkdir()
    (outside / "events.out.tfevents.1").write_text("theirs")
    (outside / "metrics").write_text('{"step": 1}\n')
    (run / "tensorboard").symlink_to(outside)
    with pytest.raises(UserError, match="link"):
        Logger(run, resume_at=5)
    (run / "tensorboard").unlink()
    (run / "metrics.jsonl").symlink_to(outside / "metrics")
    logger = Logger(run, resume_at=5)
    _log(logger, [10])
    logger.close()
    assert (outside / "metrics").read_text() == '{"step": 1}\n'
    assert (outside / "events.out.tfevents.1").read_text() == "theirs"


def test_histogram_has_count_minimum_and_maximum(tmp_path):
    values = np.random.default_rng(0).normal(size=(20, 50))
    values[0, 0] = math.nan
    logger = Logger(tmp_path)
    logger.histogram("weights", values, 7)
    logger.histogram("nothing", [math.nan], 7)
    logger.close()
    (event,) = _tensorboard(tmp_path).Histograms("weights")
    assert event.step == 7
    assert event.histogram_value.num == 999
    assert event.histogram_value.min == pytest.approx(np.nanmin(values))
    assert sum(event.histogram_value.bucket) == 999


def test_image_is_stored_without_loss(tmp_path):
    import io

    from PIL import Image

    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    logger = Logger(tmp_path)
    logger.image("frame", picture, 3)
    logger.image("grey", picture[:, :, :1], 3)
    logger.close()
    for name, expected in (("frame", picture), ("grey", picture[:, :, [0, 0, 0]])):
        (event,) = _tensorboard(tmp_path).Images(name)
        assert (event.step, event.height, event.width) == (3, 5, 7)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), expected)


def _declared(run: Path) -> dict[str, plugin_data_pb2.HParamsPluginData]:
    accumulator = PluginAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    content = accumulator.PluginTagToContent(metadata.PLUGIN_NAME)
    return {tag: plugin_data_pb2.HParamsPluginData.FromString(data) for tag, data in content.items()}


def test_hyperparameters_and_final_scores_are_replaced_by_a_resume(tmp_path):
    for resume_at, lr in ((None, 1e-4), (10, 2e-4)):
        logger = Logger(tmp_path, resume_at)
        config = {"optimizer.lr": lr, "env.tasks": ["pong"], "agent.double": True, "run_dir": None}
        logger.hyperparameters(config, {"eval/score/mean": 0.5}, step=10)
        logger.close()
    declared = _declared(tmp_path)
    hparams = declared[metadata.SESSION_START_INFO_TAG].session_start_info.hparams
    assert hparams["optimizer.lr"].number_value == 2e-4
    assert hparams["agent.double"].bool_value is True
    assert hparams["env.tasks"].string_value == "['pong']"
    metrics = declared[metadata.EXPERIMENT_TAG].experiment.metric_infos
    assert [metric.name.tag for metric in metrics] == ["final/eval/score/mean"]
    assert _scalars(tmp_path, "final/eval/score/mean") == [(10, 0.5)]


def test_full_disk_is_an_error_of_one_line(tmp_path, monkeypatch):
    logger = Logger(tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(EventWriter, "scalars", full)
    with pytest.raises(RunError, match="no space left on device while writing") as caught:
        _log(logger, [1])
    assert str(tmp_path) in str(caught.value)


def test_null_logger_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = NullLogger()
    _log(logger, [1, 2])
    logger.histogram("a", [1.0], 1)
    logger.image("b", np.zeros((2, 2, 3), np.uint8), 1)
    logger.hyperparameters({"a": 1}, {"b": 2.0}, 1)
    logger.flush()
    logger.close()
    assert list(tmp_path.iterdir()) == []
