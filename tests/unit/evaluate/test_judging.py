"""Ratings at test: which tokens are digits, the mean of probabilities, counts of right tokens, and
an evaluation of them in a run."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from raysft.config.schema import Data, Model
from raysft.data.encode import make_encoder
from raysft.data.example import Example, MicroBatch
from raysft.data.tokenizer import byte_tokenizer
from raysft.driver.preflight import prepare
from raysft.errors import UserError
from raysft.evaluate.judging import Digits, counting
from raysft.models import SpeechModel, build
from raysft.models.watched import Generated
from raysft.run.folder import read_config
from raysft.run.lines import read_lines
from raysft.scorers.rated import Rated
from tests.support import digitless, in_process
from tests.support.drama import prompts, role, written
from tests.support.models import AUDIO, CAUSAL

RATED = Rated("r", "role", "pitch_dynamics", "pitch", (4, 3))


@pytest.fixture(scope="module")
def made() -> tuple[Any, SpeechModel]:
    model = Model(**CAUSAL)
    encoder = make_encoder(model, Data(), Path("unused"))
    return encoder, build(model, Data(), encoder, 0)


def encoded(encoder: Any, *answers: str) -> list[Any]:
    return [
        encoder.encode(Example(f"e{n}", "rating", ("x" * n,), (text,), instruction="rate"), [])
        for n, text in enumerate(answers)
    ]


# -- digits ----------------------------------------------------------------------------------------


def test_digits_are_tokens_in_their_place() -> None:
    tokenizer = byte_tokenizer()
    digits = Digits.of(tokenizer)
    assert digits.ways == (tuple(tokenizer.encode(str(n))[0] for n in range(10)),)


def test_a_tokenizer_without_digits_of_their_own_has_no_probabilities() -> None:
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"?": 0, "<": 1}, "?")), unk_token="?"
    )
    assert Digits.of(words).ways == () and Digits.of(words).watched == []
    none = Generated("<answer>4</answer>", [1], np.zeros((1, 0), np.float32))
    assert Digits.of(words).probability(none, RATED, words) is None


# -- probabilities ---------------------------------------------------------------------------------


def generated(text: str, logits: dict[int, dict[int, float]]) -> tuple[Generated, Digits, Any]:
    """An answer of byte tokens; logits: by position, of digits."""
    tokenizer = byte_tokenizer()
    digits = Digits.of(tokenizer)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    table = np.full((len(tokens), len(digits.watched)), -3.0, np.float32)
    for at, values in logits.items():
        for digit, value in values.items():
            table[at, digits.watched.index(digits.ways[0][digit])] = value
    return Generated(text, tokens, table), digits, tokenizer


def test_the_mean_is_over_the_digits_of_the_scale_where_the_first_one_is_written() -> None:
    text = "<think>5 é</think><answer>4</answer>"
    at = text.encode().index(b">4<") + 1
    answer, digits, tokenizer = generated(text, {at: {3: 0.0, 4: math.log(3), 7: 99.0}})
    expected = np.full(5, math.exp(-3.0))
    expected[2:4] = 1, 3
    expected /= expected.sum()
    found = digits.probability(answer, RATED, tokenizer)
    assert found == pytest.approx(float(expected @ np.arange(1, 6)), rel=1e-6)
    yes_no = Rated("r", "arche", "content_pass", "content_pass", (1,), 0, 1)
    answer, digits, tokenizer = generated("<answer>1</answer>", {8: {0: 0.0, 1: math.log(4)}})
    assert digits.probability(answer, yes_no, tokenizer) == pytest.approx(0.8)


@pytest.mark.parametrize("text", ["<answer>N/A</answer>", "4", "<answer>9</answer>", ""])
def test_an_answer_without_a_score_has_no_probability(text: str) -> None:
    answer, digits, tokenizer = generated(text, {})
    assert digits.probability(answer, RATED, tokenizer) is None


def test_each_dimension_has_the_probabilities_of_its_own_place() -> None:
    text = "<answer>[A]4[B]2</answer>"
    answer, digits, tokenizer = generated(text, {11: {4: 9.0}, 15: {2: 9.0}})
    for label, near in (("A", 4), ("B", 2)):
        one = Rated("r", "role", "d", "d", (1,), label=label)
        assert digits.probability(answer, one, tokenizer) == pytest.approx(near, abs=0.01)


def test_logits_are_the_models_own_whatever_its_config_samples(made: Any) -> None:
    encoder, speech_model = made
    own = speech_model.net.generation_config
    speech_model.net.generation_config = GenerationConfig(
        do_sample=True, temperature=0.3, top_k=2, eos_token_id=own.eos_token_id, pad_token_id=0
    )
    sequences = encoded(encoder, "<answer>4</answer>", "<answer>2</answer>")
    asked = [
        encoder.prompt(Example("e", "rating", ("x" * n,), ("1",), instruction="rate"), [])
        for n in range(2)
    ]
    watched = Digits.of(encoder.tokenizer).watched
    try:
        found = speech_model.answers(asked, 6, watched=watched)
        assert [one.text for one in found] == speech_model.generate(asked, 6)
    finally:
        speech_model.net.generation_config = own
    assert len(sequences) == len(found)
    for prompt, one in zip(asked, found, strict=True):
        ids = torch.tensor([[*prompt.input_ids.tolist(), *one.tokens]])
        with torch.no_grad():
            logits = speech_model.net(input_ids=ids).logits[0]
        begin = len(prompt.input_ids) - 1
        expected = logits[begin : begin + len(one.tokens), watched]
        assert one.logits.shape == expected.shape and len(one.tokens) > 0
        np.testing.assert_allclose(one.logits, expected.numpy(), atol=1e-4)


# -- right tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [None, 3])
def test_right_tokens_are_counted_as_the_models_own_argmax_has_them(
    made: Any, rows: int | None
) -> None:
    encoder, speech_model = made
    sequences = encoded(encoder, "<answer>4</answer>", "<answer>2</answer>", "<answer>4</answer>")
    batch = speech_model.collate(MicroBatch.join(0, 1, 0, sequences))
    digits = Digits.of(encoder.tokenizer)
    four, two = digits.ways[0][4], digits.ways[0][2]
    # So that some are right: the model says 4 where the first answer has it.
    head = speech_model.net.get_output_embeddings()
    before = head.weight.detach().clone()
    at = sequences[0].labels.tolist().index(four)
    ids = torch.tensor([sequences[0].input_ids.tolist()])
    with torch.no_grad():
        head.weight[four] = 10 * speech_model.net.model(input_ids=ids).last_hidden_state[0, at - 1]
    speech_model.supervised.rows = rows
    try:
        speech_model.supervised.eval()
        with torch.no_grad():
            plain = speech_model.supervised(batch)
            with counting(speech_model, digits) as names:
                terms = {term.name: term for term in speech_model.supervised(batch)}
    finally:
        speech_model.supervised.rows = None
    right: list[tuple[int, bool]] = []
    for sequence in sequences:
        with torch.no_grad():
            logits = speech_model.net(input_ids=torch.tensor([sequence.input_ids.tolist()])).logits
        best = logits[0].argmax(-1).tolist()
        right += [
            (label, best[at - 1] == label)
            for at, label in enumerate(sequence.labels.tolist())
            if label != -100
        ]
    with torch.no_grad():
        head.weight.copy_(before)
    assert speech_model.more_losses == [] and names <= terms.keys()
    assert terms["token_right"].sum.item() == sum(hit for _, hit in right)
    assert terms["token_right"].by_task["rating"][1].item() == len(right)
    for score, id_ in ((4, four), (2, two)):
        own = [hit for label, hit in right if label == id_]
        assert terms[f"score_seen_{score}"].by_task["rating"][0].item() == len(own) > 0
        assert terms[f"score_right_{score}"].by_task["rating"][0].item() == sum(own)
    assert any(hit for label, hit in right if label == four) and not all(hit for _, hit in right)
    assert terms["score_seen_1"].sum.item() == 0
    assert terms["cross_entropy"].sum.item() == plain[0].sum.item()


# -- a run -----------------------------------------------------------------------------------------


def test_an_evaluation_of_ratings_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answers(
        self: SpeechModel, prompts: list[Any], limit: int, synced: bool, watched: list[int]
    ):
        asked.extend(prompt.id for prompt in prompts)
        ids = self.tokenizer.encode("<answer>3</answer>", add_special_tokens=False)
        logits = np.zeros((len(ids), len(watched)), np.float32)
        texts = ["<answer>3</answer>" if "pitch" in p.id else "none" for p in prompts]
        return [Generated(text, ids, logits) for text in texts]

    monkeypatch.setattr(SpeechModel, "answers", answers)
    judging = {
        "variations": str(prompts(tmp_path, 1)),
        "dimensions": ["pitch_dynamics", "trait_embodiment"],
    }
    train = written(tmp_path, *(role(n) for n in range(4)), name="train.jsonl")
    dev = written(tmp_path, *(role(n, pitch_variation=[n + 1, n + 1]) for n in range(4)))
    place = in_process.run(
        tmp_path / "runs",
        data={
            "train": [{"path": str(train), "judging": judging}],
            "eval": [{"path": str(dev), "name": "dev", "judging": judging}],
            "tokens_per_batch": 800,
        },
        model=AUDIO,
        train={"max_steps": 1},
    )
    (line,) = read_lines(place / "eval.jsonl")
    assert sorted(asked) == sorted(
        f"r{n}:{name}" for n in range(4) for name in ("pitch_dynamics", "trait_embodiment")
    )
    assert line["missing_scores/dev"] == 0.5
    assert line["mae/dev"] == pytest.approx(1.0)  # 3 against 1, 2, 3, 4
    assert line["probability_mae/dev"] == pytest.approx(1.0)  # the mean of 1 to 5 is 3 too
    assert 0 <= line["token_accuracy/rating"] <= 1
    assert "spearman/dev" not in line  # one answer alone says nothing of order
    found = {one["id"]: one for one in read_lines(place / "predictions" / "step_1.jsonl")}
    (first,) = found["r2:pitch_dynamics"]["ratings"]
    assert first["model"] == 3 and first["probability"] == pytest.approx(3.0)
    assert first["rated"]["ratings"] == [3, 3]
    (missing,) = found["r2:trait_embodiment"]["ratings"]
    assert missing["model"] is None and missing["rated"]["ratings"] == [4, 4, 2]


# -- runs of what does not fit ---------------------------------------------------------------------

CHOSEN = ["pitch_dynamics", "trait_embodiment"]
LONG = "A bill. " * 200


def sections(folder: Path, tokenizer: str, **train: Any) -> dict[str, Any]:
    """Of a config: six records, of which r5 is asked about in more tokens than a batch holds."""
    judging = {"variations": str(prompts(folder, 1)), "dimensions": CHOSEN}
    records = [role(n) for n in range(6)]
    records[5]["local_scene"] = LONG
    path = written(folder, *records)
    return {
        "data": {
            "train": [{"path": str(path), "judging": judging}],
            "eval": [{"path": str(path), "name": "dev", "judging": judging}],
            "tokens_per_batch": 800,
            "max_quarantined": 0.2,
        },
        "model": {**AUDIO, "tokenizer": tokenizer},
        "train": {"max_steps": 2, **train},
        "evaluate": {"max_new_tokens": 20},
    }


GRPO = {"objective": "grpo"}
GRPO["grpo"] = {"rewards": {"rating": 1.0}, "group": 2, "max_new_tokens": 20, "beta": 0.0}


@pytest.mark.parametrize("train", [{}, GRPO], ids=["sft", "grpo"])
def test_a_prompt_longer_than_a_batch_is_named_and_not_trained_on_and_is_asked_in_evaluation(
    tmp_path: Path, train: dict[str, Any]
) -> None:
    own = sections(tmp_path, "bytes", **train)
    place = in_process.run(tmp_path / "runs", **own)
    config = read_config(place)
    (found,) = prepare(config, place).rejected
    assert re.fullmatch(r"takes \d+ positions, more than data.tokens_per_batch=800", found.reason)
    assert (found.id, found.kind) == ("r5", "over budget")
    trained = {id_ for ids in in_process.ledger(place) for id_ in ids}
    assert trained == {f"r{n}" for n in range(5)}
    asked = {line["id"] for line in read_lines(place / "predictions" / "step_2.jsonl")}
    assert asked == {f"r{n}:{name}" for n in range(6) for name in CHOSEN}
    strict = config.model_copy(deep=True)
    strict.data.max_quarantined = 0.1
    with pytest.raises(UserError) as refused:
        prepare(strict, place)
    said = str(refused.value)
    assert "data.max_quarantined: 1 of 6 examples are unusable" in said and "\n" not in said
    assert "the first: r5: takes" in said


def test_a_run_whose_digits_are_no_tokens_has_no_probabilities_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = iter(["<answer>4</answer>", "<answer>2</answer>", "4"] * 4)

    def answers(self: SpeechModel, prompts: list[Any], limit: int, *args: Any, **kwargs: Any):
        empty = np.zeros((0, 0), np.float32)
        return [Generated(next(answered), [], empty) for _ in prompts]

    own = sections(tmp_path, str(digitless.saved(tmp_path)))
    monkeypatch.setattr(SpeechModel, "answers", answers)
    place = in_process.run(tmp_path / "runs", **own)
    (line,) = read_lines(place / "eval.jsonl")
    assert line["missing_scores/dev"] == pytest.approx(1 / 3) and "mae/dev" in line
    assert 0 <= line["token_accuracy/rating"] <= 1
    assert [name for name in line if "probability" in name or "accuracy_of" in name] == []
    warned = [e["reason"] for e in read_lines(place / "events.jsonl") if e["event"] == "warning"]
    (said,) = [reason for reason in warned if "digits" in reason]
    assert (
        said.startswith("model.tokenizer: digits are no tokens of their own") and "\n" not in said
    )


@pytest.mark.parametrize(
    ("dataset", "said", "earned"),
    [
        (None, "<answer>4</answer>", 2 / 3),
        ("RoleAllFixOrder", "<answer>[PitchDynamics]4</answer>", (2 / 3 + 4) / 2),
        (
            "RoleAllFlexOrderConsistent",
            "<answer>[TraitEmbodiment]2[PitchDynamics]3</answer>",
            (4 / 3 + 1 / 3) / 2,
        ),
    ],
)
def test_ratings_are_rewarded_by_their_text_whatever_tokens_write_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dataset: str | None,
    said: str,
    earned: float,
) -> None:
    """Of [4, 4, 2] the mean is 10 / 3; an answer without a rating, or one of its dimensions, is as
    far from it as the scale is long."""
    asked: Counter[str] = Counter()

    def answers(self: SpeechModel, prompts: list[Any], *args: Any, **kwargs: Any):
        found = []
        for prompt in prompts:
            text = (said, "four")[asked[prompt.id] % 2]
            asked[prompt.id] += 1
            tokens, none = self.tokenizer.encode(text), np.zeros((0, 0), np.float32)
            found.append(Generated(text, tokens, none, [self.stop_ids[0]]))
        return found

    tokenizer = str(digitless.saved(tmp_path))
    own = sections(tmp_path, tokenizer, **GRPO) | {"evaluate": {"generate": False}}
    if dataset is not None:
        own["data"]["train"][0]["judging"] = {"dataset": dataset, "dimensions": CHOSEN}
        own["data"]["tokens_per_batch"] = 1700
    monkeypatch.setattr(SpeechModel, "answers", answers)
    place = in_process.run(tmp_path / "runs", **own)
    for line in read_lines(place / "metrics.jsonl"):
        assert line["reward/rating"] == pytest.approx(-(earned + 4) / 2, abs=1e-5)
        assert line["equal_groups"] == 0
