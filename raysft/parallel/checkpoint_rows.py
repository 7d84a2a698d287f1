"""Rows of the weights that a checkpoint of transformers holds, without reading the rest of it.

Names and conversions (experts that are stacked, projections that are cut apart) are transformers'
own: it is given the tensors that make a weight, of those that may be read by row only these rows,
and a model on meta to put the result into.

Costs the checkpoint's names and shapes once; then the bytes that are asked for. What a conversion
makes of whole tensors is read whole, weight by weight.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

CHUNK_BYTES = 256 * 2**20  # that are read before they are handed over
COLUMNS = 512  # of a table that is looked at as a whole


class Slice(Protocol):
    """A tensor in a file of safetensors; what is indexed is read."""

    def get_shape(self) -> list[int]:
        """Of all of it."""
        ...

    def __getitem__(self, index: object) -> torch.Tensor: ...


Tensors = dict[str, "Slice | _Rows | torch.Tensor"]  # what transformers loads, by name in the files
Slices = dict[str, Slice]


@dataclass
class Want:
    """Rows of a weight. take: is given them [stop - start, ...] on the CPU, in `dtype`."""

    key: str
    start: int
    stop: int
    dtype: torch.dtype
    take: Callable[[torch.Tensor], object]


@dataclass
class _Source:
    """Tensors of a checkpoint, by name, that make one weight or several (`makes`).

    patterns: of the conversion, each tensor's; converter: None where a weight is a tensor as it is.
    """

    names: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    converter: WeightConverter | None = None
    makes: set[str] = field(default_factory=set)


class _Rows:
    """Some rows of a tensor in a file; transformers reads it as `tensor[...]`."""

    def __init__(self, source: Slice, start: int, stop: int) -> None:
        self._source, self._start, self._stop = source, start, stop

    def __getitem__(self, _all: object) -> torch.Tensor:
        return self._source[self._start : self._stop]


class CheckpointRows:
    """The matrices of one model in the files of its checkpoint.

    info: what lacks and what does not fit, as transformers says it when it loads.
    """

    def __init__(
        self, net: PreTrainedModel, files: Sequence[str], settings: LoadStateDictConfig
    ) -> None:
        """net: on meta, nothing tied yet; its vectors and buffers become real. settings: by which
        transformers would load it."""
        self._files, self._settings = list(files), settings
        self._sources: list[_Source] = []
        self._of: dict[str, _Source] = {}
        with self._open() as tensors:
            empty: Tensors = {
                name: torch.empty(tuple(found.get_shape()), device="meta")
                for name, found in tensors.items()
            }
            self.info = self._load(net, empty, device="meta")
            self._find_sources(net, empty)
            names = [
                name
                for source in self._sources
                if any(_is_small(net, made) for made in source.makes)
                for name in source.names
            ]
            if names:
                self._load(net, {name: tensors[name] for name in names})
            self._unequal_ties(net, tensors)
        # The plain model's tree of names, whatever becomes of the model itself.
        self._carrier = copy.deepcopy(net)
        self._shapes = dict(net.named_parameters())

    def __contains__(self, key: str) -> bool:
        return key in self._of

    def shape(self, key: str) -> torch.Size:
        """Of a weight, as the checkpoint has it."""
        return self._shapes[key].shape

    def read(self, wants: Sequence[Want]) -> None:
        """Read rows of weights, in any order, about CHUNK_BYTES at a time.

        Raises ValueError where tensors cannot be converted.
        """
        batch: list[Want] = []
        size = 0
        with self._open() as tensors:
            for want in self.in_order(wants):
                own = (want.stop - want.start) * self._shapes[want.key][0].numel()
                own *= want.dtype.itemsize
                full = batch and size + own > CHUNK_BYTES
                if (full and self._of[batch[-1].key] is not self._of[want.key]) or any(
                    want.key == other.key for other in batch
                ):
                    self._hand_over(batch, tensors)
                    batch, size = [], 0
                batch.append(want)
                size += own
            self._hand_over(batch, tensors)

    def in_order(self, wants: Sequence[Want]) -> list[Want]:
        """`wants` as `read` gives them: the same on every worker."""
        order = {id(source): at for at, source in enumerate(self._sources)}
        return sorted(wants, key=lambda want: (order[id(self._of[want.key])], want.key))

    def columns(self, key: str) -> Iterator[torch.Tensor]:
        """All rows of a matrix in float32, some columns at a time."""
        (name,) = self._of[key].names
        width = self.shape(key)[1]
        with self._open() as tensors:
            for at in range(0, width, COLUMNS):
                yield tensors[name][:, at : at + COLUMNS].float()

    def _hand_over(self, wants: list[Want], tensors: Slices) -> None:
        given: Tensors = {}
        cut: set[str] = set()  # weights of which only the rows that are wanted are read
        for want in wants:
            if want.start >= want.stop:
                want.take(torch.empty((0, *self.shape(want.key)[1:]), dtype=want.dtype))
                continue
            parts = self._by_row(want, tensors)
            if parts is not None:
                cut.add(want.key)
            given |= parts or {name: tensors[name] for name in self._of[want.key].names}
            rows = want.stop - want.start if want.key in cut else self.shape(want.key)[0]
            shape = (rows, *self.shape(want.key)[1:])
            self._put(want.key, torch.empty(shape, dtype=want.dtype, device="meta"))
        if not given:
            return
        info = self._load(self._carrier, given)
        if problems := [*info.conversion_errors, *info.mismatched_keys]:
            raise ValueError(f"tensors of the checkpoint cannot be converted: {problems[0]}")
        for want in wants:
            if want.start < want.stop:
                value = self._carrier.get_parameter(want.key).detach()
                want.take(value if want.key in cut else value[want.start : want.stop])
        for want in wants:  # a conversion makes weights beside the one that is wanted
            for key in self._of[want.key].makes:
                self._put(key, self._shapes[key].detach())

    def _by_row(self, want: Want, tensors: Slices) -> Tensors | None:
        """What makes the rows of `want` and no others; None: all of it has to be read."""
        source = self._of[want.key]
        if source.converter is None:
            (name,) = source.names
            return {name: _Rows(tensors[name], want.start, want.stop)}
        counts = {pattern: source.patterns.count(pattern) for pattern in source.patterns}
        stacked = set(counts.values()) == {self.shape(want.key)[0]}
        if len(source.makes) > 1 or not stacked or not _stacks(source.converter):
            return None
        seen = dict.fromkeys(counts, 0)
        found: Tensors = {}
        for name, pattern in zip(source.names, source.patterns, strict=True):
            if want.start <= seen[pattern] < want.stop:
                found[name] = tensors[name]
            seen[pattern] += 1
        return found

    def _put(self, key: str, value: torch.Tensor) -> None:
        path, _, name = key.rpartition(".")
        holder = self._carrier.get_submodule(path)
        holder._parameters[name] = nn.Parameter(value, requires_grad=False)

    @contextmanager
    def _open(self) -> Iterator[Slices]:
        found: Slices = {}
        with ExitStack() as stack:
            for file in self._files:
                opened = stack.enter_context(safe_open(file, "pt", device="cpu"))
                # A list: it is no mapping.
                found |= {name: opened.get_slice(name) for name in list(opened.keys())}
            yield found

    def _load(
        self, net: PreTrainedModel, tensors: Tensors, device: str = "cpu"
    ) -> LoadStateDictInfo:
        settings = dataclasses.replace(self._settings, device_map={"": device})
        info, _ = convert_and_load_state_dict_in_model(net, tensors, settings, None)
        return info

    def _find_sources(self, net: PreTrainedModel, empty: Tensors) -> None:
        mapping = self._settings.weight_mapping or []
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {p: entry for entry in converters for p in entry.source_patterns}
        prefix, known = net.base_model_prefix, net.state_dict()
        by_first: dict[str, _Source] = {}
        for name in sorted(empty, key=dot_natural_key):  # in which transformers puts them together
            first, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if first not in known and name in known:
                first, pattern = rename_source_key(name, [], [], prefix, known)
            if first not in known:
                continue
            source = by_first.setdefault(first, _Source(makes={first}))
            if pattern is not None:
                source.converter = by_pattern[pattern]
            source.names.append(name)
            source.patterns.append(pattern or name)
        for source in by_first.values():
            if source.converter is not None and len(source.converter.target_patterns) > 1:
                given = {name: empty[name] for name in source.names}
                source.makes |= known.keys() - self._load(net, given, "meta").missing_keys
            self._of |= dict.fromkeys(source.makes, source)
        self._sources = list(by_first.values())

    def _unequal_ties(self, net: PreTrainedModel, tensors: Slices) -> None:
        """Of weights that are to be one, but are both there: one, if they are equal.

        transformers compares them as they are loaded; here neither is.
        """
        lacking = self.info.missing_keys
        for target, source in list(net.all_tied_weights_keys.items()):
            if {target, source} & lacking or not {target, source} <= self._of.keys():
                continue
            if self._equal(target, source, tensors):
                lacking.add(target)
            else:
                net.all_tied_weights_keys.pop(target)

    def _equal(self, one: str, other: str, tensors: Slices) -> bool:
        if self._of[one].converter is not None or self._of[other].converter is not None:
            return False
        (of_one,), (of_other,) = self._of[one].names, self._of[other].names
        first, second = tensors[of_one], tensors[of_other]
        shape = first.get_shape()
        if shape != second.get_shape():
            return False
        step = max(1, CHUNK_BYTES // (4 * max(1, shape[-1])))
        return all(
            torch.equal(first[at : at + step], second[at : at + step])
            for at in range(0, shape[0], step)
        )


def _is_small(net: PreTrainedModel, name: str) -> bool:
    value = net.get_parameter_or_buffer(name)
    return not isinstance(value, nn.Parameter) or value.ndim < 2


def _stacks(converter: WeightConverter) -> bool:
    """Whether each row of the result is made of one tensor of each pattern."""
    first, *rest = converter.operations
    stacks = isinstance(first, MergeModulelist) and first.dim == 0
    return stacks and all(isinstance(op, Concatenate) and op.dim > 0 for op in rest)
