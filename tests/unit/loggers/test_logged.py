"""What TensorBoard, W&B and MLflow have of a run is what its own files say, under the same names,
with its answers and their clips; read back by these tools' own programs."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import soundfile
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from raysft.config import Config
from raysft.driver import preflight
from raysft.run.lines import read_lines
from raysft.train.loop import train
from tests.conftest import tone
from tests.support.models import AUDIO
from tests.support.wandb_server import WandbServer
from tests.support.worlds import start
from tests.unit.train.test_checkpoint import ONE

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@dataclass
class Logged:
    """A run, and what each logger has of it."""

    folder: Path
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    curves: EventAccumulator
    wandb: WandbServer
    mlflow: MlflowClient
    mlflow_run: Any

    @property
    def rows(self) -> list[dict[str, Any]]:
        (rows,) = self.wandb.rows.values()
        return rows


@pytest.fixture(scope="module")
def logged(make_clips: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Logged:
    """A model that hears, evaluated at 2, 4 and the end on two sources."""
    folder = tmp_path_factory.mktemp("logged")
    clips = make_clips(8)
    lines = [json.loads(line) for line in clips.read_text().splitlines()]
    lines = [{**line, "wav_path": str(clips.parent / line["wav_path"])} for line in lines]
    soundfile.write(folder / "long.wav", tone(31.0, 16000, 300), 16000)
    long = {"task_type": "asr", "id": "a|long*one*", "wav_path": "long.wav", "text": "one | two"}
    for name, some in (("train", lines), ("dev", lines[:3]), ("far", [long])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in some))
    audio = {**AUDIO["config"]["audio_config"], "max_source_positions": 2000}  # 40 s
    hears = {**AUDIO["config"], "audio_config": audio}
    tree = {
        "run": {"name": "heard", "storage_path": str(folder / "runs")},
        "data": {
            "train": [{"path": str(folder / "train.jsonl")}],
            "eval": [{"path": str(folder / f"{n}.jsonl"), "name": n} for n in ("dev", "far")],
            "lanes": 1,
            "tokens_per_batch": 400,
            "index_path": str(folder / "index"),
        },
        "model": {**AUDIO, "config": hears, "feature_extractor": {"chunk_length": 40}},
        "train": {"max_steps": 5},
        "evaluate": {"every": 2, "max_new_tokens": 3},
        "checkpoint": {"every": 0},
        "log": {
            "every": 1,
            "group": "all of them",
            "wandb": {"mode": "offline", "project": "mine", "tags": ["tiny"]},
            "mlflow": {"tracking_uri": f"sqlite:///{folder}/db/mlflow.db", "experiment": "mine"},
        },
    }
    config = preflight.check(Config.model_validate(tree))
    run = start(config, ONE)
    train(run)
    curves = EventAccumulator(str(run.folder / "tensorboard"), {"tensors": 0, "audio": 0})
    curves.Reload()
    with WandbServer() as server:
        server.sync(run.folder)
    assert config.log.mlflow is not None
    client = MlflowClient(tracking_uri=config.log.mlflow.tracking_uri)
    (experiment,) = client.search_experiments(filter_string="name = 'mine'")
    runs = client.search_runs([experiment.experiment_id])
    (found,) = [one for one in runs if one.info.run_name == "heard"]
    metrics, evaluations = (read_lines(run.folder / f"{n}.jsonl") for n in ("metrics", "eval"))
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in evaluations] == [2, 4, 5]
    warned = [line for line in read_lines(run.folder / "events.jsonl") if "reason" in line]
    assert not [line for line in warned if "log." in line["reason"]], "no logger has failed"
    return Logged(run.folder, metrics, evaluations, curves, server, client, found)


def given(logged: Logged) -> dict[str, list[tuple[int, float]]]:
    """Every figure that TensorBoard has, which `test_tensorboard` holds against the run's files."""
    found = {}
    for name in logged.curves.Tags()["scalars"]:
        found[name] = [(event.step, event.value) for event in logged.curves.Scalars(name)]
    assert [value for _, value in found["train/loss"]] == pytest.approx(
        [line["loss"] for line in logged.metrics]
    )
    assert [step for step, _ in found["eval/wer/dev"]] == [2, 4, 5]
    return found


def test_wandb_has_the_same_curves(logged: Logged) -> None:
    for name, points in given(logged).items():
        own = [(row["step"], row[name]) for row in logged.rows if name in row]
        assert own == [(step, pytest.approx(value, rel=1e-6)) for step, value in points], name


def test_mlflow_has_the_same_curves(logged: Logged) -> None:
    for name, points in given(logged).items():
        history = logged.mlflow.get_metric_history(logged.mlflow_run.info.run_id, name)
        own = sorted((point.step, point.value) for point in history)
        assert own == [(step, pytest.approx(value, rel=1e-6)) for step, value in points], name


def test_tensorboard_has_answers_with_what_differs_and_clips_of_16_bits(logged: Logged) -> None:
    tags = logged.curves.Tags()
    assert sorted(tags["tensors"]) == [f"eval/answers/{n}/text_summary" for n in ("dev", "far")]
    for source in ("dev", "far"):
        texts = logged.curves.Tensors(f"eval/answers/{source}/text_summary")
        assert [text.step for text in texts] == [2, 4, 5]
    shown = markdown_to_safe_html(texts[-1].tensor_proto.string_val[0])
    assert shown.count("<tr>") == 2, "its head and one answer"
    assert "<td>a&#124;long*one*</td>" in shown and "<strong>one &#124; two</strong>" in shown
    assert "<em>" not in shown, "text of a corpus is nobody's markup"
    clips = {name: logged.curves.Audio(name) for name in tags["audio"]}
    assert len(clips) == 4 and all(len(events) == 1 for events in clips.values()), "once a clip"
    (cut,) = [name for name in clips if name.startswith("eval/clips/far/")]
    assert cut == "eval/clips/far/a_long_one_ (first 30 s)"
    with wave.open(BytesIO(clips[cut][0].encoded_audio_string)) as sound:
        assert sound.getsampwidth() == 2 and sound.getframerate() == 16000
        assert sound.getnframes() == 30 * 16000


def test_wandb_has_config_group_answers_and_clips(logged: Logged) -> None:
    (about,) = logged.wandb.given.values()
    assert (about["project"], about["groupName"], about["displayName"]) == (
        *("mine", "all of them", "heard"),
    )
    assert sorted(about["tags"]) == ["all of them", "tiny"]
    config = json.loads(about["config"])
    assert config["train"]["value"]["max_steps"] == 5
    tables = [row for row in logged.rows if "eval/answers" in row]
    assert [row["step"] for row in tables] == [2, 4, 5]
    table = json.loads(logged.wandb.files[tables[-1]["eval/answers"]["path"]])
    answers = read_lines(logged.folder / "predictions" / "step_5.jsonl")
    wanted = {(a["source"], a["id"], a["reference"], a["hypothesis"]) for a in answers}
    assert {(row[1], row[2], row[4], row[5]) for row in table["data"]} == wanted
    assert {row[0] for row in table["data"]} == {5}
    (heard,) = [row for row in logged.rows if "eval/clips" in row]
    said = heard["eval/clips"]["captions"]
    assert "a|long*one*: one | two (its first 30 s)" in said and len(said) == 4
    assert len([name for name in logged.wandb.files if name.endswith(".wav")]) == 4


def test_mlflow_has_config_group_answers_and_clips(logged: Logged, tmp_path: Path) -> None:
    data, client, name = logged.mlflow_run.data, logged.mlflow, logged.mlflow_run.info.run_id
    assert logged.mlflow_run.info.status == "FINISHED"
    assert data.params["train.max_steps"] == "5" and data.params["run.name"] == "heard"
    parent = client.get_run(data.tags["mlflow.parentRunId"])
    assert parent.info.run_name == "all of them" and parent.info.status == "FINISHED"
    assert data.tags["raysft.event"] == "finished after step 5"
    kept = {
        item.path
        for place in ("", "answers", "clips")
        for item in client.list_artifacts(name, place)
    }
    assert kept >= {"config.yaml", "events.jsonl", "answers/step_2.md", "answers/step_5.md"}
    assert len([path for path in kept if path.endswith(".wav")]) == 4
    table = json.loads(Path(client.download_artifacts(name, "answers.json", tmp_path)).read_text())
    assert sorted({row[0] for row in table["data"]}) == [2, 4, 5]
    home = logged.folder.parent.parent / "db" / "mlartifacts"
    assert list(home.rglob("answers.json")), "files lie beside the database"
