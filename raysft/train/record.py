"""What the loop counts, times and writes, apart from checkpoints.

Everything here can be cut back to a checkpoint: counts and times since the last logged line are
saved with it, and lines written after it are cut when a run continues.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from raysft.config.schema import Config
from raysft.data.example import Quarantined
from raysft.data.quarantine import Known, summary
from raysft.errors import UserError
from raysft.json_types import Json, JsonObject
from raysft.loggers import Loggers, Sink
from raysft.loggers.names import of_evaluation, of_metrics
from raysft.losses.term import CROSS_ENTROPY, Sums
from raysft.parallel import World
from raysft.parallel.strategy import Stepped
from raysft.patience import patient
from raysft.run.answers import Answers
from raysft.run.evaluations import Evaluation, Evaluations
from raysft.run.ledger import Ledger, genesis
from raysft.run.lines import Lines, read_lines, stream_lines
from raysft.run.ownership import Lease, Ownership, Process
from raysft.train.checkpoint import Save
from raysft.train.clock import Clock
from raysft.train.flops import Cost, peak_flops
from raysft.train.loads import FILE as EXPERTS
from raysft.train.loads import Loads
from raysft.train.memory import peak_memory
from raysft.train.metrics import quarantine_line
from raysft.train.step import StepBatch

log = logging.getLogger(__name__)


@dataclass
class Totals:
    """Running sums since the last logged line: identical on all workers, saved with checkpoints."""

    tasks: list[str]
    sums: Sums | None = None  # of steps since then
    counts: dict[str, float] = field(default_factory=dict)
    loads: Loads | None = None  # of a mixture's experts
    skipped: int = 0  # steps in a row, up to now
    all_skipped: int = 0  # since the run began

    def reset(self) -> None:
        """Start a new interval."""
        self.sums = None
        self.counts = {}

    def add(self, sums: Sums, counts: dict[str, float], skipped: bool) -> None:
        """Add one step. `sums` may be on a GPU: reading it back here would wait for the step.

        skipped: its gradient was not finite, and its loss may not be; it is in no mean.
        """
        self.skipped = self.skipped + 1 if skipped else 0
        self.all_skipped += skipped
        if self.sums is None:
            self.sums = replace(sums, values=torch.zeros_like(sums.values))
        if not skipped:
            known = self.sums.values.to(sums.values.device)
            self.sums = replace(sums, values=known + sums.values)
        for key, value in counts.items():
            self.counts[key] = self.counts.get(key, 0.0) + value

    def losses(self) -> dict[str, float]:
        """See `Sums.means`."""
        assert self.sums is not None  # a step was added
        return self.sums.means(self.tasks)

    def state(self, world: World) -> JsonObject:
        """For the checkpoint: lists of exact float64. A collective."""
        sums = self.sums
        terms = [] if sums is None else list(zip(sums.names, sums.weights, sums.values.tolist()))
        return {
            "terms": terms,
            "counts": self.counts,
            "skipped": [self.skipped, self.all_skipped],
            **({"experts": self.loads.state(world)} if self.loads is not None else {}),
        }

    def load(self, state: JsonObject, world: World) -> None:
        """The inverse of `state`. Runs of before had one term, and called it `sums`."""
        terms = state["terms"] if "terms" in state else [(CROSS_ENTROPY, 1.0, state["sums"])]
        self.sums = None
        if terms:
            names, weights, values = zip(*terms)
            known = torch.tensor(values, dtype=torch.float64)
            found = torch.zeros(len(terms), 2, 1 + len(self.tasks), dtype=torch.float64)
            found[..., : known.shape[-1]] = known  # tasks that data.extend brought come last
            self.sums = Sums(names, weights, found)
        self.counts = dict(state["counts"])
        self.skipped, self.all_skipped = state["skipped"]
        if self.loads is not None and "experts" in state:
            self.loads.load(state["experts"], world)


class Record:
    """The files of a run that the loop appends to; see `metrics`."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        world: World,
        examples: int,
        total_steps: int,
        progress: Callable[[JsonObject], None] | None,
        cost: Cost | None = None,
        mixture: bool = False,
        figures: Callable[[dict[str, float]], dict[str, float]] = lambda counts: {},
    ) -> None:
        """examples: what data.max_quarantined is a share of. cost: of what is counted. mixture:
        whether there are loads of experts to tell of. figures: more of them, of counts."""
        self.config = config
        self.folder = folder
        self.world = world
        self.examples = examples
        self.total_steps = total_steps
        self.progress = progress
        self.cost = cost
        self.mixture = mixture
        self.figures = figures
        self._peak = peak_flops(world.device, config.train.precision)
        self.known = Known()  # on rank 0
        self.evaluations = Evaluations()
        self.files: list[Any] = []
        self.loggers: Loggers | None = None  # on rank 0
        self.lease: Lease | None = None
        self._owned: Ownership | None = None
        self._workers: list[Process] = []

    def take_over(self, lease: Lease | None) -> None:
        """From here on this group of workers owns the run: earlier ones write no more. Collective.

        lease: of the driver that has started this group; None: there is no driver, and rank 0 holds
        the run while it trains. Raises UserError, on every worker, where the run is another's.
        """
        workers = self.world.gather(Process.this())
        taken: Lease | str = ""
        if self.world.is_main:
            try:
                if lease is None:
                    self._owned = Ownership.take(self.folder)
                    lease = replace(self._owned.lease, group=1)
                lease.take_over(workers)
                taken = lease
            except UserError as error:
                taken = str(error)
        taken = self.world.share(taken)
        if isinstance(taken, str):
            raise UserError(taken)
        self.lease, self._workers = taken, workers

    def require(self) -> None:
        """Raises UserError where this group of workers no longer owns the run: whoever writes into
        its folder asks first."""
        if self.lease is not None:
            self.lease.require()

    def _owned_now(self) -> None:
        """As `require`, asked of the folder, not of the clock."""
        taken = self.lease.lost() if self.lease is not None else None
        if taken is not None:
            raise UserError(taken)

    def open(self, step: int, identity: str, heads: dict[str, str] | None = None) -> None:
        """Open the files, cut back to `step` already, to append. identity: of the run; heads: where
        the ledger's chains stood at `step`, as `heads` gave them; None: they begin here."""
        self.require()
        lanes = self.world.lanes(self.config.data.lanes)
        begun = {lane: genesis(identity, lane) for lane in lanes}
        at = begun if heads is None else {lane: heads[str(lane)] for lane in lanes}
        self._ledger = Ledger(self.folder, lanes, step + 1, at, self._owned_now)
        self.files = [self._ledger]
        self.known = Known()
        if self.world.is_main:
            self._read_quarantine()
            self.evaluations = Evaluations.load(self.folder).until(step)
            self.evaluations.save(self.folder)
        self.evaluations = self.world.share(self.evaluations)
        self.tensorboard = None
        self._lost = {"restarts": 0, "steps_again": 0, "lost_s": 0.0}
        if self.world.is_main:
            self._metrics = Lines(self.folder / "metrics.jsonl")
            self._quarantine = Lines(self.folder / "quarantine.jsonl")
            self._eval = Lines(self.folder / "eval.jsonl")
            self._events = Lines(self.folder / "events.jsonl")
            self.files += [self._metrics, self._quarantine, self._eval, self._events]
            if self.mixture:
                self._experts = Lines(self.folder / EXPERTS)
                self.files.append(self._experts)
            for line in read_lines(self.folder / "events.jsonl", {"event": str}):
                self._count(line)
            if self.config.log.tensorboard:
                from raysft.train.curves import curves

                self.tensorboard = curves(self.folder / "tensorboard", step)
                self.files.append(self.tensorboard)
            self.loggers = Loggers(
                self.config, self.folder, step, self.require, partial(self._shown, step)
            )

    def _shown(self, step: int, answers: Answers) -> list[Sink]:
        """TensorBoard, of the answers of evaluations after `step`."""
        writer, settings = self.tensorboard, self.config
        if writer is None or not settings.data.eval or not settings.evaluate.generate:
            return []
        from raysft.loggers.to_tensorboard import ToTensorboard

        return [ToTensorboard(writer, answers, step, heard=bool(self.evaluations.items))]

    def begun(
        self,
        step: int,
        last: int,
        saved_at: float | None,
        before: int | None,
        facts: JsonObject,
        idle: float = 0.0,
    ) -> None:
        """Record that this start goes on after `step`.

        last: the last step recorded before it was cut back; saved_at: when the checkpoint's state
        was copied (time.time()); before: workers that wrote it; facts: what the launcher knows;
        idle: seconds between the end of the start before and the moment someone asked for this
        one, which are nobody's loss.
        """
        if not step and not last and not facts.get("reason"):
            self.event("started", step=0, workers=self.world.size, **facts)
            return
        now = self.world.size
        reason = facts.get("reason") or (
            f"resized from {before} to {now} workers"
            if before not in (None, now)
            else "started again"
        )
        again = max(0, last - step)
        lost = None
        if saved_at:
            lost = round(max(0.0, time.time() - saved_at - idle), 1)
        told = {**facts, "reason": reason, "steps_again": again, "lost_s": lost}
        self.event("continued", step=step, workers=now, workers_before=before, **told)

    def event(self, name: str, **facts: Json) -> None:
        """Append a line to events.jsonl, and show it."""
        line = {"time": round(time.time(), 3), "event": name, **facts}
        if self.world.is_main:
            self.require()
            self._events.write(line)
            self._count(line)
            if self.loggers is not None:
                self.loggers.put("events", line)
        if self.progress is not None:
            self.progress(line)

    def saved(self, save: Save) -> None:
        """Record a checkpoint that is published."""
        self.event(
            "saved",
            step=save.step,
            stalled_s=round(save.stalled, 4),
            seconds=round(save.seconds, 3),
            bytes=save.bytes,
        )

    def _count(self, line: JsonObject) -> None:
        if line["event"] == "continued":
            self._lost["restarts"] += 1
            self._lost["steps_again"] += line.get("steps_again") or 0
            self._lost["lost_s"] = round(self._lost["lost_s"] + (line.get("lost_s") or 0.0), 1)

    def settle(self) -> None:
        """What has been recorded is on the disk when this returns."""
        for file in self.files:
            if file is not self.tensorboard:
                file.sync()

    def ledger(self, batch: StepBatch) -> None:
        """Record what a step that is done was trained on, and what could not be used."""
        self.require()
        for mb in batch.micro_batches:
            refused = [found.id for found in mb.quarantined]
            told = batch.told.get(mb.lane)
            self._ledger.write(mb.epoch, mb.step, mb.lane, mb.ids, refused, mb.tensors, told)

    def heads(self) -> dict[str, str]:
        """Where the ledger's chains stand, by lane, for the checkpoint. A collective."""
        found = self.world.gather(self._ledger.heads)
        return {str(lane): head for part in found for lane, head in part.items()}

    @patient
    def _read_quarantine(self) -> None:
        self.known = Known()
        for line in stream_lines(self.folder / "quarantine.jsonl", {"id": str, "reason": str}):
            self.known.add(line)

    def quarantine(self, batch: StepBatch, counts: dict[str, float]) -> None:
        """Name each newly quarantined example once; fail when there are too many of them. Rank 0
        knows which are known, and says so to the others."""
        if not counts["quarantined"]:
            return
        local = [(mb.lane, q) for mb in batch.micro_batches for q in mb.quarantined]
        found = sorted(
            (item for part in self.world.gather_main(local) for item in part),
            key=lambda item: (item[0], item[1].id),
        )
        failed: UserError | None = None
        if self.world.is_main:
            try:
                self._name(found, batch.step)
            except UserError as error:
                failed = error
        failed = self.world.share(failed)
        if failed is not None:
            raise failed

    def _name(self, found: list[tuple[int, Quarantined]], step: int) -> None:
        for _, example in found:
            line = quarantine_line(example, step)
            if self.known.add(line):
                self.require()
                self._quarantine.write(line)
        limit, count = self.config.data.max_quarantined, self.known.names
        if count > limit * self.examples:
            path = self.folder / "quarantine.jsonl"
            raise UserError(
                f"data.max_quarantined: {count} of {self.examples} examples are unusable,"
                f" more than {limit:.1%}: {summary(self.known.kinds.elements())}; the last: "
                f"{found[-1][1].id}: {found[-1][1].reason}; all are named in {path}"
            )

    def began(self, step: int) -> None:
        """Show that the first step of this start is done."""
        if self.progress is not None:
            self.progress({"began": step})

    def skipped(self, step: int, totals: Totals, found: Stepped) -> None:
        """Tell of a step whose gradient was not finite; fail when too many follow each other."""
        if not found.skipped:
            return
        self.event("skipped_step", step=step, norm=str(found.norm), in_a_row=totals.skipped)
        limit = self.config.optim.max_skipped
        if totals.skipped > limit:
            raise UserError(
                f"optim.max_skipped: the gradients of {totals.skipped} steps in a row are NaN or "
                f"infinite, the last at step {step}; lower optim.lr, set optim.clip, or train with "
                "train.precision=bf16 or fp32"
            )

    def metrics(
        self, batch: StepBatch, totals: Totals, clock: Clock, rate: float, norm: float
    ) -> None:
        """Write a line of metrics.jsonl, and start counting anew. A collective."""
        counts, lap = totals.counts, clock.lap()
        seconds = max(lap["seconds"], 1e-9)
        workers = self.world.size
        memory = [0.0] * workers
        memory[self.world.rank] = peak_memory(self.world.device) or 0.0
        wait, *memory = self.world.sum([lap["waited"] / seconds / workers, *memory]).tolist()
        told = None
        if totals.loads is not None:
            told = totals.loads.take(self.world, batch.step, int(lap["steps"]))
        line = {
            "step": batch.step,
            "epoch": batch.epoch,
            **totals.losses(),
            **self.figures(counts),
            "lr": rate,
            "grad_norm": norm,
            "tokens": int(counts["tokens"]),
            "supervised_tokens": int(counts["supervised"]),
            "examples": int(counts["examples"]),
            "audio_seconds": round(counts["audio_seconds"], 3),
            "tokens_per_s": round(counts["tokens"] / seconds, 1),
            "tokens_per_s_worker": round(counts["tokens"] / seconds / workers, 1),
            "supervised_tokens_per_s": round(counts["supervised"] / seconds, 1),
            "audio_seconds_per_s": round(counts["audio_seconds"] / seconds, 2),
            **self._utilisation(counts, seconds),
            **({"peak_memory_gb": round(max(memory) / 1e9, 3)} if max(memory) else {}),
            "padding": round(1 - counts["tokens"] / max(1.0, counts["positions"]), 6),
            "data_wait": round(wait, 4),
            "seconds": round(seconds, 4),
            "world_size": workers,
            "skipped": totals.all_skipped,
            **self._lost,
            **(told.figures if told is not None else {}),
        }
        totals.reset()
        if self.world.is_main:
            self.require()
            self._metrics.write(line)
            if told is not None:
                self._experts.write(told.line)
            self._tell("metrics", line, of_metrics(line))
        if self.progress is not None:
            self.progress({**line, "steps": lap["steps"], "total_steps": self.total_steps})
        if told is not None and told.dead is not None:
            self.event("warning", step=batch.step, reason=told.dead)

    def _utilisation(self, counts: dict[str, float], seconds: float) -> dict[str, float]:
        """TFLOP/s of a worker, and their share of its device's peak where that is known."""
        if self.cost is None:
            return {}
        flops = self.cost.total(counts) / seconds / self.world.size
        found = {"tflops": float(f"{flops / 1e12:.4g}")}
        if self._peak is not None:
            found["mfu"] = round(flops / self._peak, 4)
        return found

    def evaluation(self, found: Evaluation, checkpoint: bool) -> None:
        """Record an evaluation. checkpoint: whether one of its step is saved (or being saved)."""
        found = self.world.share(found)
        self.evaluations.add(found)
        if self.world.is_main:
            self.require()
            line = found.line(checkpoint)
            self._eval.write(line)
            self.evaluations.save(self.folder)
            self._tell("eval", line, of_evaluation(line))
        if self.progress is not None:
            line = found.line(checkpoint)
            self.progress({"total_steps": self.total_steps, "eval": line, "step": found.step})

    def _tell(self, kind: str, line: JsonObject, figures: dict[str, float]) -> None:
        """Give loggers a line of metrics or eval that was written, and TensorBoard its figures."""
        if self.tensorboard is not None:
            for key, value in figures.items():
                self.tensorboard.add_scalar(key, value, line["step"])
        if self.loggers is not None:
            self.loggers.put(kind, line)
            for reason in self.loggers.failures():
                self.event("warning", step=line["step"], reason=reason)

    def logged(self, step: int, outcome: str) -> None:
        """All is recorded: let loggers take what they have not yet. outcome: finished or stopped,
        at `step`."""
        if self.loggers is not None:
            self.loggers.close(outcome)
            failures, self.loggers = self.loggers.failures(), None
            for reason in failures:
                self.event("warning", step=step, reason=reason)

    def close(self) -> None:
        """Close every file."""
        if self.loggers is not None:  # it was not ended as it should
            self.loggers.close("failed")
            for reason in self.loggers.failures():
                log.warning("%s", reason)
        for file in self.files:
            file.close()
        if self._owned is not None:
            self._owned.release()

    def ended(self) -> None:
        """Every worker of this group has written its last. A collective."""
        self.world.barrier()
        if self.world.is_main and self.lease is not None:
            self.lease.ended(self._workers)
