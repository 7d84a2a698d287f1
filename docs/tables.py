"""What pages say of the code's tables, made from them whenever the site is built: `make docs`.

A hook of mkdocs. A line `<!-- made: NAME -->` of a page becomes what `MADE[NAME]` returns; pictures
of the repository that a page shows by `../` come along.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from raysft.config import families, losses, rewards
from raysft.config.combinations import PEFT_KEYS, contradictions
from raysft.config.marks import one_of
from raysft.config.reference import Entry, entries
from raysft.config.resume import rule_of
from raysft.config.schema import Config
from raysft.config.strategies import STRATEGIES
from raysft.data import sources
from raysft.scorers import SPEAKING, scorers

PARTS = {
    "weights": "parameters",
    "gradients": "gradients",
    "moments": "optimizer state",
    "experts": "experts",
}
ROOT = Path(__file__).resolve().parents[1]
_CODE = re.compile(r"(`[^`]*`)")

# What a start may do with a key of its run, see `raysft.config.marks`.
GOES_ON = {
    "free": "yes",
    "fixed": "no",
    "data": "with `data.extend`",
    "length": "where rates allow it",
    "base": "to the same weights elsewhere",
}


def row(*cells: object) -> str:
    """A row of a table; what would end a cell is escaped, where it is no code."""
    parts = (_CODE.split(str(cell)) for cell in cells)
    safe = (
        "".join(p if p[:1] == "`" else p.replace("|", "\\|").replace("<", "&lt;") for p in found)
        for found in parts
    )
    return f"| {' | '.join(safe)} |"


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table with that head."""
    head = list(head)
    return "\n".join([row(*head), "|---" * len(head) + "|", *(row(*cells) for cells in rows)])


# -- keys ----------------------------------------------------------------------------------------


def keys() -> str:
    """Every key, a table a section; sections within one come behind its own keys."""
    sections: dict[str, list[Entry]] = {}
    about: dict[str, str] = {}
    for entry in entries():
        if entry.kind is None:
            about[entry.key] = entry.about
            sections[entry.key] = []
        else:
            sections.setdefault(entry.key.rpartition(".")[0], []).append(entry)
    parts, head = [], ("key", "type", "default", "what it does", "may a run that goes on change it")
    tops = list(dict.fromkeys(name.partition(".")[0] for name in sections))
    for name in sorted(sections, key=lambda name: tops.index(name.partition(".")[0])):
        if name:
            parts += [f"{'###' if '.' in name else '##'} {name}", _sentence(about[name])]
        parts.append(table(head, (_key(entry) for entry in sections[name])))
    return "\n\n".join(parts)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _key(entry: Entry) -> tuple[str, ...]:
    kind = str(entry.kind).replace("|", ", ")
    default = "has to be given" if entry.default is None else f"`{entry.default}`"
    mark = rule_of(entry.key.replace("[]", ""))
    goes_on = GOES_ON[mark.rule] + (" (nor with its weights alone)" if mark.weights else "")
    return f"`{entry.key}`", kind, default if default != "``" else "", entry.about, goes_on


# -- rows of the tables --------------------------------------------------------------------------


def formats() -> str:
    """What a source may be."""
    rows = ((f"`{name}`", form.describe, form.noun) for name, form in sources.formats().items())
    return table(("`format`", "reads", "a record is called"), rows)


def strategies() -> str:
    """What each shares, and what goes with it."""
    rows = []
    for name, traits in STRATEGIES.items():
        shares = ", ".join(PARTS[part] for part in traits.shards) or "nothing: a whole model each"
        more = [f"`parallel.offload: {offload}`" for offload in traits.offloads]
        more += ["`parallel.replicate`"] * traits.replicates
        more += ["`parallel.gradients`"] * traits.turns
        more += ["`parallel.deepspeed`"] * (traits.stage is not None)
        rows.append((f"`{name}`", shares, ", ".join(more)))
    return table(("`parallel.strategy`", "shares among workers", "goes with"), rows)


def rows_of_families() -> str:
    """Which models are whose, and what each family refuses."""
    rows = []
    for family in families.families():
        types = ", ".join(f"`{kind}`" for kind in family.types)
        others = "all that `AutoModelForCausalLM` builds" if family.every_causal_lm else ""
        refused = [f"`{key}`: {why}" for key, why in family.refused_keys.items()]
        refused += [f"`peft.method: {name}`: {why}" for name, why in family.refused_methods.items()]
        rows.append((f"`{family.name}`", types + others, "; ".join(refused)))
    return table(("`model.family`", "model types", "refused"), rows)


def token_losses() -> str:
    """What `train.losses` takes."""
    rows = ((f"`{name}`", losses.about(name)) for name in losses.choices())
    return table(("`train.losses`", "what it does"), rows)


def earned() -> str:
    """What `train.grpo.rewards` takes."""
    rows = ((f"`{name}`", rewards.about(name)) for name in rewards.choices())
    return table(("`train.grpo.rewards`", "an answer earns"), rows)


def figures() -> str:
    """What evaluations measure."""
    rows = []
    for scorer in scorers():
        by = "source" if scorer.wants == "text" else "task"
        for figure in scorer.figures:
            better = "lower" if figure.better == "min" else "higher"
            tasks = ", ".join(scorer.tasks) if scorer.wants == "text" else "all"
            if scorer.wants == "speech":
                tasks = f"{', '.join(SPEAKING)}, where they are [heard](#what-a-model-speaks)"
            rows.append((f"`{figure.name}/{by.upper()}`", scorer.name, by, tasks, better))
    return table(("metric", "scorer", "of each", "of tasks, by default", "better is"), rows)


# -- what goes with what -------------------------------------------------------------------------


class Feature(NamedTuple):
    """A choice of one key."""

    key: str
    given: Any

    @property
    def value(self) -> str:
        """As YAML writes it."""
        return str(self.given).lower() if isinstance(self.given, bool) else str(self.given)

    def __str__(self) -> str:
        plain = isinstance(self.given, str)
        return f"`{self.value}`" if plain else f"`{self.key.partition('.')[2]}: {self.value}`"


def features() -> list[Feature]:
    """Strategies and adapters, and what they could meet."""
    choices: dict[str, Iterable[Any]] = {
        "parallel.strategy": list(STRATEGIES),
        "peft.method": [name for name in PEFT_KEYS if name != "none"],
        "model.family": [family.name for family in families.families()],
        "data.mode": ["packed", "padded"],
        "parallel.offload": ["optimizer", "parameters"],
        "parallel.replicate": [2],
        "optim.optimizer": ["adamw8bit"],
        "train.precision": ["bf16", "fp16"],
        "train.compile": [True],
        "train.gradient_checkpointing": [True],
    }
    return [Feature(key, value) for key, values in choices.items() for value in values]


def refusals(*chosen: Feature) -> list[str]:
    """What is said of a config with these features; none: it is taken."""
    tree: dict[str, Any] = {
        "data": {"train": [{"path": "train.jsonl"}]},
        "model": {"path": "owner/model"},
        "parallel": {"workers": 2},
    }
    for feature in chosen:
        section, _, name = feature.key.partition(".")
        tree[section] = {**tree.get(section, {}), name: feature.given}
    found = contradictions(Config.model_validate(tree))
    return [mistake.text.removeprefix(f"{mistake.key}: ") for mistake in found]


SETTING = ("parallel.strategy", "data.mode")  # what all other features are tried in


def pair(one: Feature, other: Feature) -> str | None:
    """Why two features do not go together; None: they do, under some strategy and mode."""
    keys = {one.key, other.key}
    free = ([f for f in features() if f.key == key] for key in SETTING if key not in keys)
    said = {setting: refusals(one, other, *setting) for setting in product(*free)}
    if not all(said.values()):
        return None
    if not keys & set(SETTING):  # the reason is theirs where each alone is taken
        able = [s for s in said if not refusals(one, *s) and not refusals(other, *s)]
        return said[able[0]][0] if able else "no strategy takes both"
    return min(said.values(), key=len)[0]


def matrix() -> str:
    """Feature, key, works with, refused with: asked of what refuses a config."""
    every, rows = features(), []
    for feature in every:
        works: dict[str, list[Feature]] = {}
        refused: dict[str, list[tuple[Feature, str]]] = {}
        for other in (other for other in every if other.key != feature.key):
            why = pair(feature, other)
            if why is None:
                works.setdefault(other.key, []).append(other)
            else:
                alike = re.sub(rf"\b{other.value}\b", "{}", why, count=1)
                refused.setdefault(f"{other.key} {alike}", []).append((other, why))
        goes = "; ".join(_goes(key, found, every) for key, found in works.items())
        not_with = "; ".join(map(_refused, refused.values()))
        rows.append((feature, f"`{feature.key}`", goes, not_with))
    return table(("feature", "key", "works with", "refused with"), rows)


def _goes(key: str, found: list[Feature], every: list[Feature]) -> str:
    whole = [feature for feature in every if feature.key == key]
    return f"any `{key}`" if len(whole) > 1 and found == whole else ", ".join(map(str, found))


def _refused(found: list[tuple[Feature, str]]) -> str:
    """Features that are refused for the same reason, and that, with all their names in it."""
    (first, why), values = found[0], [feature.value for feature, _ in found]
    why = re.sub(rf"\b{first.value}\b", one_of(values), why, count=1)
    return f"{', '.join(str(feature) for feature, _ in found)}: {why}"


# -- the hook ------------------------------------------------------------------------------------

MADE: dict[str, Callable[[], str]] = {
    "keys": keys,
    "formats": formats,
    "strategies": strategies,
    "families": rows_of_families,
    "losses": token_losses,
    "rewards": earned,
    "figures": figures,
    "matrix": matrix,
}
_MADE = re.compile(r"^<!-- made: (\w+) -->.*$", re.M)
_PICTURE = re.compile(r"\]\(\.\./([\w/]+\.png)\)")


def made(markdown: str) -> str:
    """A page with its tables in it. Raises KeyError for a table that there is not."""
    return _MADE.sub(lambda match: MADE[match[1]](), markdown)


def pictures() -> Iterator[str]:
    """The pictures of the repository that pages show, by their paths."""
    for page in sorted(Path(__file__).parent.glob("*.md")):
        yield from _PICTURE.findall(page.read_text(encoding="utf-8"))


def on_files(files: Any, *, config: Any) -> Any:
    """Give mkdocs the pictures."""
    from mkdocs.structure.files import File

    for path in dict.fromkeys(pictures()):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """A page as it is built."""
    return _PICTURE.sub(r"](\1)", made(markdown))
