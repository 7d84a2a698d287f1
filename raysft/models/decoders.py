"""The proof of `proof`, for models whose decoder attends to what an encoder has read.

On a small copy, whose decoder is given random states in place of an encoder's: rows padded on the
right, and prompts of one length answered together, each against itself alone. Packed rows are out
of the question: all tokens of a row attend to one clip. Prompts of several lengths would need
positions and a mask that are not given. That an encoder reads each clip alone is up to its family.
"""

from __future__ import annotations

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin

from raysft.data.encode.verdict import Verdict
from raysft.losses.chunked import Heard, heard_width
from raysft.models import copies

LENGTHS = (9, 4, 6)
STATES = 7  # of an encoder
PROMPT, ANSWER = 4, 5
LIMIT = 1e-3  # of the largest logit: as in `proof`
TABLES = ("max_target_positions", "max_position_embeddings")


def prove(net: PreTrainedModel) -> Verdict:
    """The verdict on encoder-decoders like `net`, whose weights do not matter."""
    kind = net.config.model_type
    packed = "all tokens of a row attend to one clip"
    table = _table(net.config)
    try:
        small = copies.small_copy(net)
    except ValueError as error:
        learned = positions(net.config)
        return Verdict(kind, packed=packed, answers="length", learned=learned, copied=str(error))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        size = small.config.vocab_size - 40  # special tokens are the last ones
        rows = torch.randint(size, (len(LENGTHS), max(LENGTHS)))
        states = torch.randn(len(LENGTHS), STATES, heard_width(small))
        causal, padded = _rows(small, rows, states)
        answers = _answers(small, rows[:, :PROMPT], states)
        learned = _learned(net, small, table)
    return Verdict(
        kind, causal, padded, packed, answers="length" if answers else "one", learned=learned
    )


def positions(config: PreTrainedConfig) -> int | None:
    """The decoder's number of positions, as its config has it."""
    table = _table(config)
    return None if table is None else getattr(config.get_text_config(), table)


def _table(config: PreTrainedConfig) -> str | None:
    """The name of the decoder's number of positions in its config."""
    text = config.get_text_config()
    return next((key for key in TABLES if isinstance(getattr(text, key, None), int)), None)


def _learned(net: PreTrainedModel, small: PreTrainedModel, table: str | None) -> int | None:
    """How many positions the decoder of `net` has, where its copy fails beyond its own."""
    if table is None:
        return None
    most = getattr(small.config.get_text_config(), table)
    row, states = torch.zeros(1, most + 1, dtype=torch.long), torch.randn(1, 1, heard_width(small))
    _logits(small, row[:, :-1], states)
    try:
        _logits(small, row, states)
    except (IndexError, RuntimeError):
        return positions(net.config)
    return None


def _rows(
    small: PreTrainedModel, rows: torch.Tensor, states: torch.Tensor
) -> tuple[str | None, str | None]:
    """Whether a token sees those behind it, and whether a padded row differs from itself alone."""
    together = _logits(small, rows, states)
    causal = padded = None
    for row, length in enumerate(LENGTHS):
        alone = _logits(small, rows[row : row + 1, :length], states[row : row + 1])[0]
        if not _alike(together[row, :length], alone):
            padded = f"a row of {length} tokens beside others differs from itself alone"
        changed = rows[row : row + 1, :length].clone()
        changed[0, -1] = (changed[0, -1] + 1) % (small.config.vocab_size - 40)
        if not _alike(_logits(small, changed, states[row : row + 1])[0, :-1], alone[:-1]):
            causal = "every position sees those after it"
    return causal, None if causal else padded


def _answers(small: PreTrainedModel, prompts: torch.Tensor, states: torch.Tensor) -> bool:
    """Whether prompts of one length are answered together as each alone."""
    together = _generated(small, prompts, states)
    alone = [
        _generated(small, prompts[row : row + 1], states[row : row + 1])
        for row in range(len(prompts))
    ]
    return _alike(together, torch.cat(alone))


def _logits(small: PreTrainedModel, rows: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return small(encoder_outputs=Heard(states), decoder_input_ids=rows, use_cache=False).logits


def _generated(small: PreTrainedModel, prompts: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Logits [R, new, V] of answers of ANSWER tokens."""
    small.generation_config = GenerationConfig(
        max_new_tokens=ANSWER,
        min_new_tokens=ANSWER,
        eos_token_id=small.config.vocab_size - 1,
        pad_token_id=0,
        decoder_start_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    found = GenerationMixin.generate(
        small, encoder_outputs=Heard(states), decoder_input_ids=prompts
    )
    assert not isinstance(found, torch.Tensor) and found.logits is not None  # asked for above
    return torch.stack(found.logits, 1)


def _alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() < LIMIT * expected.abs().max())
