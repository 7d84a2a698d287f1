"""report.html: what is shown is what the run wrote, it asks nothing of anybody, and a browser draws
all of it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import soundfile
import yaml

from raysft.config import load_config, to_yaml
from raysft.errors import UserError
from raysft.hearing import samples
from raysft.library import report
from raysft.page.build import NAME, shown_of
from raysft.page.live import with_page
from raysft.scorers import Spoken
from tests.conftest import tone
from tests.support.models import AUDIO

STEPS = 4000
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
WORST = "one </script><b>two"  # text of a corpus is nobody's markup


def lines(path: Path, found: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in found))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as its files have it: 4000 steps, a restart, a mixture, 30 answers."""
    folder = tmp_path_factory.mktemp("page")
    clips = [
        {"task_type": "asr", "id": f"clip-{n}", "wav_path": "a.flac", "text": "one two"}
        for n in range(30)
    ]
    soundfile.write(folder / "a.flac", tone(0.7, 16000, 300), 16000)
    lines(folder / "dev.jsonl", clips)
    run = folder / "runs" / "shown"
    tree = {
        "run": {"name": "shown", "storage_path": str(folder / "runs")},
        "data": {
            "train": [str(folder / "dev.jsonl")],
            "eval": [{"path": str(folder / "dev.jsonl"), "name": "dev"}],
            "tokens_per_batch": 100,
        },
        "model": AUDIO,
    }
    run.mkdir(parents=True)
    (folder / "c.yaml").write_text(yaml.safe_dump(tree))
    (run / "config.yaml").write_text(to_yaml(load_config(folder / "c.yaml")))
    lines(
        run / "metrics.jsonl",
        [
            {"step": s, "loss": 5 / s, "loss/asr": 5 / s, "loss/tts": 6 / s, "lr": 1e-4}
            | {"grad_norm": float("nan") if s == 7 else 1.0, "seconds": 2.0, "padding": 0.1}
            for s in range(1, STEPS + 1)
        ],
    )
    lines(run / "eval.jsonl", [{"step": s, "wer/dev": 0.5, "loss/asr": 1.0} for s in (2000, STEPS)])
    lines(
        run / "events.jsonl",
        [
            {"event": "continued", "step": 1500, "reason": "its process died", "workers": 2},
            {"event": "saved", "step": 2000},
        ],
    )
    lines(run / "quarantine.jsonl", [{"id": "x", "reason": "a.flac: no such file", "kind": None}])
    answers = [
        {"id": f"clip-{n}", "source": "dev", "reference": "one two", "hypothesis": "one two"}
        for n in range(30)
    ]
    answers[29] |= {"reference": WORST, "hypothesis": "one too three"}
    lines(run / "predictions" / f"step_{STEPS}.jsonl", answers)
    wave = tone(0.3, 16000, 200)
    said = [
        samples.Sample(
            Spoken(f"said-{n}", "tts", "one two", f"one two{' too' * n}", "one two", 6.0, 3.0),
            samples.flac(wave, 16000),
            samples.flac(wave / 2, 16000),
            n / 2,
            0.0,
        )
        for n in range(14)
    ]
    samples.write(run / "predictions" / f"step_{STEPS}.spoken", said)
    lines(run / "experts.jsonl", [{"tokens": {"all": [[3, 1], [2, 2]]}}] * 4)
    return run


def test_it_shows_what_the_run_has_written(run: Path) -> None:
    (shown,) = shown_of([run])["runs"]
    series = shown["series"]
    assert series["step"][0] == 1 and series["step"][-1] == STEPS and len(series["step"]) <= 1501
    at = series["step"].index(1 + 3 * 100)
    assert series["loss"][at] == pytest.approx(5 / 301, rel=1e-5)
    assert None in series["grad_norm"], "what is no number is a gap"
    assert shown["seconds"] == 2.0 * STEPS
    assert [e["event"] for e in shown["events"]] == ["continued"]
    assert shown["quarantine"][0]["count"] == 1
    assert shown["experts"] == [{"kind": "all", "shares": [[1.5, 0.5], [1.0, 1.0]]}]
    worst = shown["examples"][0]
    assert worst["id"] == "clip-29" and worst["errors"] == 2
    assert sorted(part["kind"] for part in worst["parts"]) == ["equal", "insert", "substitute"]
    assert all(one["clip"].startswith("data:audio/flac;base64,") for one in shown["examples"])


def test_it_plays_what_was_spoken_beside_the_real_clip(run: Path) -> None:
    (shown,) = shown_of([run])["runs"]
    said = [one["id"] for one in shown["spoken"]]
    assert said == [f"said-{n}" for n in (13, 12, 11, 10, 9, 8, 0, 1, 2, 3, 4, 5)]
    worst = shown["spoken"][0]
    assert worst["numbers"]["wer"] == 6.5 and worst["numbers"]["distortion_bound"] == 3.0
    assert "similarity" not in worst["numbers"]
    assert worst["parts"] == [
        {"kind": "equal", "said": "one two", "heard": "one two"},
        {"kind": "insert", "said": "", "heard": " ".join(["too"] * 13)},
    ]
    for name in ("spoken", "bound"):
        head, _, data = worst[name].partition(",")
        wave, rate = soundfile.read(io.BytesIO(base64.b64decode(data)))
        assert head == "data:audio/flac;base64" and rate == 16000 and len(wave) == 0.3 * rate


def test_the_page_is_one_file_that_asks_nothing_of_any_host(run: Path) -> None:
    text = report([run]).read_text()
    assert "default-src 'none'" in text
    outside = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", outside)
    facts = re.search(r'<script type="application/json" id="facts">(.*?)</script>', text, re.S)
    assert facts is not None
    assert json.loads(facts[1])["title"] == "shown", "no text of the data ends the script"


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run is here"):
        report([tmp_path])


# What a user would do: sort the table, turn to the clip.
CLICKS = """
<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("securitypolicyviolation", (event) => errors.push(event.blockedURI));
</script>
"""
SEEN = """
<script>
{
  const inked = [...document.querySelectorAll(".chart")].map((box) => {
    const canvas = box.querySelector("canvas");
    const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    return data.some((value) => value > 0);
  });
  const rows = () => [...document.querySelectorAll("tbody tr")];
  const head = [...document.querySelectorAll("th.sorts")];
  const place = head.findIndex((one) => one.textContent === "optim.lr");
  const orders = [];
  for (const time of place < 0 ? [] : ["up", "down"]) {
    head[place].click();
    orders.push(rows().map((row) => row.children[place].textContent));
  }
  const audio = document.querySelector("audio");
  const table = [...document.querySelectorAll("table:first-of-type tr")]
    .map((row) => [...row.children].map((cell) => cell.textContent));
  const tell = () => {
    document.body.dataset.seen = JSON.stringify({
      inked, orders, errors, table, players: document.querySelectorAll("audio[src]").length,
      heads: [...document.querySelectorAll("h2")].map((head) => head.textContent),
      seconds: audio ? audio.duration : null,
      wide: document.documentElement.scrollWidth > innerWidth,
    });
  };
  if (audio && !(audio.duration > 0)) {
    audio.addEventListener("loadedmetadata", tell);
    audio.load();
  } else tell();
}
</script>
"""


def seen(page: Path, size: str, tmp_path: Path) -> dict[str, Any]:
    """What a browser makes of a page."""
    before, main, after = page.read_text().partition('<main id="page">')
    body, end, rest = after.rpartition("</body>")
    text = before + CLICKS + main + body + SEEN + end + rest
    copy = tmp_path / "page.html"
    copy.write_text(text)
    assert BROWSER is not None
    done = subprocess.run(
        [
            *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu"),
            *(f"--window-size={size}", "--virtual-time-budget=8000", "--dump-dom"),
            *(f"--user-data-dir={tmp_path / 'profile'}", f"file://{copy}"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found is not None, done.stderr[-2000:]
    return json.loads(found[1].replace("&quot;", '"'))


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
@pytest.mark.parametrize("size", ["1280,900", "500,900"])
def test_a_browser_draws_every_chart_of_a_run_and_plays_its_clips(
    size: str, run: Path, tmp_path: Path
) -> None:
    found = seen(report([run]), size, tmp_path)
    assert found["errors"] == [] and not found["wide"]
    assert len(found["inked"]) >= 8 and all(found["inked"])
    assert found["seconds"] == pytest.approx(0.7, abs=0.05)
    assert "What it spoke" in found["heads"] and found["players"] == 24 + 2 * 12


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_the_table_of_a_sweep_sorts_by_numbers(run: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    rates = [0.001, 1e-05, 0.01, 0.0002]
    head = "rank,trial,status,step,wer/dev,mean_over_seeds,loss/asr,optim.lr,peft.r,"
    text = [head + "seed,seconds,attempts,folder,reason,taken_over"]
    for rank, rate in enumerate(rates):
        name = f"{rank:04d}_lr{rate}"
        shutil.copytree(run, sweep / "trials" / name)
        figure = "" if rank == 3 else f"{0.1 * rank + 0.05}"
        text.append(f"{rank + 1},{name},finished,4,{figure},,1.0,{rate},8,0,1.0,1,trials/{name},,")
        text[-1] += "step 2 from 0000" * (rank == 2)
    (sweep / "results.csv").write_text("\n".join(text) + "\n")
    found = seen(report([sweep]), "1280,900", tmp_path)
    assert (sweep / NAME).is_file()
    up, down = ([float(cell) for cell in order] for order in found["orders"])
    assert up == sorted(rates) and down == sorted(rates, reverse=True)
    titles, *rows = found["table"]
    place = [title.rstrip(" ▲▼") for title in titles].index("taken_over")
    taken = {row[1][:4]: row[place] for row in rows}
    assert taken == {"0000": "", "0001": "", "0002": "step 2 from 0000", "0003": ""}
    assert found["errors"] == [] and all(found["inked"])


def test_a_run_that_is_evaluated_before_it_logs_has_its_page_later(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    early = tmp_path / "early"
    early.mkdir()
    shutil.copy(run / "config.yaml", early)
    lines(early / "eval.jsonl", [{"step": 2, "loss/asr": 1.0}])
    told: list[dict[str, Any]] = []
    shown = with_page(told.append, early)
    shown({"eval": {"loss/asr": 1.0}, "step": 2})
    assert len(told) == 1 and not (early / NAME).exists() and not caplog.records
    lines(early / "metrics.jsonl", [{"step": 10, "loss": 1.0}])
    shown({"eval": {"loss/asr": 1.0}, "step": 10})
    assert (early / NAME).exists()
