"""Find out what a path holds: by what is in the files, not by what they are called."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from qformat.container.layout import MAGIC
from qformat.converters.sources.options import SourceOptions
from qformat.errors import QFormatError, QualityError, SourceError
from qformat.files import is_remote
from qformat.pipeline.source import Checkpoint, QuantizedSource
from qformat.quality import Quality

_GGUF = b"GGUF"


def open_checkpoint(path: Path, options: SourceOptions | None = None) -> Checkpoint:
    """Return the checkpoint at a path.

    Parameters
    ----------
    path
        As `qformat.files.source_path` gives it: a directory as Hugging Face or Meta lays them out, or with one file of weights;
        or a safetensors, torch, GGUF or container file.
    options
        How to read it.

    Raises
    ------
    SourceError
        If there is none, or none that can be read.
    QualityError
        If a quality is given for something else than layered tensors.
    """
    options = options or SourceOptions()
    try:
        checkpoint = _open(path, options)
    except (QFormatError, ImportError):
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        # each file system has errors of its own
        raise SourceError(f"{path}: cannot be read: {str(error) or type(error).__name__}") from None
    return replace(checkpoint, variant=" ".join(filter(None, (checkpoint.variant, str(options)))))


def _open(path: Path, options: SourceOptions) -> Checkpoint:
    if path.is_dir():
        return _open_directory(path, options)
    if not path.exists():
        raise SourceError(f"{path}: there is no such file or directory")
    return _open_file(path, options)


def _open_directory(path: Path, options: SourceOptions) -> Checkpoint:
    from qformat.converters.sources.hf import only_weights, open_hf, with_assets
    from qformat.converters.sources.meta import is_meta, open_meta
    from qformat.converters.sources.weights import first_bytes

    _check_quality(path, options.quality)
    checkpoint = open_hf(path, options)
    if checkpoint is None and is_meta(path):
        return open_meta(path, options)
    if checkpoint is None:
        only = only_weights(path)
        checkpoint = _open_file(only, options, alone=False)
        complete = first_bytes(only).startswith(_GGUF)  # which holds its tokenizer
        return checkpoint if complete else with_assets(path, checkpoint)
    return _recognized(checkpoint, path, options)


def _open_file(path: Path, options: SourceOptions, *, alone: bool = True) -> Checkpoint:
    from qformat.converters.sources.weights import check_no_key, first_bytes, open_weights

    start = first_bytes(path)
    if start.startswith(MAGIC):
        from qformat.converters.sources.container import open_container

        check_no_key(path, options)
        return open_container(path, options.quality)
    _check_quality(path, options.quality)
    if start.startswith(_GGUF):
        from qformat.converters.sources.gguf import open_gguf

        check_no_key(path, options)
        return open_gguf(path)
    checkpoint = _recognized(open_weights(path, options), path.parent, options)
    return replace(checkpoint, warnings=[*_alone(path), *checkpoint.warnings]) if alone else checkpoint


def _recognized(checkpoint: Checkpoint, directory: Path, options: SourceOptions) -> Checkpoint:
    """Return a checkpoint with what other tools have quantized as tensors whose codes are copied."""
    from qformat.converters.quantized.claims import Claims
    from qformat.converters.quantized.recognize import recognize
    from qformat.converters.sources.hf import read_configs

    configs, damaged = read_configs(directory)
    tensors, warnings = recognize(checkpoint.tensors, configs, options)
    known = any(isinstance(tensor, QuantizedSource) for tensor in tensors)
    if known and damaged:
        raise SourceError(
            f"{damaged[0]}: cannot be read as JSON, and may say how the weights beside it are quantized; download it again"
        )
    return replace(
        checkpoint,
        tensors=tensors,
        warnings=[*checkpoint.warnings, *warnings],
        quantized=known or Claims.of(configs).method is not None,
    )


def _check_quality(path: Path, quality: Quality) -> None:
    if quality != Quality():
        raise QualityError(
            f"{path}: is no .qf file, whose layered tensors could be read at a quality; to store weights at one, give it with "
            "the type, as in -t scm:bpw=3"
        )


def _alone(path: Path) -> list[str]:
    shard = re.search(r"-[0-9]+-of-0*([0-9]+)\.", path.name)
    if shard and int(shard[1]) > 1:
        return [f"{path.name} is one shard of {shard[1]}: give its directory for the whole model"]
    if (path.parent / "config.json").exists():
        return [
            f"only the tensors of {path.name} are taken; give its directory to take its config.json and tokenizer too"
        ]
    return []
