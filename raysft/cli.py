"""What the jobs share: arguments and one-line errors."""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raysft import environment
from raysft.config.aliases import our_key, our_value
from raysft.config.load import all_keys, describe
from raysft.errors import UserError
from raysft.failures import told


@dataclass
class Arguments:
    """Positional arguments, `key=value` overrides and `--flags` of a job's command line."""

    positional: list[str]
    overrides: list[str]
    flags: dict[str, str | bool]


def parse(
    argv: Sequence[str],
    usage: str,
    positional: int,
    flags: Sequence[str] = (),
    keys: bool = True,
    more: bool = False,
) -> Arguments:
    """Split a command line; prints help and leaves on -h (and, with exit code 2, where nothing is
    given), raises UserError on anything unknown.

    flags: allowed names; one that ends in `=` takes a value (`--data SOURCE` or `--data=SOURCE`).
    more: there may be more positional words than that.
    """
    found = Arguments([], [], {})
    rest = list(argv)
    if not rest and positional:
        print(usage.strip(), file=sys.stderr)
        raise SystemExit(2)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            print(
                usage
                + ("\n\nConfig keys (key=value overrides them)\n" + describe() if keys else "")
            )
            raise SystemExit(0)
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if name + "=" in flags:
                if not equals and not rest:
                    raise UserError(f"--{name}: needs a value\n{usage}")
                found.flags[name] = value if equals else rest.pop(0)
            elif name in (*flags, "debug") and not equals:
                found.flags[name] = True
            else:
                raise UserError(f"--{name}: {_meant(name, value, rest, flags, keys)}")
        elif word.startswith("-") and word != "-" and "=" not in word:
            raise UserError(f"{word}: {_meant(word[1:], '', rest, flags, keys)}")
        elif len(found.positional) < positional or more:
            found.positional.append(word)
        elif keys:
            found.overrides.append(word)
        else:
            raise UserError(f"{word!r}: one argument too many\n{usage}")
    if len(found.positional) < positional:
        raise UserError(
            f"{len(found.positional)} of {positional} arguments are given\n{usage.strip()}"
        )
    return found


def _meant(name: str, value: str, rest: list[str], flags: Sequence[str], keys: bool) -> str:
    """What to say of an option there is not: what it is called here, or which there are."""
    known = all_keys()
    ours = (name, "") if name in known else our_key(name, known)
    if keys and ours is not None and "[]" not in ours[0]:
        key, note = ours
        if not value and rest and not rest[0].startswith("-") and "=" not in rest[0]:
            value = rest[0]
        value = (our_value(key, value) or value).partition(",")[0]
        return f"keys are given as key=value here: {key}={value or '...'}" + (
            f" ({note})" if note else ""
        )
    names = [flag.rstrip("=") for flag in (*flags, "debug", "help")]
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean --{near[0]}? T" if near else "t"
    return f"unknown option; {hint}here are {', '.join(f'--{name}' for name in names)}"


def guarded(main: Callable[[Sequence[str]], None]) -> None:
    """Run a job's main: exit code 0 on success only, errors in one readable line."""
    argv = sys.argv[1:]
    if environment.REMARK is not None:
        print(environment.REMARK, file=sys.stderr, flush=True)
    try:
        main(argv)
    except UserError as error:
        _leave(error, f"error: {error}", argv)
    except KeyboardInterrupt as error:
        # Whoever knows what there is to say about it has said it: see `launch.Start.left`.
        print(f"\n{str(error) or 'interrupted'}", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:  # noqa: BLE001 - the last resort: one line, traceback on request
        _leave(error, f"error: {told(error)}; --debug shows all of it", argv)


def _leave(error: Exception, text: str, argv: Sequence[str]) -> None:
    if "--debug" in argv:
        traceback.print_exception(error)
    print(text, file=sys.stderr)
    raise SystemExit(1) from None
