"""Checkpoints lie in a place of one run: who finds those of another there is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysft.audit import audit
from raysft.config import Config
from raysft.errors import UserError
from raysft.run.catalogue import MARKER, Catalogue
from raysft.run.folder import check_run, open_run, run_folder, run_id
from raysft.run.storage import CLAIM
from raysft.train.loop import train
from tests.support.worlds import start, tiny
from tests.unit.train.test_checkpoint import ONE

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
PLACES = ["{}/bucket", "objects://{}/bucket/runs"]


def config_of(home: Path, who: str, place: str, **changes: Any) -> Config:
    where = {"run__storage_path": str(home / who), "checkpoint__path": place.format(home)}
    return tiny(home, **where, **{"train__max_steps": 2, **changes})


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("place", PLACES)
def test_a_new_run_is_refused_a_place_that_holds_another_runs_checkpoints(
    place: str, tmp_path: Path
) -> None:
    """Both are named, and nothing is written; the run whose place it is goes on."""
    alice = config_of(tmp_path, "alice", place)
    train(start(alice, ONE))
    folder, ours = run_folder(alice), run_id(run_folder(alice))
    assert ours is not None
    before = files(tmp_path)
    bob = config_of(tmp_path, "bob", place, optim__lr=0.5)
    for call in (check_run, open_run):
        with pytest.raises(UserError) as refused:
            call(bob)
        text = str(refused.value)
        assert text.startswith(f"checkpoint.path: {place.format(tmp_path)}/run holds the check")
        assert f"another run, {folder} (id {ours[:12]}) (the newest: step_2)" in text
        assert f"this one is {run_folder(bob)} (without an id)" in text
        assert "\n" not in text
    assert {**files(tmp_path), **before} == files(tmp_path) and not run_folder(bob).exists()
    elsewhere = config_of(tmp_path, "bob", place, run__name="other")
    assert train(start(elsewhere, ONE)) == 2
    assert run_id(run_folder(elsewhere)) not in (None, ours)
    assert train(start(config_of(tmp_path, "alice", place, train__max_steps=4), ONE)) == 4
    assert run_id(folder) == ours and audit(folder).clean


def test_every_checkpoint_names_its_run_which_keeps_its_id_and_gets_another_anew(
    tmp_path: Path,
) -> None:
    config = tiny(tmp_path, train__max_steps=2)
    train(start(config, ONE))
    run = run_folder(config)
    first = run_id(run)
    found = Catalogue.of(config.checkpoint, run).committed()
    assert first is not None and [saved.meta()["run"] for saved in found] == [first, first]
    assert yaml.safe_load(found[-1].read("config.yaml"))["id"] == first
    open_run(config)
    assert run_id(run) == first
    open_run(tiny(tmp_path, train__max_steps=2, checkpoint__resume="weights_only"))
    assert run_id(run) not in (None, first)
    assert run_id(run / "earlier_1") == first


@pytest.mark.parametrize("place", PLACES)
def test_a_run_from_before_runs_had_ids_goes_on_and_gets_one(place: str, tmp_path: Path) -> None:
    old = config_of(tmp_path, "old", place)
    train(start(old, ONE))
    run = run_folder(old)
    for saved in Catalogue.of(old.checkpoint, run).committed():
        meta = {key: value for key, value in saved.meta().items() if key != "run"}
        content = json.dumps(meta).encode()
        saved.storage.write(f"{saved.root}/meta.json", content)
        marker = hashlib.sha256(content).hexdigest().encode()
        saved.storage.write(f"{saved.root}/{MARKER}", marker)
    for claim in (tmp_path / "bucket").rglob(f"*{CLAIM}"):
        claim.unlink()
    written = run / "config.yaml"
    lines = written.read_text().splitlines(keepends=True)
    written.write_text("".join(line for line in lines if not line.startswith("id:")))
    assert run_id(run) is None
    with pytest.raises(UserError, match=r"another run, whose folder is not known \(without an id"):
        check_run(config_of(tmp_path, "new", place))
    longer = config_of(tmp_path, "old", place, train__max_steps=4)
    assert train(start(longer, ONE)) == 4
    committed = Catalogue.of(old.checkpoint, run).committed()
    assert {saved.meta().get("run") for saved in committed} == {run_id(run)} != {None}


@pytest.mark.parametrize("place", PLACES)
def test_of_two_new_runs_that_begin_at_once_in_one_place_the_first_ends_at_its_next_save(
    place: str, tmp_path: Path
) -> None:
    """Neither found anything of the other when it looked."""
    alice, bob = (config_of(tmp_path, who, place, checkpoint__every=2) for who in ("a", "b"))
    second = start(bob, ONE)

    def meanwhile(line: dict[str, Any]) -> None:
        if line.get("step") == 1 and "loss" in line:
            assert train(second) == 2

    first = start(alice, ONE, meanwhile)
    with pytest.raises(UserError, match=r"has been claimed by another run, .*/b/run \(id"):
        train(first)
    (saved,) = Catalogue.of(bob.checkpoint, run_folder(bob)).committed()
    assert saved.damage() is None and saved.meta()["run"] == run_id(run_folder(bob))
