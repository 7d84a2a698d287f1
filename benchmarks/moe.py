"""How fast do the experts of a mixture compute, by each way there is?

    block    forward and backward pass of one layer's experts, tokens given: transformers' loop over
             experts, grouped products (torch's, and the packages that are installed); adapters on
             frozen experts: split, as peft.experts has them, and materialised, as peft has them
    step     a whole training step (forward, backward, AdamW) of a model of two such layers
    dispatch what `parallel.strategy: ep` adds: tokens to the worker that has their expert and back,
             twice (forward, backward), beside the products that the experts do meanwhile; two
             workers over gloo, on CPUs only

Shapes: 8 experts, 2 a token (Mixtral 8x7B); 64, 6 (DeepSeek-V2-Lite); 128, 8 (Qwen3-30B-A3B); on a
GPU of their true width in bfloat16, on CPUs of an eighth of it (of 8 experts a sixteenth) in
float32 with one thread. Tokens go to all experts alike, or skewed: to the n-th expert with a chance
of 1/n. Ways are timed in turn, after a round that warms up; a figure is the median of the rounds.
Full run: about 10 minutes on two cores, 3 GB of memory.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import results_io
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from matplotlib import pyplot
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

from raysft.adapters import experts as adapters
from raysft.config import Config
from raysft.config.training import Peft
from raysft.models.experts import WHOLE, use
from raysft.models.fastest import candidates
from raysft.parallel.experts import ExpertGroups
from raysft.parallel.world import World

RANK, ALPHA, VOCABULARY, LAYERS, WORKERS = 16, 32, 1024, 2, 2
LOOP, SPLIT, MATERIALISED = "loop", "split", "materialised"
Run = Callable[[], float]


@dataclass(frozen=True)
class Shape:
    """Of a layer. width: of a token; inner: of an expert; narrower: how many times, on CPUs."""

    name: str
    experts: int
    chosen: int
    width: int
    inner: int
    narrower: int


SHAPES = (
    Shape("8 experts, 2 a token", 8, 2, 4096, 14336, 16),
    Shape("64 experts, 6 a token", 64, 6, 2048, 1408, 8),
    Shape("128 experts, 8 a token", 128, 8, 2048, 768, 8),
)


@dataclass(frozen=True)
class Size:
    """What is measured."""

    tokens: tuple[int, ...]
    step_tokens: int
    rounds: int


GPU = Size((512, 2048, 8192, 16384), 8192, 5)
CPU = Size((512, 2048, 16384), 2048, 2)
QUICK = Size((64,), 64, 1)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype() -> torch.dtype:
    return torch.bfloat16 if device().type == "cuda" else torch.float32


def model_of(shape: Shape) -> Any:
    """Two layers of that shape, on the device."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        moe_intermediate_size=shape.inner,
        intermediate_size=shape.inner,
        num_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
        num_hidden_layers=LAYERS,
        num_attention_heads=max(1, shape.width // 128),
        num_key_value_heads=max(1, shape.width // 512),
        head_dim=128,
    )
    torch.manual_seed(0)
    with device():
        return AutoModelForCausalLM.from_config(config, dtype=dtype())


def routed(shape: Shape, tokens: int, skewed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts of each token and their weights, [tokens, chosen]."""
    draws = torch.Generator().manual_seed(1)
    chance = 1 / torch.arange(1, shape.experts + 1) if skewed else torch.ones(shape.experts)
    ids = torch.multinomial(chance.expand(tokens, -1), shape.chosen, generator=draws)
    weights = torch.full((tokens, shape.chosen), 1 / shape.chosen)
    return ids.to(device()), weights.to(device(), dtype())


def adapted(net: Any, way: str) -> Any:
    """`net` with adapters on its experts, which alone train."""
    net.requires_grad_(False)
    if way == MATERIALISED:
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        settings = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=targets
        )
        return get_peft_model(net, settings)
    config = Config(peft=Peft(method="lora", experts=True, r=RANK, alpha=ALPHA))
    adapters.attach(config, net, adapters.matrices(config.peft, net))
    return net.to(device(), dtype())


def ways(net: Any) -> list[tuple[str, str]]:
    """What trains, and by what it computes."""
    able = candidates(net, device(), dtype())
    packages = [backend for backend in able if backend not in ("torch", LOOP)]
    split = [f"{SPLIT}, {backend}" for backend in packages if backend not in WHOLE]
    return [
        *(("full", way) for way in (LOOP, "torch", *packages)),
        *(("lora", way) for way in (MATERIALISED, SPLIT, *split)),
    ]


def made(shape: Shape, trains: str, way: str) -> Any:
    """A model of that shape that computes that way."""
    net = model_of(shape)
    if trains == "full":
        if way == LOOP:
            net.set_experts_implementation("eager")
        else:
            use(net, way)  # type: ignore[arg-type]
        return net
    whole = adapted(net, way.partition(",")[0])
    if backend := way.partition(", ")[2]:
        use(net, backend)  # type: ignore[arg-type]
    return whole


def layer_of(model: Any) -> nn.Module:
    """The experts of the first layer, with what peft has put around them."""
    names = [name for name, _ in model.named_modules() if name.endswith("layers.0.mlp.experts")]
    found: nn.Module = model.get_submodule(names[0])
    return found


def block(layer: nn.Module, shape: Shape, tokens: int, skewed: bool) -> Run:
    ids, weights = routed(shape, tokens, skewed)
    rows = torch.randn(tokens, shape.width, device=device(), dtype=dtype(), requires_grad=True)

    def run() -> float:
        layer.zero_grad()
        before = now()
        out = layer(rows, ids, weights)
        out.backward(out.detach())
        return now() - before

    return run


def step(model: Any, tokens: int) -> Run:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(0, VOCABULARY, (1, tokens), device=device())

    def run() -> float:
        before = now()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return now() - before

    return run


def now() -> float:
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(runs: dict[tuple[str, str], Run], rounds: int) -> dict[tuple[str, str], float]:
    """Median seconds of each, after one round that warms up."""
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for number in range(rounds + 1):
        for key, run in runs.items():
            seconds = run()
            if number:
                taken[key].append(seconds)
    return {key: statistics.median(seconds) for key, seconds in taken.items()}


class Through(nn.Module):
    """Experts that give back what they are sent: what is left is the exchange."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.sent: tuple[torch.Tensor, ...] = ()

    def forward(self, *sent: torch.Tensor) -> torch.Tensor:
        self.sent = sent
        return sent[0]


def dispatch(shape: Shape, size: Size) -> list[dict[str, Any]]:
    """Of each number of tokens a worker: milliseconds of the exchange, of the experts' products on
    what arrives, and of both, as `ep` does them; of the slower worker. mb: what a worker sends away
    in each of the four exchanges of a layer."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "found.json"
        given = (shape, size, f"file://{scratch}/store", out)
        processes.spawn(_dispatched, given, WORKERS)
        found: list[dict[str, Any]] = json.loads(out.read_text())
    for line in found:
        print(" ".join(f"{value!s:>8}" for value in line.values()), flush=True)
    return found


def _dispatched(rank: int, shape: Shape, size: Size, store: str, out: Path) -> None:
    """One worker of `dispatch`; the first writes what was found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORKERS)
    groups = ExpertGroups(WORKERS, World.current())
    net = model_of(shape)
    use(net, "torch")
    layer, through = layer_of(net), Through(shape.experts)
    own = layer.forward  # of the experts that it has, which are fewer from here on
    for experts in (layer, through):
        groups.share(experts)
    found = []
    for tokens in size.tokens:
        for skewed in (False, True):
            ids, weights = routed(shape, tokens, skewed)
            rows = torch.randn(tokens, shape.width, requires_grad=True)
            through(rows, ids, weights)
            arrived, *rest = through.sent
            arrived = arrived.detach().requires_grad_()
            runs = {
                ("ep", "exchange"): together(layer, through, rows, ids, weights),
                ("ep", "experts"): together(layer, own, arrived, *rest),
                ("ep", "both"): together(layer, layer, rows, ids, weights),
            }
            away = int((ids // (shape.experts // WORKERS) != rank).sum())
            taken = [*in_turn(runs, size.rounds).values(), float(away)]
            slowest = torch.tensor(taken, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            *seconds, rows_away = slowest.tolist()
            line: dict[str, Any] = {"shape": shape.name, "tokens": tokens}
            line["routing"] = "skewed" if skewed else "balanced"
            line |= {f"{k[1]}_ms": round(s * 1e3, 2) for k, s in zip(runs, seconds, strict=True)}
            line["mb"] = round(rows_away * shape.width * rows.element_size() / 1e6, 2)
            line["exchange_over_experts"] = round(seconds[0] / seconds[1], 3)
            found.append(line)
    if not rank:
        out.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def together(layer: nn.Module, forward: Callable[..., torch.Tensor], *given: torch.Tensor) -> Run:
    """`forward` and its backward pass, begun by all workers at once."""

    def run() -> float:
        layer.zero_grad()
        dist.barrier()
        before = now()
        out = forward(*given)
        out.backward(out.detach())
        return now() - before

    return run


@dataclass
class Measured:
    """The lines of `block`, of `step` and of `dispatch`, and how many processes wanted the
    machine's cores."""

    shape: Shape
    blocks: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    exchanges: list[dict[str, Any]]
    load: float


def measured(shape: Shape, size: Size) -> Measured:
    """Every way, in turn."""
    every = ways(model_of(shape))
    models = {key: made(shape, *key) for key in every}
    blocks: list[dict[str, Any]] = []
    for tokens in size.tokens:
        for skewed in (False, True):
            runs = {k: block(layer_of(m), shape, tokens, skewed) for k, m in models.items()}
            routing = "skewed" if skewed else "balanced"
            about = {"shape": shape.name, "tokens": tokens, "routing": routing}
            blocks += lines(about, in_turn(runs, size.rounds), shape)
    runs = {key: step(model, size.step_tokens) for key, model in models.items()}
    steps = lines({"shape": shape.name, "tokens": size.step_tokens}, in_turn(runs, size.rounds))
    del models, runs
    gc.collect()
    load = round(os.getloadavg()[0], 1)
    exchanges = [] if device().type == "cuda" else dispatch(shape, size)
    return Measured(shape, blocks, steps, exchanges, load)


def lines(
    about: dict[str, Any], found: dict[tuple[str, str], float], shape: Shape | None = None
) -> list[dict[str, Any]]:
    """One a way: its time, how many times faster than the slow way of its kind, and TFLOP/s."""
    out = []
    for (trains, way), seconds in found.items():
        slow = found[trains, LOOP if trains == "full" else MATERIALISED]
        line = {**about, "trains": trains, "way": way, "ms": round(seconds * 1e3, 2)}
        line["faster"] = round(slow / seconds, 2)
        if shape is not None:
            rows = about["tokens"] * shape.chosen
            products = 3 if trains == "full" else 2  # forward, and gradients of rows and matrices
            flops = products * 2 * rows * 3 * shape.width * shape.inner
            line["tflops"] = round(flops / seconds / 1e12, 4)
        print(" ".join(f"{value!s:>8}" for value in line.values()), flush=True)
        out.append(line)
    return out


def figure(
    blocks: list[dict[str, Any]], steps: list[dict[str, Any]], exchanges: list[dict[str, Any]]
) -> Figure:
    """How many times faster than the loop, and than whole updates, by tokens; steps and the
    exchange beside."""
    drawn, axes = pyplot.subplots(1, 4 if exchanges else 3, figsize=(19 if exchanges else 15, 4.2))
    kinds = (("full", "torch", f"times faster than the {LOOP}: full"),)
    kinds += (("lora", SPLIT, f"times faster than {MATERIALISED}: adapters"),)
    for axis, (trains, way, title) in zip(axes[:2], kinds, strict=True):
        for shape in dict.fromkeys(line["shape"] for line in blocks):
            for routing, style in (("balanced", "-"), ("skewed", "--")):
                mine = [
                    (line["tokens"], line["faster"])
                    for line in blocks
                    if (line["shape"], line["routing"]) == (shape, routing)
                    and (line["trains"], line["way"]) == (trains, way)
                ]
                axis.plot(*zip(*mine, strict=True), style, marker="o", label=f"{shape}, {routing}")
        axis.set(title=title, xlabel="tokens", xscale="log", ylim=(0, None))
        axis.axhline(1, color="grey", linewidth=0.8)
    axes[0].legend(fontsize=7)
    names = [f"{line['shape'].partition(' ')[0]} {line['trains']}\n{line['way']}" for line in steps]
    axes[2].bar(range(len(steps)), [line["ms"] for line in steps])
    axes[2].set_xticks(range(len(steps)), names, rotation=90, fontsize=6)
    axes[2].set(title="a training step of two layers", ylabel="ms", yscale="log")
    for shape in dict.fromkeys(line["shape"] for line in exchanges):
        for routing, style in (("balanced", "-"), ("skewed", "--")):
            mine = [
                (line["tokens"], line["exchange_over_experts"])
                for line in exchanges
                if (line["shape"], line["routing"]) == (shape, routing)
            ]
            axes[3].plot(*zip(*mine, strict=True), style, marker="o")
    if exchanges:
        title = "ep: exchange over the experts' products"
        axes[3].set(title=title, xlabel="tokens a worker", xscale="log", ylim=(0, None))
    return drawn


def main() -> None:
    """Measure, write JSON and PNG."""
    options = results_io.arguments(__doc__ or "")
    cuda = device().type == "cuda"
    size = QUICK if options.quick else GPU if cuda else CPU
    if not cuda:
        torch.set_num_threads(1)
    found = []
    for true in SHAPES:
        by = 1 if cuda else true.narrower * (4 if options.quick else 1)
        found.append(measured(replace(true, width=true.width // by, inner=true.inner // by), size))
    print(written(found, quick=options.quick, out=options.out))


def written(found: list[Measured], *, quick: bool, out: Path) -> Path:
    """The JSON and PNG of what was measured, by shape."""
    blocks = [line for each in found for line in each.blocks]
    steps = [line for each in found for line in each.steps]
    exchanges = [line for each in found for line in each.exchanges]
    payload = {
        "device": torch.cuda.get_device_name() if device().type == "cuda" else "cpu, one thread",
        "dtype": str(dtype()),
        "load": [each.load for each in found],
        "rank": RANK,
        "layers": LAYERS,
        "shapes": [vars(each.shape) for each in found],
        "block": blocks,
        "step": steps,
        "dispatch": exchanges,
    }
    drawn = figure(blocks, steps, exchanges)
    return results_io.write("moe", payload, drawn, quick=quick, out=out)


if __name__ == "__main__":
    main()
