"""patch_lm: the sequences that Ming-UniAudio has, its losses by their formulas, and speaking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysft.config.schema import Data, Model, Source
from raysft.config.speaking import Speak
from raysft.data import sources
from raysft.data.clips.audio import load
from raysft.data.encode import make_encoder
from raysft.data.example import Audio, Example, MicroBatch, Sequence, Units
from raysft.errors import BadExample, UserError
from raysft.export import export
from raysft.families.patch_lm.encode import DRAWS, LATENTS, PatchEncoder
from raysft.families.patch_lm.model import PatchLM
from raysft.losses.stop import labels
from raysft.losses.term import Term
from raysft.models import build
from raysft.models.flow_parts import T_UNITS
from tests.support import patches

OFF = -100
ASK = "Please translate the text to speech."
HEAR = "Please recognize the language of this speech and transcribe it. Format: oral."


def encoder_of(**more: Any) -> PatchEncoder:
    found = make_encoder(Model.model_validate(patches.model(**more)), Data(), "none")
    assert isinstance(found, PatchEncoder)
    return found


def model_of(encoder: PatchEncoder, mode: str = "packed", **more: Any) -> PatchLM:
    data = Data.model_validate({"mode": mode})
    found = build(Model.model_validate(patches.model(**more)), data, encoder, 0)
    assert isinstance(found, PatchLM)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in found.net.parameters():  # a new one says next to nothing
            parameter.add_(0.1 * torch.randn_like(parameter))
    return found


def encoded(encoder: PatchEncoder, example: Example, seed: int | None = 7) -> Sequence:
    clips = [load(clip, encoder.sample_rate) for clip in example.audio()]
    rng = None if seed is None else np.random.Generator(np.random.Philox(seed))
    return encoder.encode(example, clips, rng)


def batch_of(encoder: PatchEncoder, examples: list[Example], seed: int = 7) -> MicroBatch:
    found = [encoded(encoder, one, seed + place) for place, one in enumerate(examples)]
    return MicroBatch.join(0, 1, 0, found)


def examples_of(folder: Path, count: int = 12) -> list[Example]:
    source = sources.resolve(Source(path=str(patches.corpus(folder, count))), "train")
    found = [item.example for file in source.files for item in sources.scan(source, file)]
    assert all(found)
    return [example for example in found if example is not None]


# -- sequences -----------------------------------------------------------------------------------


def case(kind: str, clip: Audio, other: Audio) -> Example:
    if kind == "tts":
        return Example("a", "tts", ("hi there",), (clip,), text="hi there")
    if kind == "asr":
        return Example("a", "asr", (clip,), ("hi",), lang="English", text="hi")
    if kind == "asr without lang":
        return Example("a", "asr", (clip,), ("hi",), text="hi")
    said = ("old",) if kind == "edit" else ()
    return Example("a", "edit", (clip, "delete it"), (*said, other))


@pytest.mark.parametrize("length", [1, 4, 5, 9])
@pytest.mark.parametrize("kind", ["tts", "asr", "asr without lang", "edit", "edit of three keys"])
def test_sequences_are_those_of_the_published_system(
    kind: str, length: int, tmp_path: Path
) -> None:
    encoder = encoder_of()
    tokenizer = encoder.tokenizer

    def ids(*pieces: str) -> list[int]:
        """Each piece for itself, as it is published."""
        return [i for p in pieces for i in tokenizer(p, add_special_tokens=False).input_ids]

    human, assistant = "<role>HUMAN</role>", "<role>ASSISTANT</role>"
    clip = Audio(str(tmp_path / patches.clip(tmp_path, "a.wav", length + 0.6, 1)))
    other = Audio(str(tmp_path / patches.clip(tmp_path, "b.wav", 6.2, 2)))
    (patch,) = ids("<audioPatch>")
    heard, spoken = [patch] * length, [patch] * 6
    if kind == "tts":
        given = ids(human, f"{ASK}\nhi there", assistant, "<audio>")
        learnt = heard
    elif kind.startswith("asr"):
        given = [*ids(human + HEAR, "<audio>"), *heard, *ids("</audio>", assistant)]
        answer = "English\thi" if kind == "asr" else "hi"
        learnt = [*ids(answer), tokenizer.eos_token_id]
    else:
        given = [*ids(human, "<audio>"), *heard, *ids("</audio>")]
        given += ids("<prompt>delete it\n</prompt>", assistant)
        given += ids("<answer>") if kind == "edit" else ids("<gen_audio>")
        learnt = [*ids("old", "<gen_audio>"), *spoken] if kind == "edit" else spoken
    example = case(kind, clip, other)
    found = encoded(encoder, example)
    assert found.input_ids.tolist() == [*given, *learnt]
    assert found.labels.tolist() == [*[OFF] * len(given), *learnt]
    prompt = encoder.prompt(example, [load(one, patches.RATE) for one in example.audio()])
    assert prompt.input_ids.tolist() == given
    # What is learnt of text, where patches are, and which of them stop.
    model = model_of(encoder)
    batch = model.collate(MicroBatch.join(0, 1, 0, [found]))
    places = [at for at, token in enumerate([*given, *learnt]) if token == patch]
    own = batch["patch_at"].tolist()
    if "spoken" in batch and batch["counted"].sum():
        said = [own[number] for number in batch["spoken"].tolist()]
        assert own == places and said == [at for at in places if at >= len(given)]
        assert batch["stops"].tolist() == labels(len(said)).tolist()
        assert batch["first"].tolist() == [True] + [False] * (len(said) - 1)
    else:  # in front of it what is spoken for nothing but the graph
        assert [at - 2 for at in own[1:]] == places and own[0] == 1
    words = [token for token in learnt if token != patch]
    assert batch["targets"].tolist() == words
    counts = model.counts(MicroBatch.join(0, 1, 0, [found]))
    said = len(learnt) - len(words)
    assert counts["supervised"] == len(words)
    assert counts["flow"] == said * patches.SIZE * patches.MEL["bins"]
    assert counts["stop"] == (said > 0) and counts["goes_on"] == (said > 4)


def test_frames_behind_the_last_whole_patch_are_left_out(tmp_path: Path) -> None:
    clip = Audio(str(tmp_path / patches.clip(tmp_path, "a.wav", 3.7, 1)))
    encoder = encoder_of()
    found = encoded(encoder, Example("a", "tts", ("x",), (clip,)))
    (frames,) = found.arrays[LATENTS]
    assert frames.shape == (3 * patches.SIZE, patches.MEL["bins"])
    whole = encoder.latents(load(clip, patches.RATE))
    np.testing.assert_array_equal(frames, whole[: len(frames)])


def test_what_cannot_be_used_says_why(tmp_path: Path) -> None:
    encoder = encoder_of()
    clip = Audio(str(tmp_path / patches.clip(tmp_path, "a.wav", 0.9, 1)))
    with pytest.raises(BadExample, match="no whole patch of 2 frames"):
        encoded(encoder, Example("a", "tts", ("x",), (clip,)))
    with pytest.raises(BadExample, match="contains <audio>, a token that steers"):
        encoder.template.render(Example("a", "tts", ("say <audio>",), (clip,)))
    with pytest.raises(UserError, match="hears or speaks, and example a does neither"):
        encoder.template.render(Example("a", "tts", ("x",), ("y",)))
    with pytest.raises(UserError, match="no units"):
        encoder.template.render(Example("a", "tts", ("x",), (Units((1,)),)))
    with pytest.raises(UserError, match="no entry for task 'sing'"):
        encoder.template.render(Example("a", "sing", ("x",), (clip,)))
    with pytest.raises(BadExample, match="has 2 clips where one is taken"):
        encoder.template.render(Example("a", "tts", ("x",), (clip, clip)))


def test_a_model_says_what_it_lacks() -> None:
    given = patches.model()
    with pytest.raises(UserError, match=r"model\.patches: is needed"):
        make_encoder(Model.model_validate({**given, "patches": None}), Data(), "none")
    with pytest.raises(UserError, match=r"model\.patches\.mel: say which"):
        make_encoder(Model.model_validate({**given, "patches": {}}), Data(), "none")
    with pytest.raises(UserError, match=r"data\.speech_tokens: patch_lm hears"):
        data = Data.model_validate({"speech_tokens": {"clusters": 4}})
        make_encoder(Model.model_validate(given), data, "none")


# -- losses --------------------------------------------------------------------------------------


def term(terms: list[Term], name: str) -> Term:
    return next(one for one in terms if one.name == name)


def by_hand(model: PatchLM, mb: MicroBatch, training: bool) -> dict[str, torch.Tensor]:
    """Sums of flow and stop, sequence by sequence and patch by patch, from the formulas."""
    net, size, latent = model.net, patches.SIZE, model.latent
    sums: dict[str, list[torch.Tensor]] = {"flow": [], "stop": [], "goes_on": []}
    for document, seed in zip(model.documents(mb), draws(mb), strict=True):
        flags = document.arrays["spoken"][0]
        if not (flags == 1).any():
            continue
        frames = np.concatenate(document.arrays[LATENTS]).reshape(-1, size, latent)
        whole = torch.from_numpy(frames)
        at = np.flatnonzero(document.input_ids == model.patch_id)
        said = np.flatnonzero(flags == 1)
        rng = np.random.default_rng(seed)
        units = rng.integers(T_UNITS, size=len(said))
        noise = torch.from_numpy(rng.standard_normal((len(said), size, latent), np.float32))
        dropped = rng.random(len(said)) < model.patches.condition_dropout
        embeds = net.get_input_embeddings()(torch.from_numpy(document.input_ids.astype(np.int64)))
        embeds = embeds.clone()
        for number, place in enumerate(at):
            own = whole[number]
            normed = own / (own.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            normed = normed * net.pooling.norm.weight
            embeds[place] = (normed @ net.pooling.linear.weight.T + net.pooling.linear.bias).mean(0)
        hidden = net.language_model.model(inputs_embeds=embeds.unsqueeze(0)).last_hidden_state[0]
        losses = []
        for number, patch in enumerate(said):
            t = float(units[number]) / T_UNITS
            target = whole[patch]
            where = (1 - t) * noise[number] + t * target
            before = whole[patch - 1] if number else torch.zeros(size, latent)
            condition = hidden[at[patch] - 1]
            if training and dropped[number]:
                condition = torch.zeros_like(condition)
            velocity = net.flow_head(
                where[None], torch.tensor([units[number]]), condition[None], before[None]
            )[0]
            sums["flow"].append((velocity - (target - noise[number])).square().sum())
            losses.append(net.stop_head(hidden[at[patch]]).log_softmax(-1))
        sums["stop"].append(-losses[-1][1])
        if len(said) > 4:
            sums["goes_on"].append(torch.stack([-one[0] for one in losses[:-4]]).max())
    return {name: torch.stack(parts).sum() for name, parts in sums.items()}


def draws(mb: MicroBatch) -> list[int]:
    found = mb.arrays[DRAWS].of_sequences(len(mb.ids))
    return [int(own[0][0]) if own else 0 for own in found]


@pytest.mark.parametrize("mode", ["packed", "padded"])
@pytest.mark.parametrize("training", [True, False])
def test_losses_and_gradients_are_those_of_the_formulas(
    mode: str, training: bool, tmp_path: Path
) -> None:
    encoder = encoder_of(condition_dropout=0.3)
    model = model_of(encoder, mode, condition_dropout=0.3)
    model.supervised.train(training)
    mb = batch_of(encoder, examples_of(tmp_path))
    terms = model.loss(model.collate(mb))
    counts, expected = model.counts(mb), by_hand(model, mb, training)
    parameters = [p for p in model.net.parameters() if p.requires_grad]
    for name, value in expected.items():
        found = term(terms, name)
        assert float(found.count) == counts[name] > 0 and found.counted == name
        assert float(found.sum) == pytest.approx(float(value), rel=1e-5)
        assert found.trained is not None
        pairs = zip(
            torch.autograd.grad(found.trained, parameters, retain_graph=True, allow_unused=True),
            torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True),
            strict=True,
        )
        for own, other in pairs:
            if other is None:
                assert own is None or not own.abs().any()
            else:
                atol = 1e-5 * max(1.0, float(other.abs().max()))
                torch.testing.assert_close(own, other, rtol=0, atol=atol)
    weights = {one.name: one.weight for one in terms}
    assert weights["flow"] == 1 and weights["stop"] == weights["goes_on"] == 0.005
    assert set(term(terms, "flow").by_task) >= {"tts", "edit"}


def test_a_sequence_alone_has_the_losses_it_has_among_others(tmp_path: Path) -> None:
    encoder = encoder_of()
    model = model_of(encoder)
    model.supervised.eval()
    examples = examples_of(tmp_path)
    found = [encoded(encoder, one, place) for place, one in enumerate(examples)]
    together = model.loss(model.collate(MicroBatch.join(0, 1, 0, found)))
    for name in ("cross_entropy", "flow", "stop", "goes_on"):
        alone = [
            term(model.loss(model.collate(MicroBatch.join(0, 1, 0, [one]))), name).sum
            for one in found
        ]
        assert float(term(together, name).sum) == pytest.approx(float(sum(alone)), rel=1e-5)


def test_a_turn_of_nothing_reaches_every_parameter_and_counts_nothing() -> None:
    encoder = encoder_of()
    model = model_of(encoder)
    terms = model.loss(model.dummy())
    assert all(float(one.sum) == 0 == float(one.count) for one in terms)
    total = sum(one.trained for one in terms if one.trained is not None)
    total.backward()
    assert not [name for name, p in model.net.named_parameters() if p.grad is None]
    assert not any(p.grad.abs().any() for p in model.net.parameters())
    assert set(model.counts(MicroBatch.join(0, 1, 0, [])).values()) == {0.0}


def test_times_near_the_noise_are_for_training_alone(tmp_path: Path) -> None:
    (example,) = [one for one in examples_of(tmp_path, 3) if one.task == "tts"]
    units = {}
    for power in (1, 3):
        encoder = encoder_of(time_power=power)
        model = model_of(encoder, time_power=power)
        for seed in (7, None):
            mb = MicroBatch.join(0, 1, 0, [encoded(encoder, example, seed)])
            units[power, seed] = model.collate(mb)["units"].double() / T_UNITS
    torch.testing.assert_close(units[3, 7], units[1, 7] ** 3, rtol=0, atol=1e-6)
    assert torch.equal(units[3, None], units[1, None])


def test_noise_on_what_was_spoken_is_for_training_alone(tmp_path: Path) -> None:
    encoder = encoder_of(history_noise=0.5)
    model = model_of(encoder, history_noise=0.5)
    (example,) = [one for one in examples_of(tmp_path, 3) if one.task == "tts"]
    clean = encoded(encoder, example).arrays[LATENTS][0].reshape(-1, patches.SIZE, model.latent)
    trained, evaluated = (
        model.collate(MicroBatch.join(0, 1, 0, [encoded(encoder, example, seed)]))
        for seed in (7, None)
    )
    noise = trained["patches"].numpy() - clean
    assert 0.3 < noise.std() < 0.7
    np.testing.assert_array_equal(evaluated["patches"].numpy(), clean)
    # What is learnt is the speech itself.
    again = encoded(encoder, example, None)
    np.testing.assert_array_equal(
        again.arrays[DRAWS], encoded(encoder, example, None).arrays[DRAWS]
    )


# -- speaking ------------------------------------------------------------------------------------


def test_each_says_the_same_whatever_is_said_beside_it(tmp_path: Path) -> None:
    encoder = encoder_of()
    model = model_of(encoder, "padded")
    examples = [one for one in examples_of(tmp_path) if one.task != "asr"]
    prompts = [
        encoder.prompt(one, [load(clip, patches.RATE) for clip in one.audio()]) for one in examples
    ]
    settings = Speak.model_validate({"max_seconds": 0.5, "flow": {"steps": 3, "guidance": 1.0}})
    seeds = list(range(len(prompts)))
    together = model.speak(prompts, seeds, settings)
    assert {len(one) for one in together} <= {patches.SIZE * n for n in range(1, 13)}
    for place, prompt in enumerate(prompts):
        (alone,) = model.speak([prompt], [seeds[place]], settings)
        np.testing.assert_allclose(alone, together[place], rtol=0, atol=1e-4)
    other = model.speak(prompts, [seed + 100 for seed in seeds], settings)
    assert not np.allclose(other[0][: patches.SIZE], together[0][: patches.SIZE])


def test_it_stops_where_the_stop_head_says(tmp_path: Path) -> None:
    encoder = encoder_of()
    model = model_of(encoder, "padded")
    example = Example("a", "tts", ("x",), (Audio("none"),))
    prompt = encoder.prompt(example, [])
    rate = 50 / patches.SIZE
    with torch.no_grad():
        model.net.stop_head.weight.zero_()
        model.net.stop_head.bias.copy_(torch.tensor([0.0, 5.0]))
    at_once = model.speak([prompt], [0], Speak())
    assert len(at_once[0]) == patches.SIZE
    later = model.speak([prompt], [0], Speak(min_seconds=5 / rate))
    assert len(later[0]) == 5 * patches.SIZE
    with torch.no_grad():
        model.net.stop_head.bias.copy_(torch.tensor([5.0, 0.0]))
    cut = model.speak([prompt], [0], Speak(max_seconds=9 / rate))
    assert len(cut[0]) == 9 * patches.SIZE


def test_speaking_goes_patch_by_patch_as_it_was_trained(tmp_path: Path) -> None:
    """The condition of each patch is what the whole sequence gives, so the cache is right."""
    encoder = encoder_of()
    model = model_of(encoder, "padded")
    prompt = encoder.prompt(Example("a", "tts", ("x",), (Audio("none"),)), [])
    settings = Speak.model_validate({"max_seconds": 0.2, "flow": {"steps": 2}, "stop": 1.0})
    (frames,) = model.speak([prompt], [3], settings)
    said = torch.from_numpy(frames).view(-1, patches.SIZE, model.latent)
    net, ids = model.net, torch.from_numpy(prompt.input_ids.astype(np.int64))
    embeds = torch.cat([net.get_input_embeddings()(ids), net.pooling(said)])
    hidden = net.language_model.model(inputs_embeds=embeds.unsqueeze(0)).last_hidden_state[0]
    rng = np.random.default_rng(3)
    history = torch.zeros(1, patches.SIZE, model.latent)
    for number in range(len(said)):
        where = torch.from_numpy(
            rng.standard_normal((1, patches.SIZE, model.latent), np.float32)[0]
        )
        where = where[None]
        condition = hidden[len(ids) - 1 + number][None]
        for t in (0.0, 0.5):
            units = torch.tensor([round(t * T_UNITS)])
            where = where + 0.5 * net.flow_head(where, units, condition, history)
        torch.testing.assert_close(where[0], said[number], rtol=0, atol=1e-4)
        history = where


def test_an_export_is_trained_on_as_it_was_made(tmp_path: Path) -> None:
    told = {"roles": ["user", "model"]}
    encoder = encoder_of(**told)
    export(model_of(encoder, **told), tmp_path / "out")
    again = {"path": str(tmp_path / "out")}
    found = make_encoder(Model.model_validate(again), Data(), "none")
    assert isinstance(found, PatchEncoder)
    assert found.patches == encoder.patches and found.fingerprint == encoder.fingerprint
    free = make_encoder(
        Model.model_validate({**again, "patches": {"stop_weight": 0.5}}), Data(), "none"
    )
    assert isinstance(free, PatchEncoder) and free.patches.stop_weight == 0.5
    for key, value in (("size", 3), ("roles", ["a", "b"]), ("mel", {"preset": "usdm"})):
        other = Model.model_validate({**again, "patches": {key: value}})
        with pytest.raises(UserError, match=rf"model\.patches\.{key}: the model at model\.path"):
            make_encoder(other, Data(), "none")
