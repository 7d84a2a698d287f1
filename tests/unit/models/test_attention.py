"""Attention by documents equals attention under a dense block mask, at the documents' cost."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from raysft.models import attention
from raysft.models.attention import document_mask, segments_attention, used
from tests.support.model_zoo import make

LENGTHS = [3, 3, 3, 8, 1, 5, 5]
MODULE = SimpleNamespace(is_causal=True)


def row(
    heads: int, groups: int, dim: int, value_dim: int, lengths: list[int] = LENGTHS
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [
        (1, h, sum(lengths), d) for h, d in ((heads, dim), (groups, dim), (groups, value_dim))
    ]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def ends_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def dense(qkv: list[torch.Tensor], lengths: list[int], window: int | None) -> torch.Tensor:
    """The reference: one call with the [T, T] mask that says who may see whom."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(len(document))[:, None] - torch.arange(len(document))
    seen = (document[:, None] == document) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    q, k, v = qkv
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.3).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("heads, groups, value_dim", [(4, 4, 8), (4, 2, 8), (4, 1, 8), (2, 2, 6)])
def test_documents_alone_equal_a_dense_block_mask(
    heads: int, groups: int, value_dim: int, window: int | None
) -> None:
    qkv = row(heads, groups, 8, value_dim)
    mask = document_mask(ends_of(LENGTHS))
    ours, _ = segments_attention(MODULE, *qkv, mask, scaling=0.3, sliding_window=window)
    expected = dense(qkv, LENGTHS, window)
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)

    weights = torch.randn_like(expected)
    got = torch.autograd.grad((ours * weights).sum(), qkv)
    wanted = torch.autograd.grad((expected * weights).sum(), qkv)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_row_costs_the_sum_of_its_documents_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, calls = 0, 0

    def counting(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        nonlocal scores, calls
        scores, calls = scores + q.shape[0] * q.shape[2] * k.shape[2], calls + 1
        return scaled_dot_product_attention(q, k, v, **kwargs)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", counting)
    segments_attention(MODULE, *row(2, 2, 8, 8), document_mask(ends_of(LENGTHS)))
    assert scores == sum(n * n for n in LENGTHS)
    assert calls == 4  # neighbours of equal length share one call


def test_without_boundaries_it_is_the_sdpa_of_transformers() -> None:
    qkv = row(4, 2, 8, 8)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=2)
    ours, _ = segments_attention(module, *qkv, None, scaling=0.3)
    torch.testing.assert_close(ours, dense(qkv, [sum(LENGTHS)], None))


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_scores_it_cannot_compute_are_refused(name: str) -> None:
    with pytest.raises(NotImplementedError, match=name):
        segments_attention(
            MODULE, *row(2, 2, 8, 8), document_mask(ends_of(LENGTHS)), **{name: torch.ones(1)}
        )


def test_autocast_computes_in_its_precision() -> None:
    qkv = row(4, 2, 8, 8)
    mask = document_mask(ends_of(LENGTHS))
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = segments_attention(MODULE, *qkv, mask, scaling=0.3)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), dense(qkv, LENGTHS, None), rtol=0.02, atol=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 4])
def test_the_variable_length_kernel_equals_documents_alone(window: int | None) -> None:
    qkv = [x.detach().cuda().bfloat16().requires_grad_() for x in row(4, 2, 64, 64)]
    mask = document_mask(ends_of(LENGTHS).cuda())
    ours, _ = segments_attention(MODULE, *qkv, mask, scaling=0.3, sliding_window=window)
    expected = dense([x.float().cpu() for x in qkv], LENGTHS, window)
    torch.testing.assert_close(ours.float().cpu(), expected, rtol=0.02, atol=0.02)
    got = torch.autograd.grad(ours.float().sum(), qkv)
    wanted = torch.autograd.grad(expected.sum(), qkv)
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_variable_length_kernel_is_given_keys_as_they_are(
    groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the kernel, which computes what its documentation says of heads in groups:
    each of keys and values serves the same number of queries, in their order."""
    lengths, given = [3, 8, 5], []

    def kernel(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *ends: object, **keys: object
    ) -> torch.Tensor:
        given.append([tuple(x.shape) for x in (q, k, v)])
        assert keys.get("window_size") == (-1, 0), "no window, and nothing behind a position"
        qkv = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        return dense(qkv, lengths, None)[0]

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    qkv = row(4, groups, 8, 8, lengths)
    found = attention._varlen(*qkv, ends_of(lengths), 8, 0.3, None, True)
    assert given == [[(16, 4, 8), (16, groups, 8), (16, groups, 8)]]
    repeated = [qkv[0], *(x.repeat_interleave(4 // groups, dim=1) for x in qkv[1:])]
    expected = attention._varlen(*repeated, ends_of(lengths), 8, 0.3, None, True)
    torch.testing.assert_close(found, expected)
    assert given[1] == [(16, 4, 8)] * 3


def test_a_row_of_clips_sees_all_of_each_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, given = [3, 8, 5, 5], []
    qkv = row(4, 4, 8, 8, lengths)
    mask = document_mask(ends_of(lengths), causal=False)
    found, _ = segments_attention(MODULE, *qkv, mask, scaling=0.3)
    first = 0
    for length in lengths:
        alone = [x[:, :, first : first + length] for x in qkv]
        expected = torch.nn.functional.scaled_dot_product_attention(*alone, scale=0.3)
        torch.testing.assert_close(found[0, first : first + length], expected[0].transpose(0, 1))
        first += length

    def kernel(q: torch.Tensor, *others: object, **keys: object) -> torch.Tensor:
        given.append(keys["window_size"])
        return q

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    attention._varlen(*qkv, ends_of(lengths), 8, 0.3, None, False)
    assert given == [(-1, -1)]


def test_the_attention_in_use_is_told() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    packed, padded = make("qwen3", "packed").model, make("qwen3", "padded").model
    assert used(packed, cpu, half=True) == "torch sdpa, document by document"
    assert used(packed, gpu, half=True) == "torch varlen (flash) on packed rows"
    assert used(packed, gpu, half=False) == "torch sdpa, document by document"
    assert used(padded, gpu, half=True) == "sdpa of transformers"
