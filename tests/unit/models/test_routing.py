"""Routing by kinds of tokens, against routers written out here; stock models stay as they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)

import raysft
from raysft.errors import UserError
from raysft.models import routing
from raysft.models.modality import Kind, Plan
from raysft.models.router_losses import Weights, terms_of
from raysft.models.routers import routers
from tests.support.mixtures import EXPERTS, MIXTURES, TOP_K, VOCABULARY

torch.set_num_threads(1)

TEXT, AUDIO = (0, 1, 2, 3), (4, 5, 6, 7)
PLAN = Plan((Kind("text", ((0, 31),), TEXT, TOP_K), Kind("audio", ((32, 63),), AUDIO, TOP_K)))
KINDS = [*MIXTURES, "qwen3_omni_moe_thinker"]


def mixture(kind: str, **changes: Any) -> PreTrainedModel:
    """A tiny model of that type whose routers prefer some experts."""
    torch.manual_seed(0)
    if kind == "qwen3_omni_moe_thinker":
        config = AutoConfig.for_model(kind)
        for name, value in {**MIXTURES["qwen3_moe"], **changes}.items():
            setattr(config.text_config, name, value)
        audio = config.audio_config
        audio.d_model = audio.encoder_ffn_dim = audio.output_dim = 32
        audio.encoder_layers, audio.encoder_attention_heads, audio.num_mel_bins = 1, 2, 8
        audio.downsample_hidden_size = 8
        vision = config.vision_config
        vision.depth, vision.hidden_size, vision.num_heads, vision.intermediate_size = 1, 8, 2, 8
        vision.out_hidden_size, vision.deepstack_visual_indexes = 32, []
        vision.num_position_embeddings = 16
        config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
        config.text_config.rope_parameters["mrope_section"] = [2, 3, 3]
        config.audio_token_id, config.image_token_id, config.video_token_id = 60, 61, 62
        config.vision_start_token_id = config.audio_start_token_id = 63
        net: PreTrainedModel = Qwen3OmniMoeThinkerForConditionalGeneration(config)
    else:
        config = AutoConfig.for_model(kind, **{**MIXTURES[kind], **changes})
        net = AutoModelForCausalLM.from_config(config)
    for router in routers(net).values():
        nn.init.normal_(router.weight)  # type: ignore[arg-type]
        if hasattr(router, "e_score_correction_bias"):
            nn.init.normal_(router.e_score_correction_bias, std=0.3)  # type: ignore[arg-type]
    return net.eval()


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    """Ids of both kinds, none of them special."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, 60, (rows, length), generator=generator)


def expected(
    router: nn.Module, hidden: torch.Tensor, kind: int, settings: Plan = PLAN
) -> tuple[list[int], list[float]]:
    """The experts of one token and their weights, from the papers' formulas."""
    own = list(settings.kinds[kind].experts)
    logits = (router.weight.double() @ hidden.double()).tolist()  # type: ignore[operator]
    bias = getattr(router, "e_score_correction_bias", None)
    scale = getattr(router, "routed_scaling_factor", 1.0)
    if bias is not None:  # DeepSeek-V3: 4 groups of 2 experts, of which 2 are taken first
        scores = {i: 1 / (1 + torch.tensor(-logits[i]).exp().item()) for i in own}
        choice = {i: scores[i] + bias[i].item() for i in own}
        groups = sorted({i // 2 for i in own}, key=lambda g: -choice[2 * g] - choice[2 * g + 1])
        allowed = [i for i in own if i // 2 in groups[:2]]
        normalise = True
    else:
        among = own if settings.softmax == "group" else range(len(logits))
        total = sum(torch.tensor(logits[i]).double().exp().item() for i in among)
        scores = {i: torch.tensor(logits[i]).double().exp().item() / total for i in own}
        choice, allowed = scores, own
        always = type(router).__name__.startswith("Mixtral")
        normalise = always or getattr(router, "norm_topk_prob", False)
    if settings.renormalize is not None:
        normalise = settings.renormalize
    chosen = sorted(allowed, key=lambda i: -choice[i])[: settings.kinds[kind].top_k]
    weights = [scores[i] for i in chosen]
    if normalise:
        weights = [weight / sum(weights) for weight in weights]
    return chosen, [scale * weight for weight in weights]


def watch(net: nn.Module) -> list[tuple[nn.Module, torch.Tensor, tuple[torch.Tensor, ...]]]:
    """Every call of a router of `net` from here on: itself, hidden states, what it gave."""
    calls: list[Any] = []
    for router in routers(net).values():
        router.register_forward_hook(
            lambda module, args, out: calls.append((module, args[0].flatten(0, -2), out))
        )
    return calls


@pytest.mark.parametrize(
    "settings",
    [
        PLAN,
        Plan(PLAN.kinds, renormalize=True),
        Plan(PLAN.kinds, renormalize=False),
        Plan((PLAN.kinds[0], Kind("audio", ((32, 63),), AUDIO, 2))),
    ],
    ids=["as it is", "renormalised", "not renormalised", "fewer for audio"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_go_to_experts_of_their_kind_as_their_model_chooses(
    kind: str, settings: Plan
) -> None:
    net = mixture(kind)
    plan = routing.attach(net, settings)
    assert plan is not None
    calls = watch(net)
    ids = tokens()
    with torch.no_grad():
        net(input_ids=ids)
    assert len(calls) == len(routers(net))
    of_kind = (ids >= 32).long().flatten().tolist()
    for router, hidden, (logits, weights, experts) in calls:
        for place, own in enumerate(of_kind):
            chosen, wanted = expected(router, hidden[place], own, settings)
            k = settings.kinds[own].top_k
            order = [chosen.index(i) for i in experts[place, :k].tolist()]
            assert sorted(order) == list(range(k))
            torch.testing.assert_close(
                weights[place, :k].double(),
                torch.tensor([wanted[i] for i in order]).double(),
                rtol=1e-4,
                atol=1e-6,
            )
            assert not weights[place, k:].any()
            assert set(experts[place].tolist()) <= set(settings.kinds[own].experts)
            best = logits[place].topk(len(settings.kinds[own].experts)).indices.tolist()
            assert set(best) == set(settings.kinds[own].experts)


@pytest.mark.parametrize("kind", KINDS)
def test_without_kinds_logits_are_those_of_transformers_to_the_last_bit(kind: str) -> None:
    net, ids = mixture(kind), tokens()
    stock = copy.deepcopy(net)
    found = routing.attach(net, None)
    assert found is not None
    assert not net._forward_pre_hooks and not net._forward_hooks
    for training in (False, True):
        net.train(training)
        stock.train(training)
        found.begin(torch.zeros(ids.shape, dtype=torch.int8), training)
        assert torch.equal(net(input_ids=ids).logits, stock(input_ids=ids).logits)
        found.end()
    every = len(routers(net)) * ids.numel()
    assert found.seen.chosen.sum() == every * TOP_K and found.seen.tokens.sum() == every


@pytest.mark.parametrize("kind", KINDS)
def test_generated_tokens_are_of_a_kind_too(kind: str) -> None:
    net = mixture(kind)
    plan = Plan((Kind("text", ((0, 31),), TEXT, TOP_K), Kind("audio", ((32, 58),), AUDIO, TOP_K)))
    assert routing.attach(net, plan) is not None
    calls, prompt = watch(net), tokens(2, 6).clamp(max=58)
    prompt[0, :2] = 0  # padding on the left
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    given: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        found = net.generate(input_ids=prompt, pad_token_id=0, eos_token_id=1, **given)
    assert int(found.max()) <= 58  # what has no experts is not generated
    layers = len(routers(net))
    steps = [calls[i : i + layers] for i in range(0, len(calls), layers)]
    assert len(steps) == found.shape[1] - prompt.shape[1]
    for number, step in enumerate(steps):
        ids = prompt if not number else found[:, prompt.shape[1] + number - 1]
        for _, _, (_, _, experts) in step:
            audio = (experts >= 4).all(1)
            assert audio.tolist() == (ids >= 32).flatten().tolist()
            assert ((experts < 4).all(1) == ~audio).all()


def test_an_id_of_no_kind_is_refused_by_name() -> None:
    net = mixture("qwen3_moe")
    routing.attach(net, Plan((Kind("text", ((0, 31),), tuple(range(EXPERTS)), TOP_K),)))
    with pytest.raises(ValueError, match="token 40 is of no kind"):
        net(input_ids=torch.tensor([[3, 40]]))
    with pytest.raises(ValueError, match="give them"):
        net(inputs_embeds=torch.zeros(1, 2, 32))


@pytest.mark.parametrize("kind", ["deepseek_v2", "mixtral"])
def test_a_layer_that_is_recomputed_finds_its_kinds_and_counts_once(kind: str) -> None:
    net, ids = mixture(kind).train(), tokens()
    found = []
    for checkpointing in (False, True):
        own = copy.deepcopy(net)
        routed = routing.attach(own, PLAN, Weights(0.1, 0.01))
        assert routed is not None
        if checkpointing:
            own.gradient_checkpointing_enable({"use_reentrant": False})
        routed.begin(torch.from_numpy(routed.kinds_of(ids.numpy())), training=True)
        loss = own(input_ids=ids, labels=ids).loss
        routed.end()
        for term in terms_of(routed):
            assert term.trained is not None
            loss = loss + term.weight * term.trained
        loss.backward()
        gradients = {n: p.grad for n, p in own.named_parameters() if p.grad is not None}
        found.append((gradients, routed.seen.chosen, routed.seen.entropy))
    (plain, chosen, entropy), (again, *seen) = found
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)
    assert torch.equal(chosen, seen[0]) and torch.equal(entropy, seen[1])


# -- MoST ----------------------------------------------------------------------------------------


def most(hidden: torch.Tensor, weight: torch.Tensor, audio: torch.Tensor) -> Any:
    """MoST's gate, written out. hidden [B, T, H]; audio bool [B, T]. Returns ids, weights [B * T,
    6], and the balance loss of a layer."""
    scores = F.softmax(F.linear(hidden.float(), weight.float()), dim=-1)  # over all 64
    masked = scores.clone()
    masked[..., 32:][~audio] = 0.0
    masked[..., :32][audio] = 0.0
    weights, ids = masked.topk(6, dim=-1)
    loss = torch.zeros(())
    rows, length = audio.shape
    for row in range(rows):
        counts = torch.zeros(64)
        for place in range(length):
            for expert in ids[row, place].tolist():
                counts[expert] += 1
        loss = loss + (counts / (length * 6 / 64) * masked[row].mean(0)).sum()
    return ids.flatten(0, 1), weights.flatten(0, 1), loss / rows


def test_mosts_routing_and_its_balance_loss() -> None:
    sizes = {"n_routed_experts": 64, "num_experts_per_tok": 6, "vocab_size": 102_400}
    sizes |= {"num_hidden_layers": 3, "norm_topk_prob": False, "routed_scaling_factor": 1.0}
    net = mixture("deepseek_v2", **sizes, bos_token_id=100_000, eos_token_id=100_001).train()
    text = Kind("text", ((0, 100_001),), tuple(range(32)), 6)
    audio = Kind("audio", ((100_002, 100_503),), tuple(range(32, 64)), 6)
    weights = Weights(balance=0.001, over="sequence")
    routed = routing.attach(net, Plan((text, audio), "all", False), weights)
    assert routed is not None
    ids = torch.randint(0, 100_002, (3, 11), generator=torch.Generator().manual_seed(0))
    ids[0, 4:], ids[1, ::2] = 100_100, 100_300
    calls = watch(net)
    routed.begin(torch.from_numpy(routed.kinds_of(ids.numpy())), training=True)
    net(input_ids=ids)
    routed.end()
    (term,) = terms_of(routed)
    loss = torch.zeros(())
    for router, hidden, (_, given, experts) in calls:
        weight = router.weight
        wanted_ids, wanted, own = most(hidden.view(3, 11, -1), weight, ids > 100_001)
        loss = loss + own
        torch.testing.assert_close(given.sort().values, wanted.sort().values)
        assert torch.equal(experts.sort().values, wanted_ids.sort().values)
    assert len(calls) == 2 and term.name == "balance" and term.weight == 0.001
    assert term.trained is not None and int(term.count) == 3
    mean = term.trained / term.count
    torch.testing.assert_close(mean, loss)
    gates = [router.weight for router in routers(net).values()]
    ours = torch.autograd.grad(mean, gates, retain_graph=True)
    for one, other in zip(ours, torch.autograd.grad(loss, gates), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="token 100504 is of no kind"):
        net.eval()(input_ids=torch.tensor([[5, 100_504]]))


def test_balance_and_z_loss_within_kinds() -> None:
    net, ids = mixture("qwen3_moe").train(), tokens(3, 8)
    routed = routing.attach(net, PLAN, Weights(0.5, 0.25))
    assert routed is not None
    calls, kinds = watch(net), torch.from_numpy(routed.kinds_of(ids.numpy()))
    kinds[2, 5:] = -1  # padding counts nowhere
    routed.begin(kinds, training=True)
    net(input_ids=ids)
    routed.end()
    found = {term.name: term for term in terms_of(routed)}
    assert [(t.counted, t.weight) for t in found.values()] == [
        ("kind/text", 0.5),
        ("kind/text", 0.25),
        ("kind/audio", 0.5),
        ("kind/audio", 0.25),
    ]
    for number, (name, experts) in enumerate({"text": TEXT, "audio": AUDIO}.items()):
        here = (kinds == number).flatten()
        balance = z = 0.0
        for router, hidden, (_, _, chosen) in calls:
            logits = (hidden @ router.weight.T)[here][:, list(experts)]
            shares = logits.softmax(-1)
            counts = torch.tensor([(chosen[here] == e).sum().item() for e in experts])
            fractions = len(experts) * counts / (TOP_K * len(logits))
            balance = balance + (fractions * shares.mean(0)).sum()
            z = z + logits.logsumexp(-1).square().mean()
        for kind, wanted in (("balance", balance), ("z", z)):
            term = found[f"{kind}/{name}"]
            assert term.count == here.sum()
            torch.testing.assert_close(term.sum / term.count, wanted, rtol=1e-5, atol=1e-6)


# -- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True], ids=["one router", "a router each"])
@pytest.mark.parametrize("kind", ["deepseek_v2", "mixtral"])
def test_a_folder_routes_as_it_was_trained_after_one_call(
    kind: str, several: bool, tmp_path: Any
) -> None:
    net, ids = mixture(kind), tokens()
    every = tuple(range(EXPERTS))
    kinds = tuple(Kind(k.name, k.ids, every if several else k.experts, TOP_K) for k in PLAN.kinds)
    routing.attach(net, Plan(kinds, several=several))
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if ".by_kind." in name:
                weight.normal_()
        wanted = net(input_ids=ids).logits
    net.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for _ in range(2):  # twice is once
        raysft.modality_routing(again)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, wanted, rtol=0, atol=1e-6)
        answer = net.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        assert torch.equal(again.generate(input_ids=ids, max_new_tokens=6, do_sample=False), answer)


def test_several_routers_start_as_one_and_each_trains() -> None:
    net, ids = mixture("qwen2_moe").train(), tokens()
    stock = copy.deepcopy(net)
    every = tuple(range(EXPERTS))
    kinds = tuple(Kind(kind.name, kind.ids, every, TOP_K) for kind in PLAN.kinds)
    routing.attach(net, Plan(kinds, several=True))
    found = net(input_ids=ids, labels=ids)
    torch.testing.assert_close(found.logits, stock(input_ids=ids).logits, rtol=0, atol=1e-6)
    found.loss.backward()
    for router in routers(net).values():
        more = router.by_kind["audio"].grad  # type: ignore[union-attr, index]
        assert router.weight.grad.any() and more.any()  # type: ignore[union-attr]
        assert not torch.equal(router.weight.grad, more)  # type: ignore[arg-type]


def test_a_model_that_was_trained_without_is_refused() -> None:
    with pytest.raises(UserError, match="was trained without"):
        raysft.modality_routing(mixture("olmoe"))


def test_vocabulary() -> None:
    assert PLAN.table(VOCABULARY).tolist() == [0] * 32 + [1] * 32
    assert Plan.from_json(PLAN.to_json()) == PLAN
