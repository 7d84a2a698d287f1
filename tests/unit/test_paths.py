"""Paths: one rule for config keys, clips and arguments; what is no file is refused by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from raysft import paths
from raysft.config import load_config, to_yaml
from raysft.config.schema import Source
from raysft.data import sources
from raysft.errors import BadExample, UserError

PATHS = ("run.storage_path", "data.index_path", "data.train.0.path", "parallel.deepspeed")
MODELS = ("model.path", "model.tokenizer", "peft.path", "data.speech_tokens.path")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder a command runs in, with a home and a config."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "here"


@pytest.fixture
def config(here: Path) -> Path:
    file = here.parent / "configs" / "small.yaml"
    file.parent.mkdir()
    tree = {
        "data": {"train": ["train.jsonl"], "speech_tokens": {"clusters": 9}},
        "model": {"path": "owner/base", "tokenizer": "owner/base"},
        "peft": {"method": "lora"},
        "parallel": {"strategy": "zero1"},
    }
    file.write_text(yaml.safe_dump(tree))
    return file


def value(config: Path, key: str, given: str) -> str:
    found = load_config(config, [f"{key}={given}"]).model_dump()
    for part in key.split("."):
        found = found[int(part)] if part.isdigit() else found[part]
    return found


@pytest.mark.parametrize("key", PATHS + MODELS)
def test_every_key_reads_a_path_the_same_way(here: Path, config: Path, key: str) -> None:
    home = here.parent / "home"
    for folder in (here, home):
        for name in ("a #1: {b} é.json", "c d"):
            (folder / name).write_text("{}")
    (here / "link").symlink_to(home)
    for given, means in (
        ("./a #1: {b} é.json", here / "a #1: {b} é.json"),
        ("~/c d", home / "c d"),
        (f"file://{here}/a%20%231:%20%7Bb%7D%20%C3%A9.json", here / "a #1: {b} é.json"),
        (f"file://localhost{here}/c d", here / "c d"),
        (str(here / "c d"), here / "c d"),
        ("../home/c d", home / "c d"),
    ):
        assert value(config, key, given) == str(means), given
    through_link = value(config, key, f"{here}/link/c d")
    assert Path(through_link).samefile(home / "c d")


@pytest.mark.parametrize("key", PATHS + MODELS)
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("$DATA/x", "holds $DATA, and variables are not expanded"),
        ("${DATA}/x", "holds ${DATA}, and variables"),
        ("file://host/x", "names the machine 'host'"),
        ("data:audio/wav;base64,UklG", "holds the bytes themselves"),
    ],
)
def test_what_is_no_file_is_refused_by_key_and_name(
    here: Path, config: Path, key: str, given: str, says: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_config(config, [f"{key}={given}"])
    assert f"{key}: " in str(caught.value)
    assert says in str(caught.value)


def test_a_file_whose_name_looks_like_a_variable_is_that_file(here: Path, config: Path) -> None:
    (here / "$DATA").mkdir()
    (here / "$DATA" / "x").write_text("{}")
    assert value(config, "data.train.0.path", "$DATA/x") == str(here / "$DATA" / "x")
    assert value(config, "run.storage_path", "cost$") == str(here / "cost$")


def test_a_model_is_a_folder_where_there_is_one_or_it_can_be_nothing_else(
    here: Path, config: Path
) -> None:
    for given in ("owner/name", "gpt2", "owner.x/name-1_2"):
        assert value(config, "model.path", given) == given
    for given in ("./gpt2", "a/b/c", "../gpt2", "~/gpt2", "/gpt2"):
        assert Path(value(config, "model.path", given)).is_absolute(), given
    (here / "owner" / "name").mkdir(parents=True)
    assert value(config, "model.path", "owner/name") == str(here / "owner" / "name")
    assert value(config, "model.tokenizer", "bytes") == "bytes"


def test_a_path_beside_the_config_that_is_not_here_is_refused_naming_both_places(
    here: Path, config: Path
) -> None:
    (config.parent / "train.jsonl").write_text("")
    with pytest.raises(UserError) as caught:
        load_config(config)
    said = f"{here}/train.jsonl does not exist, but {config.parent}/train.jsonl does"
    assert said in str(caught.value)
    (config.parent / "train.jsonl").rename(config.parent.parent / "train.jsonl")
    with pytest.raises(UserError, match=f"run it in {config.parent.parent}, or write the whole"):
        load_config(config)
    (here / "train.jsonl").write_text("")
    assert load_config(config).data.train[0].path == str(here / "train.jsonl")


def test_checkpoint_path_takes_stores_and_begins_at_the_folder_of_runs(
    here: Path, config: Path
) -> None:
    for given, means in (
        ("s3://bucket/x", "s3://bucket/x"),
        ("checkpoints", "checkpoints"),
        ("~/x", str(here.parent / "home" / "x")),
        (f"file://{here}/x", str(here / "x")),
    ):
        assert value(config, "checkpoint.path", given) == means


def test_the_written_config_means_the_same_from_another_folder(
    here: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "base").mkdir()
    before = load_config(config, ["model.path=base", "run.storage_path=~/runs"])
    written = here / "config.yaml"
    written.write_text(to_yaml(before))
    monkeypatch.chdir(here.parent)
    assert load_config(written) == before


# --- the same rule for clips


def clip_of(manifest: Path, given: str) -> str:
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"task_type": "asr", "wav_path": given, "text": "x"}) + "\n")
    source = sources.resolve(Source(path=str(manifest)), "train")
    (found,) = sources.scan(source, source.files[0])
    if found.example is None:
        raise BadExample(found.error)
    return found.example.audio()[0].path


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("inside", ["", "clips/"])
def test_a_clip_beside_a_linked_folder_is_the_one_that_open_finds(
    here: Path, depth: int, inside: str
) -> None:
    """`..` after a link leaves the folder the link leads to."""
    wanted = f"{'../' * depth}audio/{inside}a.wav"
    store = here / "store/deep/manifests"
    for number, folder in enumerate((here / "project", here, here / "store/deep", here / "store")):
        (folder / "audio" / "clips").mkdir(parents=True)
        (folder / "audio" / inside / "a.wav").write_bytes(b"x" * number)
    store.mkdir()
    (here / "project" / "manifests").symlink_to(store)
    manifest = here / "project/manifests/train.jsonl"
    found = clip_of(manifest, wanted)
    with open(f"{manifest.parent}/{wanted}", "rb") as system:
        assert Path(found).read_bytes() == system.read()
    relative = clip_of(Path("project/manifests/train.jsonl"), wanted)
    assert Path(relative).samefile(found)


def test_a_link_inside_the_path_of_a_clip_is_followed_as_the_system_does(here: Path) -> None:
    (here / "store/audio").mkdir(parents=True)
    (here / "set").mkdir()
    (here / "set/link").symlink_to(here / "store/audio")
    (here / "store/a.wav").write_bytes(b"right")
    (here / "set/a.wav").write_bytes(b"wrong")
    assert Path(clip_of(here / "set/t.jsonl", "link/../a.wav")).read_bytes() == b"right"
    assert paths.absolute("set/link/../a.wav") == f"{here}/set/link/../a.wav"


def test_clips_follow_the_rule_of_every_path(here: Path) -> None:
    manifest = here / "set/t.jsonl"
    home = here.parent / "home"
    assert clip_of(manifest, "~/a.wav") == str(home / "a.wav")
    assert clip_of(manifest, "file:///data/a%20b.wav") == "/data/a b.wav"
    assert clip_of(manifest, "é #1: {x}.wav") == str(here / "set" / "é #1: {x}.wav")
    assert clip_of(manifest, "s3://b/a b.wav") == "s3://b/a b.wav"
    with pytest.raises(BadExample, match=r"t.jsonl line 1: field 'wav_path': .*\$D"):
        clip_of(manifest, "$D/a.wav")


def test_without_a_home_the_tilde_says_so(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as with no HOME and no user
    with pytest.raises(UserError, match="'~/x': this user has no home folder; set HOME"):
        paths.absolute("~/x")


# --- a run that goes on elsewhere


def test_places_are_the_same_where_they_moved_or_hold_the_same(here: Path) -> None:
    base = here / "base"
    base.mkdir()
    (base / "weights").write_bytes(b"w" * 3_000_000)
    (base / "config.json").write_text("{}")
    copy = here / "elsewhere" / "copy"
    shutil.copytree(base, copy)
    (here / "link").symlink_to(base)
    assert paths.same(str(base), str(here / "link"))
    assert paths.same(str(base), str(copy))
    assert not paths.same(str(base), str(here / "nowhere"))
    (copy / "config.json").write_text("[]")
    assert not paths.same(str(base), str(copy))
    assert paths.same("/gone/models/base", str(base))
    assert not paths.same("/gone/models/other", str(base))
    assert paths.same("models/base", "/any/where/models/base"), "of a run before paths were whole"
    assert not paths.same("models/base", "/any/where/other/base")
    assert not paths.same("owner/base", "other/base")
    assert not paths.same("s3://bucket/a", "s3://bucket/b")


def unlooked(key: str, place: Path, config: Path) -> str:
    with pytest.raises(UserError) as caught:
        if key == "CONFIG":
            load_config(place)
        else:
            sources.resolve(Source(path=str(place)), "train", key)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("key", ["CONFIG", "data.train[0]"])
def test_a_path_the_system_does_not_tell_of_is_refused_by_key_and_cause(
    here: Path, config: Path, key: str
) -> None:
    name = key if key == "CONFIG" else f"{key}.path"
    said = unlooked(key, here / ("x" * 300), config)
    assert said.startswith(f"{name}: ")
    assert said.endswith("cannot be looked at: File name too long")
    (here / "a").symlink_to(here / "b")
    (here / "b").symlink_to(here / "a")
    said = unlooked(key, here / "a", config)
    assert said == f"{name}: {here / 'a'} cannot be looked at: Too many levels of symbolic links"
    closed = here / "closed"
    (closed / "inner").mkdir(parents=True)
    closed.chmod(0o600)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may enter everything
    try:
        said = unlooked(key, closed / "inner" / "t.jsonl", config)
        assert paths.nearest(closed / "inner" / "t.jsonl") == ""
    finally:
        os.seteuid(user)
        closed.chmod(0o700)
    place = closed / "inner" / "t.jsonl"
    assert said == f"{name}: {place} cannot be looked at: Permission denied"
