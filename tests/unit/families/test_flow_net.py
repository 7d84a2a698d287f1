"""Nets of flow decoders: their parts, and that each row is computed as it would be alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from raysft.config.schema import Model
from raysft.errors import UserError
from raysft.families.flow_decoder.config import FlowDecoderConfig
from raysft.families.flow_decoder.net import FlowDecoder
from raysft.families.flow_decoder.settings import config_of
from raysft.models.meta import on_meta
from tests.support import flows

KINDS = ("dit", "one", "voicebox")


def net_of(kind: str) -> FlowDecoder:
    """Every weight random: a new net lets little through."""
    settings = flows.model(kind)["config"]
    net = FlowDecoder(FlowDecoderConfig(**{k: v for k, v in settings.items() if k != "model_type"}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def inputs_of(kind: str, rows: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch; what is padding holds large numbers, which must not matter."""
    random = torch.Generator().manual_seed(seed)
    count, most = len(rows), max(rows)
    books = 2 if kind == "dit" else 1
    shape = (count, 2 * most, flows.MEL["bins"])
    known = torch.tensor(rows)
    found = {
        "input_ids": torch.randint(0, 14, (count, most, books), generator=random),
        "rows": known,
        "frames": 2 * known,
        "at": torch.randn(shape, generator=random),
        "units": torch.randint(0, 1 << 24, (count,), generator=random),
        "prompt": torch.randn(shape, generator=random),
        "dropped": torch.tensor([number == 1 for number in range(count)]),
    }
    for row, length in enumerate(rows):
        found["at"][row, 2 * length :] = 1e3
        found["prompt"][row, 2 * length :] = -1e3
    if kind == "voicebox":
        found["rows_of"] = torch.arange(2 * most).div(2, rounding_mode="floor").expand(count, -1)
    else:
        found["voice"] = torch.randn(count, flows.SPEAKER, generator=random)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_a_batch_is_what_it_is_alone(kind: str) -> None:
    net, rows = net_of(kind), [3, 7, 1, 5]
    batch = inputs_of(kind, rows)
    with torch.no_grad():
        together = net(**batch).velocity
        for row, length in enumerate(rows):
            own = {name: value[row : row + 1] for name, value in batch.items()}
            for name in ("at", "prompt", "rows_of"):
                if name in own:
                    own[name] = own[name][:, : 2 * length]
            own["input_ids"] = own["input_ids"][:, :length]
            alone = net(**own).velocity[0]
            found = together[row, : 2 * length]
            assert found.abs().max() > 0.1
            torch.testing.assert_close(found, alone, rtol=0, atol=1e-5 * alone.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_dropped_does_not_matter_and_what_is_given_does(kind: str) -> None:
    """Of the second row all conditions are left out, of the first none."""
    net = net_of(kind)
    batch = inputs_of(kind, [4, 4])
    with torch.no_grad():
        before = net(**batch).velocity
        for name in ("input_ids", "prompt", "voice"):
            if name not in batch:
                continue
            other = dict(batch)
            other[name] = inputs_of(kind, [4, 4], seed=9)[name]
            after = net(**other).velocity
            assert (after[0] - before[0]).abs().max() > 1e-3, name
            torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_net_says_nothing_and_learns_at_once(kind: str) -> None:
    settings = {k: v for k, v in flows.model(kind)["config"].items() if k != "model_type"}
    net = FlowDecoder(FlowDecoderConfig(**settings))
    found = net(**inputs_of(kind, [3, 5])).velocity
    assert not found.any()
    for name, parameter in net.named_parameters():
        silent = name.startswith("decoder.out") or ".steer." in name or name.endswith("bias")
        assert parameter.any() != silent or "norm" in name or "_bias" in name, name
    (found - 1).square().sum().backward()
    assert net.decoder.out.weight.grad is not None and net.decoder.out.weight.grad.any()


def test_a_speaker_is_a_direction() -> None:
    net, batch = net_of("dit"), inputs_of("dit", [4, 2])
    with torch.no_grad():
        before = net(**batch).velocity
        after = net(**{**batch, "voice": 7 * batch["voice"]}).velocity
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_frames_come_of_the_rows_around_them_and_of_three_ahead() -> None:
    """Without attention, what a change of one row of codes reaches is known: its own frames, and
    those of the rows that look ahead to it or behind it."""
    settings = {k: v for k, v in flows.model("one")["config"].items() if k != "model_type"}
    settings |= {"encoder_blocks": 0, "encoder_up_blocks": 0}
    net = FlowDecoder(FlowDecoderConfig(**settings)).eval()
    embedded = torch.randn(1, 12, flows.SIZES["unit_width"])
    mask = torch.ones(1, 12, dtype=torch.bool)
    other = embedded.clone()
    other[0, 6] += 1.0
    with torch.no_grad():
        changed = (net.encoder(other, mask) - net.encoder(embedded, mask)).abs().amax(-1)[0] > 1e-6
    # Row n sees n..n+3, of which the two before it are seen too: so 3 is the first to see 6, and 8
    # the last. A frame sees the four frames before it: those of two more rows.
    frames = changed.nonzero().ravel().tolist()
    assert (frames[0], frames[-1]) == (2 * 3, 2 * 8 + 1 + 4)


def _linear(given: int, made: int) -> int:
    return given * made + made


def test_parts_have_the_parameters_that_the_published_shapes_have() -> None:
    """Step-Audio's, and USDM's, counted by hand from the shapes."""
    with on_meta():
        step, usdm = (FlowDecoder(FlowDecoderConfig(estimator=e)) for e in ("dit", "voicebox"))
    d, ffn, bins = 512, 2048, 80
    norm = 2 * d
    entry = _linear(d, d) + norm
    attention = 4 * _linear(d, d) + d * d + 2 * d  # of positions; content and position bias
    block = attention + _linear(d, ffn) + _linear(ffn, d) + 2 * norm
    convs = (d * d * 4 + d) + (d * d * 3 + d) + (d * d * 5 + d)
    dit_block = 4 * _linear(d, d) + _linear(d, ffn) + _linear(ffn, d) + _linear(d, 6 * d)
    time = _linear(256, d) + _linear(d, d)
    assert parameters(step) == {
        "input_embedding": 5121 * 256,
        "encoder": 2 * entry + convs + 10 * block + norm,
        "encoder_proj": _linear(d, bins),
        "spk_embed_affine_layer": _linear(192, bins),
        "decoder": time + _linear(320, d) + 16 * dit_block + _linear(d, 2 * d) + _linear(d, bins),
    }
    w, inner = 1024, 4096
    box = 4 * _linear(w, w) + _linear(w, inner) + _linear(inner, w) + 4 * w
    positions = 2 * (w * (w // 16) * 31 + w)
    assert parameters(usdm) == {
        "input_embedding": 10001 * w,
        "decoder": _linear(256, w)
        + _linear(w, w)
        + _linear(2 * bins + w, w)
        + positions
        + 24 * box
        + 2 * w
        + _linear(w, bins),
    }


def parameters(net: FlowDecoder) -> dict[str, int]:
    return {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_loaded_as_it_was_saved(kind: str, tmp_path: Path) -> None:
    net, batch = net_of(kind), inputs_of(kind, [3, 2])
    net.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is FlowDecoder
    assert loaded.config.settings == net.config.settings
    with torch.no_grad():
        assert torch.equal(loaded(**batch).velocity, net(**batch).velocity)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    found = []
    for checkpointing in (False, True):
        net, batch = net_of("dit"), inputs_of("dit", [3, 5])
        net.train()
        for part in net.modules():
            if hasattr(part, "dropout"):
                part.dropout = 0.0
        if checkpointing:
            net.gradient_checkpointing_enable({"use_reentrant": False})
            assert net.decoder.blocks[0].gradient_checkpointing
        net(**batch).velocity[0, :6].square().sum().backward()
        found.append({name: p.grad for name, p in net.named_parameters()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"estimator": "unet"}, "model.config.estimator: unet, expected dit or voicebox"),
        ({"codebooks": []}, "model.config.codebooks"),
        ({"codebooks": [4, 5, 6]}, "model.config.codebooks"),
        ({"estimator": "voicebox", "codebooks": [4, 5]}, "but voicebox reads one codebook"),
        ({"width": 30}, "model.config.width: 30 cannot be cut into 8"),
        ({"upsample": 4}, "model.config.upsample: 4 frames for each of 25 tokens a second"),
        ({"mel": {"preset": "usdm"}}, "the mel has 86.1328 frames a second"),
        ({"mel": {"fmax": 9e9}}, "model.config.mel: fmin 0 Hz to fmax 9e+09 Hz"),
        ({"mel": {"hops": 3}}, "model.config.mel.hops"),
        ({"training_cfg_rate": 1.5}, "model.config.training_cfg_rate: 1.5"),
        ({"tokens_per_second": 0}, "model.config.tokens_per_second: 0"),
        ({"wdith": 16}, "model.config.wdith: unknown key"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        config_of(Model(config={"model_type": "raysft_flow_decoder", **given}))
    assert said in str(error.value)
    assert "\n" not in str(error.value)
