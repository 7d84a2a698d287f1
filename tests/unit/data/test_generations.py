"""What a run trained on is written down; changed data is refused, or used from the next epoch."""

from __future__ import annotations

import itertools
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from raysft.config.schema import Source
from raysft.data.index import part
from raysft.data.index.build import Index
from raysft.data.plan.generations import open_index
from raysft.errors import UserError
from raysft.run import plans
from tests.support.generations import Run, names, refusal
from tests.support.indexes import Encoder, asr, clip, jsonl, most


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return most(tmp_path / "a.json", 40)


def test_the_run_folder_says_what_it_trains_on(run: Run, corpus: Path) -> None:
    run.start(Source(path=str(corpus), weight=2.0))
    (only,) = run.written()
    assert only["from_epoch"] == 0
    assert only["plan_hash"] == plans.load(run.folder).start().plan_hash
    assert only["index"] == str(run.index(Source(path=str(corpus), weight=2.0)).folder)
    assert only["settings"]["lanes"] == 2
    assert only["settings"]["weights"] == [2.0]
    (file,) = only["files"]
    assert (file["path"], file["examples"]) == (str(corpus), 40)
    assert len(file["digest"]) == 64


@pytest.mark.parametrize("extend", [False, True])
def test_unchanged_data_goes_on_and_changes_nothing(run: Run, corpus: Path, extend: bool) -> None:
    run.start(corpus)
    whole = run.train(30)
    run.cursor = None
    found = []
    for steps in (4, 5, 21):
        run.start(corpus, extend=extend)
        found += run.train(steps)
        assert len(run.written()) == 1
    assert found == whole


def test_before_the_first_checkpoint_other_data_simply_replaces_it(
    run: Run, corpus: Path, tmp_path: Path
) -> None:
    run.start(corpus)
    run.start(most(tmp_path / "b.json", 30))
    assert [file["path"] for file in run.written()[0]["files"]] == [str(tmp_path / "b.json")]


def test_a_swapped_dataset_of_the_same_size_is_refused_not_skipped_into(
    run: Run, corpus: Path
) -> None:
    # Elsewhere a run resumed on another dataset skipped as many samples as it had done on the
    # first, and went on without a word.
    run.start(corpus)
    run.train(3)
    size = corpus.stat().st_size
    text = corpus.read_text().replace("text ", "test ")
    corpus.write_text(text)
    assert corpus.stat().st_size == size
    said = refusal(run, corpus)
    assert f"1 file ({corpus}) changed (40 examples went, 40 came)" in said
    assert "data.extend=true" in said


def test_added_and_removed_files_are_named_up_to_three(
    run: Run, corpus: Path, tmp_path: Path
) -> None:
    run.start(corpus)
    run.train(3)
    more = [most(tmp_path / f"new{i}.json", 10, start=100 * i) for i in range(5)]
    said = refusal(run, *more)
    assert f"1 file ({corpus}) removed (40 examples)" in said
    first = ", ".join(str(path) for path in more[:3])
    assert f"5 files ({first} and 2 more) added (50 examples)" in said


def test_changed_lines_are_counted(run: Run, tmp_path: Path) -> None:
    clip(tmp_path / "a.wav")
    lines = [asr(text=f"text {i}") for i in range(20)]
    corpus = jsonl(tmp_path / "a.jsonl", lines)
    run.start(corpus, tokens_per_batch=200)
    run.train(1)
    jsonl(corpus, [*lines[2:], *(asr(text=f"new {i}") for i in range(5))])
    assert "changed (2 examples went, 5 came)" in refusal(run, corpus, tokens_per_batch=200)


def test_a_repaired_clip_stops_no_run_and_joins_it_with_extend(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clip(tmp_path / "a.wav")
    (tmp_path / "broken.wav").write_bytes(b"nothing")
    records = [asr(text=f"text {i}") for i in range(9)]
    corpus = jsonl(tmp_path / "a.jsonl", [*records, asr("broken.wav", id="b1")])
    run.start(corpus, tokens_per_batch=200)
    run.train(1)
    before = run.written()
    clip(tmp_path / "broken.wav")
    run.start(corpus, tokens_per_batch=200)
    assert run.written() == before, "what was planned stays"
    assert "data.extend=true" in caplog.text
    run.start(corpus, tokens_per_batch=200, extend=True)
    assert "1 example repaired: b1" in caplog.text
    assert [part["examples"] for part in run.written()] == [9, 10]
    run.epoch()
    assert "b1" in run.epoch()


def test_weights_and_order_of_sources_are_part_of_the_data(
    run: Run, corpus: Path, tmp_path: Path
) -> None:
    other = most(tmp_path / "b.json", 40, start=40)
    run.start(corpus, other)
    run.train(3)
    assert "in another order" in refusal(run, other, corpus)
    heavier = refusal(run, corpus, Source(path=str(other), weight=1.5))
    assert "data.train[1].weight is 1.5, was 1" in heavier
    assert "data.extend=true" in heavier


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lanes": 3}, "data.lanes is 3, was 2"),
        ({"tokens_per_batch": 50}, "data.tokens_per_batch is 50, was 40"),
        ({"mode": "padded"}, "data.mode is padded, was packed"),
        ({"order": "sequential"}, "data.order is sequential, was shuffled"),
        ({"window": 9}, "data.window is 9, was 8"),
        ({"seed": 1}, "run.seed is 1, was 0"),
        ({"encoder": Encoder("another")}, "tokenizer"),
    ],
)
@pytest.mark.parametrize("extend", [False, True])
def test_a_changed_setting_is_refused_by_its_key_with_or_without_extend(
    run: Run, corpus: Path, change: dict[str, object], said: str, extend: bool
) -> None:
    run.start(corpus)
    run.train(3)
    assert said in refusal(run, corpus, extend=extend, **change)


def test_data_that_has_moved_is_the_same_data(run: Run, corpus: Path, tmp_path: Path) -> None:
    run.start(corpus)
    whole = run.train(12)
    run.cursor = None
    found = run.train(4)
    (tmp_path / "elsewhere").mkdir()
    moved = Path(shutil.move(corpus, tmp_path / "elsewhere" / corpus.name))
    run.start(moved)
    assert found + run.train(8) == whole
    assert run.written()[0]["files"][0]["path"] == str(moved)


def test_extended_data_is_used_from_the_next_epoch_on(
    run: Run, corpus: Path, tmp_path: Path
) -> None:
    run.start(corpus)
    ids = [name for step in run.train(3) for name in step]
    more = most(tmp_path / "b.json", 20, start=40)
    run.start(corpus, more, extend=True)
    assert [item["from_epoch"] for item in run.written()] == [0, 1]
    # At every further start, with data.extend or without: nothing new.
    for extend in (True, False):
        run.start(corpus, more, extend=extend)
        ids += run.train(1)[0]
        assert [item["from_epoch"] for item in run.written()] == [0, 1]
    assert sorted(ids + run.epoch()) == names(0, 40)
    for _ in range(2):
        run.start(corpus, more)
        assert sorted(run.epoch()) == names(0, 60)
    # and once more, later
    third = most(tmp_path / "c.json", 5, start=60)
    rest = run.train(1)[0]
    run.start(corpus, more, third, extend=True)
    assert [item["from_epoch"] for item in run.written()] == [0, 1, 4]
    assert sorted(rest + run.epoch()) == names(0, 60)
    assert sorted(run.epoch()) == names(0, 65)


def test_data_added_between_two_epochs_is_used_at_once(
    run: Run, corpus: Path, tmp_path: Path
) -> None:
    run.start(corpus)
    run.train(1)
    run.epoch()  # a run that is at its end, say, and is given more data and more epochs
    more = most(tmp_path / "b.json", 20, start=40)
    found = run.start(corpus, more, extend=True)
    assert run.epoch() and run.cursor.epoch == 2
    assert found.summary(1).examples == 60
    assert found.count_steps(0) + found.count_steps(1) == run.cursor.step


def test_a_generation_that_has_not_begun_is_replaced_or_dropped(
    run: Run, corpus: Path, tmp_path: Path
) -> None:
    run.start(corpus)
    run.train(3)
    more = most(tmp_path / "b.json", 20, start=40)
    run.start(corpus, more, extend=True)
    other = most(tmp_path / "c.json", 10, start=40)
    assert f"({more}) removed" in refusal(run, corpus, other)
    run.start(corpus, other, extend=True)
    assert [item["examples"] for item in run.written()] == [40, 50]
    run.start(corpus, extend=True)
    assert [item["examples"] for item in run.written()] == [40]


def test_a_checkpoint_from_before_the_extension_still_continues(
    run: Run, corpus: Path, tmp_path: Path
) -> None:
    run.start(corpus)
    run.train(3)
    early = run.cursor
    more = most(tmp_path / "b.json", 20, start=40)
    run.start(corpus, more, extend=True)
    whole = run.train(25)
    run.cursor = early  # later checkpoints turned out to be damaged
    run.start(corpus, more)
    assert run.train(25) == whole


def test_lines_may_be_appended_but_not_changed_under_an_epoch_that_still_reads_them(
    run: Run, tmp_path: Path
) -> None:
    clip(tmp_path / "a.wav")
    lines = [asr(text=f"text {i}", id=f"m{i}") for i in range(20)]
    corpus = jsonl(tmp_path / "a.jsonl", lines)
    run.start(corpus, tokens_per_batch=200)
    ids = run.train(1)[0]
    jsonl(corpus, [*lines[1:], asr(id="m20"), asr(id="m21")])
    said = refusal(run, corpus, tokens_per_batch=200, extend=True)
    assert f"{corpus} (changed in place)" in said
    jsonl(corpus, [*lines, asr(id="m20"), asr(id="m21")])
    run.start(corpus, tokens_per_batch=200, extend=True)
    assert sorted(ids + run.epoch()) == names(0, 20)
    assert sorted(run.epoch()) == names(0, 22)


def test_a_clip_broken_meanwhile_does_not_make_an_appended_file_an_overwritten_one(
    run: Run, tmp_path: Path
) -> None:
    clip(tmp_path / "a.wav")
    clip(tmp_path / "b.wav")
    lines = [asr(text=f"text {i}", id=f"m{i}") for i in range(20)]
    corpus = jsonl(tmp_path / "a.jsonl", [*lines, asr("b.wav", id="m20")])
    run.start(corpus, tokens_per_batch=200)
    run.train(1)
    (tmp_path / "b.wav").write_bytes(b"nothing")
    jsonl(corpus, [*lines, asr("b.wav", id="m20"), asr(id="m21")])
    run.start(corpus, tokens_per_batch=200, extend=True)
    run.epoch()
    assert sorted(run.epoch()) == sorted([*names(0, 20), "m21"])


def test_the_folder_of_indexes_may_be_moved(run: Run, corpus: Path, tmp_path: Path) -> None:
    run.start(corpus)
    run.train(3)
    more = most(tmp_path / "b.json", 20, start=40)
    run.start(corpus, more, extend=True)
    run.cache = run.cache.rename(tmp_path / "elsewhere")
    run.start(corpus, more)
    run.epoch()
    assert sorted(run.epoch()) == names(0, 60)


def test_a_file_that_the_epoch_under_way_needs_must_not_go(
    run: Run, corpus: Path, tmp_path: Path
) -> None:
    other = most(tmp_path / "b.json", 20, start=40)
    run.start(corpus, other)
    run.train(1)
    other.unlink()
    assert f"{other} (gone)" in refusal(run, corpus, extend=True)
    most(tmp_path / "b.json", 20, start=40)
    run.start(corpus, extend=True)  # left out of data.train, yet there
    run.epoch()
    assert sorted(run.epoch()) == names(0, 40)


def test_an_old_index_that_is_gone_is_said_when_it_is_needed(
    run: Run, corpus: Path, tmp_path: Path
) -> None:
    run.start(corpus)
    run.train(3)
    old = Path(run.written()[0]["index"])
    more = most(tmp_path / "b.json", 20, start=40)
    run.start(corpus, more, extend=True)
    shutil.rmtree(old)
    with pytest.raises(UserError, match=f"epoch 0 on .* index in {old}.* restore"):
        run.start(corpus, more)


def test_an_old_index_is_not_needed_once_its_epochs_are_done(
    run: Run, corpus: Path, tmp_path: Path
) -> None:
    run.start(corpus)
    run.train(3)
    more = most(tmp_path / "b.json", 20, start=40)
    run.start(corpus, more, extend=True)
    run.epoch()
    run.train(1)
    shutil.rmtree(run.written()[0]["index"])
    run.start(corpus, more)
    run.epoch()
    assert sorted(run.epoch()) == names(0, 60)


def test_a_run_without_plan_json_goes_on_only_with_its_own_data(
    run: Run, corpus: Path, tmp_path: Path
) -> None:
    run.start(corpus)
    run.train(3)
    (run.folder / "plan.json").unlink()
    with pytest.raises(UserError, match="another plan"):
        run.start(most(tmp_path / "b.json", 30))
    assert not (run.folder / "plan.json").exists()
    run.start(corpus)
    assert len(run.written()) == 1


@pytest.mark.parametrize("content", ["", "[]", "{}", "[{"])
def test_a_damaged_plan_json_is_said(run: Run, corpus: Path, content: str) -> None:
    run.start(corpus)
    run.train(1)
    (run.folder / "plan.json").write_text(content)
    with pytest.raises(UserError, match=r"plan\.json: is damaged"):
        run.start(corpus)


def test_a_new_task_joins_the_mix_with_its_data(run: Run, tmp_path: Path) -> None:
    first = Source(path=str(most(tmp_path / "a.json", 40)), task="asr")
    second = Source(path=str(most(tmp_path / "b.json", 20, start=40)), task="tts")
    run.start(first, mix={"asr": 1.0})
    run.train(2)
    run.start(first, second, mix={"asr": 0.5, "tts": 0.5}, extend=True)
    assert plans.tasks(run.folder) == ["asr", "tts"]
    run.epoch()
    assert set(run.epoch()) == set(names(0, 60))


def test_rows_of_all_generations_are_read_as_one_index(
    run: Run, corpus: Path, tmp_path: Path
) -> None:
    more = most(tmp_path / "b.json", 20, start=40)
    first, second = run.index(corpus), run.index(corpus, more)
    places = [first.place, second.place]
    joined = pickle.loads(pickle.dumps(open_index(places)))
    rows = np.array([99, 3, 40, 39, 0])
    assert joined.ids(rows) == ["m59", "m3", "m0", "m39", "m0"]
    assert joined.tokens[rows].tolist() == [
        *second.tokens[[59]],
        first.tokens[3],
        second.tokens[0],
        first.tokens[39],
        first.tokens[0],
    ]
    assert joined.seconds[rows].tolist() == [0.0] * 5
    assert joined.tokens[99] == second.tokens[59]
    assert joined.source_name(99) == "b"
    assert len(joined) == 100
    assert type(open_index(places[:1])) is Index


def test_a_run_whose_clips_were_replaced_goes_on_as_planned_and_says_which(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clips = [clip(tmp_path / f"{i}.wav", 0.5) for i in range(12)]
    lines = [asr(f"{i}.wav", id=f"clip{i}") for i in range(12)]
    file = jsonl(tmp_path / "t.jsonl", lines)
    run.start(file, tokens_per_batch=200)
    run.train(1)
    planned = [step.lanes for step in itertools.islice(plans.load(run.folder).steps(run.cursor), 9)]
    for replaced in (clips[3], clips[7], clips[9], clips[11], clips[1]):
        clip(replaced, 0.3)
    going_on = run.start(file, tokens_per_batch=200)
    text = caplog.text
    assert "clips of 5 examples have other lengths than when they were indexed" in text
    assert "clip1, clip3, clip7 and 2 more" in text
    again = [step.lanes for step in itertools.islice(going_on.steps(run.cursor), 9)]
    assert all(np.array_equal(a, b) for x, y in zip(planned, again) for a, b in zip(x, y))
    run.start(file, tokens_per_batch=200, extend=True)
    assert [part["from_epoch"] for part in run.written()] == [0, 1]


def test_a_run_of_before_goes_on_where_everything_is_measured_anew(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clip(tmp_path / "a.wav", 0.5)
    file = jsonl(tmp_path / "t.jsonl", [asr() for _ in range(12)])
    with monkeypatch.context() as patch:
        patch.setattr(part, "MEASURED", part.MEASURED - 1)
        run.start(file, tokens_per_batch=200)
        run.train(2)
    before = run.written()
    run.start(file, tokens_per_batch=200)
    run.train(2)
    assert run.written() == before
    assert caplog.text == ""
