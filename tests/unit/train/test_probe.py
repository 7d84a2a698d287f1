"""data.tokens_per_batch: auto finds what fits, and the run keeps to it."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from raysft.config import Config
from raysft.data.example import MicroBatch
from raysft.driver.preview import dry_run
from raysft.errors import UserError
from raysft.models import SpeechModel
from raysft.parallel import Strategy, World, make_strategy
from raysft.run.folder import check_run, open_run, read_config, write_config
from raysft.train.loop import train
from raysft.train.probe import (
    FREE,
    MULTIPLE,
    Lengths,
    Search,
    _sequence,
    _Trials,
    find_budget,
    peak_bytes,
    restart_peak,
)
from tests.support import worlds
from tests.support.model_zoo import make

CPU = torch.device("cpu")
LENGTHS = Lengths(shortest=10, middle=60, longest=200, most=20_000)
ROOM = 250_000_000  # bytes for activations in the tests


# -- which budgets are tried ---------------------------------------------------------------------


@pytest.mark.parametrize("free_positions", [100, 700, 5_000, 123_456, 10**6])
@pytest.mark.parametrize("per_position", [1e3, 1e6])
def test_the_search_ends_close_to_the_largest_that_fits(
    free_positions: int, per_position: float
) -> None:
    rest = 1e9

    def peak(budget: int) -> float:
        return rest + per_position * (budget + budget**1.02 / 50)

    room = peak(free_positions)
    search = Search(64, 10**7, room, (2, peak(2)))
    tried = []
    while (budget := search.next()) is not None:
        tried.append(budget)
        search.tell(budget, peak(budget))
    assert peak(search.fits) <= room
    assert search.fits >= free_positions * 0.94 - MULTIPLE
    assert len(tried) <= 12
    assert all(after <= 4 * before for before, after in pairwise(tried))


def test_the_search_stops_at_the_least_budget_that_does_not_fit_and_at_the_most_there_is() -> None:
    nothing = Search(128, 1024, 10.0, (2, 5.0))
    assert nothing.next() == 128
    nothing.tell(128, 11.0)
    assert (nothing.next(), nothing.fits) == (None, 0)
    everything = Search(128, 1024, 1e9, (2, 5.0))
    while (budget := everything.next()) is not None:
        everything.tell(budget, 6.0)
    assert everything.fits == 1024


def test_a_search_that_runs_out_of_memory_goes_on_below() -> None:
    search = Search(64, 10**6, 1e9, (2, 0.0))
    while (budget := search.next()) is not None:
        search.tell(budget, float("inf") if budget > 3000 else 1e6)
    assert 3000 * 0.9 < search.fits <= 3000


def test_lengths_of_an_index() -> None:
    tokens = np.array([5, 9, 300, 7, 8], np.int32)
    assert Lengths.of(tokens, lanes=2) == Lengths(5, 8, 300, 165)


def test_a_batch_of_short_clips_has_no_more_audio_than_it_may() -> None:
    tokens, heard = np.array([5, 9, 300, 7, 5], np.int32), np.array([30, 30, 60, 0, 0.5])
    lengths = Lengths.of(tokens, 2, heard)
    assert lengths.heard == {5: 0.5, 7: 0, 300: 60}
    assert [lengths.count(n, 3000, 120) for n in (5, 7, 300)] == [240, 428, 2]
    assert [lengths.count(n, 3000, None) for n in (5, 7, 300)] == [600, 428, 10]
    assert lengths.count(300, 3000, 10) == 1


@pytest.mark.parametrize("length", [5, 12, 20])
def test_a_trial_has_clips_as_long_as_its_examples(length: int) -> None:
    adapter = make("qwen2_audio", "packed")
    row = _sequence(adapter, length)
    (document,) = adapter.documents(MicroBatch.join(0, 1, 0, [row]))  # its frames make its tokens
    assert len(row.input_ids) == length
    assert (document.input_ids == adapter.audio_token_id).sum() == length - 2


# -- real steps ----------------------------------------------------------------------------------


def _found(config: Config, name: str, room: int, world: World) -> int:
    torch.set_num_threads(1)
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
    changes = shape if name == "qwen3" else {}

    def factory() -> tuple[SpeechModel, Strategy]:
        adapter = make(name, config.data.mode, **changes)
        return adapter, make_strategy(config, adapter.supervised, world)

    restart_peak(CPU)
    limit = int((peak_bytes(CPU) + room) / (1 - FREE))
    return find_budget(config, factory, LENGTHS, world, limit)


def _alone(tree: dict[str, Any], name: str, answer: str) -> None:
    config = Config.model_validate(tree)
    Path(answer).write_text(str(_found(config, name, ROOM, World.current())))


@pytest.mark.parametrize(
    ("name", "mode"),
    [("qwen3", "padded"), pytest.param("qwen2_audio", "packed", marks=pytest.mark.slow)],
)
def test_a_budget_is_found_for_every_kind_of_batch(name: str, mode: str, tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    process = worlds.fork(_alone, {"data": {"mode": mode, "lanes": 2}}, name, str(answer))
    process.join(600)
    budget = int(answer.read_text())
    assert budget % MULTIPLE == 0
    assert budget > LENGTHS.longest


def _together(rank: int, store: str, strategy: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    config = Config.model_validate({"parallel": {"strategy": strategy}, "data": {"lanes": 3}})
    # The second worker has less room than the first.
    budget = _found(config, "qwen3", 2 * ROOM // (1 + rank), World.current())
    Path(f"{store}_{rank}").write_text(str(budget))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_workers_agree(strategy: str, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    processes = [worlds.fork(_together, rank, store, strategy) for rank in range(2)]
    for process in processes:
        process.join(600)
    first, second = (int(Path(f"{store}_{rank}").read_text()) for rank in range(2))
    assert first == second


def test_an_example_that_does_not_fit_is_a_readable_line() -> None:
    config = Config.model_validate({"parallel": {"memory_gb": 0.001}})
    with pytest.raises(UserError, match=r"longest example takes 200 positions, .* 90% of 0.00 GB"):
        find_budget(
            config,
            lambda: ((a := make("qwen3")), make_strategy(config, a.supervised, World.current())),
            LENGTHS,
            World.current(),
        )
    with pytest.raises(UserError, match=r"set parallel\.memory_gb"):
        find_budget(Config(), lambda: pytest.fail("built"), LENGTHS, World.current())


# -- a run ---------------------------------------------------------------------------------------


def _corpus(folder: Path) -> list[dict[str, str]]:
    """Nearly all of it is supervised: no batch of it is far from the worst case."""
    items = [
        {"id": f"u{i}", "input": "[Hu1]", "output": f"text {i} " * (2 + i % 20)}
        for i in range(4000)
    ]
    (folder / "long.json").write_text(json.dumps(items))
    return [{"path": str(folder / "long.json")}]


def _changes(folder: Path) -> dict[str, Any]:
    model = {**worlds.CAUSAL, "speech_units": 20}
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    model["config"] = {**worlds.CAUSAL["config"], **shape}
    return {
        "data__train": [{"path": str(folder / "long.json")}],
        "data__window": 4096,
        "data__prefetch": 1,
        "train__max_steps": 3,
        "checkpoint__every": 0,
        "model": model,
    }


def _exact() -> None:
    """Tensors that are freed are given back at once. Otherwise a peak holds what lies idle in the
    heap, a third of it and more, which depends on all that the process did before."""
    m_mmap_threshold = -3
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 16)
    torch.set_num_threads(1)


def _probe(folder: Path, room: int) -> None:
    """Writes the limit and the budget found under it."""
    from raysft import worker
    from raysft.driver.preflight import read_train

    _exact()
    config = _config(folder, "probe", "auto")
    encoder, index = read_train(config, folder)
    world = World.current()

    def factory() -> tuple[SpeechModel, Strategy]:
        adapter, _ = worker.build_model(config, encoder, 1)
        return adapter, make_strategy(config, adapter.supervised, world)

    restart_peak(CPU)
    limit = int((peak_bytes(CPU) + room) / (1 - FREE))
    lengths = Lengths.of(index.tokens, config.data.lanes)
    budget = find_budget(config, factory, lengths, world, limit)
    (folder / "answer").write_text(f"{limit} {budget}")


def _config(folder: Path, name: str, budget: int | str) -> Config:
    changes = _changes(folder)
    model = changes.pop("model")
    config = worlds.tiny(folder, name, data__tokens_per_batch=budget, **changes)
    tree = config.model_dump(mode="json")
    return Config.model_validate({**tree, "model": {**tree["model"], **model}})


def _run(folder: Path, budget: int) -> None:
    """Writes the peak of a whole run."""
    _exact()
    job = worlds.start(_config(folder, f"run{budget}", budget), World.current())
    restart_peak(CPU)
    train(job)
    (folder / f"peak{budget}").write_text(str(peak_bytes(CPU)))


def _by_hand(folder: Path, budget: int) -> None:
    """Writes the peak of plain steps on the longest, the middle and the shortest examples."""
    from raysft import worker
    from raysft.data.example import MicroBatch, Sequence
    from raysft.driver.preflight import read_train

    _exact()
    config = _config(folder, "hand", budget)
    encoder, index = read_train(config, folder)
    adapter, _ = worker.build_model(config, encoder, 1)
    optimizer = torch.optim.AdamW(adapter.supervised.parameters(), lr=1e-9)
    restart_peak(CPU)
    for length in sorted(index.tokens)[:: (len(index) - 1) // 2]:
        ids = np.full(length, 65, np.int32)
        rows = [Sequence("x", "asr", ids, ids) for _ in range(budget // length)]
        batch = adapter.collate(MicroBatch.join(0, 1, 0, rows))
        for _ in range(2):
            adapter.supervised(batch)[0].trained.backward()
        optimizer.step()
        optimizer.zero_grad()
    (folder / f"peak{budget}").write_text(str(peak_bytes(CPU)))


def _peak(folder: Path, budget: int, of: Callable[..., None]) -> float:
    process = worlds.fork(of, folder, budget)
    process.join(600)
    return float((folder / f"peak{budget}").read_text())


@pytest.mark.slow
def test_the_budget_is_within_15_percent_of_the_best_and_a_run_with_it_fits(tmp_path: Path) -> None:
    _corpus(tmp_path)
    process = worlds.fork(_probe, tmp_path, 800_000_000)
    process.join(600)
    limit, budget = (int(word) for word in (tmp_path / "answer").read_text().split())
    assert _peak(tmp_path, budget, _run) <= limit
    # More positions take more memory: the best is below one that leaves less than 10% free.
    assert _peak(tmp_path, int(budget * 1.15), _by_hand) > (1 - FREE) * limit


def test_a_run_keeps_its_number_and_auto_means_it(tmp_path: Path) -> None:
    config = worlds.tiny(tmp_path, "kept", train__max_steps=2)
    folder = open_run(config)
    train(worlds.start(config, World.current()))
    again = worlds.tiny(
        tmp_path, "kept", train__max_steps=2, data__tokens_per_batch="auto", parallel__memory_gb=4.0
    )
    resumed = worlds.resolved(again)
    check_run(resumed)
    assert resumed.data == config.data
    open_run(resumed)
    assert read_config(folder).data.tokens_per_batch == 120
    other = worlds.tiny(tmp_path, "kept", train__max_steps=2, data__tokens_per_batch=128)
    with pytest.raises(UserError, match=r"data\.tokens_per_batch \(was 120, now 128\)"):
        check_run(other)


def test_a_start_that_was_killed_before_the_number_was_found_looks_again(tmp_path: Path) -> None:
    auto = worlds.tiny(tmp_path, data__tokens_per_batch="auto", parallel__memory_gb=4.0)
    folder = open_run(auto)
    assert worlds.resolved(auto).data.tokens_per_batch == "auto"
    write_config(worlds.tiny(tmp_path), folder)
    assert worlds.resolved(auto).data.tokens_per_batch == 120


def test_weights_only_finds_a_number_of_its_own(tmp_path: Path) -> None:
    train(worlds.start(worlds.tiny(tmp_path, train__max_steps=2), World.current()))
    anew = worlds.tiny(
        tmp_path,
        data__tokens_per_batch="auto",
        parallel__memory_gb=4.0,
        checkpoint__resume="weights_only",
    )
    assert worlds.resolved(anew).data.tokens_per_batch == "auto"


def test_a_dry_run_says_what_it_assumes(tmp_path: Path) -> None:
    auto = worlds.tiny(tmp_path, data__tokens_per_batch="auto", parallel__memory_gb=4.0)
    assert "4,096 is assumed here" in dry_run(auto)


def test_where_rows_are_filled_up_trials_have_them_of_the_budget(tmp_path: Path) -> None:
    """Whatever the length of the examples: the run's rows have no other shape."""
    config = worlds.tiny(tmp_path, train__static_shapes=True, data__tokens_per_batch=120)
    seen: list[int] = []

    def factory() -> tuple[SpeechModel, Strategy]:
        model = make("llama")
        strategy = make_strategy(config, model.supervised, World.current())
        strategy.module.register_forward_pre_hook(
            lambda module, given: seen.append(given[0]["input_ids"].shape[1])
        )
        return model, strategy

    trials = _Trials(config, factory, LENGTHS, World.current())
    trials.smallest()
    seen.clear()
    trials.peak(1000)
    assert len(seen) >= 3 and set(seen) == {1024}
