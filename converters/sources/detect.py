"""Open a checkpoint: tables of the kinds of files and directories, recognized by content and not by name.

To support another kind, write a module with the two functions of a row, and add the row.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from qformat.converters.sources.assets import with_assets
from qformat.converters.sources.container import is_container, open_container
from qformat.converters.sources.ctranslate2 import is_ctranslate2, open_ctranslate2
from qformat.converters.sources.files import Opener, missing
from qformat.converters.sources.foreign import check_directory, check_known
from qformat.converters.sources.gguf import is_gguf, open_gguf
from qformat.converters.sources.hf import advice_for, is_hf, open_hf, open_set, select
from qformat.converters.sources.hub_cache import snapshot_in
from qformat.converters.sources.listing import Folder
from qformat.converters.sources.meta import is_meta, open_meta
from qformat.converters.sources.model_files import recognized
from qformat.converters.sources.options import SourceOptions
from qformat.converters.sources.parallel_parts import check_file, check_folder
from qformat.converters.sources.pipelines import check_pipeline
from qformat.converters.sources.safetensors import is_safetensors, open_safetensors
from qformat.converters.sources.shards import open_indexed
from qformat.converters.sources.torch import open_torch, open_torch_shard
from qformat.converters.sources.torch_file import is_torch
from qformat.converters.sources.weight_files import weight_name
from qformat.converters.sources.whole import check_alone, check_elements
from qformat.converters.sources.wrappers import unwrapped
from qformat.converters.weights_name import named
from qformat.errors import QFormatError, QualityError, SourceError
from qformat.files import is_remote, open_regular, reading
from qformat.pipeline.source import Checkpoint
from qformat.quality import Quality


class FileKind(NamedTuple):
    """A kind of file that holds tensors; files are opened with their path, and the options that apply as keywords."""

    matches: Callable[[bytes], bool]  # whether a file is of this kind, by its first bytes
    open: Callable[..., Checkpoint]
    # opens one of several files of a model; None if a file is a whole model, with its tokenizer and configuration
    open_shard: Callable[..., Checkpoint] | None
    options: tuple[str, ...] = ()  # fields of `SourceOptions`


class DirectoryKind(NamedTuple):
    """A layout of directories, which are opened with a function that opens the files in them."""

    matches: Callable[[Folder], bool]
    open: Callable[[Folder, Opener], Checkpoint]
    may_be_quantized: bool  # whether other tools write quantized checkpoints in this layout


SAFETENSORS = FileKind(is_safetensors, open_safetensors, open_safetensors)
FILES = (
    FileKind(is_container, open_container, None, ("quality", "root")),
    FileKind(is_gguf, open_gguf, None),
    FileKind(is_torch, open_torch, open_torch_shard, ("state_dict_key",)),
    SAFETENSORS,
    FileKind(is_ctranslate2, open_ctranslate2, open_ctranslate2),
)
DIRECTORIES = (
    DirectoryKind(is_hf, open_hf, may_be_quantized=True),
    DirectoryKind(is_meta, open_meta, may_be_quantized=True),
)  # others may have a single file of weights, with any name

_PICKLE = b"\x80"


def open_checkpoint(path: Path, options: SourceOptions | None = None) -> Checkpoint:
    """Return the checkpoint at a path.

    Parameters
    ----------
    path
        A path or URL from `qformat.files.source_path`: of a file of a kind in `FILES`, or of a directory in a layout in
        `DIRECTORIES` or with a single file of weights.
    options
        How to read it.

    Raises
    ------
    SourceError
        If there is no checkpoint, or it cannot be read.
    QualityError
        If a quality is given and the file has no layered tensors.
    """
    options = options or SourceOptions()
    try:
        checkpoint = _open(path, options)
    except (QFormatError, ImportError):
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        # each remote file system has exceptions of its own
        raise SourceError(f"{path}: cannot be read: {str(error) or type(error).__name__}") from None
    return replace(checkpoint, variant=" ".join(filter(None, (checkpoint.variant, str(options)))))


def _open(path: Path, options: SourceOptions) -> Checkpoint:
    if path.is_dir():
        return named(_open_directory(Folder(snapshot_in(path)), options))
    if not path.exists():
        raise SourceError(f"{missing(path)}{_hub_hint(path)}")
    if (name := weight_name(path.name)) and name.is_index:
        return named(_open_index(path, options))
    parts = check_file(path)
    kind = _kind_of(path, options)
    checkpoint = _open_model(path, kind, options)
    if parts:
        check_alone(path, parts, checkpoint)
    if not kind.open_shard:
        return checkpoint
    advice = advice_for(path)
    return replace(checkpoint, warnings=[*([advice] if advice else []), *checkpoint.warnings])


def _hub_hint(path: Path) -> str:
    """Return how to read a model of the Hugging Face Hub, if a path that does not exist is written like the name of one."""
    name = path.as_posix().removeprefix(Path.cwd().as_posix() + "/")  # an absolute path may have been made of it
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) or path.parent.exists():
        return ""
    return f"; for the model of that name on the Hugging Face Hub, give hf://{name} (with huggingface_hub installed)"


def _open_index(path: Path, options: SourceOptions) -> Checkpoint:
    """Open the shards that an index lists, and the files beside them."""
    _check_no_container(path, options)
    checkpoint = open_indexed(path, partial(_open_weights, options))
    return _with_folder(Folder(path.parent), checkpoint, options)


def _open_directory(folder: Folder, options: SourceOptions) -> Checkpoint:
    path = folder.path
    _check_no_container(path, options)
    check_pipeline(folder)
    for kind in DIRECTORIES:
        if kind.matches(folder):
            checkpoint = kind.open(folder, partial(_open_weights, options))
            break
    else:
        check_folder(folder)
        return _open_other(folder, options)
    if kind.may_be_quantized:
        return _with_folder(folder, checkpoint, options)
    return with_assets(folder, check_elements(path, checkpoint), _is_weights)


def _open_other(folder: Folder, options: SourceOptions) -> Checkpoint:
    """Open the only weights in a directory, which have no usual name."""
    try:
        chosen = select(folder)
    except SourceError:
        check_directory(folder.path)
        raise
    whole = chosen.single or (chosen.shards[0] if chosen.suffix == ".gguf" else None)
    if whole and not chosen.index:
        kind = _kind_of(whole, options)
        if not kind.open_shard:
            return with_assets(folder, _open_model(whole, kind, options), _is_weights)
    return _with_folder(folder, open_set(chosen, partial(_open_weights, options)), options)


def _with_folder(folder: Folder, checkpoint: Checkpoint, options: SourceOptions) -> Checkpoint:
    """Finish what was opened in a directory: names, quantized layers, and the files that belong to it."""
    checkpoint = unwrapped(check_elements(folder.path, checkpoint))
    return recognized(with_assets(folder, checkpoint, _is_weights), folder.path, options)


def _is_weights(start: bytes) -> bool:
    return any(kind.matches(start) for kind in FILES)


def _open_model(path: Path, kind: FileKind, options: SourceOptions) -> Checkpoint:
    """Open a file that holds a whole model, as far as there is one."""
    checkpoint = kind.open(path, **{name: getattr(options, name) for name in kind.options})
    if not kind.open_shard:
        return checkpoint
    return recognized(unwrapped(check_elements(path, checkpoint)), path.parent, options)


def _open_weights(options: SourceOptions, path: Path, *, shard: bool = True) -> Checkpoint:
    """Open a file of a directory."""
    kind = _kind_of(path, options)
    if not kind.open_shard:
        raise _unknown(path)
    open_file = kind.open_shard if shard else kind.open
    return open_file(path, **{name: getattr(options, name) for name in kind.options})


def _kind_of(path: Path, options: SourceOptions) -> FileKind:
    """Return the kind of a file, after checking that the options apply to it."""
    with reading(path), open_regular(path) as file:
        start = file.read(32)
    check_known(path, start)
    kind = next((kind for kind in FILES if kind.matches(start)), SAFETENSORS if path.suffix == ".safetensors" else None)
    if kind is None or "quality" not in kind.options:
        _check_no_container(path, options)
    if kind is not None:
        if options.state_dict_key is not None and "state_dict_key" not in kind.options:
            raise SourceError(
                f"{path}: --state-dict-key selects a part of a torch checkpoint, and this is another kind of file"
            )
        return kind
    if not start:
        raise SourceError(f"{path}: the file is empty; download it again")
    if start.startswith(_PICKLE):
        raise SourceError(
            f"{path}: is a pickle that torch.save did not write; it is not loaded, since it can run any code"
        )
    raise _unknown(path)


def _unknown(path: Path) -> SourceError:
    return SourceError(
        f"{path}: holds no weights of a known kind; give a .safetensors, torch (.pth, .pt, .bin, .ckpt), CTranslate2, .gguf or .qf "
        "file, or a directory with weights"
    )


def _check_no_container(path: Path, options: SourceOptions) -> None:
    """Raise an error if options are given that only a container file can have."""
    if options.root is not None:
        raise SourceError(f"{path}: is not a .qf file, so it has no root; give --root only for one")
    if options.quality != Quality():
        raise QualityError(
            f"{path}: is not a .qf file, whose layered tensors can be read at a quality; to store weights at one, give it with "
            "the type, as in -t scm:bpw=3"
        )
