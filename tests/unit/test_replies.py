"""Dialogs that are learnt, and answered in three steps; voices that are spoken in; a pair that
speaks alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModelForCausalLM

from raysft import clone, command, synthesize
from raysft.config.schema import Data, Model
from raysft.data.encode import make_encoder
from raysft.data.example import ASSISTANT, Audio, Example, Turn, Units
from raysft.errors import UserError
from raysft.export import export, export_run
from raysft.families.causal_lm.model import CausalLM
from raysft.families.flow_decoder.model import FlowModel
from raysft.families.patch_lm.encode import PatchEncoder
from raysft.families.patch_lm.flow_head import FlowHead
from raysft.models import build
from raysft.synthesis import dialog as replies
from raysft.synthesis.run import Utterances
from raysft.transcribe.model import load
from tests.support import dialogs, flows, listeners, pairs, patches
from tests.support.in_process import losses, run
from tests.support.models import CAUSAL

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FEW = ["speak.flow.steps=2", "speak.max_seconds=0.3"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of text alone, whose tables are two."""
    folder = tmp_path_factory.mktemp("base")
    config = {**CAUSAL["config"], "tie_word_embeddings": False}
    section, data = Model(**{**CAUSAL, "config": config}), Data()
    return export(build(section, data, make_encoder(section, data, folder), 1), folder / "base")


def trained(folder: Path, base: Path, steps: int, **more: Any) -> Path:
    """A run on dialogs."""
    path = dialogs.corpus(folder / "talk.jsonl")
    data = {"train": [{"path": str(path)}], "tokens_per_batch": 2000, "lanes": 1}
    data |= {"prompts": {"dialog": "Two talk."}}
    model = {"path": str(base), "speech_units": dialogs.UNITS, "extra_tokens": dialogs.MARKERS}
    train = {"max_steps": steps, "precision": "fp32"}
    return run(folder, data=data, model=model, train=train, optim={"lr": 1e-2}, **more)


@pytest.fixture(scope="module")
def learnt(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("dialogs"), base, 40)


def test_dialogs_are_learnt(learnt: Path) -> None:
    said = losses(learnt)
    assert said[-1] < 0.4 * said[0]


def test_only_the_rows_of_new_tokens_move_under_lora(base: Path, tmp_path: Path) -> None:
    place = trained(tmp_path / "lora", base, 2, peft={"method": "lora", "r": 2})
    export_run(place, tmp_path / "merged", merge=True)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    before = AutoModelForCausalLM.from_pretrained(base)
    encoder = load(str(place)).encoder
    names = [*dialogs.MARKERS, *(f"<|unit{n}|>" for n in range(dialogs.UNITS))]
    new = encoder.tokenizer.convert_tokens_to_ids(names)
    assert list(encoder.new_ids) == new
    section = Model(path=str(base), speech_units=dialogs.UNITS, extra_tokens=dialogs.MARKERS)
    begun = build(section, Data(), make_encoder(section, Data(), base), 1).net
    for table in ("get_input_embeddings", "get_output_embeddings"):
        old, now = getattr(before, table)().weight, getattr(after, table)().weight
        assert torch.equal(now[: len(old)], old)
        assert len(now) == len(old) + len(new)
        moved = (now[new] != getattr(begun, table)().weight[new]).any(1)
        # <|continue|> stands in no dialog, and is never read.
        assert moved[1:].all() and len(new) == len(moved)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flows.base(tmp_path_factory.mktemp("decoder"), "voicebox")


def by_hand(net: Any, ids: list[int], most: int, stops: set[int], may: set[int]) -> list[int]:
    """The likeliest of the tokens that may stand there, one by one, without a cache."""
    found: list[int] = []
    for _ in range(most):
        with torch.no_grad():
            logits = net(input_ids=torch.tensor([[*ids, *found]])).logits[0, -1]
        wrong = [token for token in range(len(logits)) if token not in may]
        logits[wrong] = -torch.inf
        found.append(int(logits.argmax()))
        if found[-1] in stops:
            return found[:-1]
    return found


def test_three_steps_write_what_each_may(
    learnt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(replies, "MOST_TEXT", 12)
    answering = load(str(learnt))
    encoder, net = answering.encoder, answering.speech_model.model
    tokenizer = encoder.tokenizer
    units = set(tokenizer.convert_tokens_to_ids([f"<|unit{n}|>" for n in range(dialogs.UNITS)]))
    markers = set(tokenizer.convert_tokens_to_ids(dialogs.MARKERS))
    newline, end = tokenizer.convert_tokens_to_ids("Ċ"), tokenizer.eos_token_id
    pad = {tokenizer.pad_token_id} - {end}
    rows = set(range(len(tokenizer)))
    asked = [
        Example(f"q{n}", "dialog", (), (), turns=(Turn("user", (Units(u), "x")),), script="dialog")
        for n, u in enumerate([(1, 2, 3), (7,), (0, 11) * 4])
    ]
    prompt = Utterances.__init__.__globals__["_prompt"]
    found = replies.Replies(answering, prompt)(asked, 9)
    for example, reply in zip(asked, found, strict=True):
        user = Turn("user", example.turns[0].content[:1])
        given = prompt(answering, Example("x", "dialog", (), (), turns=(user,), script="dialog"))
        ids = given.input_ids.tolist()
        may = rows - units - markers - pad
        heard = tokenizer.decode(by_hand(net, ids, 12, {newline, end}, may)).strip()
        assert reply.heard == heard
        if not heard:
            assert reply.error is not None and "the user's text is empty" in str(reply.error)
            continue
        ids += [*tokenizer(heard.lower()).input_ids, *tokenizer("\n### Agent\n").input_ids]
        may = rows - units - pad
        said = tokenizer.decode(
            by_hand(net, ids, 12, {tokenizer.convert_tokens_to_ids("<|correspond|>"), end}, may)
        ).strip()
        assert reply.said == said.replace("<|continue|>", "").strip()
        if reply.error is None:
            ids += tokenizer(f"{reply.said.lower()}<|correspond|>").input_ids
            sounds = by_hand(net, ids, 9, {newline}, units | {newline})
            first = tokenizer.convert_tokens_to_ids("<|unit0|>")
            assert reply.units == tuple(token - first for token in sounds)
    assert any(reply.error is None for reply in found)


def test_a_dialog_is_answered_with_a_wave(
    learnt: Path, decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = dialogs.corpus(tmp_path / "ask.jsonl", 2, 2)
    out = str(tmp_path / "out")
    command.synthesize([str(learnt), str(manifest), "--decoder", str(decoder), "--out", out, *FEW])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [Path(line[0]).name for line in lines] == ["d0.wav", "d1.wav"]
    for path, heard, said in lines:
        assert heard.startswith("hello") and said.startswith("hello")
        wave, rate = soundfile.read(path)
        assert rate == flows.RATE and len(wave) > 0
    with pytest.raises(UserError, match="reads no raw audio"):
        list(synthesize(learnt, [clip(tmp_path)], FEW, decoder=decoder, task="dialog"))
    (alone,) = synthesize(decoder, [str(dialogs.corpus(tmp_path / "one.jsonl", 1, 2))], FEW)
    assert "is a dialog: what is said in it is a language model's" in alone.error
    with pytest.raises(UserError, match="--speaker: task dialog"):
        synthesize(learnt, ["a.wav"], FEW, decoder=decoder, task="dialog", speaker="b.wav")
    with pytest.raises(UserError, match="a word: task dialog replies to clips"):
        synthesize(learnt, ["a word"], FEW, decoder=decoder, task="dialog")


def clip(folder: Path, seconds: float = 0.6) -> str:
    rng = np.random.default_rng(1)
    path = folder / "heard.wav"
    wave = 0.1 * rng.standard_normal(int(seconds * flows.RATE))
    soundfile.write(path, wave.astype(np.float32), flows.RATE)
    return str(path)


# -- voices --------------------------------------------------------------------------------------


def test_a_voice_is_spoken_in_by_a_model_of_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the language model and the decoder are given is what the models that hear make."""
    seen: dict[str, Any] = {}
    say, write = FlowModel.speak, CausalLM.generate

    def speak(self: FlowModel, prompts: Any, *more: Any) -> Any:
        seen["voices"] = [prompt.arrays["voice"][0][0] for prompt in prompts]
        seen["rows"] = [len(prompt.arrays["codes"][0]) for prompt in prompts]
        return say(self, prompts, *more)

    def generate(self: CausalLM, prompts: Any, *more: Any, **also: Any) -> list[str]:
        seen["asked"] = [self.tokenizer.decode(prompt.input_ids) for prompt in prompts]
        write(self, prompts, 1, **also)
        return ["<audio_3><audio_31>x<audio_5>"] * len(prompts)

    monkeypatch.setattr(FlowModel, "speak", speak)
    monkeypatch.setattr(CausalLM, "generate", generate)
    section = Model(**{**CAUSAL, "speech_units": 32, "unit_token": "<audio_{}>"})
    made = make_encoder(section, Data(), tmp_path)
    llm = export(build(section, Data(), made, 1), tmp_path / "llm")
    xvector = listeners.saved("xvector", tmp_path / "xvector")
    dac = listeners.saved("dac", tmp_path / "dac")
    decoder = flows.base(tmp_path, "one", speaker_width=12, codebooks=[32])
    heard = clip(tmp_path)
    makes = [
        f"speak.speech_tokens={{method: codec, model: {dac}, codebooks: 1}}",
        f"speak.speakers={{method: xvector, model: {xvector}}}",
    ]
    (one,) = clone(llm, heard, "what is heard", "to be said", [*FEW, *makes], decoder=decoder)
    assert not one.error and one.text == "to be said"
    assert seen["rows"] == [3] and one.seconds == pytest.approx(3 * 0.04)
    np.testing.assert_allclose(seen["voices"][0], embedding(xvector, heard), rtol=1e-3, atol=1e-5)
    told = "".join(f"<audio_{unit}>" for unit in codes(dac, heard))
    (asked,) = seen["asked"]
    assert f"speaker prompt text: \nwhat is heard\nspeaker audio tokens: \n{told}\n" in asked
    assert asked.endswith("\nto be said\n")
    voice = ["--speaker", heard, "--speaker-text", "what is heard", "--decoder", str(decoder)]
    out = str(tmp_path / "one.wav")
    command.synthesize([str(llm), "to be said", *voice, "--out", out, *FEW, *makes])
    wave, _ = soundfile.read(tmp_path / "one.wav")
    assert len(wave) == len(one.wave)
    with pytest.raises(UserError, match="--speaker-text: says what the clip of --speaker does"):
        synthesize(llm, ["x"], FEW, speaker_text="y", decoder=decoder)
    (silent,) = clone(llm, heard, "what is heard", "x", [*FEW, makes[0]], decoder=decoder)
    assert "has no speaker embedding" in silent.error


def codes(folder: Path, heard: str) -> list[int]:
    """Of the first codebook, by transformers alone."""
    from transformers import AutoFeatureExtractor, DacModel

    wave, rate = soundfile.read(heard, dtype="float32")
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    given = extractor(wave, sampling_rate=rate, return_tensors="pt")
    with torch.no_grad():
        found = DacModel.from_pretrained(folder).eval().encode(given["input_values"])
    return found.audio_codes[0, 0].tolist()


def embedding(folder: Path, heard: str) -> np.ndarray:
    """By transformers alone."""
    from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

    wave, rate = soundfile.read(heard, dtype="float32")
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    given = extractor(wave, sampling_rate=rate, return_tensors="pt")
    with torch.no_grad():
        net = AutoModelForAudioXVector.from_pretrained(folder).eval()
        return net(**given).embeddings[0].numpy()


def test_a_voice_is_gone_on_with_by_patches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sequence is that of speaking both texts with the clip's patches as its beginning, and
    the first patch that is said follows the clip's last."""
    section, data = Model(**patches.model()), Data(prompts={"tts": "Say:"})
    made = make_encoder(section, data, tmp_path)
    assert isinstance(made, PatchEncoder)
    folder = export(build(section, data, made, 1), tmp_path / "patches")
    heard = tmp_path / patches.clip(tmp_path, "a.wav", 4.4, 1)
    seen: dict[str, Any] = {}
    head = FlowHead.forward

    def forward(self: FlowHead, where: Any, units: Any, condition: Any, history: Any) -> Any:
        if not torch.is_grad_enabled():  # it speaks
            seen.setdefault("history", history.clone())
        return head(self, where, units, condition, history)

    monkeypatch.setattr(FlowHead, "forward", forward)
    overrides = ["speak.flow.steps=2", "speak.max_seconds=0.4"]
    (one,) = clone(folder, heard, "four two", "and one.", overrides)
    assert not one.error and 0 < one.seconds <= 0.4
    encoder = load(str(folder)).encoder
    wave, _ = soundfile.read(heard, dtype="float32")
    voice = Turn("system", ("four two", Audio(str(heard))))
    turns = (voice, Turn("user", ("and one.",)), Turn(ASSISTANT, (Audio("x"),)))
    asked = encoder.prompt(Example("x", "tts", (), (), turns=turns, script="clone"), [wave])
    spoken = Example("x", "tts", ("four two and one.",), (Audio(str(heard)),))
    whole = encoder.encode(spoken, [wave])
    np.testing.assert_array_equal(asked.input_ids, whole.input_ids)
    frames = whole.arrays["latents"][0]
    np.testing.assert_allclose(seen["history"][0].numpy(), frames[-patches.SIZE :], rtol=1e-5)


# -- a pair --------------------------------------------------------------------------------------


def test_a_pair_speaks_alone_as_its_two_models_do(tmp_path: Path) -> None:
    data = pairs.data(tmp_path / "corpus", lanes=1, tokens_per_batch=400)
    train = {"max_steps": 2, "precision": "fp32"}
    place = run(tmp_path / "run", data=data, model=pairs.model(), train=train)
    export_run(place, tmp_path / "pair")
    both = AutoModelForCausalLM.from_pretrained(tmp_path / "pair")
    both.llm.save_pretrained(tmp_path / "llm")
    load(str(place)).encoder.tokenizer.save_pretrained(tmp_path / "llm")
    both.flow.save_pretrained(tmp_path / "flow")
    folders = {"run": place, "export": tmp_path / "pair", "two": tmp_path / "llm"}
    found = {
        name: list(
            synthesize(
                folder, ["say 1", "x"], FEW, decoder=tmp_path / "flow" if name == "two" else None
            )
        )
        for name, folder in folders.items()
    }
    for one, again, apart in zip(*found.values(), strict=True):
        assert one.error == again.error == apart.error
        np.testing.assert_allclose(one.wave, apart.wave, atol=1e-3)
        np.testing.assert_allclose(again.wave, apart.wave, atol=1e-3)
