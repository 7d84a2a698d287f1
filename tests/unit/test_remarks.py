"""Libraries warn into a file of the run; their errors, and ours, reach the terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from raysft.remarks import LOG
from tests.cluster.conftest import ROOT

TALK = """
import logging, sys, warnings
from pathlib import Path
from raysft import remarks
remarks.before_imports()
import transformers, peft, bitsandbytes
remarks.quiet(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
logging.getLogger("transformers.modeling_utils").warning("some weights are new")
logging.getLogger("bitsandbytes.autograd").warning("the gemm_4bit path is slow")
logging.getLogger("peft.tuners").error("this adapter is broken")
logging.getLogger("raysft.driver.preflight").warning("said by raysft")
warnings.warn("a table is tied")
warnings.warn("will be removed", FutureWarning)
"""


def talk(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", TALK, *arguments],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": "/tmp"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return done.stderr


def test_warnings_are_kept_in_the_runs_folder_and_errors_are_shown(tmp_path: Path) -> None:
    assert talk(str(tmp_path)).splitlines() == ["this adapter is broken", "said by raysft"]
    kept = (tmp_path / LOG).read_text()
    for said in ("some weights are new", "gemm_4bit", "a table is tied", "this adapter is broken"):
        assert said in kept
    assert "will be removed" not in kept and "said by raysft" not in kept
