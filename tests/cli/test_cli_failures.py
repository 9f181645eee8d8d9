"""Wrong usage, files that commands cannot read, and lists of digests: one line names the file and the cause."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.checkpoints import safetensors_bytes, weights
from tests.helpers.cli import Result, cli_finish, cli_start, nothing_at, one_line, run_all, run_cli, valid
from tests.helpers.files import Draft, put, raw_asset, raw_tensor, sha256, small_draft

TYPES = "affine, bf16, f16, f32, f64, levels, lossless, lut, nlm, q4_0, q4_1, q5_0, q5_1, q8_0"
#: options by a part of the message, words separated by spaces
WRONG_OPTIONS: dict[str, list[str]] = {
    f"the types for weights are {TYPES}": ["-t q4_o"],
    "q4_9": ["-t q4_9", "--tensor-type a.weight=q4_9"],
    "type": ["-t "],
    "q4_0:": ["-t q4_0:"],
    "nothing": ["-t q4_0:nothing=1"],
    "search": ["-t q4_0:search", "-t q4_0:search=", "-t q4_0:search=naive,search=naive"],
    "none": ["-t q4_0:search=none"],
    "bits": ["-t f16:bits=3"],
    "no codec": ["-t " + "x" * 5000],
    **{word: [f"--tensor-type {word}"] for word in ("a.weight", "=f16", "a.weight=")},
    **{name: [f"--tensor-type {name}=f16"] for name in ("nothing.*", "b.ids")},
    "c=f16": ["--tensor-type a.weight=f16 --tensor-type c=f16"],
    **{jobs: [f"-j {jobs}"] for jobs in ("0", "many")},
    **{argument: [argument] for argument in ("--no-such-option", "more")},
}
OPTIONS = [(says, one.split(" ")) for says, several in WRONG_OPTIONS.items() for one in several]


@pytest.mark.parametrize(("says", "options"), [*OPTIONS, ("q4_0", ["-t", " q4_0"])])
def test_wrong_options_of_convert_are_refused(says: str, options: list[str], source: Path, tmp_path: Path) -> None:
    assert says in one_line(run_cli("convert", source, tmp_path / "m.qf", *options), code=2)
    nothing_at(tmp_path / "m.qf")


@pytest.mark.parametrize(
    "arguments",
    [
        *("convert", "convert only-a-source", "inspect", "inspect a b", "verify", "checksum", "quantize-stats"),
        *("quantize-stats x --include (", "quantize-stats x --exclude *", "quantize-stats x -t q4_9"),
        *("no-such-command", "--no-such-option"),
    ],
)
def test_wrong_usage_exits_with_status_2(arguments: str) -> None:
    one_line(run_cli(*arguments.split()), code=2)


# ---- commands that read


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


GOOD_FILE = small_draft().pack()
DAMAGED = {
    "empty": b"",
    "truncated": GOOD_FILE[:-1],
    "half": GOOD_FILE[: len(GOOD_FILE) // 2],
    "header only": GOOD_FILE[:64],
    "header damaged": flip(GOOD_FILE, 40),
    "magic damaged": flip(GOOD_FILE, 3),
    "index damaged": flip(GOOD_FILE, len(GOOD_FILE) - 500),
    "trailer damaged": flip(GOOD_FILE, len(GOOD_FILE) - 100),
    "text mode": GOOD_FILE.replace(b"\n", b"\r\n"),
    "appended": GOOD_FILE + b"\n",
    "safetensors": safetensors_bytes({"a": ("f32", (3,), bytes(12))}),
    "text": b"hello\nworld\n" * 50,
    "random": np.random.default_rng(5).bytes(4000),
    "binary without lines": bytes(100_000),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_inspect_and_verify_refuse_damaged_files_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.qf"
    path.write_bytes(DAMAGED[name])
    inspected, verified = run_all(["inspect", path], ["verify", "--json", path])
    assert str(path) in one_line(inspected)
    assert inspected.out == ""
    assert (verified.code, verified.err) == (1, "")
    report = json.loads(verified.out)
    assert report["ok"] is False
    assert [len(file["errors"]) for file in report["files"]] == [1]


@pytest.mark.parametrize("name", ["empty", "truncated", "index damaged", "random"])
def test_each_command_on_a_damaged_file_fails_or_prints_its_digest(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.qf"
    path.write_bytes(DAMAGED[name])
    commands = ("inspect --json", "quantize-stats", "verify", "verify --quick", "checksum")
    inspected, measured, verified, quick, summed = run_all(*([*command.split(), path] for command in commands))
    for result in (inspected, measured):
        assert str(path) in one_line(result)
        assert result.out == ""
    for result in (verified, quick):
        assert (result.code, result.err) == (1, "")
        first, second = result.out.splitlines()
        assert first == f"{path}: FAILED"
        assert second.startswith("  ")
    assert summed == Result(0, f"{sha256(DAMAGED[name])}  {path}\n", "")


@pytest.mark.parametrize("kind", ["missing", "directory", "below a file"])
def test_paths_that_are_not_files_are_refused_and_others_are_processed(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(GOOD_FILE)
    (tmp_path / "directory").mkdir()
    path = tmp_path / {"missing": "none", "directory": "directory", "below a file": "file/x"}[kind]
    file = tmp_path / "file"
    alone = [[command, path] for command in ("inspect", "quantize-stats", "checksum", "verify")]
    inspected, measured, summed, verified, both, both_summed = run_all(
        *alone, ["verify", path, file], ["checksum", path, file]
    )
    for result in (inspected, measured, summed, both_summed):
        assert str(path) in one_line(result)
        assert result.out == (f"{sha256(GOOD_FILE)}  {file}\n" if result is both_summed else "")
    for result in (verified, both):
        assert (result.code, result.err) == (1, "")
        first, second, *others = result.out.splitlines()
        assert first == f"{path}: FAILED"
        assert second.startswith("  ")
        assert others == ([f"{file}: OK"] if result is both else [])


def test_verify_names_the_damaged_tensor_and_segment(tmp_path: Path) -> None:
    index = small_draft().place().index
    assets, tensors = index["assets"], index["tensors"]
    at = [tensors[1]["segments"][0]["offset"], tensors[5]["segments"][0]["offset"] + 3, assets[0]["offset"]]
    data = GOOD_FILE
    for position in at:
        data = flip(data, position)
    path = tmp_path / "m.qf"
    path.write_bytes(data)
    result = run_cli("verify", path)
    assert (result.code, result.err) == (1, "")
    lines = result.out.splitlines()
    assert lines[0] == f"{path}: FAILED"
    assert [line.split(": ")[0] for line in lines[1:]] == [
        "  asset 'LICENSE'",
        "  tensor 'b.weight', segment 'blocks'",
        "  tensor 'zhalf', segment 'data'",
    ]
    (file,) = json.loads(run_cli("verify", "--json", path).out)["files"]
    assert (file["path"], file["ok"]) == (str(path), False)
    assert file["root_sha256"] == json.loads(run_cli("inspect", "--json", path).out)["root_sha256"]
    places = [(error["tensor"], error["asset"], error["segment"]) for error in file["errors"]]
    assert places == [(None, "LICENSE", None), ("b.weight", None, "blocks"), ("zhalf", None, "data")]
    assert all(re.search("SHA-256.*byte", error["what"]) for error in file["errors"])
    assert run_cli("verify", "--quick", path).code == 0
    assert run_cli("inspect", path).code == 0


def test_verify_reports_changed_padding(tmp_path: Path) -> None:
    path = tmp_path / "m.qf"
    path.write_bytes(flip(GOOD_FILE, 127))
    (file,) = json.loads(run_cli("verify", "--json", path).out)["files"]
    assert ["padding" in error["what"] for error in file["errors"]] == [True]


def test_inspect_and_verify_accept_files_of_a_future_minor_version(tmp_path: Path) -> None:
    draft = small_draft()
    put("tensors", "b.weight", "codec", "future")(draft)
    put("tensors", "zhalf", "must_understand", ["future"])(draft)
    draft.minor = 7
    path = tmp_path / "m.qf"
    path.write_bytes(draft.pack())
    assert run_cli("verify", path).code == 0
    result = run_cli("inspect", path)
    assert (result.code, result.err) == (0, "")
    assert "future" in result.out
    assert json.loads(run_cli("inspect", "--json", path).out)["format"] == {"major": 1, "minor": 7}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_names_that_the_terminal_encoding_lacks_are_escaped(encoding: str, tmp_path: Path) -> None:
    draft = Draft(tensors=[raw_tensor("gewicht \u2603", "f32", weights(0, 3))], metadata={"\u2603": "\U0001f600"})
    path = tmp_path / "m.qf"
    path.write_bytes(flip(draft.pack(), 65))
    for command in (["inspect"], ["inspect", "--json"], ["verify"], ["verify", "--json"]):
        result = run_cli(*command, path, env={"PYTHONIOENCODING": encoding})
        assert result.code == (command[0] == "verify")
        assert result.err == ""
        assert "gewicht" in result.out


def test_inspect_escapes_control_characters_of_a_file(tmp_path: Path) -> None:
    evil = "x\x1b[2J\r\x9b31m\u202eok\n"
    draft = Draft(
        tensors=[raw_tensor("w\x9b31m\u202e", "f32", weights(0, 3))],
        assets=[raw_asset("a\x9b31m.txt", b"x")],
        metadata={evil: evil},
    )
    path = tmp_path / "m.qf"
    path.write_bytes(draft.pack())
    result = run_cli("inspect", path)
    assert result.code == 0
    assert all(character.isprintable() or character == "\n" for character in result.out)
    assert len(result.out.splitlines()) == 7


NOT_UTF8 = os.fsdecode(b"m\xff.qf")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names or devices")


@needs_linux
@pytest.mark.parametrize(
    "command", [["inspect"], ["inspect", "--json"], ["verify"], ["verify", "--json"], ["checksum"]]
)
def test_commands_read_files_whose_names_are_not_utf8(command: list[str], tmp_path: Path) -> None:
    path = tmp_path / NOT_UTF8
    path.write_bytes(GOOD_FILE)
    result = run_cli(*command, path)
    assert (result.code, result.err) == (0, "")
    if command == ["checksum"]:
        assert os.fsencode(result.out).endswith(b"m\xff.qf\n")


@needs_linux
def test_convert_writes_a_file_whose_name_is_not_utf8(source: Path, tmp_path: Path) -> None:
    path = tmp_path / NOT_UTF8
    for options in ([], ["--json", "--force"]):
        result = run_cli("convert", source, path, *options)
        assert (result.code, result.err) == (0, "")
    valid(path)


@needs_linux
@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["checksum"], ["verify", "--json"]])
def test_commands_fail_in_one_line_if_stdout_is_full_or_closed(command: list[str], tmp_path: Path) -> None:
    small = tmp_path / "small.qf"
    small.write_bytes(GOOD_FILE)
    with Path("/dev/full").open("wb") as full:
        message = one_line(cli_finish(cli_start(*command, small, stdout=full)))
    assert "No space left" in message
    reading, writing = os.pipe()
    os.close(reading)
    process = cli_start(*command, small, stdout=writing)
    os.close(writing)
    result = cli_finish(process)
    assert result.err == ""
    assert result.code != 0


# ---- lists


def digests(*paths: Path) -> str:
    return "".join(f"{sha256(path.read_bytes())}  {path.name}\n" for path in paths)


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Return a folder with two files, and a list of them."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.qf").write_bytes(GOOD_FILE)
    (folder / "b c.txt").write_bytes(b"some text")
    (folder / "SHA256SUMS").write_text(digests(folder / "a.qf", folder / "b c.txt"))
    return folder


def test_names_in_a_list_are_relative_to_the_list(listed: Path, tmp_path: Path) -> None:
    result = run_cli("verify", listed / "SHA256SUMS", cwd=tmp_path)
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [f"{listed / 'a.qf'}: OK", f"{listed / 'b c.txt'}: OK"]
    assert run_cli("verify", "SHA256SUMS", cwd=listed).code == 0
    assert run_cli("verify", "folder/SHA256SUMS", cwd=tmp_path).code == 0
    # and to nothing else: a file that is missing there is not looked for in the working directory
    shutil.move(listed / "SHA256SUMS", tmp_path / "SHA256SUMS")
    result = run_cli("verify", "../SHA256SUMS", cwd=listed)
    assert result.code == 1
    assert result.out.count("No such file") == 2


Rewrite = Callable[[str], str]
LISTS_THAT_HOLD: dict[str, Rewrite] = {
    "CR LF": lambda text: text.replace("\n", "\r\n"),
    "binary marker": lambda text: text.replace("  ", " *"),
    "upper case": lambda text: text.replace(text[:64], text[:64].upper()),
    "no line end": lambda text: text.rstrip("\n"),
    "comments and blank lines": lambda text: "# sums\n\n" + text.replace("\n", "\n\n# more\n"),
    "escaped though it need not be": lambda text: "\\" + text,
    "files twice": lambda text: text * 2,
}
LISTS_THAT_FAIL: dict[str, tuple[Rewrite, str, str]] = {
    "wrong digest": (lambda text: "0" * 64 + text[64:], "a.qf: FAILED", "does not match"),
    "missing file": (lambda text: text + "0" * 64 + "  none.qf\n", "none.qf: FAILED", "cannot be read"),
    "directory": (lambda text: text + "0" * 64 + "  .\n", "FAILED", "directory"),
    "short digest": (lambda text: text + "0" * 63 + "  a.qf\n", "SHA256SUMS: FAILED", "line 3"),
    "no name": (lambda text: text + "0" * 64 + "  \n", "SHA256SUMS: FAILED", "line 3"),
    "junk": (lambda text: text + "junk\n", "SHA256SUMS: FAILED", "line 3"),
    "NUL in a name": (lambda text: text + "0" * 64 + "  a\0b\n", "FAILED", ""),
    "name too long": (lambda text: text + "0" * 64 + "  " + "n" * 300 + "\n", "FAILED", "too long"),
    "a file as a folder": (lambda text: text + "0" * 64 + "  a.qf/x\n", "x: FAILED", "cannot be read"),
}


@pytest.mark.parametrize("name", LISTS_THAT_HOLD)
def test_lists_in_every_accepted_notation_are_verified(name: str, listed: Path) -> None:
    sums = listed / "SHA256SUMS"
    sums.write_bytes(LISTS_THAT_HOLD[name](sums.read_text()).encode())
    result = run_cli("verify", sums)
    assert (result.code, result.err) == (0, "")
    assert set(result.out.splitlines()) == {f"{listed / 'a.qf'}: OK", f"{listed / 'b c.txt'}: OK"}


@pytest.mark.parametrize("name", LISTS_THAT_FAIL)
def test_verify_reports_wrong_lines_of_a_list(name: str, listed: Path) -> None:
    change, line, says = LISTS_THAT_FAIL[name]
    sums = listed / "SHA256SUMS"
    sums.write_bytes(change(sums.read_text()).encode())
    result = run_cli("verify", sums)
    assert (result.code, result.err) == (1, "")
    lines = result.out.splitlines()
    assert f"{listed / 'b c.txt'}: OK" in lines, "the other lines count all the same"
    (at,) = [i for i, text in enumerate(lines) if text.endswith("FAILED")]
    assert lines[at].endswith(line)
    assert says in lines[at + 1]
    report = json.loads(run_cli("verify", "--json", sums).out)
    assert report["ok"] is False
    assert [file["ok"] for file in report["files"]].count(False) == 1


def test_verify_reports_the_damaged_file_of_a_list(listed: Path) -> None:
    (listed / "b c.txt").write_bytes(b"some texT")
    result = run_cli("verify", listed / "SHA256SUMS")
    assert result.code == 1
    assert result.out.splitlines()[:2] == [f"{listed / 'a.qf'}: OK", f"{listed / 'b c.txt'}: FAILED"]


STRANGE_NAMES = ["new\nline", "back\\slash", "both\\\n\\n", "  spaces ", "*star", "#hash", "-dash", "\\", "é ☃", "\x1b"]


def test_lists_of_strange_names_round_trip(tmp_path: Path) -> None:
    for i, name in enumerate([*STRANGE_NAMES, "return\r"]):
        (tmp_path / name).write_bytes(b"%d" % i)
    sums = run_cli("checksum", "--", *STRANGE_NAMES, "return\r", cwd=tmp_path)
    assert (sums.code, sums.err) == (0, "")
    (tmp_path / "SHA256SUMS").write_text(sums.out, newline="")
    assert len(sums.out.splitlines()) == len(STRANGE_NAMES) + 1
    assert run_cli("verify", "SHA256SUMS", cwd=tmp_path).code == 0
    (tmp_path / STRANGE_NAMES[2]).write_bytes(b"changed")
    assert run_cli("verify", "SHA256SUMS", cwd=tmp_path).code == 1


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="there is no sha256sum")
def test_checksum_and_sha256sum_write_and_read_the_same_lists(tmp_path: Path) -> None:
    for i, name in enumerate(STRANGE_NAMES):
        (tmp_path / name).write_bytes(b"%d" % i)
    ours = run_cli("checksum", "--", *STRANGE_NAMES, cwd=tmp_path).out
    command = ["sha256sum", "--", *STRANGE_NAMES]
    theirs = subprocess.run(command, check=True, capture_output=True, cwd=tmp_path).stdout
    assert ours.encode() == theirs
    (tmp_path / "SHA256SUMS").write_bytes(theirs)
    subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], check=True, capture_output=True, cwd=tmp_path)
    assert run_cli("verify", "SHA256SUMS", cwd=tmp_path).code == 0
    binary = subprocess.run(["sha256sum", "-b", *command[1:]], check=True, capture_output=True, cwd=tmp_path).stdout
    (tmp_path / "SHA256SUMS").write_bytes(binary)
    assert run_cli("verify", "SHA256SUMS", cwd=tmp_path).code == 0
