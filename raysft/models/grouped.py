"""Products of rows by the matrix of their group: what the experts of a mixture compute by.

rows [S, n] lie one group after the other; `Groups` says where each ends. A product gives [S, m] for
matrices [G, n, m], in the rows' dtype, which is the matrices' too, with gradients of both. Groups
may be empty. Rows behind the last group (another worker's) cost nothing and give anything.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional as F

ALIGNED = 16  # bytes; a row that torch.grouped_mm takes has a multiple of them
GROUPED_MM_FROM = (8, 0)  # CUDA compute capability


@dataclass
class Groups:
    """Where groups end in rows that are sorted by group: int32 [G], on the rows' device."""

    ends: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor, groups: int) -> Groups:
        """ids: the group of each row [S], ascending; those from `groups` on are of none."""
        numbers = torch.arange(groups, device=ids.device, dtype=ids.dtype)
        return cls(torch.searchsorted(ids, numbers, right=True, out_int32=True))

    @cached_property
    def counts(self) -> list[int]:
        """Rows of each group. Waits for the device."""
        ends = self.ends.tolist()
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]


Product = Callable[[torch.Tensor, torch.Tensor, Groups], torch.Tensor]


def by_torch(rows: torch.Tensor, matrices: torch.Tensor, groups: Groups) -> torch.Tensor:
    """torch.nn.functional.grouped_mm, of any widths; where torch has none, `by_loop`."""
    if not _has_grouped_mm(rows):
        return by_loop(rows, matrices, groups)
    step = ALIGNED // rows.element_size()
    width = matrices.shape[2]
    inner, outer = -rows.shape[1] % step, -width % step
    if inner or outer:
        rows = F.pad(rows, (0, inner))
        matrices = F.pad(matrices, (0, outer, 0, inner))
    return F.grouped_mm(rows, matrices, offs=groups.ends)[:, :width]


def _has_grouped_mm(rows: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() and rows.dtype != torch.bfloat16:
        return False  # the compiler's own has no other
    if rows.device.type != "cuda":
        return True
    return torch.cuda.get_device_capability(rows.device) >= GROUPED_MM_FROM


@torch.compiler.disable
def by_loop(rows: torch.Tensor, matrices: torch.Tensor, groups: Groups) -> torch.Tensor:
    """One product a group, one after the other."""
    counts = groups.counts
    *parts, rest = rows.split([*counts, len(rows) - sum(counts)])
    # Not by index, whose gradient is as large as all matrices for each of them.
    found = [part @ matrix for part, matrix in zip(parts, matrices.unbind(), strict=True)]
    return torch.cat([*found, rest.new_zeros(len(rest), matrices.shape[2])])


@torch.compiler.disable
def by_grouped_gemm(rows: torch.Tensor, matrices: torch.Tensor, groups: Groups) -> torch.Tensor:
    """The package grouped_gemm, on GPUs and in bfloat16."""
    from grouped_gemm import ops

    sizes = torch.tensor(groups.counts)  # it takes them from the host
    taken = int(sizes.sum())
    flipped = not matrices.is_contiguous()
    given = (matrices.mT if flipped else matrices).contiguous()
    if given.requires_grad and not sizes.all():
        empty = (sizes == 0).nonzero().flatten().to(given.device)
        given.register_hook(lambda gradient: gradient.index_fill(0, empty, 0.0))
    found = ops.gmm(rows[:taken].contiguous(), given, sizes, trans_b=flipped)
    return F.pad(found, (0, 0, 0, len(rows) - taken))


def installed() -> bool:
    """Whether the package grouped_gemm is."""
    return importlib.util.find_spec("grouped_gemm") is not None
