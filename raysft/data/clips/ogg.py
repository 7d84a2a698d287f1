"""Ogg (Vorbis, Opus): its pages, which say whether it is whole and what it was joined from.

A stream's length is the position of its last page. libsndfile decodes the first stream only; files
joined end to end (`cat a.ogg b.ogg`; radio does it) are streams one after the other, of whatever
rate, and are decoded one by one. A recording that began in the middle of a stream has positions
that count from elsewhere: its length only decoding tells.

Costs one read of files up to 128 kB (25 s at 40 kbit/s); of larger ones the index reads the two
ends, and goes through all pages only where the last is of another stream than the first, or where
the two could be of one number: numbers are drawn at random, but not by all programs.
RFC 3533, section 6.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from raysft.data.clips import pyav
from raysft.data.clips.file import (
    ENDLESS,
    File,
    Piece,
    Sound,
    Track,
    check_whole,
    read,
    resampled_length,
    sound,
)
from raysft.errors import BadExample

PAGE = 27 + 255 + 255 * 255  # bytes of the largest
_WHOLE = 1 << 17  # bytes up to which a file is read as one
_KNOWN = re.compile(rb"OpusHead|\x01vorbis")
_DRAWN = 1 << 16  # streams of smaller numbers were counted
_MORE_SHARE = 1.05  # of the bytes that as many pages take as there are by the last one's number
_PACKET = 8192  # samples of the longest packet of either codec (Opus: 5760)


@dataclass
class _Link:
    """One of the streams that follow each other. stop: where it ends in the file's bytes."""

    start: int
    stop: int = 0
    serials: set[int] = field(default_factory=set)
    shifted: bool = False  # its positions do not begin at 0


def track(file: File) -> Track:
    """Raises BadExample where the file is cut off, or no audio that libsndfile knows."""
    last = _last_page(file)
    if not _KNOWN.search(file.read(0, PAGE)):
        return pyav.track(file, "an Ogg file that holds neither Vorbis nor Opus")
    complete = file.held or file.size <= _WHOLE
    head = file.read(0, file.size if complete else PAGE)
    links = _links(head)
    if not complete and links and _may_be_joined(file, head, links, last):
        complete, links = True, _links(file.read(0, file.size))
    if not links:
        raise BadExample(
            f"{file.path}: not audio that can be read (an ogg without its first page)", "not audio"
        )
    if len(links) == 1:
        links[0].stop = file.size
    opened = [sound(file.path, file.view(link.start, link.stop)) for link in links]
    rate = opened[0].samplerate
    samples = sum(resampled_length(one.frames, one.samplerate, rate) for one in opened)
    certain = samples < ENDLESS and not any(link.shifted for link in links)

    def decode(most: float) -> list[Piece]:
        if complete:
            return [_decode(file.path, *each, most) for each in zip(links, opened)]
        whole = _links(file.read(0, file.size))
        views = [file.view(link.start, link.stop) for link in whole]
        return [
            _decode(file.path, link, sound(file.path, view), most)
            for link, view in zip(whole, views)
        ]

    def close() -> None:
        for one in opened:
            one.close()

    channels = {one.channels for one in opened}
    only = channels.pop() if len(channels) == 1 else None
    return Track(rate, samples if certain else None, decode, close, channels=only)


def _decode(path: str, link: _Link, opened: Sound, most: float) -> Piece:
    piece = read(path, opened, most)
    if not link.shifted and len(piece[0]) <= most:
        check_whole(path, len(piece[0]), opened.frames, "samples")
    return piece


def _may_be_joined(
    file: File, head: bytes, links: list[_Link], last: tuple[int, int] | None
) -> bool:
    """Whether a file could be several, by its beginning and its last page."""
    if last is None or len(links) > 1 or last[0] not in links[0].serials or last[0] < _DRAWN:
        return True
    places = [page[0] for page in _pages(head)][2:]  # behind the small ones of headers
    if len(places) < 2:
        return True
    page = (places[-1] - places[0]) / (len(places) - 1)
    return file.size > _MORE_SHARE * page * (last[1] + 1)


def _last_page(file: File) -> tuple[int, int] | None:
    """(stream, number in it) of the last page. Raises BadExample where the file ends inside it."""
    tail = file.read(max(0, file.size - PAGE), PAGE)
    at = len(tail)
    while (at := tail.rfind(b"OggS", 0, at)) >= 0:
        page = tail[at:]
        if len(page) >= 6 and (page[4] or page[5] > 7):
            continue  # version and flags say: these four bytes are data of a page
        sizes = page[27 : 27 + page[26]] if len(page) > 26 else b""
        if len(page) < 27 or len(page) < 27 + page[26] + sum(sizes):
            raise BadExample(
                f"{file.path}: cut off: the file ends inside its last page", "truncated"
            )
        return int.from_bytes(page[14:18], "little"), int.from_bytes(page[18:22], "little")
    return None


def _links(content: bytes) -> list[_Link]:
    """The streams that were joined, by their first pages. Pages of one file's several streams
    (sound and pictures) begin together."""
    links: list[_Link] = []
    beginning, counting = False, True
    for at, flags, position, serial, packets in _pages(content):
        if flags & 2:
            if not beginning:
                links.append(_Link(at))
                counting = True
            links[-1].serials.add(serial)
            beginning = True
        elif links:
            beginning = False
            # The first page with sound: no more can have been decoded than its packets hold.
            if counting and 0 < position < 1 << 62:
                links[-1].shifted = position > (packets + 1) * _PACKET
                counting = False
    for link, following in zip(links, [*links[1:], None]):
        link.stop = following.start if following else len(content)
    return links


def _pages(content: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """(place, flags, position, serial, packets that end in it) of each page."""
    at = 0
    while (at := content.find(b"OggS", at)) >= 0:
        head = content[at : at + 27 + 255]
        if len(head) < 27 or head[4] or head[5] > 7:
            at += 4
            continue
        sizes = head[27 : 27 + head[26]]
        position = int.from_bytes(head[6:14], "little")
        serial = int.from_bytes(head[14:18], "little")
        yield at, head[5], position, serial, sum(size < 255 for size in sizes)
        at += 27 + len(sizes) + sum(sizes)
