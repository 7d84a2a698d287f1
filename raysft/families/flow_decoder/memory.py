"""What a flow decoder keeps of a micro-batch until its backward pass: nothing is computed.

Counted in torch's own layers on a CPU, with all weights of a part trained, or none.
"""

from __future__ import annotations

from raysft.families.flow_decoder.config import FlowDecoderConfig
from raysft.families.flow_decoder.net import FlowDecoder

ROW_S = 10.0  # seconds of a row: attention by relative positions keeps scores of all its pairs


def kept(net: FlowDecoder, positions: int, width: int, checkpointing: bool) -> float:
    """Bytes of so many frames in rows of ROW_S. width: bytes of a number: 4, or 2 under autocast.
    checkpointing: of every layer its input alone, and all of one layer."""
    config = net.config
    assert config.width and config.depth and config.ffn
    # Of a layer: norms and what they give, queries and keys before and after they are turned,
    # values, attention, both inner sides of the feed-forward; of DiT what gates let through, too.
    layer = positions * width * ((11 if config.of_voicebox else 13.5) * config.width)
    layer += positions * width * 2 * config.ffn
    inputs = positions * width * config.width
    total = layer + config.depth * inputs if checkpointing else config.depth * layer
    trained = (p.requires_grad for name, p in net.named_parameters() if _before(name))
    if config.of_voicebox or not any(trained):
        return total
    blocks = config.encoder_blocks / config.upsample + config.encoder_up_blocks
    return total + (1 if checkpointing else blocks) * _block(config, positions, width)


def _block(config: FlowDecoderConfig, positions: int, width: int) -> float:
    """Of a block of the encoder, at the frames' rate."""
    row = min(positions, ROW_S * config.settings.frames_per_second)
    scores = positions * row * config.encoder_heads * (15 + 1.75 * width)
    return positions * width * (16.6 * config.encoder_width + 2.25 * config.encoder_ffn) + scores


def _before(name: str) -> bool:
    return name.startswith(("encoder.", "input_embedding."))
