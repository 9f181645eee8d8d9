"""Commands that a fault hits at one of their file-system calls, and the commands after them.

``python -m tests.helpers.fault_campaign FOLDER STRIDE ["SCENARIO; …" ["FAULT; …"]]``

`faults.c` has to be preloaded. A process that has imported everything forks for each run, so that thousands take minutes. For each
scenario and each kind of fault, it hits every call in turn (every STRIDE-th one). Then the target has to be as it was before, or
complete; and the next run, with the same options or others and without faults, has to go on or say what is there, and to leave
nothing but its output. Every second next run is killed itself, and followed by another one.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import importlib
import os
import pkgutil
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file as save_safetensors

import qformat
from qformat.cli import main
from qformat.container.layout import MAGIC
from qformat.container.replaced import shards_of
from qformat.container.verify import verify
from qformat.readers.torch import load_file
from tests.helpers import gguf

FAULTS = {
    "SIGKILL": (0, signal.SIGKILL),
    "SIGTERM": (0, signal.SIGTERM),
    "SIGINT": (0, signal.SIGINT),
    "EIO": (1, errno.EIO),
    "EIO from then on": (2, errno.EIO),
    "ENOSPC": (1, errno.ENOSPC),
    "ENOSPC from then on": (2, errno.ENOSPC),
    "short write": (3, 0),
}
INTERRUPTED = {"SIGKILL": (-9,), "SIGTERM": (0, 1, 143), "SIGINT": (0, 1, 130)}
_library = ctypes.CDLL(os.environ["LD_PRELOAD"])
_library.faults_calls.restype = ctypes.c_long
_library.faults_arm.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_int)

Command = tuple[str, ...]


@dataclass(frozen=True)
class Scenario:
    """A command that is hit, what stands there before, and other commands that may follow."""

    command: Command
    before: Sequence[Command] = ()
    others: Sequence[Command] = ()
    plain: bool = False  # on a file system that knows neither renameat2 nor files without names


def _convert(*options: str, source: str = "new.safetensors") -> Command:
    return ("convert", f"{{src}}/{source}", "{dst}/m.qf", "-t", "f32", "-j1", *options)


def _export(to: str, *options: str, source: str = "new.qf") -> Command:
    return ("export", f"{{src}}/{source}", "{dst}/m", "--to", to, "-j1", *options)


SHARDS, FORCE, RESUME = ("--shard-size", "2048"), "--force", "--resume"
OLD, OLD_SHARDS = (
    _convert(source="old.safetensors"),
    _convert("--shard-size", "3072", FORCE, source="old.safetensors"),
)
OTHER = ("convert", "{src}/old.safetensors", "{dst}/m.qf", "-t", "q8_0", "-j1")
SCENARIOS = {
    "convert": Scenario(_convert(), (), [OTHER, (*OTHER, RESUME), (*OTHER, *SHARDS)]),
    "convert --force": Scenario(_convert(FORCE), [OLD], [(*OTHER, FORCE), (*OTHER, *SHARDS, FORCE)]),
    "convert --resume": Scenario(_convert(RESUME), (), [(*OTHER, RESUME), _convert(), _convert(*SHARDS, RESUME)]),
    "shards": Scenario(_convert(*SHARDS), (), [OTHER, _convert(*SHARDS, RESUME), (*OTHER, *SHARDS)]),
    "shards --resume": Scenario(
        _convert(*SHARDS, RESUME), (), [_convert(*SHARDS), _convert(RESUME), (*OTHER, *SHARDS)]
    ),
    "shards over a file": Scenario(
        _convert(*SHARDS, FORCE), [OLD], [(*OTHER, FORCE), _convert(*SHARDS, RESUME, FORCE)]
    ),
    "shards over fewer": Scenario(_convert("--shard-size", "1024", FORCE), [OLD_SHARDS], [(*OTHER, FORCE), OLD_SHARDS]),
    "shards over more": Scenario(
        _convert("--shard-size", "3072", FORCE, RESUME),
        [_convert(*SHARDS, source="old.safetensors")],
        [(*OTHER, FORCE)],
    ),
    "shards over as many": Scenario(_convert("--shard-size", "3072", FORCE), [OLD_SHARDS], [(*OTHER, *SHARDS, FORCE)]),
    "shards over the same": Scenario(OLD_SHARDS, [OLD_SHARDS], [_convert(FORCE)]),
    "a file over shards": Scenario(_convert(FORCE), [OLD_SHARDS], [(*OTHER, *SHARDS, FORCE)]),
    "shards, plain": Scenario(_convert(*SHARDS), (), [OTHER], plain=True),
    "truncate": Scenario(("truncate", "{src}/layered.qf", "{dst}/m.qf", "-q", "3"), (), [OTHER]),
    "truncate --force": Scenario(
        ("truncate", "{src}/layered.qf", "{dst}/m.qf", "-q", "3", FORCE), [OLD_SHARDS], [(*OTHER, FORCE)]
    ),
    "safetensors": Scenario(_export("safetensors"), (), [_export("safetensors", "-t", "f16")]),
    "safetensors --force": Scenario(
        _export("safetensors", FORCE),
        [_export("safetensors", source="old.qf")],
        [_export("safetensors", "-t", "f16", FORCE)],
    ),
    "gguf": Scenario(_export("gguf", source="llama.qf"), (), [_export("gguf", "-t", "q8_0", source="llama.qf")]),
    "gguf --force": Scenario(
        _export("gguf", FORCE, source="llama.qf"),
        [_export("gguf", "-t", "f16", source="llama.qf")],
        [_export("safetensors", FORCE)],
    ),
    "hf": Scenario(_export("hf"), (), [_export("hf", "--shard-size", "2048")]),
    "hf --force": Scenario(
        _export("hf", FORCE),
        [_export("hf", "--shard-size", "2048", source="old.qf")],
        [_export("hf", "-t", "f16", FORCE)],
    ),
    "hf shards --force": Scenario(
        _export("hf", "--shard-size", "2048", FORCE), [_export("hf", source="old.qf")], [_export("hf", FORCE)]
    ),
    "hf --force, plain": Scenario(
        _export("hf", FORCE), [_export("hf", source="old.qf")], [_export("hf", "-t", "f16", FORCE)], plain=True
    ),
    "json": Scenario(("quantize-stats", "{src}/new.safetensors", "--json", "{dst}/m.json", "-j1"), (), ()),
    "json, plain": Scenario(("quantize-stats", "{src}/old.safetensors", "--json", "{dst}/m.json", "-j1"), plain=True),
}


class Campaign:
    """The runs of a scenario in a folder."""

    def __init__(self, folder: Path, name: str, stride: int) -> None:
        self._scenario, self._stride = SCENARIOS[name], stride
        self._sources, self._place, self._template = folder / "src", folder / "dst", folder / "template"
        self._command = self._filled(self._scenario.command)
        self._others = [self._filled(command) for command in self._scenario.others]
        self._target = Path(next(text for text in self._command if text.startswith(f"{self._place}/")))
        self._checked: set[str] = set()
        self._log = folder / "log"
        for path in (self._place, self._template):
            shutil.rmtree(path, ignore_errors=True)
        self._prepare()
        self.counts: Counter[str] = Counter()
        self.broken: list[str] = []

    def _filled(self, command: Command) -> Command:
        return tuple(text.format(src=self._sources, dst=self._place) for text in command)

    def _prepare(self) -> None:
        """Make what stands there before: foreign files, a head and shards of another name, and the old target."""
        self._place.mkdir()
        for name in ("m-00001-of-00002.qf", "m.qf.tmp", "m.journal", "x.partial"):
            (self._place / name).write_bytes(b"foreign")
        keep = self._filled(("convert", "{src}/old.safetensors", "{dst}/keep.qf", "-t", "f32", *SHARDS))
        for command in (keep, *map(self._filled, self._scenario.before)):
            assert self._run(command) == 0, self._log.read_text()
        shutil.copytree(self._place, self._template, symlinks=True)
        others = {path.name for path in self._own()}
        self._foreign = {path: path.read_bytes() for path in self._place.iterdir() if path.name not in others}
        self._old = self._content()
        self._expected = {}
        for command in (self._command, *self._others):
            self._restore()
            assert self._run(command) == 0, (command, self._log.read_text())
            assert not self._leftovers(), (command, self._leftovers())
            self._expected[command] = self._content()
        self._new = self._expected[self._command]

    def _restore(self) -> None:
        shutil.rmtree(self._place)
        shutil.copytree(self._template, self._place, symlinks=True)

    def _own(self) -> list[Path]:
        """Return the target, and its shards."""
        if not os.path.lexists(self._target):
            return []
        shards = shards_of(self._target) if self._target.is_file() else ()
        return [self._target, *(self._place / shard.name for shard in shards)]

    def _leftovers(self) -> list[str]:
        known = {path.name for path in self._own()} | {path.name for path in self._foreign}
        return sorted(path.name for path in self._place.iterdir() if path.name not in known)

    def _content(self) -> str:
        """Return a digest of the target; nothing if it is absent. Raise an error if it cannot be read or is damaged."""
        digest = hashlib.sha256()
        own = self._own()
        for path in own:
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                digest.update(
                    f"{file.name}\n{file.stat().st_size}\n".encode() + (file.read_bytes() if file.is_file() else b"")
                )
        found = digest.hexdigest() if own else ""
        if found not in self._checked and own and own[0].is_file() and own[0].read_bytes().startswith(MAGIC):
            assert all(report.ok for report in verify([str(self._target)])), "verify finds damage"
            load_file(str(self._target))
        self._checked.add(found)
        return found

    def _run(self, command: Command, fault: str = "SIGKILL", at: int = -1) -> int:
        """Run a command in a process of its own, and return its exit status, less than 0 for a signal; `at` -1 is no fault."""
        child = os.fork()
        if not child:
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.argv = ["qformat", *command]
            code = 70
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells ignore in the background
            try:
                kind, value = FAULTS[fault]
                _library.faults_arm(os.fsencode(self._place), kind, value, at, self._scenario.plain)
                main()
                code = 0
            except SystemExit as done:
                code = done.code if isinstance(done.code, int) else 1
            except BaseException:  # noqa: BLE001  the end of the process
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os.write(log, f"\ncalls {_library.faults_calls()}\n".encode())
            os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _calls(self, command: Command) -> int:
        return int(self._log.read_text().rsplit("\ncalls ", 1)[1])

    def run(self, faults: Sequence[str]) -> None:
        """Make all runs."""
        for fault in faults:
            self._restore()
            self._run(self._command, fault)
            for number in range(0, self._calls(self._command), self._stride):
                self._restore()
                self.counts[fault] += 1
                try:
                    self._hit(fault, number)
                except Exception as error:  # noqa: BLE001  one broken run does not end the others
                    log = self._log.read_text().replace("\n", " | ")[-300:]
                    self.broken.append(f"{fault} at {number}: {error!r} {log}")

    def _hit(self, fault: str, number: int) -> None:
        code, text = self._run(self._command, fault, number), self._log.read_text()
        assert code in INTERRUPTED.get(fault, (0, 1)), f"exit status {code}"
        assert "Traceback" not in text, "a traceback"
        found = self._state([self._old, self._new])
        assert code or found == self._new, "exit status 0 without the output"
        following = [self._command, *self._others]
        follow = following[number % len(following)]
        if number % 2:
            again = self._run(follow, "SIGKILL", number * 7 // 2 % 97)
            assert again in (-9, 0, 1, 2), f"exit status {again}"
            found = self._state([found, self._old, self._new, self._expected[follow]])
            follow = following[number // 2 % len(following)]
        code, text = self._run(follow), self._log.read_text()
        if code:
            assert "exists already" in text, "the next run fails"
            assert FORCE not in follow, "the next run fails in spite of --force"
            assert found, "exists already, but nothing was there"
            assert self._content() == found, "it was replaced"
        else:
            assert self._content() == self._expected[follow], f"{follow} ends with other bytes"
        assert not self._leftovers(), f"left: {self._leftovers()}"

    def _state(self, allowed: Sequence[str]) -> str:
        found = self._content()
        absent = [""] if self._scenario.plain else []
        assert found in [*allowed, *absent], "neither old nor new" if found else "absent"
        assert all(path.read_bytes() == data for path, data in self._foreign.items()), "a foreign file is changed"
        return found


def _make_sources(folder: Path) -> None:
    for module in pkgutil.walk_packages(qformat.__path__, "qformat."):  # now rather than in each run
        if "numba" not in module.name and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("old", "new"):
        arrays = {f"w{i}": rng.normal(size=(8, 32)).astype(np.float32) for i in range(4)}
        save_safetensors(arrays, folder / f"{name}.safetensors")
        qformat.save_file(arrays, folder / f"{name}.qf", assets={"config.json": b"{}", "sub/more.json": b"[1]"})
    qformat.save_file(arrays, folder / "layered.qf", "scm")
    gguf.write(
        folder / "llama.gguf",
        {"blk.0.ffn_up.weight": (arrays["w0"], "f32"), "blk.0.ffn_norm.weight": (arrays["w1"][0], "f32")},
    )
    gguf.store(folder / "llama.gguf")


def campaign(folder: Path, stride: int, names: Sequence[str], faults: Sequence[str]) -> int:
    """Run scenarios, print how many runs there were, and return how many of them are broken."""
    _make_sources(folder / "src")
    broken = 0
    for name in names:
        start = time.perf_counter()
        runs = Campaign(folder, name, stride)
        runs.run(faults)
        broken += len(runs.broken)
        seconds = time.perf_counter() - start
        print(
            f"{name}: {sum(runs.counts.values())} runs, {len(runs.broken)} broken, {seconds:.1f} s; {dict(runs.counts)}",
            flush=True,
        )
        for line in runs.broken[:20]:
            print("   ", line)
    return broken


if __name__ == "__main__":
    place, stride = Path(sys.argv[1]), int(sys.argv[2])
    chosen = sys.argv[3].split("; ") if sys.argv[3:] and sys.argv[3] else [*SCENARIOS]
    kinds = sys.argv[4].split("; ") if sys.argv[4:] and sys.argv[4] else [*FAULTS]
    sys.exit(bool(campaign(place, stride, chosen, kinds)))
