"""The tokenizer of a Speech2Text checkpoint, whose files transformers reads into a slow one alone.

`sentencepiece.bpe.model` has pieces with their scores, `vocab.json` the ids of the model: together
the fast tokenizer that says the same ids. Runs once, where a run starts; no package is needed but
`tokenizers`. An export has it as tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from struct import unpack
from typing import TYPE_CHECKING

from raysft.config.schema import Model
from raysft.data.text import load_tokenizer
from raysft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PIECES, VOCABULARY = "sentencepiece.bpe.model", "vocab.json"
UNIGRAM = 1  # of a model's types
NORMAL, USER_DEFINED = 1, 4  # of a piece's types: those that a text may become
SPACE = "\u2581"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
# Numbers of the fields of sentencepiece_model.proto.
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_MODEL_TYPE = 3
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE = 2, 3, 4, 5


def load(model: Model) -> PreTrainedTokenizerFast:
    """That of model.tokenizer, or of tokenizer.json, where there is one; else made of both files.

    Raises UserError where there is none, or the files are of another kind.
    """
    if model.tokenizer is not None or model.path is None or _file(model, "tokenizer.json"):
        return load_tokenizer(model, 0)
    pieces, vocabulary = _file(model, PIECES), _file(model, VOCABULARY)
    if pieces is None or vocabulary is None:
        return load_tokenizer(model, 0)  # which says that there is none
    settings = _file(model, "tokenizer_config.json")
    told = json.loads(settings.read_text(encoding="utf-8")) if settings else {}
    if told.get("do_upper_case"):
        raise UserError(
            f"model.path: {model.path}: tokenizer_config.json: do_upper_case: a tokenizer that "
            "writes capitals alone is not known here; name another in model.tokenizer"
        )
    try:
        known = json.loads(vocabulary.read_text(encoding="utf-8"))
        return made(pieces.read_bytes(), known)
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"model.path: {model.path}: {PIECES} and {VOCABULARY} make no tokenizer: {error}; "
            "name one in model.tokenizer"
        ) from None


def _file(model: Model, name: str) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(model.path, name, _raise_exceptions_for_missing_entries=False, **model.hub)
    return None if found is None else Path(found)


def made(pieces: bytes, ids: dict[str, int]) -> PreTrainedTokenizerFast:
    """A fast tokenizer. pieces: what sentencepiece has written. ids: of the model's tokens, which
    are numbered without gaps. Raises ValueError for other kinds of models."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as pre
    from transformers import PreTrainedTokenizerFast

    scores: dict[str, float] = {}
    trainer: dict[int, int | bytes] = {}
    rules: dict[int, int | bytes] = {}
    for number, content in _fields(pieces):
        if number == _PIECE and isinstance(content, bytes):
            piece = dict(_fields(content))
            text, score = piece[_TEXT], piece.get(_SCORE, b"\0\0\0\0")
            assert isinstance(text, bytes) and isinstance(score, bytes)
            if piece.get(_KIND, NORMAL) in (NORMAL, USER_DEFINED):
                scores[text.decode()] = unpack("<f", score)[0]
        elif number == _TRAINER and isinstance(content, bytes):
            trainer = dict(_fields(content))
        elif number == _NORMALIZER and isinstance(content, bytes):
            rules = dict(_fields(content))
    if trainer.get(_MODEL_TYPE, UNIGRAM) != UNIGRAM:
        raise ValueError("it is no unigram model")
    if any(not rules.get(key, 1) for key in (_DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE)):
        raise ValueError("it keeps spaces as they are")
    by_id = sorted(ids, key=lambda name: ids[name])
    if [ids[name] for name in by_id] != list(range(len(ids))):
        raise ValueError("its ids have gaps")
    if missing := scores.keys() - ids.keys():
        raise ValueError(f"{min(missing)!r} has no id")
    lowest = min(scores.values())
    table = [(name, scores.get(name, lowest)) for name in by_id]
    tokenizer = Tokenizer(models.Unigram(table, unk_id=ids[SPECIAL["unk_token"]]))
    charsmap = rules.get(_CHARSMAP)
    steps: list[normalizers.Normalizer] = []
    if isinstance(charsmap, bytes) and charsmap:
        steps.append(normalizers.Precompiled(charsmap))
    steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre.Metaspace(SPACE, prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(SPACE, prepend_scheme="always", split=False)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL.values()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message of protocol buffers, in order."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(content, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if size is None and kind == 2:
            size, at = _varint(content, at)
        if size is None or at + size > len(content):
            raise ValueError(f"{PIECES} is damaged")
        yield key >> 3, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    found = shift = 0
    while True:
        byte = content[at]
        found |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return found, at
