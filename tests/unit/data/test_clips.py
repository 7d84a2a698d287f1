"""Clips of every container: read to their end, or refused for what is wrong with them."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import wave
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile

from raysft.data.clips import audio, chunked
from raysft.data.clips.file import File, Sound
from raysft.data.quarantine import kind as kind_of
from raysft.errors import BadExample
from tests.support.audio_files import KINDS, encoded, ffmpeg, ffmpeg_samples, speech

RATE = 16000
FLOW = 0.02  # share by which a length may differ from that of ffmpeg's decode

load = partial(audio.load, rate=RATE)


def put(folder: Path, data: bytes, name: str = "clip.bin") -> str:
    path = folder / name
    path.write_bytes(data)
    return str(path)


def seconds(path: str) -> float:
    """Of a clip, on which index and decoding agree."""
    probed = audio.probe(path)
    decoded = len(load(path))
    assert decoded == audio.resampled_length(probed.samples, probed.rate, RATE)
    return decoded / RATE


def refused(path: str, by=audio.probe) -> str:
    with pytest.raises(BadExample) as caught:
        by(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)[len(path) + 2 :]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_is_as_long_as_ffmpeg_decodes_it(tmp_path, kind, channels):
    if channels == 2 and kind in ("gsm.wav", "g721.au"):
        pytest.skip("a codec of one channel")
    path = put(tmp_path, encoded(kind, channels=channels))
    assert seconds(path) == pytest.approx(ffmpeg_samples(path, RATE) / RATE, rel=FLOW)


# MP3 without an encoder's note of its length, in several shapes.
SHAPES = {
    "constant rate": ["-b:a", "32k"],
    "variable rate": ["-q:a", "4"],
    "stereo": ["-q:a", "5", "-ac", "2"],
    "mpeg 1": ["-b:a", "96k", "-ar", "44100"],
    "low rate": ["-b:a", "8k", "-ar", "8000"],
    "layer 2": ["-f", "mp2", "-b:a", "64k", "-ar", "16000"],
    "a quiet start": ["-q:a", "4", "-af", "adelay=2000"],
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> dict[str, bytes]:
    """Shape -> an MP3 (of 4 s) whose length no header tells."""
    folder = tmp_path_factory.mktemp("mp3")
    soundfile.write(folder / "base.wav", speech(RATE, 4.0), RATE)
    made = {}
    for shape, options in SHAPES.items():
        target = folder / "out.mp3"
        note = [] if "mp2" in options else ["-write_xing", "0"]
        ffmpeg("-i", folder / "base.wav", *note, "-id3v2_version", "0", *options, target)
        made[shape] = target.read_bytes()
    return made


@pytest.mark.parametrize("shape", SHAPES)
def test_an_mp3_without_its_length_is_read_to_its_end(tmp_path, bare, shape):
    path = put(tmp_path, bare[shape], "clip.mp3")
    assert seconds(path) == pytest.approx(ffmpeg_samples(path, RATE) / RATE, rel=1e-3)
    expected = 6 if shape == "a quiet start" else 4
    assert seconds(path) == pytest.approx(expected, abs=0.2)


TAG = b"ID3\x04\0\0\0\0\x10\0" + bytes(2048)
BEHIND = {
    "zeros": bytes(20_000),
    "noise": np.random.default_rng(0).bytes(20_000),
    "a page": b"<html>not found</html>\n" * 900,
    "ID3v1": b"TAG" + bytes(125),
    "APE": b"APETAGEX" + struct.pack("<IIII", 2000, 3000, 0, 0) + bytes(8) + bytes(3000 - 32)
    + b"APETAGEX" + struct.pack("<IIII", 2000, 3000, 0, 1 << 31) + bytes(8),
}  # fmt: skip


@pytest.mark.parametrize("with_note", [True, False])
@pytest.mark.parametrize("behind", BEHIND)
def test_tags_and_junk_around_an_mp3_are_no_sound_of_it(tmp_path, bare, behind, with_note):
    clean = encoded("mp3") if with_note else bare["constant rate"]
    alone = load(put(tmp_path, clean, "alone.mp3"))
    path = put(tmp_path, TAG + clean + BEHIND[behind], "clip.mp3")
    seconds(path)
    np.testing.assert_allclose(load(path), alone, atol=1e-4)


def test_the_sound_of_an_mp3_is_the_one_that_ffmpeg_decodes(tmp_path, bare):
    for data in (bare["constant rate"], bare["variable rate"], encoded("mp3")):
        path = put(tmp_path, data, "clip.mp3")
        theirs = ffmpeg_samples(path, RATE, samples=True)
        np.testing.assert_allclose(load(path), theirs, atol=1e-4)


@pytest.mark.parametrize("kind", ["mp3", "ogg", "opus", "flac"])
def test_joined_files_are_all_of_them(tmp_path, kind):
    one, two = encoded(kind, 0), encoded(kind, 1)
    parts = [load(put(tmp_path, data, f"part.{kind}")) for data in (one, two)]
    path = put(tmp_path, one + two, f"clip.{kind}")
    joined = load(path)
    assert len(joined) / RATE == pytest.approx(sum(map(len, parts)) / RATE, rel=FLOW)
    assert np.corrcoef(joined[: len(parts[0])], parts[0])[0, 1] > 0.99
    # The second's sound, wherever the encoder's padding has moved it.
    found = np.correlate(joined[-10_000:], parts[1][-8000:], "valid").max()
    assert found > 0.98 * np.sum(parts[1][-8000:] ** 2)
    seconds(path)


def quiet_flac(seconds: float, unknown: bool) -> bytes:
    """FLAC of speech between silence, of fewer bytes than its rate makes one expect."""
    out = io.BytesIO()
    soundfile.write(out, speech(RATE, seconds), RATE, format="FLAC", subtype="PCM_16")
    data = bytearray(out.getvalue())
    if unknown:
        data[21] &= 0xF0
        data[22:26] = bytes(4)
    return bytes(data)


@pytest.mark.parametrize("lengths", [(5, 5), (5, 2), (2, 5), (20, 20)])
@pytest.mark.parametrize("unknown", [True, False])
def test_joined_flac_files_are_measured_as_they_are_read(tmp_path, lengths, unknown):
    path = put(tmp_path, b"".join(quiet_flac(length, unknown) for length in lengths))
    assert seconds(path) == pytest.approx(sum(lengths), abs=1e-3)
    for length in lengths:
        assert seconds(put(tmp_path, quiet_flac(length, unknown))) == length


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize(
    "codec, lengths", [("libvorbis", (20, 4)), ("libvorbis", (4, 20)), ("libopus", (20, 4))]
)
def test_joined_ogg_files_of_one_number_are_measured_as_they_are_read(
    tmp_path, codec, lengths, drawn
):
    whole, numbers = b"", set()
    for seed, length in enumerate(lengths):
        soundfile.write(tmp_path / "one.wav", speech(48000, length, seed), 48000)
        # The stream's number: as of programs that draw it, or count.
        number = ["-fflags", "+bitexact", "-serial_offset", 1_234_567_890 if drawn else 1]
        options = ["-c:a", codec, "-b:a", "96k", *number]
        ffmpeg("-i", tmp_path / "one.wav", *options, tmp_path / "one.ogg")
        one = (tmp_path / "one.ogg").read_bytes()
        whole += one
        numbers.add(one[14:18])
    assert len(whole) > 1 << 17 and len(numbers) == 1
    assert seconds(put(tmp_path, whole)) == pytest.approx(sum(lengths), abs=0.1)


def test_joined_ogg_files_may_have_other_rates_and_channels(tmp_path):
    parts = []
    for rate, channels, subtype in ((16000, 1, "VORBIS"), (44100, 2, "VORBIS"), (48000, 1, "OPUS")):
        wave = speech(rate, 1.0)
        out = io.BytesIO()
        stereo = np.stack([wave] * channels, axis=1)
        soundfile.write(out, stereo, rate, format="OGG", subtype=subtype)
        parts.append(out.getvalue())
    path = put(tmp_path, b"".join(parts))
    assert seconds(path) == pytest.approx(3.0, abs=1e-3)
    third = load(path)[2 * RATE : 3 * RATE]
    assert np.corrcoef(third, speech(RATE, 1.0))[0, 1] > 0.95
    long = put(tmp_path, parts[1] * 9, "long.ogg")  # beyond what is read as one
    assert len(load(long)) == pytest.approx(9 * RATE, rel=1e-3)


def test_an_ogg_recorded_from_the_middle_of_a_stream_is_as_long_as_what_is_there(tmp_path):
    data = encoded("ogg", seconds=8.0)
    pages = [at for at in range(len(data)) if data[at : at + 4] == b"OggS"]
    headers = next(at for at in pages[1:] if data[at + 6 : at + 14] != bytes(8))
    middle = next(at for at in pages if int.from_bytes(data[at + 6 : at + 14], "little") > 64000)
    path = put(tmp_path, data[:headers] + data[middle:])
    assert seconds(path) == pytest.approx(ffmpeg_samples(path, RATE) / RATE, rel=0.1)
    assert seconds(path) < 5


def flac_with_total(total: int) -> bytes:
    data = bytearray(encoded("flac"))
    word = int.from_bytes(data[21:26], "big") >> 36 << 36 | total
    data[21:26] = word.to_bytes(5, "big")
    return bytes(data)


@pytest.mark.parametrize("total", [0, 10_400, 3])
def test_a_flac_is_as_long_as_its_frames_say(tmp_path, total):
    path = put(tmp_path, flac_with_total(total))
    assert len(load(path)) == audio.probe(path).samples == 20_800
    behind = put(tmp_path, flac_with_total(total) + bytes(5000), "behind.flac")
    assert len(load(behind)) == audio.probe(behind).samples == 20_800


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_cut_off_is_called_so_whatever_the_container(tmp_path, kind, share):
    data = encoded(kind, seconds=4.0)
    path = put(tmp_path, data[: int(len(data) * share)])
    for by in (audio.probe, load):
        assert kind_of(refused(path, by)) == "truncated"


@pytest.mark.parametrize("shape", SHAPES)
def test_an_mp3_that_promises_nothing_is_never_called_cut_off(tmp_path, bare, shape):
    data = bare[shape]
    path = put(tmp_path, data[: len(data) // 2], "clip.mp3")
    assert seconds(path) == pytest.approx(ffmpeg_samples(path, RATE) / RATE, rel=FLOW)


def patched(data: bytes, marker: bytes, number: bytes) -> bytes:
    """`number` written behind the first `marker`."""
    at = data.index(marker) + len(marker)
    return data[:at] + number + data[at + len(number) :]


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0x7F000000, 0x80000000])
def test_a_size_that_a_pipe_leaves_is_read_to_the_end_of_the_file(tmp_path, size):
    for kind in ("wav", "gsm.wav", "adpcm.wav", "wavex"):
        data = patched(encoded(kind), b"data", struct.pack("<I", size))
        path = put(tmp_path, data)
        whole = audio.probe(put(tmp_path, encoded(kind), "whole.wav")).samples
        assert audio.probe(path).samples == pytest.approx(whole, abs=400)
        seconds(path)
    data = patched(encoded("aiff"), b"SSND", struct.pack(">I", size))
    assert seconds(put(tmp_path, data)) == 1.3
    data = encoded("au")[:8] + struct.pack(">I", size) + encoded("au")[12:]
    assert seconds(put(tmp_path, data)) == 1.3


def test_a_size_of_many_gigabytes_is_a_promise(tmp_path):
    path = put(tmp_path, patched(encoded("wav"), b"data", struct.pack("<I", 3_000_000_000)))
    assert "cut off: 41600 of 3000000000 bytes" in refused(path)


def test_a_wav_that_is_empty_is_so_whatever_chunks_follow(tmp_path):
    out = io.BytesIO()
    soundfile.write(out, np.zeros(0), RATE, format="WAV", subtype="PCM_16")
    for behind in (b"", b"LIST" + struct.pack("<I", 2000) + bytes(2000)):
        assert "too short: 0 samples" in refused(put(tmp_path, out.getvalue() + behind))


@pytest.mark.parametrize("kind", ["au", "sph"])
def test_more_samples_than_promised_are_no_clip_to_be_guessed_at(tmp_path, kind):
    path = put(tmp_path, encoded(kind) * 2)
    assert "but 4" in refused(path)
    assert kind_of(refused(path)) == "not audio"


SIZED = ["wav", "wavex", "adpcm.wav", "gsm.wav", "rf64", "w64", "aiff", "caf"]


def promising(kind: str, count: int) -> bytes:
    """A file whose header is that of `count` samples, and whose samples are twice as many: as of a
    recorder that was killed after it had written its header once."""
    rate, container, subtype = KINDS[kind]
    whole, out = speech(rate, 2 * count / rate), io.BytesIO()
    soundfile.write(out, whole[:count], rate, format=container, subtype=subtype)
    return out.getvalue() + np.int16(whole[count:] * 32767).tobytes()


@pytest.mark.parametrize("kind", SIZED)
def test_a_header_that_promises_less_than_is_there_is_not_believed(tmp_path, kind):
    for count in (320, 4800, 16000):
        for by in (audio.probe, load):
            reason = refused(put(tmp_path, promising(kind, count)), by)
            assert "its header promises" in reason and f"but {2 * count} more follow" in reason
            assert kind_of(reason) == "not audio"


def test_a_wave_writer_that_was_killed_is_not_believed(tmp_path):
    path, samples = tmp_path / "killed.wav", np.int16(speech(RATE, 4.0) * 32767)
    with wave.open(str(path), "wb") as writer:
        writer.setparams((1, 2, RATE, 0, "NONE", ""))
        for block in samples.reshape(-1, 4000):
            writer.writeframesraw(block.tobytes())
        data = path.read_bytes()
    assert seconds(str(path)) == 4.0
    reason = refused(put(tmp_path, data, "cut.wav"))
    assert "its header promises 8000 bytes of samples, but 120000 more follow" in reason


@pytest.mark.parametrize("kind", SIZED)
def test_joined_files_of_which_only_the_first_would_be_read_are_refused(tmp_path, kind):
    one = encoded(kind)
    for other in (one, encoded(kind, seconds=0.02)):
        for by in (audio.probe, load):
            reason = refused(put(tmp_path, one + other), by)
            assert "several files were joined end to end" in reason
            assert kind_of(reason) == "not audio"
    empty = io.BytesIO()
    rate, container, subtype = KINDS[kind]
    soundfile.write(empty, np.zeros(0), rate, format=container, subtype=subtype)
    assert refused(put(tmp_path, empty.getvalue() + one))


@pytest.mark.parametrize("padded", [True, False])
def test_chunks_behind_the_samples_are_no_sound_and_no_fault(tmp_path, padded):
    def chunk(end: str, name: bytes, size: int) -> bytes:
        body = bytes(range(1, 252)) * 100
        return name + struct.pack(end, size) + body[:size] + bytes(size % 2 * padded)

    wav = encoded("wav") + chunk("<I", b"LIST", 6001) + (chunk("<I", b"id3 ", 900) * padded)
    assert seconds(put(tmp_path, wav)) == 1.3
    aiff = encoded("aiff") + chunk(">I", b"ANNO", 6001) + (chunk(">I", b"ID3 ", 900) * padded)
    assert seconds(put(tmp_path, aiff)) == 1.3
    caf = encoded("caf") + b"info" + struct.pack(">Q", 5001) + bytes(5001)
    assert seconds(put(tmp_path, caf)) == 1.3
    guid = b"levl" + bytes.fromhex("f3acd3118cd100c04f8edb8a")
    w64 = encoded("w64") + guid + struct.pack("<Q", 24 + 4000) + bytes(4000)
    assert seconds(put(tmp_path, w64)) == 1.3
    odd = io.BytesIO()  # 24 bits: an odd number of bytes
    soundfile.write(odd, speech(RATE)[:16001], RATE, format="WAV", subtype="PCM_24")
    data = odd.getvalue()[: None if padded else 44 + 48003]
    assert audio.probe(put(tmp_path, data + chunk("<I", b"LIST", 6000))).samples == 16001


def test_a_header_whose_rate_is_not_that_of_its_frames_is_refused(tmp_path):
    data = bytearray(encoded("flac"))
    data[18] ^= 0x01  # 16 Hz more or less
    assert "its last frame 16000 Hz" in refused(put(tmp_path, bytes(data)))


@pytest.mark.parametrize("container", ["VOC", "PAF", "IRCAM", "AVR", "PVF", "MAT5", "SVX", "MPC2K"])
def test_containers_that_do_not_tell_whether_they_are_whole_are_refused_by_name(
    tmp_path, container
):
    path = tmp_path / "clip"
    soundfile.write(path, speech(RATE), RATE, format=container, subtype="PCM_16")
    reason = refused(str(path))
    assert soundfile.available_formats()[container] in reason
    assert "convert the clip to wav or flac" in reason
    assert kind_of(reason) == "not audio"


@pytest.mark.parametrize("error", [ValueError("frames"), ZeroDivisionError(), RuntimeError("x")])
def test_whatever_a_decoder_raises_is_about_its_clip(tmp_path, monkeypatch, error):
    def read(*_, **__):
        raise error

    path = put(tmp_path, encoded("wav"))
    monkeypatch.setattr(Sound, "read", read)
    reason = refused(path, load)
    assert type(error).__name__ in reason
    assert kind_of(reason) == "truncated"


# --- channels


def stereo(tmp_path: Path, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    path = str(tmp_path / "stereo.wav")
    soundfile.write(path, np.stack([left, right], axis=1), RATE, subtype="FLOAT")
    return load(path)


@pytest.mark.parametrize("share", [1.0, 0.97, 0.8])
def test_channels_in_opposite_phase_give_the_loudest_of_them(tmp_path, share):
    wave = speech(RATE)
    np.testing.assert_allclose(stereo(tmp_path, wave, -share * wave), wave, atol=1e-6)
    other = wave if share == 1 else -wave  # the first of equals
    np.testing.assert_allclose(stereo(tmp_path, share * wave, -wave), other, atol=1e-6)


def test_channels_that_do_not_cancel_are_averaged(tmp_path):
    one, other = speech(RATE, seed=1), speech(RATE, seed=2)
    for left, right in (
        (one, other),  # unrelated
        (one, one),
        (one, 0 * one),  # one is silent
        (one, -0.5 * one),
        (0 * one, 0.01 * other),
    ):
        np.testing.assert_allclose(stereo(tmp_path, left, right), (left + right) / 2, atol=1e-6)


def test_one_channel_of_eight_is_no_cancelling(tmp_path):
    wave = np.zeros((RATE, 8))
    wave[:, 3] = speech(RATE, 1.0)
    soundfile.write(tmp_path / "clip.wav", wave, RATE, subtype="FLOAT")
    np.testing.assert_allclose(load(str(tmp_path / "clip.wav")), wave[:, 3] / 8, atol=1e-6)


def test_a_channel_that_is_no_number_is_refused_beside_one_that_is(tmp_path):
    wave = np.stack([speech(RATE), -speech(RATE)], axis=1)
    wave[50, 1] = np.nan
    soundfile.write(tmp_path / "clip.wav", wave, RATE, subtype="FLOAT")
    assert "NaN" in refused(str(tmp_path / "clip.wav"), load)


def test_reading_clips_needs_neither_torch_nor_ray():
    code = (
        "import sys, raysft.data.clips.audio; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'av', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def answered(path: str, by) -> tuple[object, ...]:
    """What a way to open a WAV says of it: its length, rate and channels, or why there is none."""
    with closing(File(path)) as file:
        try:
            with closing(by(file)) as track:
                return track.samples, track.rate, track.channels, track.part is not None
        except BadExample as error:
            return (str(error),)


def test_a_plain_wav_is_what_libsndfile_says_of_it(tmp_path):
    rng = np.random.default_rng(0)
    edges = [0, 1, 2, 3, 7, 8, 9, 16, 24, 32, 40, 255, 256, 1 << 15, 1 << 16, (1 << 32) - 1]
    plain = 0
    for number in range(4000):
        subtype = ("PCM_16", "PCM_24", "PCM_32", "PCM_U8")[number % 4]
        out = io.BytesIO()
        frames = np.zeros((int(rng.integers(0, 60)), int(rng.integers(1, 10))))
        soundfile.write(out, frames, int(rng.integers(1, 99_999)), subtype, format="WAV")
        data = bytearray(out.getvalue())
        if number > 1200:  # one field is another, or the file ends elsewhere
            layout = [
                (4, 4),
                (16, 4),
                (20, 2),
                (22, 2),
                (24, 4),
                (28, 4),
                (32, 2),
                (34, 2),
                (40, 4),
            ]
            at, width = layout[rng.integers(len(layout))]
            value = int(rng.choice(edges)) % (1 << 8 * width)
            if number % 3:
                value = int.from_bytes(data[at : at + width], "little") + int(rng.integers(-9, 10))
            data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
        if number % 5 == 4:
            data += bytes(int(rng.integers(0, 9)))
        path = put(tmp_path, bytes(data))
        with closing(File(path)) as file:
            found = chunked._plain(file)
        if found is not None:
            plain += 1
            asked = answered(path, lambda file: chunked._asked(file, chunked.riff))
            assert (found.samples, found.rate, found.channels, True) == asked, data[:44]
            if found.samples:
                assert len(found_samples(path)) == found.samples
    assert plain > 600


def found_samples(path: str) -> np.ndarray:
    with closing(File(path)) as file, closing(chunked.track(file, chunked.riff)) as track:
        (piece, rate) = track.decode(1e9)[0]
        assert rate == track.rate
        assert np.array_equal(track.part(1, len(piece)), piece[1:])
        return piece
