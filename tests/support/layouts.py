"""One little corpus in every layout that people have it in, as their own tools write it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

RATE = 16000


@dataclass(frozen=True)
class Utterance:
    """id, speaker, text, int16 samples at RATE Hz, and language."""

    id: str
    speaker: str
    text: str
    samples: np.ndarray
    language: str = "en"

    def encoded(self, kind: str = "FLAC") -> bytes:
        """As a file."""
        out = io.BytesIO()
        soundfile.write(out, self.samples, RATE, format=kind, subtype="PCM_16")
        return out.getvalue()


TEXTS = ("the kettle is boiling", 'say "close the gate', "eins zwei, drei", "九月 三日", "o'clock")


def corpus(count: int = 5) -> list[Utterance]:
    """Noise of half a second and more, each of another length."""
    rng = np.random.default_rng(7)
    return [
        Utterance(
            f"s{n % 2}-10-{n:04d}",
            f"s{n % 2}",
            TEXTS[n % len(TEXTS)],
            rng.integers(-9000, 9000, RATE // 2 + 400 * n).astype(np.int16),
            {2: "de", 3: "zh"}.get(n % len(TEXTS), "en"),
        )
        for n in range(count)
    ]


def written(folder: Path, utterances: list[Utterance], end: str = "flac") -> list[Path]:
    """Their files, by id."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{one.id}.{end}" for one in utterances]
    for path, one in zip(paths, utterances):
        path.write_bytes(one.encoded(end.upper()))
    return paths


def recording(utterances: list[Utterance]) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """All of them one after the other, and where each begins and ends, in seconds."""
    ends = np.cumsum([len(one.samples) for one in utterances])
    starts = [0, *ends[:-1].tolist()]
    spans = [(start / RATE, end / RATE) for start, end in zip(starts, ends.tolist())]
    return np.concatenate([one.samples for one in utterances]), spans


def jsonl(path: Path, records: list[dict[str, object]]) -> Path:
    """A line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records))
    return path


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """An archive of (name, content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def _nemo(folder: Path, us: list[Utterance]) -> Path:
    written(folder / "wav", us)
    return jsonl(
        folder / "manifest.json",
        [
            {
                "audio_filepath": f"wav/{u.id}.flac",
                "duration": round(len(u.samples) / RATE, 2),
                "text": u.text,
                "speaker": u.speaker,
                "lang": u.language,
                "id": u.id,
            }
            for u in us
        ],
    )


def _nemo_offsets(folder: Path, us: list[Utterance]) -> Path:
    whole, spans = recording(us)
    folder.mkdir(parents=True)
    soundfile.write(folder / "talk.flac", whole, RATE)
    return jsonl(
        folder / "manifest.json",
        [
            {"audio_filepath": "talk.flac", "offset": a, "duration": b - a, "text": u.text}
            | {"id": u.id, "speaker": u.speaker}
            for u, (a, b) in zip(us, spans)
        ],
    )


def _nemo_tarred(folder: Path, us: list[Utterance]) -> Path:
    """Two shards, the second of one recording with its parts as -sub."""
    whole, spans = recording(us[3:])
    out = io.BytesIO()
    soundfile.write(out, whole, RATE, format="FLAC", subtype="PCM_16")
    tar(folder / "audio_0.tar", [(f"{u.id}.flac", u.encoded()) for u in us[:3]])
    tar(folder / "audio_1.tar", [("talk.flac", out.getvalue())])
    records: list[dict[str, object]] = [
        {"audio_filepath": f"{u.id}.flac", "text": u.text, "shard_id": 0, "id": u.id}
        for u in us[:3]
    ]
    for n, (u, (a, b)) in enumerate(zip(us[3:], spans)):
        name = "talk.flac" if n == 0 else f"talk-sub{n}.flac"
        records.append({"audio_filepath": name, "text": u.text, "shard_id": 1, "id": u.id})
        records[-1] |= {"offset": a, "duration": b - a}
    for record, u in zip(records, us):
        record |= {"speaker": u.speaker, "source_lang": u.language}
    return jsonl(folder / "tarred_audio_manifest.json", records)


def _kaldi(folder: Path, us: list[Utterance]) -> Path:
    paths = written(folder.parent / "kaldi_audio", us)
    folder.mkdir(parents=True)
    (folder / "wav.scp").write_text("".join(f"{u.id} {p}\n" for u, p in zip(us, paths)))
    (folder / "text").write_text("".join(f"{u.id}\t{u.text}\n" for u in us))
    (folder / "utt2spk").write_text("".join(f"{u.id} {u.speaker}\n" for u in us))
    (folder / "utt2lang").write_text("".join(f"{u.id} {u.language}\n" for u in us))
    return folder


def _kaldi_segments(folder: Path, us: list[Utterance]) -> Path:
    whole, spans = recording(us)
    folder.mkdir(parents=True)
    soundfile.write(folder / "talk.wav", whole, RATE)
    (folder / "wav.scp").write_text("rec1 talk.wav\n")
    lines = [f"{u.id} rec1 {a} {b}\n" for u, (a, b) in zip(us, spans)]
    lines[-1] = f"{us[-1].id} rec1 {spans[-1][0]} -1\n"
    (folder / "segments").write_text("".join(lines))
    (folder / "text").write_text("".join(f"{u.id} {u.text}\n" for u in us))
    (folder / "utt2spk").write_text("".join(f"{u.id} {u.speaker}\n" for u in us))
    return folder


def _kaldi_commands(folder: Path, us: list[Utterance]) -> Path:
    _kaldi(folder, us)
    lines = (folder / "wav.scp").read_text().splitlines()
    (folder / "wav.scp").write_text("".join(f"{u} cat {p} |\n" for u, p in map(str.split, lines)))
    return folder


def _wenet(folder: Path, us: list[Utterance]) -> Path:
    written(folder / "wav", us, "wav")
    records = [
        {"key": u.id, "wav": f"wav/{u.id}.wav", "txt": u.text, "speaker": u.speaker} for u in us
    ]
    return jsonl(folder / "data.list", records)  # type: ignore[arg-type]


def _wenet_segments(folder: Path, us: list[Utterance]) -> Path:
    whole, spans = recording(us)
    folder.mkdir(parents=True)
    soundfile.write(folder / "talk.wav", whole, RATE)
    return jsonl(
        folder / "data.list",
        [
            {"key": u.id, "wav": "talk.wav", "txt": u.text, "start": a, "end": b, "spk": u.speaker}
            for u, (a, b) in zip(us, spans)
        ],
    )


def _wenet_shards(folder: Path, us: list[Utterance]) -> Path:
    for number, some in enumerate((us[:2], us[2:])):
        members = []
        for u in some:
            members += [(f"{u.id}.wav", u.encoded("WAV")), (f"{u.id}.txt", u.text.encode())]
        tar(folder / f"shards_{number:09d}.tar", members)
    (folder / "shards.list").write_text("".join(f"{p}\n" for p in sorted(folder.glob("*.tar"))))
    return folder / "shards.list"


def _webdataset(folder: Path, us: list[Utterance]) -> Path:
    members = []
    for u in us:
        note = {"text": u.text, "speaker": u.speaker, "duration": round(len(u.samples) / RATE, 3)}
        note["lang"] = u.language
        members += [(f"a/{u.id}.flac", u.encoded()), (f"a/{u.id}.json", json.dumps(note).encode())]
    return tar(folder / "000.tar", members)


def _funasr(folder: Path, us: list[Utterance]) -> Path:
    written(folder / "wav", us, "wav")
    records = [
        {
            "key": u.id,
            "source": f"wav/{u.id}.wav",
            "source_len": 90,
            "target": u.text,
            "target_len": 4,
        }
        | {"speaker": u.speaker, "text_language": u.language}
        for u in us
    ]
    return jsonl(folder / "funasr.jsonl", records)


def _emilia(folder: Path, us: list[Utterance]) -> Path:
    written(folder, us)
    records = [
        {"id": u.id, "wav": f"{u.id}.flac", "text": u.text, "duration": len(u.samples) / RATE}
        | {"speaker": u.speaker, "language": u.language, "dnsmos": 3.4}
        for u in us
    ]
    return jsonl(folder / "emilia.jsonl", records)


def _step(folder: Path, us: list[Utterance]) -> Path:
    written(folder / "wav", us)
    records = [
        {"audio_path": f"wav/{u.id}.flac", "text": u.text, "speaker_id": u.speaker, "utt_id": u.id}
        for u in us
    ]
    return jsonl(folder / "meta.jsonl", records)  # type: ignore[arg-type]


def _lhotse(folder: Path, us: list[Utterance]) -> Path:
    from lhotse import CutSet

    cuts = _cuts(folder, us)
    CutSet.from_cuts(cuts).to_file(str(folder / "cuts.jsonl.gz"))
    return folder / "cuts.jsonl.gz"


def _shar(folder: Path, us: list[Utterance]) -> Path:
    from lhotse import CutSet

    (folder / "shar").mkdir(parents=True)
    cuts = CutSet.from_cuts(_cuts(folder, us))
    cuts.to_shar(str(folder / "shar"), fields={"recording": "flac"}, shard_size=2)
    return folder / "shar"


def _cuts(folder: Path, us: list[Utterance]) -> list[object]:
    from lhotse import MonoCut, Recording, SupervisionSegment

    whole, spans = recording(us)
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / "talk.wav", whole, RATE)
    talk = Recording.from_file(folder / "talk.wav")
    return [
        MonoCut(
            id=u.id,
            start=a,
            duration=b - a,
            channel=0,
            recording=talk,
            supervisions=[
                SupervisionSegment(
                    u.id, talk.id, 0.0, b - a, text=u.text, language=u.language, speaker=u.speaker
                )
            ],
        )
        for u, (a, b) in zip(us, spans)
    ]


def _librispeech(folder: Path, us: list[Utterance]) -> Path:
    for speaker in sorted({u.speaker for u in us}):
        own = [u for u in us if u.speaker == speaker]
        chapter = folder / "train-clean-100" / speaker / "10"
        written(chapter, own)
        lines = [f"{u.id} {u.text}\n" for u in own]
        (chapter / f"{speaker}-10.trans.txt").write_text("".join(lines))
    return folder / "train-clean-100"


def _ljspeech(folder: Path, us: list[Utterance]) -> Path:
    written(folder / "wavs", us, "wav")
    (folder / "metadata.csv").write_text("".join(f"{u.id}|{u.text}|{u.text}\n" for u in us))
    return folder


def _aishell(folder: Path, us: list[Utterance]) -> Path:
    for u in us:
        written(folder / "wav" / "train" / u.speaker, [u], "wav")
    (folder / "transcript").mkdir()
    lines = [f"{u.id} {' '.join(u.text.replace(' ', ''))}\n" for u in us]
    (folder / "transcript" / "aishell_transcript_v0.8.txt").write_text("".join(lines))
    return folder


def _common_voice(folder: Path, us: list[Utterance]) -> Path:
    written(folder / "clips", us)
    names = "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender "
    names += "accents variant locale segment"
    rows = [
        [u.speaker, f"{u.id}.flac", "x", u.text, "", "2", "0", "", "", "", "", u.language, ""]
        for u in us
    ]
    lines = ["\t".join(row) for row in [names.split(), *rows]]
    (folder / "train.tsv").write_text("\n".join(lines) + "\n")
    return folder / "train.tsv"


def _table(folder: Path, us: list[Utterance]) -> Path:
    written(folder / "wav", us, "wav")
    with (folder / "mine.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["clip", "said", "who", "name", "tongue"])
        writer.writerows([f"wav/{u.id}.wav", u.text, u.speaker, u.id, u.language] for u in us)
    return folder / "mine.csv"


def _gigaspeech(folder: Path, us: list[Utterance]) -> Path:
    whole, spans = recording(us)
    (folder / "audio").mkdir(parents=True)
    soundfile.write(folder / "audio" / "A1.flac", whole, RATE)
    segments = [
        {"sid": u.id, "begin_time": a, "end_time": b, "text_tn": u.text, "speaker": u.speaker}
        for u, (a, b) in zip(us, spans)
    ]
    segments.append({"sid": "none", "begin_time": 0.0, "end_time": 0.5, "text_tn": "<SIL>"})
    audio = {"aid": "A1", "path": "audio/A1.flac", "segments": segments}
    (folder / "GigaSpeech.json").write_text(json.dumps({"dataset": "G", "audios": [audio]}))
    return folder / "GigaSpeech.json"


def _mustc(folder: Path, us: list[Utterance]) -> Path:
    whole, spans = recording(us)
    (folder / "txt").mkdir(parents=True)
    (folder / "wav").mkdir()
    soundfile.write(folder / "wav" / "ted_1.wav", whole, RATE)
    lines = [
        f"- {{duration: {b - a}, offset: {a}, rW: 3, uW: 0, speaker_id: {u.speaker}, "
        "wav: ted_1.wav}\n"
        for u, (a, b) in zip(us, spans)
    ]
    (folder / "txt" / "train.yaml").write_text("".join(lines))
    (folder / "txt" / "train.en").write_text("".join(f"{u.text}\n" for u in us))
    (folder / "txt" / "train.de").write_text("".join(f"auf Deutsch {u.id}\n" for u in us))
    return folder / "txt" / "train.yaml"


def _clip_folder(folder: Path, us: list[Utterance]) -> Path:
    for u in us:
        (path,) = written(folder / u.speaker, [u], "wav")
        path.with_suffix(".lab").write_text(u.text + "\n")
    return folder


def _hub_rows(us: list[Utterance]) -> pa.Table:
    audio = [{"bytes": u.encoded(), "path": f"{u.id}.flac"} for u in us]
    names = ("id", "speaker_id", "sentence", "language", "audio")
    columns = (*zip(*((u.id, u.speaker, u.text, u.language) for u in us)), audio)
    return pa.table(dict(zip(names, columns)))


def _parquet(folder: Path, us: list[Utterance]) -> Path:
    folder.mkdir(parents=True)
    pq.write_table(_hub_rows(us), folder / "train-00000-of-00001.parquet", row_group_size=2)
    pq.write_table(_hub_rows(us[:1]), folder / "test-00000-of-00001.parquet")
    return folder


def _arrow(folder: Path, us: list[Utterance]) -> Path:
    from datasets import Dataset

    Dataset(_hub_rows(us)).save_to_disk(str(folder))
    return folder


def _audiofolder(folder: Path, us: list[Utterance]) -> Path:
    written(folder, us)
    with (folder / "metadata.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file_name", "transcription", "speaker_id", "id"])
        writer.writerows([f"{u.id}.flac", u.text, u.speaker, u.id] for u in us)
    return folder / "metadata.csv"


def _packed(folder: Path, us: list[Utterance]) -> Path:
    plain = _nemo(folder, us)
    packed = folder / "manifest.json.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    return packed


@dataclass(frozen=True)
class Layout:
    """How a corpus is written; the format that `auto` finds; the entry's other keys; texts and ids
    where they come out otherwise (id: of an utterance and its number); whether speakers are told,
    and languages.
    """

    write: Callable[[Path, list[Utterance]], Path]
    format: str
    entry: dict[str, object]
    text: Callable[[Utterance], str] = lambda u: u.text
    id: Callable[[Utterance, int], str] = lambda u, n: u.id
    speakers: bool = True
    languages: bool = False


COLUMNS = {
    "columns": {
        "audio": "clip",
        "text": "said",
        "speaker": "who",
        "id": "name",
        "language": "tongue",
    }
}
LAYOUTS: dict[str, Layout] = {
    "nemo": Layout(_nemo, "nemo", {}, languages=True),
    "nemo_offsets": Layout(_nemo_offsets, "nemo", {}),
    "nemo_tarred": Layout(_nemo_tarred, "nemo", {"tars": "audio_{0..1}.tar"}, languages=True),
    "kaldi": Layout(_kaldi, "kaldi", {}, languages=True),
    "kaldi_segments": Layout(_kaldi_segments, "kaldi", {}),
    "kaldi_commands": Layout(_kaldi_commands, "kaldi", {"commands": True}, languages=True),
    "wenet": Layout(_wenet, "wenet", {}),
    "wenet_segments": Layout(_wenet_segments, "wenet", {}),
    "wenet_shards": Layout(_wenet_shards, "webdataset", {}, speakers=False),
    "webdataset": Layout(_webdataset, "webdataset", {}, languages=True),
    "funasr": Layout(_funasr, "funasr", {}, languages=True),
    "emilia": Layout(_emilia, "emilia", {}, languages=True),
    "step": Layout(_step, "clips_jsonl", {}),
    "lhotse": Layout(_lhotse, "lhotse", {}, languages=True),
    "shar": Layout(_shar, "lhotse", {}, languages=True),
    "librispeech": Layout(_librispeech, "librispeech", {}),
    "ljspeech": Layout(_ljspeech, "ljspeech", {}, speakers=False),
    "aishell": Layout(_aishell, "aishell", {}, lambda u: u.text.replace(" ", "")),
    "common_voice": Layout(_common_voice, "table", {}, languages=True),
    "table": Layout(_table, "table", {"format": "table", **COLUMNS}, languages=True),
    "gigaspeech": Layout(_gigaspeech, "gigaspeech", {}),
    "mustc": Layout(_mustc, "mustc", {"columns": {"text": "en"}}, id=lambda u, n: f"ted_1_{n}"),
    "clip_folder": Layout(_clip_folder, "clip_folder", {}, id=lambda u, n: f"{u.speaker}_{u.id}"),
    "parquet": Layout(_parquet, "parquet", {}, languages=True),
    "arrow": Layout(_arrow, "parquet", {}, languages=True),
    "audiofolder": Layout(_audiofolder, "table", {}),
    "packed": Layout(_packed, "nemo", {}, languages=True),
}
