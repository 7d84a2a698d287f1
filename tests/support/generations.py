"""A run whose data changes between its starts, for the tests of generations."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from raysft.config.schema import Data, Source
from raysft.data.index.build import Index
from raysft.data.plan.generations import Generations, open_index
from raysft.data.plan.plan import Cursor
from raysft.errors import UserError
from raysft.run import plans
from tests.support.indexes import Encoder, build


class Run:
    """A run's folder, and starts of it on whatever data there is then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "runs" / "a"
        self.folder.mkdir(parents=True)
        self.cache = folder / "index"
        self.cursor: Cursor | None = None

    def index(self, *paths: Path | Source, encoder: Encoder | None = None) -> Index:
        return build(self.cache, *paths, encoder=encoder)

    def start(
        self, *paths: Path | Source, encoder: Encoder | None = None, seed: int = 0, **data: object
    ) -> Generations:
        settings = Data(**{"lanes": 2, "tokens_per_batch": 40, "window": 8, **data})
        index = self.index(*paths, encoder=encoder)
        return plans.follow(self.folder, index, settings, seed, self.cursor)

    def train(self, steps: int) -> list[list[str]]:
        """Do `steps` steps and save; the ids of each."""
        generations = plans.load(self.folder)
        index = open_index(plans.places(self.folder))
        cursor = self.cursor or generations.start()
        ids = []
        for step in itertools.islice(generations.steps(cursor), steps):
            ids.append(sorted(index.ids(np.concatenate(step.lanes))))
            cursor = step.after
        self.cursor = Cursor.from_json(json.loads(json.dumps(cursor.to_json())))
        return ids

    def epoch(self) -> list[str]:
        """Train to the end of the epoch; the ids of the steps left in it."""
        assert self.cursor is not None
        before, ids = self.cursor.epoch, []
        while self.cursor.epoch == before:
            ids += self.train(1)[0]
        return ids

    def written(self) -> list[dict]:
        return json.loads((self.folder / "plan.json").read_bytes())


def refusal(run: Run, *paths: Path | Source, **changes: object) -> str:
    before = run.written()
    with pytest.raises(UserError) as error:
        run.start(*paths, **changes)
    assert run.written() == before
    text = str(error.value)
    assert "\n" not in text
    assert "run.name" in text
    assert "checkpoint.resume=weights_only" in text
    return text


def names(first: int, last: int) -> list[str]:
    return sorted(f"m{number}" for number in range(first, last))
