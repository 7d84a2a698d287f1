"""Weights that a model has places for, and that are read when a strategy has cut them up: of each
matrix a worker reads the rows that it keeps.

Under `deferring` a model is built as from `model.path`, but its matrices are stand-ins: of the
right shape and type, one number in memory, which is no number (NaN), so that nothing can be made
of them unseen. What has fewer than two dimensions, and buffers, are real at once. A strategy asks
which stand-ins it has (`places`) and has their rows read (`read`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from raysft.parallel.checkpoint_rows import CheckpointRows, Want

_state = threading.local()
_ATTRIBUTE = "raysft_unread"


@contextmanager
def deferring(wanted: bool = True) -> Iterator[None]:
    """Models that are built in here from a path have stand-ins for their matrices."""
    before = asked()
    _state.asked = wanted
    try:
        yield
    finally:
        _state.asked = before


def asked() -> bool:
    """Whether matrices are to be read later."""
    return getattr(_state, "asked", False)


def of(module: nn.Module) -> Unread | None:
    """What is not read yet of the model that `module` is, or holds; None: nothing."""
    for part in module.modules():
        found: Unread | None = getattr(part, _ATTRIBUTE, None)
        if found is not None:
            return found
    return None


def forget(module: nn.Module) -> None:
    """All of the model in `module` has been read."""
    for part in module.modules():
        vars(part).pop(_ATTRIBUTE, None)


@contextmanager
def reading_later() -> Iterator[None]:
    """`from_pretrained` finds out what there is to read, and reads vectors and buffers only.

    For all threads of the process: transformers has one place where it reads.
    """
    own = PreTrainedModel._load_pretrained_model

    def load(
        model: PreTrainedModel,
        state_dict: object,
        checkpoint_files: Sequence[str],
        load_config: LoadStateDictConfig,
        expected_keys: object = None,
    ) -> tuple[LoadStateDictInfo, None]:
        rows = CheckpointRows(model, checkpoint_files, load_config)
        for parameter in model.parameters():
            vars(parameter)["_is_hf_initialized"] = True
        setattr(model, _ATTRIBUTE, Unread(rows))
        return rows.info, None

    PreTrainedModel._load_pretrained_model = staticmethod(load)
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = staticmethod(own)


@dataclass(frozen=True)
class Place:
    """Where the content of a parameter is. key: its name in the plain model. first: the row there
    that is the parameter's first."""

    key: str
    first: int = 0


class Unread:
    """The matrices of one model whose content is in a checkpoint."""

    def __init__(self, rows: CheckpointRows) -> None:
        self._rows = rows
        self._grown: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {}
        self._new: dict[str, torch.Tensor] = {}
        self._places: dict[int, tuple[Place, nn.Parameter]] = {}  # which keeps its id

    def grow(self, table: nn.Parameter, net: nn.Module, make: Callable[..., torch.Tensor]) -> None:
        """`table`, of `net`, has rows beyond those of the checkpoint. make: of mean and spread [H]
        of the old ones the new [n, H]."""
        self._grown[self._keys(net)[id(table)]] = make

    def stand_in(self, net: nn.Module) -> None:
        """Give `net`, whose matrices are on meta, stand-ins for them."""
        keys = self._keys(net)

        def made(_name: str, parameter: nn.Parameter) -> nn.Parameter | None:
            if not parameter.is_meta:
                return None
            stand = _stand_in(parameter, parameter.shape)
            return self._at(stand, Place(keys[id(parameter)]))

        replace(net, made)

    def part(self, parameter: nn.Parameter, first: int, rows: int) -> nn.Parameter:
        """A stand-in for `rows` rows of a stand-in, from `first` on."""
        place = self._places[id(parameter)][0]
        part = _stand_in(parameter, torch.Size((rows, *parameter.shape[1:])))
        return self._at(part, Place(place.key, place.first + first))

    def copies(self, module: nn.Module, copy: nn.Module) -> None:
        """Give `copy`, a copy of `module`, stand-ins where that has them."""
        for holder, own in zip(copy.modules(), module.modules(), strict=True):
            for name, parameter in own.named_parameters(recurse=False):
                if is_stand_in(parameter):
                    part = self.part(parameter, 0, parameter.shape[0])
                    part.requires_grad_(getattr(holder, name).requires_grad)
                    setattr(holder, name, part)

    def realise(self, module: nn.Module) -> None:
        """Read now what of `module` is a stand-in."""
        for parameter in module.parameters():
            if is_stand_in(parameter):
                rows = self.rows(parameter, range(parameter.shape[0]))
                parameter.data = rows.to(parameter.dtype)

    def rows(self, parameter: nn.Parameter, at: Sequence[int]) -> torch.Tensor:
        """Rows `at` of a stand-in, in float32."""
        found: list[torch.Tensor] = []
        low, high = min(at), max(at) + 1
        place = self._places[id(parameter)][0]
        want = Want(place.key, place.first + low, place.first + high, torch.float32, found.append)
        self.read([want])
        return found[0][torch.as_tensor(at) - low]

    def places(self, module: nn.Module) -> dict[str, Place]:
        """Name of each stand-in in `module`, which is around the model, and where it is."""
        found = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if is_stand_in(parameter):
                found[name] = self._places[id(parameter)][0]
            elif parameter.is_floating_point() and bool(parameter.isnan().any()):
                raise ValueError(f"{name} was made of weights that are not read yet")
        return found

    def read(self, wants: Sequence[Want]) -> None:
        """As `CheckpointRows.read`, with the rows of tables that have grown."""
        self._rows.read([self._old(want) if want.key in self._grown else want for want in wants])

    def in_order(self, wants: Sequence[Want]) -> list[Want]:
        """As `CheckpointRows.in_order`."""
        return self._rows.in_order(wants)

    def _old(self, want: Want) -> Want:
        old = self._rows.shape(want.key)[0]
        if want.stop <= old:
            return want

        def take(rows: torch.Tensor) -> None:
            new = self._new_rows(want.key)[max(want.start, old) - old : want.stop - old]
            want.take(torch.cat([rows, new.to(want.dtype)]))

        return Want(want.key, min(want.start, old), old, want.dtype, take)

    def _new_rows(self, key: str) -> torch.Tensor:
        if key not in self._new:
            parts = [(columns.mean(0), columns.std(0)) for columns in self._rows.columns(key)]
            means, spreads = (torch.cat(part) for part in zip(*parts, strict=True))
            self._new[key] = self._grown[key](means, spreads)
        return self._new[key]

    def _keys(self, net: nn.Module) -> dict[int, str]:
        """By id of a parameter of `net`, the first of its names that the checkpoint has."""
        named = list(net.named_parameters(remove_duplicate=False))
        return {id(own): name for name, own in reversed(named) if name in self._rows}

    def _at(self, parameter: nn.Parameter, place: Place) -> nn.Parameter:
        self._places[id(parameter)] = (place, parameter)
        return parameter


def is_stand_in(parameter: torch.Tensor) -> bool:
    """Whether a parameter has a shape, but no content yet."""
    return parameter.ndim > 1 and not any(parameter.stride()) and parameter.numel() > 1


def cast(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Store a parameter in `dtype`; a stand-in stays one."""
    if is_stand_in(parameter):
        parameter.data = _nothing(parameter.shape, dtype)
    else:
        parameter.data = parameter.data.to(dtype)


def to_meta(module: nn.Module) -> None:
    """Put what in `module` is a stand-in on meta, where strategies cut it up."""

    def made(_name: str, own: nn.Parameter) -> nn.Parameter | None:
        if not is_stand_in(own):
            return None
        return nn.Parameter(
            torch.empty(own.shape, dtype=own.dtype, device="meta"), own.requires_grad
        )

    replace(module, made)


def replace(module: nn.Module, made: Callable[[str, nn.Parameter], nn.Parameter | None]) -> None:
    """Put other parameters into `module`; what is one under several names stays one.

    made: of the first of its names, and a parameter, that which takes its place; None: it stays.
    """
    found: dict[int, tuple[nn.Parameter, nn.Parameter | None]] = {}  # each keeps its id
    for path, holder in module.named_modules():
        for name, own in list(holder._parameters.items()):
            if own is None:
                continue
            if id(own) not in found:
                found[id(own)] = (own, made(f"{path}.{name}" if path else name, own))
            _, other = found[id(own)]
            if other is not None:
                setattr(holder, name, other)


def _stand_in(like: nn.Parameter, shape: torch.Size) -> nn.Parameter:
    return nn.Parameter(_nothing(shape, like.dtype), like.requires_grad)


def _nothing(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((), math.nan, dtype=dtype).expand(shape)
