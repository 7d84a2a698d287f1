"""`stages`: what the config of each stage is, and what is said of mistakes in one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysft.config import Config, load_config
from raysft.config.load import begins_from, pair_of, stage_configs, stages_to_yaml, stand_in
from raysft.errors import UserError
from tests.support import pairs
from tests.support.models import CAUSAL

TREE: dict[str, Any] = {
    "run": {"name": "voice", "seed": 5},
    "data": {"train": ["train.jsonl"], "eval": ["dev.jsonl"], "mix": {"asr": 0.5, "tts": 0.5}},
    "model": CAUSAL,
    "optim": {"lr": 1e-3, "betas": [0.9, 0.95]},
    "evaluate": {"every": 10},
    "stages": [
        {"name": "llm", "optim": {"lr": 1e-4}},
        {"name": "flow", "data": {"train": ["codes.jsonl"], "mix": {"tts": 1.0}}},
        {"name": "joint", "model": {"path": "stages.llm"}, "run": {"seed": 6}},
    ],
}


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    monkeypatch.chdir(tmp_path)

    def loaded(*overrides: str, stages: Any = None, **sections: Any) -> Config:
        tree = {**TREE, **sections, **({} if stages is None else {"stages": stages})}
        (tmp_path / "voice.yaml").write_text(yaml.safe_dump(tree))
        return load_config("voice.yaml", overrides)

    return loaded


def test_a_stage_is_the_file_with_its_own_keys_in_place(
    load: Callable[..., Config], tmp_path: Path
) -> None:
    """Mappings merge, lists and values replace; what a stage does not name is the file's."""
    found = stage_configs(load())
    assert list(found) == ["llm", "flow", "joint"]
    assert [one.optim.lr for one in found.values()] == [1e-4, 1e-3, 1e-3]
    assert all(one.optim.betas == [0.9, 0.95] for one in found.values())
    sources = [[source.path for source in one.data.train] for one in found.values()]
    whole, own = [str(tmp_path / "train.jsonl")], [str(tmp_path / "codes.jsonl")]
    assert sources == [whole, own, whole]
    assert found["flow"].data.mix == {"asr": 0.5, "tts": 1.0}
    assert [one.run.seed for one in found.values()] == [5, 5, 6]
    assert [one.stages for one in found.values()] == [[], [], []]


def test_each_has_a_folder_below_that_of_all(load: Callable[..., Config], tmp_path: Path) -> None:
    """With one index for all, and one group for loggers; checkpoints elsewhere do not meet."""
    found = stage_configs(load(checkpoint={"path": "s3://bucket/runs"}))
    for name, one in found.items():
        place = Path(one.run.storage_path) / one.run.name
        assert place == tmp_path / "runs" / "voice" / name
        assert one.data.index_path == str(tmp_path / "runs" / "index")
        assert (one.log.group, one.checkpoint.path) == ("voice", "s3://bucket/runs/voice")


def test_a_stage_keeps_its_best_by_validation_loss_where_it_is_evaluated(
    load: Callable[..., Config],
) -> None:
    stages = [
        {"name": "plain"},
        {"name": "named", "checkpoint": {"best": "wer/dev"}},
        {"name": "unseen", "evaluate": {"every": 0}},
    ]
    found = [one.checkpoint.best for one in stage_configs(load(stages=stages)).values()]
    assert found == ["loss", "wer/dev", None]


def test_overrides_hold_for_all_stages_or_for_the_one_they_name(
    load: Callable[..., Config],
) -> None:
    """What names a stage wins, wherever it stands."""
    words = ["stages.flow.optim.lr=7e-5", "optim.lr=1e-6", "stages.llm.data.train.0.weight=2"]
    found = stage_configs(load(*words, "run.name=other", "only=flow"))
    assert [one.optim.lr for one in found.values()] == [1e-6, 7e-5, 1e-6]
    assert [one.data.train[0].weight for one in found.values()] == [2.0, 1.0, 1.0]
    assert {Path(one.run.storage_path).name for one in found.values()} == {"other"}


def test_only_takes_a_name_or_several(load: Callable[..., Config]) -> None:
    assert load("only=llm").only == ["llm"]
    assert load("only=[llm, joint]").only == ["llm", "joint"]
    assert load().only is None


def test_a_stage_begins_from_the_best_model_of_one_before(
    load: Callable[..., Config], tmp_path: Path
) -> None:
    """That model and what belongs to it take the place of the file's."""
    config = load()
    joint = stage_configs(config)["joint"]
    assert joint.model.path == str(tmp_path / "runs" / "voice" / "llm_best")
    assert (joint.model.config, joint.model.tokenizer) == (None, None)
    assert [begins_from(config, name) for name in ("llm", "joint")] == [[], ["llm"]]


def test_before_it_is_there_one_of_its_shapes_stands_in(load: Callable[..., Config]) -> None:
    """Also through a stage between; other keys of the model are the stage's."""
    stages = [
        {"name": "one", "model": {"config": {"num_hidden_layers": 7}}},
        {"name": "two", "model": {"path": "stages.one"}},
        {"name": "three", "model": {"path": "stages.two", "unit_token": "[u{}]"}},
    ]
    shaped = stand_in(load(stages=stages), "three")
    assert shaped is not None and shaped.model.config is not None
    assert shaped.model.path is None and shaped.model.tokenizer == "bytes"
    assert shaped.model.config["num_hidden_layers"] == 7
    assert shaped.model.config["hidden_size"] == CAUSAL["config"]["hidden_size"]
    assert shaped.model.unit_token == "[u{}]"


def test_two_models_as_one_have_a_folder_that_is_made_of_them(
    load: Callable[..., Config], tmp_path: Path
) -> None:
    """And the file's units are fitted once, for all stages that say the same of them."""
    pair = {"llm": "stages.llm", "flow": "stages.flow", "flow_weight": 0.5}
    stages = [
        {"name": "llm"},
        {"name": "flow", "model": pairs.flow()},
        {"name": "joint", "model": {"pair": pair}},
        {"name": "other", "data": {"speech_tokens": {"clusters": 7}}},
    ]
    data = {**TREE["data"], "speech_tokens": {"clusters": 20}, "mix": {}}
    config = load(stages=stages, data=data)
    found, folder = stage_configs(config), tmp_path / "runs" / "voice"
    assert found["joint"].model.path == str(folder / "joint_start")
    assert (found["joint"].model.config, found["joint"].model.tokenizer) == (None, None)
    assert sorted(begins_from(config, "joint")) == ["flow", "llm"]
    assert pair_of(config, "joint") == (
        {"llm": str(folder / "llm_best"), "flow": str(folder / "flow_best"), "flow_weight": 0.5},
        folder / "joint_start",
    )
    assert pair_of(config, "llm") is None
    shaped = stand_in(config, "joint")
    assert shaped is not None and shaped.model.tokenizer == "bytes"
    parts = {"text_config": CAUSAL["config"], "flow_config": pairs.flow()["config"]}
    assert shaped.model.config == {"model_type": "raysft_pair", **parts, "flow_weight": 0.5}
    paths = [one.data.speech_tokens and one.data.speech_tokens.path for one in found.values()]
    assert paths == [*[str(folder / "speech_tokens.safetensors")] * 3, None]


def test_another_type_of_model_takes_nothing_of_the_files(load: Callable[..., Config]) -> None:
    own = {"model_type": "llama", "hidden_size": 8}
    found = stage_configs(load(stages=[{"name": "other", "model": {"config": own}}]))
    assert found["other"].model.config == own


def test_what_is_written_down_reads_back_as_the_same_stages(
    load: Callable[..., Config], tmp_path: Path
) -> None:
    config = load("stages.llm.optim.lr=3e-5")
    (tmp_path / "again.yaml").write_text(stages_to_yaml(config))
    assert stage_configs(load_config("again.yaml")) == stage_configs(config)


@pytest.mark.parametrize(
    ("words", "tree", "expected"),
    [
        ([], {"stages": [{"name": "llm", "optim": {"lrr": 1}}]}, r"optim.lrr: unknown key; .*lr"),
        (
            [],
            {"stages": [{"name": "a"}, {"name": "b", "optm": {}}]},
            r"voice.yaml: stages.b.optm: unknown key; did you mean optim\?",
        ),
        ([], {"stages": [{"optim": {}}]}, r"stages.0: expected a name and keys"),
        ([], {"stages": {"llm": {}}}, r"stages: expected a list"),
        ([], {"stages": [{"name": "../x"}]}, r"stages.0.name: '../x' cannot be"),
        ([], {"stages": [{"name": "a_best"}]}, r"does not end in _best"),
        ([], {"stages": [{"name": "a"}, {"name": "A"}]}, r"stages.1.name: A is there already"),
        (
            [],
            {"stages": [{"name": "a", "run": {"name": "x"}}]},
            r"stages.a.run.name: is said once for all stages",
        ),
        (
            [],
            {"stages": [{"name": "a"}, {"name": "b", "model": {"path": "stages.c"}}]},
            r"stages.b.model.path: stages.c is no stage.*there are a, b",
        ),
        (
            [],
            {"stages": [{"name": "a", "model": {"path": "stages.b"}}, {"name": "b"}]},
            r"stages.a.model.path: stages.b does not come before a",
        ),
        (
            [],
            {"stages": [{"name": "a"}, {"name": "b", "model": {"pair": {"llm": "stages.a"}}}]},
            r"stages.b.model.pair: expected \{llm: stages.NAME, flow: stages.NAME\}",
        ),
        (
            ["stages.joint.model.pair={llm: stages.llm, flow: stages.flw}"],
            {},
            r"stages.joint.model.pair.flow: stages.flw is no stage; did you mean stages.flow\?",
        ),
        (
            ["stages.joint.model.pair={llm: stages.llm, flow: stages.flow, flow_wait: 1}"],
            {},
            r"stages.joint.model.pair.flow_wait: unknown key; did you mean flow_weight\?",
        ),
        (["run.name=a/b"], {}, r"voice.yaml: run.name: 'a/b' is not a plain folder name"),
        (["only=lm"], {}, r"only: lm is no stage; did you mean llm\?"),
        (["only=llm"], {"stages": []}, r"only: names stages, and the config has none"),
        (["stages.lm.optim.lr=1"], {}, r"stages.lm.optim.lr: no stage lm; did you mean llm\?"),
        (["stages.llm=1"], {}, r"stages.llm=1: expected stages.NAME.key=value"),
        (["stages.llm.run.name=x"], {}, r"stages.llm.run.name: is not one stage's"),
        (["stages.llm.optim.lr=1"], {"stages": []}, r"stages.llm.optim.lr: the config has no"),
        (
            ["stages.llm.parallel.workers=9"],
            {},
            r"stages.llm.parallel.workers: 9 workers share data.lanes: 8",
        ),
    ],
)
def test_mistakes_name_the_stage_and_the_key(
    words: list[str], tree: Any, expected: str, load: Callable[..., Config]
) -> None:
    with pytest.raises(UserError, match=expected):
        load(*words, **tree)


def test_what_is_wrong_with_all_stages_is_said_once(load: Callable[..., Config]) -> None:
    """And what is wrong with one beside it; nothing twice."""
    with pytest.raises(UserError) as error:
        load("optim.lrr=1", "parallel.workers=9", "stages.flow.model.config=null")
    assert str(error.value).splitlines() == [
        "voice.yaml: 3 mistakes",
        "  - optim.lrr: unknown key; did you mean optim.lr?",
        "  - parallel.workers: 9 workers share data.lanes: 8, so some would have nothing to do; "
        "raise data.lanes or use at most 8 workers",
        "  - stages.flow.model: neither is given: set model.path (a folder or hub id with weights) "
        "or model.config (random weights)",
    ]
