"""The tokenizer of a model: where it is, its speech units, and one of bytes that is built in.

Stands under `text`: runs once, where a run starts. Costs a second of imports and, for 150,000
tokens, about another to read.

Without a padding token the end token stands in for it. That is safe here: padded positions are
masked by length and labels are set by position, so no end token is taken for padding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from raysft.config.schema import Model
from raysft.data import remote_code
from raysft.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

UNIT = "<|unit{}|>"


def load_tokenizer(model: Model, units: int) -> PreTrainedTokenizerFast:
    """The tokenizer of `model.tokenizer` or `model.path`, with `units` unit tokens added.

    Raises UserError where there is none, it has no fast form, or no end token.
    """
    name = model.tokenizer or model.path
    if name is None:
        raise UserError(
            "model.tokenizer: nothing given, and model.path, its default, is not set either: "
            "give a folder, a hub id, or `bytes` for the built-in byte tokenizer"
        )
    if model.tokenizer == "bytes":
        tokenizer = byte_tokenizer()
    else:
        from transformers import AutoTokenizer

        key = "model.tokenizer" if model.tokenizer else "model.path"
        try:
            revision = model.revision if name == model.path else None
            # Not mistral-common's, which is slow: transformers makes a fast one of tekken.json.
            tokenizer = AutoTokenizer.from_pretrained(
                name, mistral_format=False, **model.model_copy(update={"revision": revision}).hub
            )
            _name_tekken(tokenizer)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(
                f"{key}: no tokenizer could be loaded from {name!r}: {reason}"
            ) from None
        if not tokenizer.is_fast:
            raise UserError(
                f"{key}: {name!r} has only a slow tokenizer ({type(tokenizer).__name__}): "
                "convert it to a tokenizer.json, or name another one in model.tokenizer"
            )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.tokenizer: {name!r} has no end token, without which no answer can end: "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    add_units(tokenizer, units)
    return tokenizer


def _name_tekken(tokenizer: PreTrainedTokenizerBase) -> None:
    """Say which tokens of a tekken.json begin, end and pad, where none of its files does."""
    if not str(tokenizer.init_kwargs.get("vocab_file") or "").endswith("tekken.json"):
        return
    known = tokenizer.get_vocab()
    for kind, name in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"), ("unk", "<unk>")):
        if getattr(tokenizer, f"{kind}_token") is None and name in known:
            setattr(tokenizer, f"{kind}_token", name)


def unit_pattern(form: str) -> re.Pattern[str]:
    """What matches the unit tokens of `form` (`model.unit_token`), their number as group 1."""
    before, after = form.split("{}")
    return re.compile(f"{re.escape(before)}([0-9]+){re.escape(after)}")


def add_units(tokenizer: PreTrainedTokenizerFast, units: int, form: str = UNIT) -> list[int]:
    """Add `form` of 0 .. units - 1; those that are there already keep their ids.
    Returns the ids of the others."""
    from tokenizers import AddedToken

    # Not `special`: units in an answer must survive decoding with skip_special_tokens.
    names = [form.format(i) for i in range(units)]
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in names])
    return tokenizer.convert_tokens_to_ids([name for name in names if name not in known])


def add_markers(
    tokenizer: PreTrainedTokenizerFast, markers: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Add what stands before and after units, as control tokens: no text may hold them, and answers
    are decoded without. Returns their ids, and those of them that are new."""
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in markers])
    ids = [tokenizer.convert_tokens_to_ids(name) for name in markers]
    return ids, [i for i, name in zip(ids, markers, strict=True) if name not in known]


def new_to_model(
    model: Model, tokenizer: PreTrainedTokenizerFast, used: list[int], added: list[int]
) -> tuple[int, ...]:
    """Units and markers that the tokenizer beside the model's weights lacks: those `added` here, or
    those of all that are `used` that were in model.tokenizer before."""
    if model.path is None or model.tokenizer in (None, model.path):
        return tuple(added)
    try:
        own = load_tokenizer(model.model_copy(update={"tokenizer": None}), 0).get_vocab()
    except UserError:  # weights that came without a tokenizer: nothing in them is known as a unit
        own = {}
    names = tokenizer.convert_ids_to_tokens(used)
    return tuple(i for i, name in zip(used, names, strict=True) if name not in own)


def unit_ids(tokenizer: PreTrainedTokenizerFast, form: str = UNIT) -> np.ndarray:
    """int64 [N]: the token id of each unit, N being the number of units the tokenizer has."""
    pattern = unit_pattern(form)
    found = {
        int(match[1]): token
        for name, token in tokenizer.get_vocab().items()
        if (match := pattern.fullmatch(name)) and form.format(int(match[1])) == name
    }
    missing = next((unit for unit in range(len(found)) if unit not in found), None)
    if missing is not None:
        raise UserError(
            f"model.tokenizer: has {form.format(max(found))} but no {form.format(missing)}: "
            "unit tokens must be numbered without gaps"
        )
    return np.array([found[unit] for unit in range(len(found))], np.int64)


class HoldsTokenizer:
    """Something that has a transformers tokenizer, and travels to data tasks without making it
    there: it takes a second of imports to unpickle."""

    _tokenizer: PreTrainedTokenizerFast | bytes

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The transformers tokenizer."""
        if isinstance(self._tokenizer, bytes):
            self._tokenizer = remote_code.unpacked(self._tokenizer)
        return self._tokenizer

    def __getstate__(self) -> dict[str, object]:
        state = dict(self.__dict__)
        if not isinstance(self._tokenizer, bytes):
            state["_tokenizer"] = remote_code.packed(self._tokenizer, "AutoTokenizer")
        return state


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes (id = byte) and `<|bos|>`, `<|eos|>`, `<|pad|>`: 259 tokens.

    Nothing is out of its vocabulary. It is saved by save_pretrained like any other.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # The byte-level alphabet: printable bytes stand for themselves, the others for the code
    # points from 256 on, in order.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(plain))
    alphabet = {byte: chr(byte) for byte in plain}
    alphabet |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE({alphabet[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = {f"{name}_token": f"<|{name}|>" for name in ("bos", "eos", "pad")}
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in specials.values()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


def last_token(backend: Tokenizer, text: str) -> tuple[int, int]:
    """Where a text can be cut, so that the ids of whatever it begins are those of what is before
    and those of the rest: ids before it, and characters. (0, 0): nowhere.

    That is before the last added token in it: a tokenizer looks for those first, and each stretch
    between two is read for itself. Not one that takes in what is beside it, that is looked for in
    normalised text, or that is part of another.
    """
    if backend.padding or backend.truncation:
        return 0, 0
    added = backend.get_added_tokens_decoder()
    encoding = backend.encode(text, add_special_tokens=False)
    for place in reversed(range(len(encoding.ids))):
        token = added.get(encoding.ids[place])
        if token is None or token.normalized or token.lstrip or token.rstrip or token.single_word:
            continue
        start, stop = encoding.offsets[place]
        if text[start:stop] != token.content:
            continue
        if any(token.content in one.content for one in added.values() if one is not token):
            continue
        rest = backend.encode(text[start:], add_special_tokens=False).ids
        return (place, start) if encoding.ids[place:] == rest else (0, 0)
    return 0, 0


def template_of(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The tokenizer's chat template; of several, its default. UserError where none is that."""
    found = tokenizer.chat_template
    if not isinstance(found, dict):
        return found
    if "default" not in found:
        raise UserError(
            f"data.template: the tokenizer has chat templates for {', '.join(sorted(found))}, and "
            "none is the default: name one so in its files, or set data.template to plain"
        )
    return found["default"]
