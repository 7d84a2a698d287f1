"""Which failures a restart can mend, and the line that is said of one."""

from __future__ import annotations

import errno
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from raysft import failures
from raysft.errors import BadExample, UserError
from tests.cluster.conftest import ROOT


def raised(code: str, names: dict[str, object] | None = None) -> Exception:
    """What `code` raises, with its traceback."""
    try:
        exec(compile(code, "/home/user/my_format.py", "exec"), names or {})
    except Exception as error:  # noqa: BLE001 - whichever it is
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    "code",
    [
        "[][3]",
        "{}['text']",
        "int('one')",
        "len(3)",
        "1 / 0",
        "None.shape",
        "undefined",
        "import no_such_module",
        "from os import no_such_name",
        "assert False, 'shapes'",
        "raise NotImplementedError",
        "b'\\xff'.decode()",
        "import json; json.loads('{')",
    ],
)
def test_mistakes_in_code_and_data_are_certain(code: str) -> None:
    error = raised(code)
    assert failures.certain(error)
    said = failures.told(error)
    assert said.startswith(type(error).__name__) and "\n" not in said
    if "json" not in code:
        assert said.endswith("(/home/user/my_format.py, line 1, in <module>)")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error", "/data/a.wav"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/mnt/a"),
        LocalEntryNotFoundError("the hub did not answer"),
        TimeoutError("no answer"),
        ConnectionResetError("reset"),
        MemoryError(),
        RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]"),
        RuntimeError("NCCL communicator was aborted on rank 3."),
        RuntimeError("Timed out waiting 10000ms for recv operation to complete"),
        ValueError("Default process group has not been initialized, please make sure to call"),
        torch.distributed.DistBackendError("ncclInternalError"),
    ],
)
def test_what_the_outside_did_is_tried_again_for_ever(error: Exception) -> None:
    assert not failures.certain(error)
    assert failures.repeats(error) is None


def test_wrong_shapes_and_a_full_device_are_certain_once_they_come_again() -> None:
    shapes = raised("import torch; torch.ones(2, 3) @ torch.ones(2, 3)")
    assert not failures.certain(shapes)
    assert failures.repeats(shapes) == (
        "RuntimeError in /home/user/my_format.py, line 1, in <module>"
    )
    full = raised(
        "raise oom('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has')",
        {"oom": torch.OutOfMemoryError},
    )
    assert not failures.certain(full) and failures.repeats(full) is not None
    assert "lower data.tokens_per_batch" in failures.told(full)


def test_a_message_for_the_user_stays_as_it_is_and_others_name_type_and_place() -> None:
    assert failures.told(UserError("data.train: empty")) == "data.train: empty"
    assert failures.told(BadExample("a.wav: silent")) == "BadExample: a.wav: silent"
    error = raised("raise ValueError('first line\\nsecond line')")
    assert failures.told(error) == (
        "ValueError: first line (/home/user/my_format.py, line 1, in <module>)"
    )


def test_the_place_is_the_innermost_of_raysft_and_not_the_librarys_below() -> None:
    from raysft.data.plan import pack

    with pytest.raises(Exception) as caught:
        pack.choose(np.array(["long", "short"]), 3)
    assert failures.place(caught.value).startswith("raysft/data/plan/pack.py, line ")


def test_what_a_task_of_ray_raised_is_seen_through_its_wrapping() -> None:
    import ray

    text = (
        "Traceback (most recent call last):\n"
        f'  File "{ROOT}/raysft/data/text.py", line 12, in encode\n'
        "    return table[key]\n"
        '  File "/usr/lib/site-packages/numpy/x.py", line 3, in get\n'
        "    raise KeyError(key)\n"
        "KeyError: 'speaker'\n"
    )
    cause = KeyError("speaker\nFailed to apply UDF transform after 1/1 attempts.\nTo change")
    for error in (
        ray.exceptions.RayTaskError("read", text, cause),
        ray.exceptions.RayTaskError("read", text, cause).as_instanceof_cause(),
    ):
        assert failures.certain(error)
        said = failures.told(error)
        assert said == "KeyError: speaker (raysft/data/text.py, line 12, in encode)"
    broken = ray.exceptions.RaySystemError(ModuleNotFoundError("No module named 'mine'"), text)
    assert failures.certain(broken)
    for kind in (ray.exceptions.ActorDiedError, ray.exceptions.WorkerCrashedError):
        assert not failures.certain(kind())


PAIR = """
import os, sys
import torch, torch.distributed as dist
from raysft import failures
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
dist.all_reduce(torch.ones(1))
if rank:
    os._exit(9)
try:
    for _ in range(1000):
        dist.all_reduce(torch.ones(100_000))
except Exception as error:
    print(failures.from_peer(error), failures.certain(error), failures.repeats(error))
"""


def test_the_end_of_a_peer_in_a_collective_is_known_as_what_it_is(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(PAIR)]
    environ = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            env=environ,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    out, _ = ranks[0].communicate(timeout=120)
    ranks[1].wait()
    assert out.split() == ["True", "False", "None"]
