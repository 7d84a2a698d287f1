"""`stages`: several trainings in one file. What the config of each is, as plain trees.

A stage is the file without `stages`, with the stage's own keys in place of the file's: mappings
merge, whatever else replaces. `expand` makes each entry of `stages` such a whole tree; `tree_of`
makes the config of a run of it, in a folder below that of all stages. A stage that is evaluated
while it trains keeps its best by validation loss, unless it names another metric.

`model.path: stages.NAME` is the model of an earlier stage: its best checkpoint, which is exported
beside the stages' folders (`best_of`). `model.pair: {llm: stages.NAME, flow: stages.NAME}` is two
of them as one model, of the family `pair`.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from raysft import paths
from raysft.config.overrides import apply_override
from raysft.errors import UserError
from raysft.json_types import Json, JsonObject

BEST = "_best"  # after a stage's name: the folder of its best model
START = "_start"  # after a stage's name: the pair that it begins with
PAIR = ("llm", "flow")  # keys of model.pair
PAIR_WEIGHTS = ("llm_weight", "flow_weight")  # those that it may have beside
BEST_BY = "loss"  # the validation loss
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}")
UNITS = "speech_tokens.safetensors"  # fitted once, for all stages
_TAKEN = ("owner",)  # of the folder that holds the stages'
_MODEL = re.compile(r"stages\.(.*)")
# Of all stages together, never of one.
_OF_ALL = ("stages", "only", "sweep", "prepare")
_PLACE = ("run.name", "run.storage_path")
# Which model it is, and what goes with that one.
_WHICH = ("path", "config", "pair", "tokenizer", "feature_extractor", "revision")


def names_of(tree: JsonObject) -> list[str]:
    """Names of the stages of a tree without `mistakes`, in order."""
    return [str(entry["name"]) for entry in tree.get("stages") or []]


def mistakes(tree: JsonObject) -> list[str]:
    """What is wrong with `stages` and `only` themselves: a line each."""
    entries, only = tree.get("stages"), tree.get("only")
    if not entries:
        return [] if only is None else ["only: names stages, and the config has none (stages: [])"]
    if not isinstance(entries, list):
        return ["stages: expected a list, as [{name: llm, ...}, {name: flow, ...}]"]
    found: list[str] = []
    names: list[str] = []
    for place, entry in enumerate(entries):
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(name, str):
            found.append(f"stages.{place}: expected a name and keys, as {{name: llm, ...}}")
            continue
        if not _NAME.fullmatch(name) or name.endswith((BEST, START)) or name in _TAKEN:
            found.append(
                f"stages.{place}.name: {name!r} cannot be a stage's; a name begins with a letter, "
                f"has letters, digits, - and _ (at most 40), and does not end in {BEST} or {START}"
            )
        elif name.lower() in [other.lower() for other in names]:
            found.append(f"stages.{place}.name: {name} is there already; give each its own name")
        names.append(name)
        found += [
            f"stages.{name}.{key}: is said once for all stages; write it beside stages"
            for key in (*_OF_ALL, *_PLACE)
            if _has(entry, key)
        ]
        found += [f"stages.{name}.{line}" for line in _wrong_pair(entry)]
    if found:
        return found
    for name in [only] if isinstance(only, str) else only if isinstance(only, list) else []:
        if name not in names:
            found.append(f"only: {name} is no stage{_near(str(name), names)}")
    return found


def _has(tree: JsonObject, key: str) -> bool:
    section, _, name = key.partition(".")
    below = tree.get(section)
    return section in tree and (not name or (isinstance(below, dict) and name in below))


def _wrong_pair(entry: JsonObject) -> list[str]:
    """What is wrong with the model.pair of an entry: a line each."""
    model = entry.get("model")
    pair = model.get("pair") if isinstance(model, dict) else None
    if pair is None:
        return []
    if not isinstance(pair, dict) or not all(isinstance(pair.get(key), str) for key in PAIR):
        return [f"model.pair: expected {{llm: stages.NAME, flow: stages.NAME}}, found {pair!r}"]
    found = [
        f"model.pair.{key}: unknown key{_near(str(key), [*PAIR, *PAIR_WEIGHTS])}"
        for key in pair
        if key not in (*PAIR, *PAIR_WEIGHTS)
    ]
    for key in PAIR_WEIGHTS:
        value = pair.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            found.append(f"model.pair.{key}: expected a number greater than 0, found {value!r}")
    return found


def _near(name: str, names: Sequence[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, names, 1)
    meant = f"; did you mean {prefix}{near[0]}?" if near else ""
    return f"{meant} (there are {', '.join(names)})"


def override(tree: JsonObject, overrides: Sequence[str]) -> JsonObject:
    """`tree` with `key=value`s of a command line: each holds for all stages, one that begins with
    `stages.NAME.` for that stage, whatever else is said. Raises UserError."""
    tree = copy.deepcopy(tree)
    own = [text for text in overrides if text.startswith("stages.")]
    general = [text for text in overrides if text not in own]
    for text in general:
        apply_override(tree, text)
    if not tree.get("stages") and own:
        raise UserError(f"{own[0].partition('=')[0]}: the config has no stages")
    if not tree.get("stages") or mistakes(tree):
        return tree  # `load.validate` says them
    tree = expand(tree)
    entries = {str(entry["name"]): entry for entry in tree["stages"]}
    for entry in entries.values():
        for text in general:
            key = text.partition("=")[0]
            if key.split(".")[0] not in _OF_ALL and key not in _PLACE:
                apply_override(entry, text)
    for text in own:
        name, _, rest = text.removeprefix("stages.").partition(".")
        key = rest.partition("=")[0]
        if "=" in name or not rest:
            raise UserError(f"{text}: expected stages.NAME.key=value: stages.llm.optim.lr=1e-4")
        if name not in entries:
            raise UserError(f"{text.partition('=')[0]}: no stage {name}{_near(name, [*entries])}")
        if key in ("name", *_PLACE) or key.split(".")[0] in _OF_ALL:
            raise UserError(f"stages.{name}.{key}: is not one stage's; write it into the file")
        try:
            apply_override(entries[name], rest)
        except UserError as error:
            raise UserError(f"stages.{name}.{error}") from error
    return tree


def expand(tree: JsonObject) -> JsonObject:
    """`tree`, without `mistakes`, with every entry of `stages` as the whole tree of that stage, but
    for where its run is. Done again it changes nothing."""
    base = {key: value for key, value in tree.items() if key not in _OF_ALL}
    if isinstance(base.get("run"), dict):
        base["run"] = {key: base["run"][key] for key in base["run"] if f"run.{key}" not in _PLACE}
    entries = [_merged(_without_its_model(base, entry), entry) for entry in tree["stages"]]
    return {**tree, "stages": entries}


def _without_its_model(base: JsonObject, entry: JsonObject) -> JsonObject:
    """The tree that a stage is laid upon: a stage that says which model has no other beside it."""
    own, model = entry.get("model"), base.get("model")
    if not isinstance(own, dict) or not isinstance(model, dict):
        return base
    gone: tuple[str, ...] = ()
    if own.get("pair") is not None:
        gone = _WHICH
    elif isinstance(own.get("path"), str):
        gone = _WHICH if _MODEL.fullmatch(own["path"]) else ("config", "pair", "revision")
    elif own.get("config") is not None:
        gone = ("path", "pair", "revision")
    return {**base, "model": {key: model[key] for key in model if key not in gone}}


def _merged(below: Json, above: Json) -> Json:
    """Mappings key by key; but the config of another type of model (model_type) as a whole."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return copy.deepcopy(above)
    types = {tree["model_type"] for tree in (below, above) if "model_type" in tree}
    if len(types) > 1:
        return copy.deepcopy(above)
    found = {**copy.deepcopy(below)}
    for key, value in above.items():
        found[key] = _merged(found[key], value) if key in found else copy.deepcopy(value)
    return found


def folder_of(tree: JsonObject) -> Path:
    """The folder that holds those of the stages: run.storage_path/run.name, absolute."""
    run = tree.get("run")
    run = run if isinstance(run, dict) else {}
    place, name = str(run.get("storage_path") or "runs"), str(run.get("name") or "run")
    return Path(paths.absolute(place)) / name


def best_of(folder: Path, name: str) -> Path:
    """Where the best model of a stage is exported. folder: that holds the stages'."""
    return folder / f"{name}{BEST}"


def begins_from(tree: JsonObject, name: str) -> dict[str, str]:
    """Which stages a stage takes models of: dotted key -> its name. tree: as `expand` gives it."""
    (entry,) = (entry for entry in tree["stages"] if entry["name"] == name)
    return dict(_models(entry.get("model"), "model"))


def _models(node: Json, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for inner, value in node.items():
            yield from _models(value, f"{key}.{inner}")
    elif isinstance(node, str) and (match := _MODEL.fullmatch(node)):
        yield key, match[1]


def start_of(folder: Path, name: str) -> Path:
    """Where the pair that a stage begins with is assembled. folder: that holds the stages'."""
    return folder / f"{name}{START}"


def pair_of(tree: JsonObject, name: str) -> JsonObject | None:
    """The model.pair of a stage, with folders for stages; None where it has none. tree: as `expand`
    gives it."""
    (entry,) = (entry for entry in tree["stages"] if entry["name"] == name)
    pair = (entry.get("model") or {}).get("pair")
    if pair is None:
        return None
    found = dict(pair)
    for key in PAIR:
        match = _MODEL.fullmatch(found[key])
        place = best_of(folder_of(tree), match[1]) if match else paths.model(found[key])
        found[key] = str(place)
    return found


def unknown(tree: JsonObject, name: str) -> list[str]:
    """What is wrong with the stages that a stage takes models of: a line each."""
    names = names_of(tree)
    before = names[: names.index(name)]
    found = []
    for key, other in begins_from(tree, name).items():
        if other not in names:
            found.append(f"{key}: stages.{other} is no stage{_near(other, names, 'stages.')}")
        elif other not in before:
            found.append(f"{key}: stages.{other} does not come before {name}; change their order")
    return found


def tree_of(tree: JsonObject, name: str, stand_in: bool = False) -> JsonObject | None:
    """The config of a stage's run. tree: as `expand` gives it.

    stand_in: with the model that an earlier stage begins with in place of the one it will end
        with, whose shapes are the same; None where a stage takes several.
    """
    (entry,) = (entry for entry in tree["stages"] if entry["name"] == name)
    found = copy.deepcopy({key: value for key, value in entry.items() if key != "name"})
    folder, run = folder_of(tree), found.get("run") or {}
    if not isinstance(run, dict):
        return found  # `load.validate` says so
    if pair_of(tree, name) is not None:
        pair = found["model"].pop("pair")
        if not stand_in:
            found["model"]["path"] = str(start_of(folder, name))
        elif (shapes := _pair_stand_in(tree, pair)) is None:
            return None
        else:
            found["model"] = {**shapes, **found["model"]}
    for key, other in dict(_models(found.get("model"), "model")).items():
        if not stand_in:
            _set(found, key, str(best_of(folder, other)))
        elif key != "model.path" or (before := tree_of(tree, other, stand_in=True)) is None:
            return None
        else:
            taken = {which: before["model"][which] for which in _WHICH if which in before["model"]}
            found["model"] = {**taken, **{k: v for k, v in found["model"].items() if k != "path"}}
    found["run"] = {**run, "name": name, "storage_path": str(folder)}
    for section in ("data", "evaluate", "checkpoint", "log"):
        if found.get(section) is None:
            found[section] = {}
        if not isinstance(found[section], dict):
            return found  # `load.validate` says so
    units = found["data"].get("speech_tokens")
    if isinstance(units, dict) and units.get("path") is None and units == _first_units(tree):
        found["data"]["speech_tokens"] = {**units, "path": str(folder / UNITS)}
    if found["data"].get("index_path") is None:  # made once for all
        found["data"]["index_path"] = str(folder.parent / "index")
    if found["log"].get("group") is None:
        found["log"]["group"] = folder.name
    kept = found["checkpoint"]
    if found["data"].get("eval") and found["evaluate"].get("every") and kept.get("best") is None:
        kept["best"] = BEST_BY
    place = kept.get("path")
    if isinstance(place, str) and (paths.is_store(place) or place.startswith(("/", "~", "file:"))):
        kept["path"] = f"{place.rstrip('/')}/{folder.name}"
    return found


def _first_units(tree: JsonObject) -> Json:
    """The data.speech_tokens of the first stage that has some: what all that say the same share."""
    datas = (entry.get("data") for entry in tree["stages"])
    found = (data.get("speech_tokens") for data in datas if isinstance(data, dict))
    return next((units for units in found if units), None)


def _pair_stand_in(tree: JsonObject, pair: JsonObject) -> JsonObject | None:
    """A `model` of the shapes of a pair's two; None where one of them is no `model.config`."""
    parts = []
    for key in PAIR:
        match = _MODEL.fullmatch(pair[key])
        before = tree_of(tree, match[1], stand_in=True) if match else None
        model = (before or {}).get("model") or {}
        if model.get("config") is None:
            return None
        parts.append(model)
    llm, flow = parts
    weights = {key: pair[key] for key in PAIR_WEIGHTS if key in pair}
    both = {"text_config": llm["config"], "flow_config": flow["config"], **weights}
    tokenizer = {"tokenizer": llm["tokenizer"]} if "tokenizer" in llm else {}
    return {"config": {"model_type": "raysft_pair", **both}, **tokenizer}


def _set(tree: JsonObject, key: str, value: str) -> None:
    *parents, last = key.split(".")
    for part in parents:
        tree = tree[part]
    tree[last] = value
