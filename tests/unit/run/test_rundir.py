"""A run's folder: what continues it, what begins anew with its weights, what is refused."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from raysft.audit import audit
from raysft.config import Config
from raysft.driver.preflight import check
from raysft.errors import UserError
from raysft.parallel import World
from raysft.run.catalogue import Catalogue, Saved
from raysft.run.folder import check_run, initial_weights, open_run, read_config, reopen
from raysft.run.lines import read_lines
from raysft.run.storage import open_storage
from raysft.train.checkpoint import load_weights, newest_sound
from raysft.train.job import Job
from raysft.train.loop import train
from tests.properties.test_world_sizes import ledger
from tests.support.worlds import die_at, fork, start, tiny
from tests.unit.train.test_checkpoint import ONE, flip

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ANEW = {"checkpoint__resume": "weights_only"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a corpus and `runs/run`: 4 steps, each of them a checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    train(start(tiny(folder, train__max_steps=4, checkpoint__keep=2), ONE))
    return folder


@pytest.fixture
def home(trained: Path, tmp_path: Path) -> Path:
    """A copy of it of one's own."""
    return Path(shutil.copytree(trained, tmp_path / "home"))


def weights(job: Job) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in job.strategy.module.state_dict().items()}


def files(folder: Path) -> dict[str, bytes]:
    """All there is below a folder."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def events(run: Path) -> list[str]:
    return [e["event"] for e in read_lines(run / "events.jsonl") if e["event"] != "saved"]


# -- auto and never ------------------------------------------------------------------------------


def test_auto_continues_a_run_and_never_refuses_it_and_names_the_choices(home: Path) -> None:
    run = home / "runs" / "run"
    before = files(run)
    with pytest.raises(UserError, match=r"a run is there and checkpoint.resume is never; choose"):
        open_run(tiny(home, checkpoint__resume="never"))
    assert files(run) == before
    longer = tiny(home, train__max_steps=6)
    assert train(start(longer, ONE)) == 6
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert events(run) == ["started", "finished", "length", "continued", "finished"]
    fresh = tiny(home, "fresh", checkpoint__resume="never")
    assert open_run(fresh).is_dir()


def test_a_run_whose_ranks_follow_all_its_steps_cannot_be_made_longer(tmp_path: Path) -> None:
    peft = {"method": "adalora", "r": 2, "init_r": 3, "tinit": 1, "tfinal": 1, "every": 1}
    changes = {f"peft__{key}": value for key, value in peft.items()}
    train(start(tiny(tmp_path, train__max_steps=4, **changes), ONE))
    with pytest.raises(UserError, match=r"train\.max_steps \(was 4, now 6\)"):
        start(tiny(tmp_path, train__max_steps=6, **changes), ONE)


def test_a_run_from_before_a_key_existed_goes_on(home: Path) -> None:
    """A key that config.yaml does not have yet counts as its default; any other value is new."""
    written = home / "runs" / "run" / "config.yaml"
    tree = yaml.safe_load(written.read_text())
    del tree["optim"]["decay"], tree["train"]["compile"], tree["peft"]
    written.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"train.compile \(was False, now True\)"):
        open_run(tiny(home, train__compile=True))
    assert train(start(tiny(home, train__max_steps=6), ONE)) == 6


def test_auto_refuses_another_config_and_names_weights_only(home: Path) -> None:
    run = home / "runs" / "run"
    before = files(run)
    for changes in ({"optim__lr": 1.0}, {"data__lanes": 3}, {"data__tokens_per_batch": 90}):
        with pytest.raises(UserError, match=r"checkpoint.resume=weights_only to begin anew"):
            open_run(tiny(home, **changes))
    assert files(run) == before


def test_weights_of_tasks_belong_to_the_run_and_name_tasks_of_the_data(home: Path) -> None:
    with pytest.raises(UserError, match=r"train.task_weights.text \(was None, now 0.5\)"):
        open_run(tiny(home, train__task_weights={"text": 0.5}))
    config = tiny(home, "other", train__task_weights={"txt": 0.5})
    with pytest.raises(UserError, match=r"txt is no task of the training data, which has asr; "):
        start(config, ONE)


def test_weights_of_sources_that_are_counts_are_refused_before_anything_starts(
    home: Path,
) -> None:
    def weighted(name: str, *weights: float) -> Config:
        corpus = str(home / "units.json")
        sources = [{"path": corpus, "weight": weight} for weight in weights]
        return tiny(home, name, data__train=sources)

    with pytest.raises(UserError, match=r"data.train.1.weight: 1250: .* no number of clips or ho"):
        check(weighted("new", 12.5, 1250.0))
    check(weighted("new", 0.01, 1.0))
    check(weighted("new", 100.0))
    # A run that is there has them in its plan.
    written = home / "runs" / "run" / "config.yaml"
    tree = yaml.safe_load(written.read_text())
    tree["data"]["train"][0]["weight"] = 1250.0
    written.write_text(yaml.safe_dump(tree))
    check(weighted("run", 1250.0))


def test_how_often_is_saved_and_the_like_may_change(home: Path) -> None:
    free = {
        "checkpoint__every": 3,
        "checkpoint__keep": 1,
        "checkpoint__grace_s": 5.0,
        "log__every": 2,
        "parallel__timeout_s": 5,
        "parallel__max_failures": 0,
    }
    assert train(start(tiny(home, train__max_steps=6, **free), ONE)) == 6


# -- weights_only --------------------------------------------------------------------------------


def test_weights_only_begins_at_step_0_with_the_weights_and_nothing_else(home: Path) -> None:
    run = home / "runs" / "run"
    before = files(run)
    losses: list[float] = []
    config = tiny(home, train__max_steps=2, optim__lr=1e-3, data__lanes=3, **ANEW)
    first = start(config, ONE, lambda line: losses.append(line["loss"]) if "loss" in line else None)
    assert first.catalogue.committed() == []
    train(first)
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, 2]
    assert events(run) == ["started", "finished"]
    assert [e["step"] for e in read_lines(run / "events.jsonl") if e["event"] == "started"] == [0]
    assert audit(run).clean, "a plan and a cursor of its own"
    # The same steps of a run that has these weights by other means, and a fresh optimizer:
    plain = start(tiny(home, "plain", train__max_steps=2, optim__lr=1e-3, data__lanes=3), ONE)
    old, _ = newest_sound(Catalogue(open_storage(run / "earlier_1", None)), ONE)
    assert old is not None and old.step == 4
    plain.weights = old
    train(plain)
    assert losses == [line["loss"] for line in read_lines(plain.folder / "metrics.jsonl")]
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(weights(first).values(), weights(plain).values(), strict=True)
    )
    # The old run is whole, in a folder of its own.
    kept = files(run / "earlier_1")
    moved = {name for name in before if not name.startswith("owner")}
    assert moved <= set(kept) and all(kept[name] == before[name] for name in moved)
    assert audit(run / "earlier_1").clean


def test_the_weights_it_begins_with_are_those_of_the_old_run_to_the_bit(home: Path) -> None:
    saved = Saved(4, open_storage(home / "runs" / "run", None))
    expected = start(tiny(home, "expected"), ONE)
    load_weights(saved, expected.strategy)
    job = start(tiny(home, **ANEW), ONE)
    assert job.weights is not None and job.weights.step == 4
    begun: list[dict[str, torch.Tensor]] = []
    job.progress = lambda line: (
        begun.append(weights(job)) if line.get("event") == "started" else None
    )
    job.total_steps = 1
    train(job)
    assert all(torch.equal(begun[0][k], v) for k, v in weights(expected).items())


def test_the_same_command_again_continues_and_does_not_begin_anew(home: Path) -> None:
    run = home / "runs" / "run"

    class Killed(Exception):
        pass

    def die(line: dict[str, Any]) -> None:
        if line.get("event") == "saved" and line["step"] == 2:
            raise Killed

    with pytest.raises(Killed):
        train(start(tiny(home, train__max_steps=5, **ANEW), ONE, die))
    assert train(start(tiny(home, train__max_steps=5, **ANEW), ONE)) == 5
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert [path.name for path in run.glob("earlier_*")] == ["earlier_1"]
    whole = tiny(home, "whole", train__max_steps=5)
    job = start(whole, ONE)
    job.weights = initial_weights(run)
    train(job)
    assert ledger(run) == ledger(job.folder)
    ours, theirs = (
        [line["loss"] for line in read_lines(r / "metrics.jsonl")] for r in (run, job.folder)
    )
    assert ours == theirs


def test_killed_before_its_first_checkpoint_it_still_begins_with_the_weights(home: Path) -> None:
    open_run(tiny(home, **ANEW))
    for _ in range(2):
        job = start(tiny(home, **ANEW), ONE)
        assert job.weights is not None and job.weights.damage() is None


def test_a_run_that_began_with_weights_may_be_begun_anew_again(home: Path) -> None:
    run = home / "runs" / "run"
    train(start(tiny(home, train__max_steps=2, **ANEW), ONE))
    open_run(tiny(home, train__max_steps=2))  # auto: continues
    job = start(tiny(home, train__max_steps=3, **ANEW), ONE)
    assert job.weights is not None
    assert job.weights.where == str(run / "earlier_2" / "checkpoints" / "step_2")
    assert initial_weights(run / "earlier_2") is not None
    train(job)
    assert audit(run).clean and audit(run / "earlier_1").clean and audit(run / "earlier_2").clean


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__config": {"hidden_size": 64}}, r"weights are of another model: model.config.hid"),
        ({"run__name": "other"}, r"other holds no run to take weights from; name that run, or"),
    ],
)
def test_weights_only_refuses_what_it_cannot_begin_with(
    changes: dict[str, Any], said: str, home: Path
) -> None:
    config = tiny(home, **ANEW)
    for key, value in changes.items():
        section, _, name = key.partition("__")
        part = getattr(config, section)
        if isinstance(value, dict):
            value = {**getattr(part, name), **value}
        setattr(part, name, value)
    before = files(home / "runs" / "run")
    with pytest.raises(UserError, match=said):
        open_run(config)
    assert files(home / "runs" / "run") == before


def test_weights_only_refuses_a_run_without_a_checkpoint_and_one_place_for_two_runs(
    home: Path,
) -> None:
    run = home / "runs" / "run"
    place = {"checkpoint__path": str(home / "elsewhere")}
    train(start(tiny(home, "placed", train__max_steps=1, **place), ONE))
    with pytest.raises(UserError, match=r"checkpoint.path: .*elsewhere holds the checkpoints of"):
        open_run(tiny(home, "placed", **place, **ANEW))
    job = start(tiny(home, "placed", **ANEW), ONE)
    place = home / "elsewhere" / "placed"
    assert job.weights is not None and job.weights.where == str(place / "step_1")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint to take them from"):
        open_run(tiny(home, **ANEW))


def test_weights_only_takes_the_newest_sound_checkpoint(home: Path) -> None:
    """A damaged one is never loaded: its weights would be wrong without anybody knowing."""
    run = home / "runs" / "run"
    flip(run / "checkpoints" / "step_4" / "state" / "__0_0.distcp")
    job = start(tiny(home, **ANEW), ONE)
    assert job.weights is not None and job.weights.step == 3
    assert job.weights.damage() is None


def set_aside(config: Config, operation: int) -> None:
    die_at(operation)
    open_run(config)


@pytest.mark.slow
def test_killed_between_any_two_moves_weights_only_still_begins_with_the_weights(
    trained: Path, tmp_path: Path
) -> None:
    for operation in itertools.count(1):
        home = Path(shutil.copytree(trained, tmp_path / str(operation)))
        run = home / "runs" / "run"
        before = files(run)
        life = fork(set_aside, tiny(home, **ANEW), operation)
        life.join()
        check_run(tiny(home, **ANEW))
        assert open_run(tiny(home, **ANEW)) == run
        begins = initial_weights(run)
        assert begins is not None and begins.where.endswith("earlier_1/checkpoints/step_4")
        assert begins.damage() is None
        assert read_config(run).checkpoint.resume == "weights_only"
        kept = files(run / "earlier_1")
        kept.pop("weights.json", None)
        stays = {name: content for name, content in before.items() if name.startswith("owner")}
        assert {**kept, **stays} == before, "who owns the folder is the folder's"
        assert not (run / "earlier_2").exists()
        if life.exitcode == 0:
            break
    assert operation > 5


# -- where it lies -------------------------------------------------------------------------------


def test_a_folder_that_is_no_run_is_refused_and_one_that_was_moved_is_still_the_run(
    home: Path,
) -> None:
    (home / "runs" / "notes").mkdir()
    (home / "runs" / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds no config.yaml, so it is not the folder of a run"):
        open_run(tiny(home, "notes"))
    moved = shutil.move(home / "runs" / "run", home / "moved")
    config = reopen(Path(moved), ["train.max_steps=5"])
    assert (config.run.storage_path, config.run.name) == (str(home), "moved")
    assert train(start(config, World.current())) == 5


def test_what_a_run_reads_may_move_but_not_become_another(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = home / "runs" / "run" / "config.yaml"
    tokens = home / "tokens"
    tokens.mkdir()
    (tokens / "tokenizer.json").write_text("{}")

    def checked(recorded: object, now: object, key: str = "tokenizer") -> None:
        tree = yaml.safe_load(written.read_text())
        tree["model"][key] = str(recorded)
        written.write_text(yaml.safe_dump(tree))
        config = tiny(home, train__max_steps=6)
        check_run(config.model_copy(update={"model": config.model.model_copy(update={key: now})}))

    copy = Path(shutil.copytree(tokens, home / "elsewhere" / "copy"))
    checked(tokens, str(copy))
    checked("/gone/with/all/tokens", str(tokens))
    monkeypatch.chdir(home)
    checked("tokens", str(tokens))  # a run from before paths were made absolute
    monkeypatch.chdir(home / "elsewhere")
    checked("../tokens", str(tokens))
    (copy / "tokenizer.json").write_text("{ }")
    for recorded in (tokens, "/gone/other"):
        with pytest.raises(UserError, match=rf"model.tokenizer \(was '{recorded}', now '{copy}'"):
            checked(recorded, str(copy))


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match=r"run.storage_path: .*/runs/run cannot be made: "):
        open_run(tiny(tmp_path))
