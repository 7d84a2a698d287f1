"""Qwen2-Audio's encoder over rows that are cut, against transformers' own over whole ones."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.qwen2_audio.configuration_qwen2_audio import Qwen2AudioEncoderConfig
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from raysft.families.audio_lm import cut

LIMIT = 200  # frames


def tower(attention: str = "sdpa") -> Qwen2AudioEncoder:
    config = Qwen2AudioEncoderConfig(
        num_mel_bins=12,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        d_model=32,
        max_source_positions=LIMIT // 2,
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    return Qwen2AudioEncoder(config)


def clips(lengths: list[int]) -> torch.Tensor:
    """[clips, mels, LIMIT]: noise, and another level behind each clip."""
    found = torch.randn(len(lengths), 12, LIMIT, generator=torch.Generator().manual_seed(1))
    for row, length in enumerate(lengths):
        found[row, :, length:] = -1.5 + 0.01 * row
    return found


def mask_of(of: Qwen2AudioEncoder, lengths: list[int], frames: int) -> torch.Tensor | None:
    """As the model makes it of its mask of frames."""
    positions = torch.tensor([(length - 1) // 2 + 1 for length in lengths])
    heard = torch.arange(frames // 2) < positions[:, None]
    return create_bidirectional_mask(
        config=of.config,
        inputs_embeds=torch.zeros(len(lengths), frames // 2, 1),
        attention_mask=heard.long(),
    )


def valid(made: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Embeddings that become audio tokens."""
    tokens = [((length - 1) // 2 + 1 - 2) // 2 + 1 for length in lengths]
    return torch.cat([row[:count] for row, count in zip(made, tokens, strict=True)])


LENGTHS = ([7], [LIMIT], [20, 21, 22, 23, 24, 25], [8, LIMIT - 1, 61, 9, 60, LIMIT - 2, LIMIT - 3])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_what_is_heard_is_that_of_whole_rows(lengths: list[int], attention: str) -> None:
    plain, ours = tower(attention), tower(attention)
    cut.attach(ours)
    expected = valid(
        plain(clips(lengths), attention_mask=mask_of(plain, lengths, LIMIT)).last_hidden_state,
        lengths,
    )
    frames = cut.frames_of(max(lengths), LIMIT)
    found = valid(
        ours(
            clips(lengths)[..., :frames], attention_mask=mask_of(ours, lengths, frames)
        ).last_hidden_state,
        lengths,
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, one), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_rows_are_no_longer_than_what_is_heard_and_layers_take_nothing_else() -> None:
    ours, seen, packed = tower(), [], []
    cut.attach(ours)
    ours.conv1.register_forward_pre_hook(lambda part, args: seen.append(tuple(args[0].shape)))
    for layer in ours.layers:
        layer.register_forward_pre_hook(lambda part, args: packed.append(tuple(args[0].shape)))
    lengths = [190, *[20] * 9, 12]
    ours(clips(lengths)[..., :192], attention_mask=mask_of(ours, lengths, 192))
    assert seen == [(1, 12, 192), (10, 12, 22)]
    assert packed == [(1, 95 + 9 * 10 + 6, 32)] * 2
