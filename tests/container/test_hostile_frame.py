"""Wrong or unusual assets, headers, trailers and trailer records: both readers agree on each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import zstandard

from tests.helpers.cases import (
    FRAME,
    SKIPPED,
    TWO_53,
    Case,
    Cases,
    add_asset,
    before_placing,
    check,
    edits,
    handmade,
    stored,
)
from tests.helpers.files import MAGIC, VOCABULARY, Draft, Edit, header, put, raw_asset, trailer, trailer_record

CASES = Cases()


# -- assets

TOK = ("assets", "tok/vocab.txt")
EMPTY_FRAME = zstandard.ZstdCompressor().compress(b"")
NO_SIZE = zstandard.ZstdCompressor(write_content_size=False).compress(VOCABULARY)
CHECKED = zstandard.ZstdCompressor(write_checksum=True).compress(VOCABULARY)
SKIPPABLE = (0x184D2A50).to_bytes(4, "little") + (4).to_bytes(4, "little") + b"skip"
DICTIONARY = zstandard.ZstdCompressionDict(
    b"token 1\n" * 40 + VOCABULARY[:100], dict_type=zstandard.DICT_TYPE_RAWCONTENT
)
WITH_DICTIONARY = zstandard.ZstdCompressor(dict_data=DICTIONARY).compress(VOCABULARY)


R = b"r" * 100
CASES.fine("zstd: frame with a checksum", stored(CHECKED))
CASES.fine("zstd: frame made by hand", stored(handmade(100), R))
CASES.fine("zstd: window of 1 MiB", stored(handmade(100, descriptor=0xC0, extra=b"\x50"), R))
CASES.fine("zstd: dictionary 0", stored(handmade(100, descriptor=0xE1, extra=b"\0"), R))
CASES.fine("zstd: one byte less than its content", stored(handmade(18, block=18), R[:18]))
CASES.refused("zstd: as long as its content", stored(handmade(17, block=17), R[:17]), "x.bin")
CASES.refused("zstd: longer than its content", stored(zstandard.ZstdCompressor().compress(b"x"), b"x"), "x.bin")
CASES.refused("zstd: empty content", stored(EMPTY_FRAME, b""), "x.bin")
CASES.refused("zstd: nothing for nothing", stored(b"", b""), "x.bin")
CASES.refused("zstd: size 0", stored(FRAME, size=0), "x.bin")
CASES.refused("zstd: size above 256 MiB", stored(FRAME, size=(256 << 20) + 1), "x.bin")
CASES.refused("zstd: size 2^53 - 1", stored(FRAME, size=TWO_53 - 1), "x.bin")
CASES.damaged("x.bin", "zstd: more than size", stored(FRAME, size=len(VOCABULARY) - 1))
CASES.damaged("x.bin", "zstd: less than size", stored(FRAME, size=len(VOCABULARY) + 1))
CASES.damaged("x.bin", "zstd: size of 256 MiB", stored(FRAME, size=256 << 20))
CASES.damaged("x.bin", "zstd: no content size", stored(NO_SIZE))
for claim in (0, 99, 101, 2**31, 2**60, 2**64 - 1, 2**64 - 2):
    CASES.damaged("x.bin", f"zstd: frame that claims {claim} bytes for 100", stored(handmade(claim), R))
CASES.damaged("x.bin", "zstd: frame and size claim 101 bytes for 100", stored(handmade(101), R, size=101))
CASES.damaged("x.bin", "zstd: frame and size claim 99 bytes for 100", stored(handmade(99), R, size=99))
CASES.damaged("x.bin", "zstd: frame and size claim 1 MiB for 100 bytes", stored(handmade(1 << 20), R, size=1 << 20))
CASES.damaged("x.bin", "zstd: window of 2 TiB", stored(handmade(100, descriptor=0xC0, extra=b"\xf8"), R))
CASES.damaged("x.bin", "zstd: two frames", stored(FRAME + FRAME))
CASES.damaged("x.bin", "zstd: a frame and an empty one", stored(FRAME + EMPTY_FRAME))
CASES.damaged("x.bin", "zstd: an empty frame and one", stored(EMPTY_FRAME + FRAME))
CASES.damaged("x.bin", "zstd: a byte after the frame", stored(FRAME + b"\0"))
CASES.damaged("x.bin", "zstd: a skippable frame before", stored(SKIPPABLE + FRAME))
CASES.damaged("x.bin", "zstd: a skippable frame after", stored(FRAME + SKIPPABLE))
CASES.damaged("x.bin", "zstd: nothing but a skippable frame", stored(SKIPPABLE))
CASES.damaged("x.bin", "zstd: nothing but an empty frame", stored(EMPTY_FRAME))
CASES.damaged("x.bin", "zstd: a frame cut short", stored(FRAME[:-1]))
CASES.damaged("x.bin", "zstd: half a frame", stored(FRAME[: len(FRAME) // 2]))
CASES.damaged("x.bin", "zstd: only a frame's header", stored(FRAME[:7]))
CASES.damaged("x.bin", "zstd: only the magic", stored(FRAME[:4]))
CASES.damaged("x.bin", "zstd: nothing", stored(b""))
CASES.damaged("x.bin", "zstd: zeros", stored(bytes(50)))
CASES.damaged("x.bin", "zstd: text", stored(VOCABULARY[:-1]))
CASES.damaged("x.bin", "zstd: a checksum cut off", stored(CHECKED[:-4]))
CASES.damaged("x.bin", "zstd: a wrong checksum", stored(CHECKED[:-1] + bytes([CHECKED[-1] ^ 1])))
CASES.damaged("x.bin", "zstd: a reserved block type", stored(handmade(100, kind=3), R))
CASES.damaged("x.bin", "zstd: a reserved bit", stored(handmade(100, descriptor=0xE8), R))
CASES.damaged("x.bin", "zstd: a block longer than the frame", stored(handmade(100, kind=0), R))
CASES.damaged("x.bin", "zstd: a compressed block of nothing", stored(handmade(100, kind=2, block=0, content=b""), R))
CASES.damaged(
    "x.bin", "zstd: no last block", stored(handmade(100)[:-4] + (100 << 3 | 2).to_bytes(3, "little") + b"r", R)
)
CASES.damaged("x.bin", "zstd: content of another digest", stored(FRAME, content_sha256="0" * 64), "SHA-256")
CASES.damaged("x.bin", "zstd: needs a dictionary", stored(WITH_DICTIONARY))
CASES.damaged("x.bin", "zstd: names a dictionary", stored(handmade(100, descriptor=0xE1, extra=b"\7"), R))
for encoding in ("gzip", "", "ZSTD", "zstd ", "x" * 100_000):
    CASES.loses("tok/vocab.txt", f"encoding {encoding[:10]} of length {len(encoding)}", put(*TOK, "encoding", encoding))
CASES.refused("raw: size is not length", put("assets", "LICENSE", "size", 15), "LICENSE")
CASES.refused("raw: digests differ", put("assets", "LICENSE", "content_sha256", "0" * 64), "LICENSE")
CASES.refused("zstd called raw", put(*TOK, "encoding", "raw"), "tok/vocab.txt")
CASES.refused("raw called zstd", put("assets", "LICENSE", "encoding", "zstd"), "LICENSE")
CASES.fine("empty raw asset", add_asset(raw_asset("x.bin", b"")))

# -- header


def header_is(data: bytes) -> Edit:
    return before_placing(lambda d: setattr(d, "header", data))


def header_says(**fields: Any) -> Edit:
    """Change the header of a file that is laid out for one of 64 bytes."""

    def edit(draft: Draft) -> None:
        draft.place().header = header(**fields)[:64]

    return edit


for size in (128, 192, 4096, 65472):
    CASES.fine(f"header of {size} bytes", header_is(header(size=size)))
    CASES.fine(
        f"header of {size} bytes with an unknown feature", header_is(header(size=size)[:64] + b"\xa5" * (size - 64))
    )
for size in (0, 1, 32, 63, 65, 96, 127, 65535):
    CASES.refused(f"header size {size}", header_says(size=size), "header size")
for size in (128, 1024, 65472):
    CASES.refused(f"header size {size} of a file laid out for 64", header_says(size=size))
CASES.refused(
    "file laid out for a longer header",
    edits(header_is(header(size=128)), lambda d: d.place().pack()[:10] + b"\x40" + d.pack()[11:]),
)
for bit in (0, 1, 31, 32, 63):
    CASES.refused(f"incompatible bit {bit}", header_says(incompatible=1 << bit), "features")
    CASES.fine(f"compatible bit {bit}", header_says(compatible=1 << bit))
CASES.fine("all compatible bits", header_says(compatible=2**64 - 1))
for major in (0, 2, 255, 256, 65535):
    CASES.refused(f"major {major}", header_says(major=major), f"version {major}")
CASES.fine(
    "reserved bytes of the header",
    before_placing(lambda d: setattr(d, "header", header()[:12] + b"\xff" * 4 + header()[16:32] + b"\xff" * 32)),
)
CASES.refused("another magic", header_says(magic=b"\x89QFN\r\n\x1a\n"), "not a qformat file")

# -- trailer


def trailer_says(**fields: Any) -> Edit:
    return lambda draft: draft.place().pack(**fields)


for minor in (1, 2, 2**31, 2**32 - 1):
    CASES.fine(f"minor {minor}", before_placing(lambda d, minor=minor: setattr(d, "minor", minor)))
CASES.fine("reserved bytes of the trailer", trailer_says(reserved=b"\xff" * 24))
CASES.refused("CRC-32", trailer_says(crc_xor=1), "CRC-32")
CASES.refused("end magic", trailer_says(end_magic=b"QFM-END\r"), "trailer")
CASES.refused("digest of the index", trailer_says(index_sha256=bytes(32)), "index")
CASES.refused("digest of the records", trailer_says(records_sha256=bytes(32)), "records")
for length in (0, 1, 2**31, 2**53, 2**63, 2**64 - 1):
    CASES.refused(f"index_length {length}", trailer_says(index_length=length))
    CASES.refused(f"records_length {length}", trailer_says(records_length=length or 1))
    CASES.refused(f"index_offset {length}", trailer_says(index_offset=length))


def wrap_around(draft: Draft) -> bytes:
    index = draft.index_bytes()
    return draft.pack(index_length=(len(index) + 64) % 2**64, records_length=2**64 - 64)


def index_later(by: int) -> Edit:
    """Let the trailer count the first bytes of the index as segments."""

    def edit(draft: Draft) -> bytes:
        index = draft.index_bytes()
        at = len(draft.header) + len(draft.body)
        return draft.header + draft.body + index + trailer(index[by:], at + by)

    return edit


CASES.refused("lengths that wrap around", wrap_around)
for by in (1, 64):
    CASES.refused(f"index {by} bytes later", index_later(by))
CASES.refused("index is the header", lambda d: header() + trailer(header(), 0))
CASES.refused("nothing but header and trailer", lambda d: header() + trailer(b"", 64))
CASES.refused("header and trailer overlap", lambda d: header()[:64] + trailer(b"", 0)[1:])
CASES.refused("no room for a header", lambda d: MAGIC + trailer(b"", 0))

# -- trailer records


def records_are(data: bytes) -> Edit:
    return before_placing(lambda d: setattr(d, "records", data))


CASES.fine("record: one", records_are(SKIPPED))
CASES.fine("record: many", records_are(b"".join(trailer_record(bytes(n), kind=n) for n in range(20))))
CASES.fine("record: other flags", records_are(trailer_record(b"x", flags=0xFFFFFFFE)))
CASES.fine("record: type 0 and empty", records_are(trailer_record(kind=0)))
CASES.fine("record: the largest type", records_are(trailer_record(kind=2**32 - 1)))
for flags in (1, 3, 0xFFFFFFFF):
    CASES.refused(
        f"record: must understand, flags {flags:#x}",
        records_are(SKIPPED + trailer_record(kind=9, flags=flags)),
        "record 9",
    )
for count in (1, 7, 8, 15):
    CASES.refused(f"record: {count} bytes", records_are(bytes(count)))
    CASES.refused(f"record: {count} bytes after one", records_are(SKIPPED + bytes(count)))
for length in (1, 17, 24, 2**31, 2**63, 2**64 - 1, 2**64 - 16, 2**64 - 32):
    CASES.refused(f"record: length {length} of 16", records_are(trailer_record(b"", length=length)))
    CASES.refused(f"record: length {length} of 16 after one", records_are(SKIPPED + trailer_record(b"", length=length)))
CASES.refused("record: padding is missing", records_are(trailer_record(b"x")[:-7]))
CASES.refused("record: padding is not zero", records_are(trailer_record(b"x")[:-1] + b"\1"))
CASES.refused("record: 8 bytes too many", records_are(SKIPPED + bytes(8)))


@CASES.each
def test_both_readers_agree_on_a_file_with(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path / "f.qf")
