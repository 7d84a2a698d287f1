"""DPO in processes: a plain loop's losses, whatever workers, strategies and kills."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from raysft.audit import audit
from raysft.config.load import validate
from raysft.config.schema import Config
from raysft.data.clips import audio
from raysft.data.encode import make_encoder
from raysft.data.example import MicroBatch
from raysft.data.sources import messages
from raysft.driver import preflight, shown
from raysft.parallel import World
from raysft.run.lines import read_lines
from raysft.train.loop import train
from tests.properties.test_grpo_runs import KINDS, check_gradients, check_same, zero3
from tests.support import preferred, worlds
from tests.support.models import AUDIO
from tests.support.preferred import write

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ALONE = World(0, 1, torch.device("cpu"))
STEPS = 4


def started(tree: dict[str, Any]) -> Any:
    return worlds.start(validate(tree, "here"), ALONE)


def answers(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A record as two conversations, of which the last turn is learnt."""
    texts = [record["chosen"], record["rejected"]]
    if isinstance(texts[1], list):
        texts[1] = texts[1][0]["content"]
    kept = {name: value for name, value in record.items() if name not in ("chosen", "rejected")}
    return [
        {**kept, "messages": [*record["messages"], {"role": "assistant", "content": text}]}
        for text in texts
    ]


def likelihoods(model: Any, config: Config, records: dict[str, Any], folder: Path) -> Any:
    """(net, id) -> the log-probability of the chosen and of the rejected answer, each read alone,
    and the tokens of each."""
    settings = config.data.model_copy(update={"supervise": "last"})
    encoder = make_encoder(config.model, settings, folder)

    def of(net: Any, name: str) -> list[tuple[torch.Tensor, int]]:
        found = []
        for record in answers(records[name]):
            example = messages.FORMAT.parse(json.dumps(record).encode(), folder / "x.jsonl", 1)
            clips = [audio.load(clip, encoder.sample_rate or 0) for clip in example.audio()]
            sequence = encoder.encode(example, clips)
            batch = model.collate(MicroBatch.join(0, 0, 0, [sequence]))
            inputs = {
                name: value
                for name, value in batch.items()
                if name not in ("keep", "targets", "tasks", "documents")
            }
            logits = net(**inputs, use_cache=False).logits[0]
            labels = torch.from_numpy(sequence.labels).long()
            loss = functional.cross_entropy(
                logits[:-1], labels[1:], ignore_index=-100, reduction="sum"
            )
            found.append((-loss, int((labels[1:] != -100).sum())))
        return found

    return of


def plain_loop(
    net: Any, of: Callable[[Any, str], Any], steps: list[list[str]], config: Config
) -> list[dict[str, float]]:
    """Train `net` on pairs as ledgers name them, one answer at a time."""
    base = copy.deepcopy(net).eval()
    settings, optim = config.train.dpo, config.optim
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, optim.lr, (0.9, 0.95), eps=optim.eps, weight_decay=0.0
    )
    net.train()
    lines = []
    for names in steps:
        losses, right = [], []
        for name in names:
            (chosen, long), (rejected, short) = of(net, name)
            with torch.no_grad():
                (ref_chosen, _), (ref_rejected, _) = of(base, name)
            if settings.loss == "ipo":
                ahead = (chosen - ref_chosen) / long - (rejected - ref_rejected) / short
                loss = (ahead - 1 / (2 * settings.beta)) ** 2
            else:
                ahead = (chosen - ref_chosen) - (rejected - ref_rejected)
                loss = -functional.logsigmoid(settings.beta * ahead)
            losses.append(loss - settings.sft_weight * chosen / long)
            right.append(float(ahead) > 0)
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        watched = float(loss), float(norm), float(np.mean(right))
        lines.append(dict(zip(("loss", "grad_norm", "right"), watched, strict=True)))
    return lines


def check_loop(tree: dict[str, Any], records: dict[str, Any], folder: Path) -> None:
    job = started(tree)
    model = worlds_model(job)
    net = copy.deepcopy(model.net)
    train(job)
    steps: list[list[str]] = [[] for _ in range(STEPS)]
    for file in (job.folder / "ledger").glob("*.jsonl"):
        for line in read_lines(file):
            steps[line["step"] - 1] += line["ids"]
    assert all(len(set(names)) == len(names) > 2 for names in steps)
    wanted = plain_loop(net, likelihoods(model, job.config, records, folder), steps, job.config)
    found = read_lines(job.folder / "metrics.jsonl")
    assert len(found) == len(wanted) == STEPS
    for line, right, names in zip(found, wanted, steps, strict=True):
        assert line["loss"] == pytest.approx(right["loss"], rel=2e-4)
        assert line["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)
        assert line["term/reward_accuracy"] == pytest.approx(right["right"])
        assert line["examples"] == len(names)
    assert found[-1]["loss"] < found[0]["loss"]
    (trained,) = (job.strategy.module.lm,)
    for (name, ours), theirs in zip(trained.named_parameters(), net.parameters(), strict=True):
        moved = float((theirs - ours).abs().max())
        assert moved < 2e-4, name


def worlds_model(job: Any) -> Any:
    """The speech model of a job."""
    return job.stream.speech_model


@pytest.mark.parametrize("dpo", [{"beta": 0.2}, {"loss": "ipo", "beta": 0.5}, {"sft_weight": 0.5}])
def test_losses_are_those_of_a_plain_loop_over_single_answers(
    dpo: dict[str, Any], tmp_path: Path
) -> None:
    # AdamW makes full steps of what is rounded where its epsilon is small.
    tree = preferred.tree(tmp_path, "run", dpo, optim__eps=1e-3)
    records = {record["id"]: record for record in preferred.records()}
    check_loop(tree, records, tmp_path)


def test_clips_are_heard_as_by_a_plain_loop(make_clips: Any, tmp_path: Path) -> None:
    clips = sorted(make_clips(24).parent.glob("*.wav"))
    path = preferred.spoken(clips, tmp_path / "spoken.jsonl")
    records = {record["id"]: record for record in map(json.loads, path.read_text().splitlines())}
    tree = preferred.tree(
        tmp_path, "run", {}, data__train=[{"path": str(path)}], optim__eps=1e-3, optim__lr=3e-3
    )
    model = copy.deepcopy(AUDIO)
    model["config"]["audio_config"]["dropout"] = 0.0
    check_loop({**tree, "model": model}, records, tmp_path)


def gradients(folder: Path, size: int, cells: list[tuple[str, str, str]]) -> list[Any]:
    """The gradient of the first step of each (strategy, kind, loss), weighted by task."""
    from safetensors.torch import load_file

    paths = []
    for strategy, kind, loss in cells:
        changes = {**KINDS[kind], "parallel__strategy": strategy}
        changes["train__task_weights"] = {"advice": 2.0}
        dpo = {"loss": loss, "sft_weight": 0.3}
        paths.append(write(folder, f"{strategy}_{kind}_{loss}_{size}", dpo, **changes))
    assert worlds.run(size, *paths, kill_at=-1, module="tests.support.matrix") == 0
    return [load_file(folder / "runs" / path.stem / "gradient.safetensors") for path in paths]


def test_gradients_are_those_of_one_process_with_two_workers(tmp_path: Path) -> None:
    kinds = [(kind, "sigmoid") for kind in KINDS]
    check_gradients(tmp_path, [2], ["fsdp"], *kinds, found_of=gradients)


@pytest.mark.slow
def test_gradients_are_those_of_one_process_under_every_strategy(tmp_path: Path) -> None:
    kinds = [(kind, loss) for kind in KINDS for loss in ("sigmoid", "ipo")]
    strategies = ["ddp", "fsdp", "zero1", "zero2"]
    check_gradients(tmp_path, [2, 3], strategies, *kinds, found_of=gradients)


@pytest.mark.slow  # test_grpo_runs does it too
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_reference_under_zero3_is_that_of_one_process(kind: str, tmp_path: Path) -> None:
    names = ("loss", "grad_norm", "term/reward_margin", "term/logp_chosen")
    found = []
    for size, more in ((1, {}), (2, zero3(tmp_path))):
        changes = {**KINDS[kind], "optim__eps": 1e-3, **more}
        path = write(tmp_path, f"of_{size}", {"beta": 0.2}, **changes)
        assert worlds.run(size, path) == 0
        lines = read_lines(tmp_path / "runs" / path.stem / "metrics.jsonl")
        found.append([[line[name] for name in names] for line in lines])
    wanted, own = found
    assert all(abs(margin) > 1e-5 for _, _, margin, _ in wanted[1:])
    for line, right in zip(own, wanted, strict=True):
        assert line == pytest.approx(right, rel=1e-3, abs=1e-6)


def check_kills(folder: Path, size: int, strategy: str, kind: str) -> None:
    changes = {**KINDS[kind], "parallel__strategy": strategy, "optim__lr": 3e-3}
    if kind == "lora":
        changes["peft__dropout"] = 0.2
    whole, killed = (write(folder, name, {}, **changes) for name in ("whole", "killed"))
    assert worlds.run(size, whole) == 0
    assert worlds.run(size, killed, kill_at=3) == -9
    assert worlds.run(size, killed) == 0
    runs = [folder / "runs" / name for name in ("whole", "killed")]
    check_same(runs, ("loss", "grad_norm", "term/reward_margin", "term/logp_chosen"))
    assert all(audit(run).clean for run in runs)


def test_killed_and_resumed_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    """The reference is that of the run's beginning, not that of its resumption."""
    check_kills(tmp_path, 2, "fsdp", "full")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2"])
@pytest.mark.parametrize("size", [1, 3])
def test_every_strategy_is_the_same_to_the_last_bit_after_a_kill(
    size: int, strategy: str, tmp_path: Path
) -> None:
    check_kills(tmp_path, size, strategy, "lora")


def test_evaluation_says_how_often_the_chosen_one_is_likelier(tmp_path: Path) -> None:
    held = preferred.records()[:12]
    plain = {
        "id": "plain",
        "messages": [*held[0]["messages"], {"role": "assistant", "content": "A"}],
    }
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [*held, plain]))
    changes = {"data__eval": [{"path": str(path)}], "train__max_steps": 8, "evaluate__every": 4}
    job = started(preferred.tree(tmp_path, "run", {}, **changes))
    train(job)
    lines = read_lines(job.folder / "eval.jsonl")
    assert [line["step"] for line in lines] == [4, 8]
    for task in ("chat", "advice"):
        assert lines[0][f"preferred_margin/{task}"] < lines[1][f"preferred_margin/{task}"]
    assert lines[-1]["sources"]["held"]["examples"] == 13
    # Who evaluates the run later reads the same pairs; who looks at them is shown both answers.
    encoder, index = preflight.read_eval(job.config, job.folder, tmp_path / "later")
    lines_of = shown.examples(index, encoder, 400, 2, colours=False)
    assert lines_of[0] == "example 1: p0, task chat: 61 positions, 7 supervised"
    assert [line for line in lines_of if "\u27e6" in line or line == "  rejected:"] == [
        *("    \u27e6yes<|eos|>\u27e7", "  rejected:", "    \u27e6no<|eos|>\u27e7"),
        *("    \u27e6yes indeed<|eos|>\u27e7", "  rejected:", "    \u27e6no, no<|eos|>\u27e7"),
    ]
    assert [int(length) for length in index.tokens[:1]] == [61]
    model, net = worlds_model(job), job.strategy.module.lm.eval()
    records = {record["id"]: record for record in held}
    of = likelihoods(model, job.config, records, tmp_path)
    with torch.no_grad():
        for task in ("chat", "advice"):
            names = [record["id"] for record in held if record["task"] == task]
            pairs = [[float(logp) for logp, _ in of(net, name)] for name in names]
            likelier = np.mean([chosen > rejected for chosen, rejected in pairs])
            margin = np.mean([chosen - rejected for chosen, rejected in pairs])
            assert lines[-1][f"preferred/{task}"] == pytest.approx(likelier)
            assert lines[-1][f"preferred_margin/{task}"] == pytest.approx(margin, rel=1e-4)
            if task == "advice":
                tokens = sum(size for name in names for _, size in of(net, name)[:1])
                total = -sum(chosen for chosen, _ in pairs)
                assert lines[-1]["loss/advice"] == pytest.approx(total / tokens, rel=1e-5)


def test_a_model_whose_data_has_no_pairs_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    from raysft.errors import UserError

    tree = preferred.tree(tmp_path, "run", {}, data__train=[{"path": str(worlds.units(tmp_path))}])
    with pytest.raises(UserError, match=re.escape("has no rejected answer, and train.objective")):
        started(tree)
