r"""Lists of SHA-256 digests, as ``sha256sum``, its option ``--tag``, OpenSSL and BSD's ``sha256`` print them, signed by PGP or not.

Names are bytes in any encoding. In a line that begins with ``\``, ``\n``, ``\r`` and ``\\`` stand for line ends and backslashes.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

_PLAIN = re.compile(rb"(\\?)([0-9a-fA-F]{64})(?: [ *]|[ \t]+\*?(?=\S))(.+)")
_TAGGED = re.compile(rb"(\\?)SHA(?:2-)?256 ?\((.+)\) ?= ?([0-9a-fA-F]{64})")
_NAMELESS = re.compile(rb"[0-9a-fA-F]{64}\s*")
# other functions: MD5, SHA-1, SHA-224, SHA-384 and SHA-512, BLAKE2
_OTHER = re.compile(rb"\\?(?:(?:[0-9a-fA-F]{32}|[0-9a-fA-F]{40}|[0-9a-fA-F]{56}|[0-9a-fA-F]{96}|[0-9a-fA-F]{128})[ \t].*"
                    rb"|[A-Z0-9-]+ ?\(.+\) ?= ?[0-9a-fA-F]{32,128})")  # fmt: skip
_ESCAPED = {b"n": b"\n", b"r": b"\r", b"\\": b"\\"}


@dataclass(frozen=True)
class Entry:
    """A line of a list.

    Attributes
    ----------
    number
        Number of the line, from 1.
    name
        The file, relative to the list.
    digest
        Its SHA-256, in lower case.
    problem
        Why the line cannot be checked, or empty; it has no name and digest then.
    """

    number: int
    name: str = ""
    digest: str = ""
    problem: str = ""


def sums_line(path: str, digest: str) -> str:
    r"""Return the line that ``sha256sum`` prints: names with a line end or backslash are escaped, which a leading ``\`` tells."""
    if any(c in path for c in "\\\n\r"):
        escaped = path.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        return f"\\{digest}  {escaped}"
    return f"{digest}  {path}"


def is_list(start: bytes) -> bool:
    """Return whether a file is a list, by its first bytes: its first line but for comments has a digest."""
    first = next(_lines(start), (0, b""))[1]
    return any(form.match(first) for form in (_PLAIN, _TAGGED, _NAMELESS, _OTHER))


def parse(data: bytes) -> Iterator[Entry]:
    """Yield the entries of a list."""
    for number, line in _lines(data):
        if match := _PLAIN.fullmatch(line):
            escaped, digest, name = match.groups()
        elif match := _TAGGED.fullmatch(line):
            escaped, name, digest = match.groups()
        else:
            yield Entry(number, problem=_problem(line))
            continue
        yield Entry(number, os.fsdecode(_unescape(name) if escaped else name), digest.decode().lower())


def _problem(line: bytes) -> str:
    if _NAMELESS.fullmatch(line):
        return "has a digest, but no name of a file"
    if _OTHER.fullmatch(line):
        return "has a digest that is not SHA-256, and only that can be checked"
    return "is not of the form 'SHA256  NAME'"


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield lines with their numbers, except empty ones, comments and the frame of a PGP signature."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        data = data.decode("utf-16", "surrogateescape").encode("utf-8", "surrogateescape")
    data = data.removeprefix(codecs.BOM_UTF8)
    part = ""  # of a signed message: header, text or signature
    for number, line in enumerate(data.split(b"\n"), 1):
        line = line.removesuffix(b"\r")  # noqa: PLW2901
        if line == b"-----BEGIN PGP SIGNED MESSAGE-----":
            part = "header"
        elif line == b"-----BEGIN PGP SIGNATURE-----":
            part = "signature"
        elif line == b"-----END PGP SIGNATURE-----":
            part = ""
        elif not line.strip():
            part = "text" if part == "header" else part
        elif part in ("", "text") and not line.startswith(b"#"):
            yield number, line.removeprefix(b"- ") if part else line


def _unescape(name: bytes) -> bytes:
    return re.sub(rb"\\([nr\\])", lambda match: _ESCAPED[match[1]], name)
