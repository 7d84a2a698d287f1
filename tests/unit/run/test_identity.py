"""A run stands upon one base: another one there is refused, the same in another place is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from raysft.config import Config
from raysft.config.schema import Model
from raysft.data.text import byte_tokenizer
from raysft.errors import UserError
from raysft.export import export_run
from raysft.parallel import World
from raysft.run import identity
from raysft.run.folder import base_in, open_run
from raysft.run.lines import read_lines
from raysft.train.loop import train
from tests.support.worlds import resolved, start, tiny

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ONE = World.current()


def make(folder: Path, seed: int, **settings: Any) -> Path:
    torch.manual_seed(seed)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=280, num_attention_heads=4, **{**small, **settings})
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def digest(folder: Path) -> dict[str, str]:
    found = identity.of(Model(path=str(folder)))
    assert found is not None
    return found


def adapters(folder: Path, base: str | Path, revision: str | None = None, **changes: Any) -> Config:
    given = {"train__max_steps": 4, "peft__method": "lora", "optim__lr": 1e-2}
    given |= {"checkpoint__every": 0, **changes}
    model = Model(path=str(base), revision=revision, speech_units=20)
    return tiny(folder, **given).model_copy(update={"model": model})


def losses(folder: Path, name: str = "run") -> list[float]:
    return [line["loss"] for line in read_lines(folder / "runs" / name / "metrics.jsonl")]


# -- the digest ----------------------------------------------------------------------------------


def test_the_same_weights_are_the_same_however_they_lie(tmp_path: Path) -> None:
    one = make(tmp_path / "one", 0)
    net = AutoModelForCausalLM.from_pretrained(one)
    net.save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2
    shutil.copytree(one, tmp_path / "copy")
    settings = json.loads((tmp_path / "copy" / "config.json").read_text())
    settings["transformers_version"] = "4.31.0"
    (tmp_path / "copy" / "config.json").write_text(json.dumps(settings))
    assert digest(one) == digest(tmp_path / "cut") == digest(tmp_path / "copy")


def test_one_other_value_and_one_other_setting_are_seen(tmp_path: Path) -> None:
    one, found = make(tmp_path / "one", 0), []
    weights = load_file(one / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.1.mlp.down_proj.weight"):
        other = shutil.copytree(one, tmp_path / name)
        changed = {key: value.clone() for key, value in weights.items()}
        changed[name].view(-1)[-1] += 1e-3
        save_file(changed, other / "model.safetensors", {"format": "pt"})
        found.append(digest(other))
    assert {item["config"] for item in found} == {digest(one)["config"]}
    assert len({item["weights"] for item in (*found, digest(one))}) == 3
    settings = json.loads((one / "config.json").read_text())
    settings["rope_parameters"]["rope_theta"] = 5e5
    (one / "config.json").write_text(json.dumps(settings))
    assert digest(one)["config"] != found[0]["config"]


def test_large_tensors_are_told_apart_by_parts_of_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    table, seen = torch.zeros(5_000_001), set()
    for change in (0, 1, 2):
        moved = table + (0.01 if change == 1 else 0)
        if change == 2:
            moved[-1] = 1.0
        save_file({"table": moved}, tmp_path / "model.safetensors")
        seen.add(digest(tmp_path)["weights"])
    assert len(seen) == 3


def test_what_cannot_be_read_is_said_in_a_line(tmp_path: Path) -> None:
    base = make(tmp_path, 0)
    whole = (base / "model.safetensors").read_bytes()
    for content in (b"", whole[:4], whole[:-9], b"<html>" * 99):
        (base / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=r"model.path .*: its weights cannot be read: "):
            digest(base)
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(UserError, match=r"gone.safetensors is missing, which model.safetensors.in"):
        digest(base)


# -- a run and its base --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and `runs/run`: 4 steps of adapters upon it."""
    folder = tmp_path_factory.mktemp("identity")
    train(start(adapters(folder, make(folder / "base", 0)), ONE))
    return folder


@pytest.fixture
def home(trained: Path, tmp_path: Path) -> Path:
    """Its run and corpus as a copy of one's own; the base stays where it was."""
    return Path(shutil.copytree(trained, tmp_path / "home", dirs_exist_ok=True))


def test_config_and_checkpoint_name_the_base(trained: Path) -> None:
    run = trained / "runs" / "run"
    for where in (run, run / "checkpoints" / "step_4"):
        assert base_in((where / "config.yaml").read_text()) == digest(trained / "base")


def test_another_base_is_refused_wherever_it_would_be_used(trained: Path, home: Path) -> None:
    """`home` as if its base had been overwritten in place."""
    written = home / "runs" / "run" / "config.yaml"
    text = written.read_text().replace(str(trained), str(home))
    written.write_text(text)
    kept = home / "runs" / "run" / "checkpoints" / "step_4" / "config.yaml"
    before = text
    for seed, what in ((1, "other weights"), (0, "another config.json")):
        shutil.rmtree(home / "base")
        make(home / "base", seed, **({} if seed else {"rope_theta": 5e5}))
        longer = adapters(home, home / "base", train__max_steps=6)
        refusal = rf"runs/run: its base is another now: model.path .*/base has {what} \(digest"
        with pytest.raises(UserError, match=refusal):
            open_run(longer)
        with pytest.raises(UserError, match=refusal):
            open_run(longer.model_copy(update={"checkpoint": _anew(longer)}))
        for merge in (False, True):
            with pytest.raises(UserError, match=refusal):
                export_run(home / "runs" / "run", home / "out", merge)
    assert not (home / "out").exists() and written.read_text() == before and kept.exists()


def _anew(config: Config) -> Any:
    return config.checkpoint.model_copy(update={"resume": "weights_only"})


def test_a_worker_that_has_another_copy_of_the_base_is_refused(home: Path, trained: Path) -> None:
    """The driver's machine had the right one, and the run went on; this machine has not."""
    shutil.rmtree(home / "base")
    make(home / "base", 1)
    config = adapters(home, trained / "base", train__max_steps=6)
    open_run(config)
    moved = config.model_copy(
        update={"model": config.model.model_copy(update={"path": str(home / "base")})}
    )
    from raysft import worker

    with pytest.raises(UserError, match="has other weights"):
        worker.build_job(moved, home / "runs" / "run", ONE, None, 6)


def test_the_same_base_in_another_place_goes_on(home: Path) -> None:
    longer = adapters(home, home / "base", train__max_steps=6)
    assert train(start(longer, ONE)) == 6
    whole = adapters(home, home / "base", run__name="whole", train__max_steps=6)
    train(start(whole, ONE))
    assert losses(home) == losses(home, "whole")


def test_a_run_that_recorded_no_base_goes_on_and_says_so_once(
    home: Path, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = home / "runs" / "run" / "config.yaml"
    tree = yaml.safe_load(written.read_text())
    del tree["base"], tree["model"]["revision"]
    written.write_text(yaml.safe_dump(tree))
    config = adapters(home, trained / "base")
    open_run(config)
    open_run(config)
    said = [r.getMessage() for r in caplog.records if "has not recorded which base" in r.message]
    assert len(said) == 1
    assert base_in(written.read_text()) == digest(trained / "base")


def test_random_weights_have_no_base(tmp_path: Path) -> None:
    folder = open_run(tiny(tmp_path))
    assert "base" not in yaml.safe_load((folder / "config.yaml").read_text())


# -- a hub id ------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache on a machine without network: its main branch is commit aaaa... ."""
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "cache" / "models--org--tiny"
    make(repo / "snapshots" / ("a" * 40), 0)
    make(repo / "snapshots" / ("b" * 40), 1)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    return repo


def test_a_run_stays_with_the_commit_it_began_with(cache: Path, tmp_path: Path) -> None:
    config = resolved(adapters(tmp_path, "org/tiny"))
    assert config.model.revision == "a" * 40
    train(start(config, ONE))
    train(start(resolved(adapters(tmp_path, "org/tiny", run__name="w", train__max_steps=6)), ONE))
    (cache / "refs" / "main").write_text("b" * 40)  # the branch has moved on
    longer = resolved(adapters(tmp_path, "org/tiny", train__max_steps=6))
    assert longer.model.revision == "a" * 40
    assert train(start(longer, ONE)) == 6
    assert losses(tmp_path) == losses(tmp_path, "w")
    tree = yaml.safe_load((tmp_path / "runs" / "run" / "config.yaml").read_text())
    assert tree["base"] == {"revision": "a" * 40} and tree["model"]["revision"] == "a" * 40
    assert resolved(adapters(tmp_path, "org/tiny", run__name="new")).model.revision == "b" * 40
    for other in ("b" * 40, "main"):
        with pytest.raises(UserError, match=r"org/tiny has revision b+ \(was a+\); put that one"):
            open_run(resolved(adapters(tmp_path, "org/tiny", other)))


def test_a_hub_id_or_revision_that_is_nowhere_is_one_line(cache: Path, tmp_path: Path) -> None:
    for name, revision, where in (
        ("org/none", None, "no model at 'org/none': "),
        ("org/tiny", "v9", "no model at 'org/tiny' at model.revision v9: "),
    ):
        with pytest.raises(UserError, match=f"model.path: {where}") as caught:
            resolved(adapters(tmp_path, name, revision))
        assert "\n" not in str(caught.value)
