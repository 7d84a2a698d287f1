"""checkpoint.best keeps the best checkpoint, whatever is logged, measured or switched on; and any
checkpoint that is kept can be chosen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysft import worker
from raysft.config import Config
from raysft.data.read.reader import Reader
from raysft.driver.preflight import read_eval
from raysft.errors import UserError
from raysft.export import export_run
from raysft.parallel import World
from raysft.run.catalogue import Catalogue, Saved, best_step, unreadable
from raysft.run.evaluations import NAME, Evaluation, Evaluations, Measure, choose, table
from raysft.run.folder import new_evaluation, reopen, run_folder
from raysft.run.lines import read_lines
from raysft.train.loop import train
from tests.support import worlds

# Losses fall in these runs: with mode max the first evaluation is the best, as in one that gets
# worse.
BEST = {
    "evaluate__every": 2,
    "evaluate__generate": False,
    "checkpoint__every": 2,
    "checkpoint__keep": 1,
    "checkpoint__best": "loss/text",
    "checkpoint__best_mode": "max",
}


def corpus(folder: Path, name: str, count: int, hard: int = 0) -> Path:
    """Items of one task; the last `hard` of them are like none that is trained on."""
    items = [
        {"id": f"{name}{i}", "instruction": "say", "input": "ab " * (1 + i % 5), "output": "gh ij"}
        for i in range(count)
    ]
    for item in items[count - hard :]:
        item["output"] = "ZQXJ@#ZQXJ@#"
    path = folder / f"{name}.json"
    path.write_text(json.dumps(items))
    return path


def config(folder: Path, **changes: Any) -> Config:
    """A run that is evaluated on dev.json."""
    for name in ("train", "dev"):
        if not (folder / f"{name}.json").exists():
            corpus(folder, name, 30)
    sources = {
        "data__train": [{"path": str(folder / "train.json")}],
        "data__eval": [{"path": str(folder / "dev.json"), "name": "dev"}],
    }
    return worlds.tiny(folder, **(BEST | sources | changes))


def run(config: Config) -> Path:
    """Train it, or go on with it; returns its folder."""
    train(worlds.start(config, World.current()))
    return run_folder(config)


def kept(config: Config) -> list[int]:
    catalogue = Catalogue.of(config.checkpoint, run_folder(config))
    return [saved.step for saved in catalogue.committed()]


def evaluated(run: Path, *overrides: str, step: int | None = None) -> dict[str, float]:
    """What jobs/evaluate.py does in a worker."""
    settings = reopen(run, overrides)
    folder = new_evaluation(run, step or 0, settings)
    encoder, index = read_eval(settings, run, folder)
    data = worker.Data(0, index, encoder, None, Reader(index, encoder, 8192, None).read)
    job = worker.build_evaluator(settings, run, World.current(), data)
    return worker.evaluate_checkpoint(job, step, folder / "predictions.jsonl")


def content(run: Path) -> dict[str, bytes]:
    files = [path for path in run.rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in files if "evaluations" not in path.parts}


# -- the best stays ------------------------------------------------------------------------------


def test_the_best_stays_beside_the_last_ones(tmp_path: Path) -> None:
    settings = config(tmp_path)
    folder = run(settings)
    losses = [line["loss/text"] for line in read_lines(folder / "eval.jsonl")]
    assert losses == sorted(losses, reverse=True) and len(losses) == 6
    assert kept(settings) == [2, 12]
    assert choose(folder, settings.checkpoint, "best", Saved.damage)[0].step == 2
    assert choose(folder, settings.checkpoint, "last", Saved.damage)[0].step == 12


def edited(change: Callable[[list[dict[str, Any]]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        lines = read_lines(path)
        change(lines)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        Path.unlink,
        edited(lambda lines: (lines[0].update({"loss/text": math.nan}), lines.pop())),
    ],
    ids=["deleted", "edited"],
)
def test_what_is_done_to_the_log_deletes_no_checkpoint(
    tmp_path: Path, edit: Callable[[Path], None]
) -> None:
    folder = run(config(tmp_path, train__max_steps=4))
    edit(folder / "eval.jsonl")
    longer = config(tmp_path, train__max_steps=8)
    run(longer)
    assert kept(longer) == [2, 8]


def test_a_figure_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    nan, inf = math.nan, math.inf
    values = {1: {"loss/a": nan}, 2: {"loss/a": 3.0}, 3: {"loss/a": 2.0}, 4: {"loss/a": -inf}}
    assert best_step(values, "loss/a", "min") == 3
    assert best_step(values, "loss/a", "max") == 2
    assert best_step({1: {"loss/a": nan}}, "loss/a", "min") is None
    folder = run(config(tmp_path, train__max_steps=4))
    state = json.loads((folder / NAME).read_text())
    state[0]["figures"]["loss/text"] = nan
    (folder / NAME).write_text(json.dumps(state))
    longer = config(tmp_path, train__max_steps=8)
    run(longer)
    assert kept(longer) == [4, 8]


def test_set_late_it_keeps_the_best_of_those_that_are_there(tmp_path: Path) -> None:
    run(config(tmp_path, train__max_steps=6, checkpoint__best=None))
    late = config(tmp_path, train__max_steps=12)
    run(late)
    assert kept(late) == [6, 12], "of step 2 there is no checkpoint"


def test_evaluations_of_other_data_change_nothing_of_a_run(tmp_path: Path) -> None:
    folder = run(config(tmp_path, train__max_steps=6))
    hard = corpus(tmp_path, "hard", 10, hard=10)
    before = content(folder)
    assert evaluated(folder, f"data.eval=['{hard}']", "log.every=7")["loss/text"] > 5
    assert content(folder) == before
    (own,) = (folder / "evaluations").iterdir()
    assert own.name == "step_0_hard" and reopen(own).log.every == 7
    assert evaluated(folder, f"data.eval=['{hard}']")["loss/text"] > 5
    names = sorted(path.name for path in (folder / "evaluations").iterdir())
    assert names == ["step_0_hard", "step_0_hard_2"], "none is written over another"
    longer = config(tmp_path, train__max_steps=12)
    run(longer)
    assert kept(longer) == [2, 12]


def test_a_figure_of_all_examples_is_not_compared_with_those_of_a_few(tmp_path: Path) -> None:
    corpus(tmp_path, "dev", 60, hard=58)
    few = config(tmp_path, evaluate__max_examples=1, train__max_steps=8)
    folder = run(few)
    lines = read_lines(folder / "eval.jsonl")
    assert [(line["step"], line["final"]) for line in lines] == [
        *((step, False) for step in (2, 4, 6, 8)),
        (8, True),
    ]
    sizes = [(line["sources"]["dev"]["examples"], line["sources"]["dev"]["of"]) for line in lines]
    assert sizes == [(1, 60)] * 4 + [(60, 60)]
    assert max(lines, key=lambda line: line["loss/text"])["final"], "the trap is one"
    assert kept(few) == [2, 8]
    # With the lowest as the best, the last step takes part by its figure of the same few.
    lowest = few.checkpoint.model_copy(update={"best_mode": "min"})
    assert choose(folder, lowest, "best", unreadable)[0].step == 8


def test_other_evaluation_data_begins_a_comparison_of_its_own(tmp_path: Path) -> None:
    run(config(tmp_path, train__max_steps=4))
    corpus(tmp_path, "dev", 20, hard=2)
    changed = config(tmp_path, train__max_steps=10)
    folder = run(changed)
    digests = [line["sources"]["dev"]["data"] for line in read_lines(folder / "eval.jsonl")]
    # Step 4 was measured on the old data; the run goes on from it, so it is on the new as well.
    assert len(set(digests)) == 2 and digests[:2] == digests[:1] * 2
    assert choose(folder, changed.checkpoint, "best", Saved.damage)[0].step == 4
    assert kept(changed) == [2, 4, 10], "the best by the old data stays"


def test_another_number_of_examples_deletes_no_checkpoint_that_was_the_best(tmp_path: Path) -> None:
    run(config(tmp_path, train__max_steps=4, evaluate__at_end=False))
    fewer = config(tmp_path, train__max_steps=10, evaluate__at_end=False, evaluate__max_examples=5)
    folder = run(fewer)
    sizes = [line["sources"]["dev"]["examples"] for line in read_lines(folder / "eval.jsonl")]
    assert set(sizes) == {30, 5}
    newest = choose(folder, fewer.checkpoint, "best", Saved.damage)[0].step
    assert kept(fewer) == sorted({2, newest, 10}) and newest > 2


def test_a_run_from_before_there_was_a_state_goes_by_its_log(tmp_path: Path) -> None:
    folder = run(config(tmp_path, train__max_steps=6))
    (folder / NAME).unlink()
    old = [
        {key: value for key, value in line.items() if key == "step" or "/" in key}
        for line in read_lines(folder / "eval.jsonl")
    ]
    old.append({"step": 6, "loss/text": 99.0})  # jobs/evaluate.py once wrote here
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    longer = config(tmp_path, train__max_steps=12)
    run(longer)
    assert kept(longer) == [2, 12]
    steps = [line["step"] for line in read_lines(folder / "eval.jsonl")]
    assert steps == [2, 4, 6, 6, 8, 10, 12]


def test_a_best_that_nothing_will_measure_is_refused_before_training(tmp_path: Path) -> None:
    wrong = config(tmp_path, checkpoint__best="wer/test")
    with pytest.raises(UserError, match=r"checkpoint\.best: wer/test is not measured; .*loss/text"):
        run(wrong)


def test_a_damaged_state_is_refused_with_what_to_do(tmp_path: Path) -> None:
    settings = config(tmp_path, train__max_steps=4)
    folder = run(settings)
    (folder / NAME).write_text("[{")
    with pytest.raises(UserError, match=r"evaluations\.json: cannot be read .* delete it"):
        run(config(tmp_path, train__max_steps=8))


# -- which is taken ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with checkpoints of several steps."""
    settings = config(
        tmp_path_factory.mktemp("several"), checkpoint__keep=3, checkpoint__best_mode="max"
    )
    run(settings)
    assert kept(settings) == [2, 8, 10, 12]
    return settings


def test_any_step_that_is_kept_is_evaluated_as_it_was_when_it_was_trained(several: Config) -> None:
    folder = run_folder(several)
    logged = {line["step"]: line["loss/text"] for line in read_lines(folder / "eval.jsonl")}
    for step in (2, 10):
        assert evaluated(folder, step=step)["loss/text"] == pytest.approx(logged[step], rel=1e-6)
    assert evaluated(folder)["loss/text"] == pytest.approx(logged[12], rel=1e-6)


def test_any_step_that_is_kept_is_exported(several: Config, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = run_folder(several)
    taken = {word: export_run(folder, tmp_path / word, step=word) for word in ("8", "best", "last")}
    assert taken == {"8": 8, "best": 2, "last": 12}
    tables = [load_file(tmp_path / word / "model.safetensors") for word in taken]
    norms = [table["model.norm.weight"] for table in tables]
    assert not torch.equal(norms[0], norms[1]) and not torch.equal(norms[0], norms[2])


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("4", r"--step 4: .* keeps no checkpoint of it; kept are 2, 8, 10, 12"),
        ("newest", r"--step newest: has to be a step, best or last"),
        ("-1", r"--step -1: has to be a step, best or last"),
    ],
)
def test_a_step_that_is_not_there_is_refused(several: Config, word: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        choose(run_folder(several), several.checkpoint, word, unreadable)


def test_the_best_is_refused_where_no_figure_says_which(several: Config, tmp_path: Path) -> None:
    folder = run_folder(several)
    for best, expected in ((None, "has no checkpoint.best"), ("wer/dev", "has a figure of wer/de")):
        settings = several.checkpoint.model_copy(update={"best": best})
        with pytest.raises(UserError, match=f"--step best: .*{expected}"):
            choose(folder, settings, "best", unreadable)
    with pytest.raises(UserError, match="no committed checkpoint; train first"):
        choose(tmp_path, several.checkpoint, "last", unreadable)


# -- what is compared, and shown -----------------------------------------------------------------


def measured(rules: str = "r", **digests: str) -> Measure:
    return Measure({n: {"data": d, "examples": 5, "of": 5} for n, d in digests.items()}, rules)


def test_figures_are_compared_by_what_they_depend_on() -> None:
    one, other = measured(dev="a", test="b"), measured(dev="a", test="c")
    assert one.of("wer/dev") == other.of("wer/dev")
    assert one.of("wer/test") != other.of("wer/test")
    assert one.of("loss/asr") != other.of("loss/asr"), "of all sources together"
    assert measured("r", dev="a").of("wer/dev") != measured("s", dev="a").of("wer/dev")
    assert measured("r", dev="a").of("loss/asr") == measured("s", dev="a").of("loss/asr")


def test_the_best_is_looked_for_among_checkpoints_and_comparable_figures() -> None:
    whole, few = measured(dev="w"), measured(dev="f")
    found = Evaluations(
        [
            Evaluation(1, {"wer/dev": 0.1}, few),
            Evaluation(2, {"wer/dev": 0.3}, few),
            Evaluation(3, {"wer/dev": 0.2}, few),
            Evaluation(3, {"wer/dev": 0.05}, whole, final=True),
        ]
    )
    assert found.best("wer/dev", "min", [1, 2, 3]) == 1
    assert found.best("wer/dev", "min", [2, 3]) == 3
    assert found.best("wer/dev", "max", [2, 3]) == 2
    assert found.best("wer/dev", "min", []) is None
    assert found.best("cer/dev", "min", [1, 2, 3]) is None


def test_a_kind_alone_is_the_mean_over_what_has_it() -> None:
    """Over tasks for losses, over sources for errors; of those that an evaluation has."""
    whole = measured(a="w", b="w")
    found = Evaluations(
        [
            Evaluation(1, {"loss/asr": 1.0, "loss/tts": 5.0, "wer/a": 0.1, "wer/b": 0.1}, whole),
            Evaluation(2, {"loss/asr": 2.0, "loss/tts": 3.0, "wer/a": 0.3, "wer/b": 0.0}, whole),
            Evaluation(
                3, {"loss/asr": 0.0, "loss/tts": math.nan, "wer/a": 0.0, "wer/b": 0.4}, whole
            ),
            Evaluation(4, {"loss/asr": 0.0, "loss/tts": 0.0}, measured(a="w", b="other")),
        ]
    )
    assert found.until(3).best("loss", "min", [1, 2, 3]) == 2, "3.0 and 2.5, and no number"
    assert found.until(3).best("wer", "min", [1, 2, 3]) == 1
    assert found.best("loss", "min", [1, 2, 3, 4]) == 4, "what measures the same as the newest"
    assert found.bests("loss", "min", [1, 2, 3, 4]) == {2, 4}
    assert found.best("cer", "min", [1, 2, 3, 4]) is None


@pytest.mark.parametrize(("best", "given"), [("loss", True), ("wer", False), ("los", False)])
def test_a_kind_that_nothing_measures_is_refused(best: str, given: bool, tmp_path: Path) -> None:
    settings = config(tmp_path, checkpoint__best=best, train__max_steps=4)
    if given:
        with_best = run(settings)
        saved, _ = choose(with_best, settings.checkpoint, "best", unreadable)
        assert saved.step == 2, "the highest, in these runs"
        return
    with pytest.raises(UserError, match=rf"checkpoint\.best: {best} is not measured"):
        run(settings)


def test_the_best_by_each_measure_is_spared_until_another_is_better_by_it() -> None:
    def item(step: int, wer: float, measure: Measure | None, final: bool = False) -> Evaluation:
        return Evaluation(step, {"wer/dev": wer}, measure, final)

    old, new = measured("lower", dev="a"), measured("none", dev="a")
    steps = [1, 2, 3, 4]
    first = [item(1, 0.1, old), item(2, 0.3, old)]
    assert Evaluations(first).bests("wer/dev", "min", steps) == {1}
    changed = [*first, item(2, 0.6, new), item(3, 0.5, new), item(4, 0.4, new)]
    assert Evaluations(changed).bests("wer/dev", "min", steps) == {1, 4}
    assert Evaluations(changed).bests("wer/dev", "min", [2, 3, 4]) == {2, 4}
    assert Evaluations(changed).bests("wer/dev", "max", steps) == {2}, "the best by both"
    back = [*changed, item(4, 0.05, old)]
    assert Evaluations(back).bests("wer/dev", "min", steps) == {4}
    whole = [*first, item(2, 0.01, measured("lower", dev="all"), final=True)]
    assert Evaluations(whole).bests("wer/dev", "min", steps) == {1}, "no figure of the series"
    unknown = [item(1, 0.1, None), item(2, 0.3, None), item(3, 0.2, new)]
    assert Evaluations(unknown).bests("wer/dev", "min", steps) == {1}
    assert Evaluations().bests("wer/dev", "min", steps) == set()


def test_an_evaluation_is_shown_as_a_small_table() -> None:
    figures = {"wer/dev": 0.1234, "cer/dev": 0.05, "loss/asr": 1.23456, "perplexity/asr": 3.4369}
    measure = Measure({"dev": {"data": "a", "examples": 8, "of": 1070}})
    assert table(Evaluation(3, figures, measure).line(checkpoint=True)).splitlines() == [
        "  source         wer         cer    examples",
        "  dev         12.34%       5.00%  8 of 1,070",
        "  task        loss  perplexity",
        "  asr        1.235       3.437",
    ]
