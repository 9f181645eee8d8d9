"""Weights in several files, with or without an index."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from qformat.converters.quantized.roles import is_activation_only, may_be_codes, tells_of_codes
from qformat.converters.sources.files import Opener
from qformat.converters.sources.weight_files import NUMBER
from qformat.converters.wording import and_more
from qformat.errors import SourceError
from qformat.files import open_regular, reading
from qformat.pipeline.source import Checkpoint, SourceTensor


def open_indexed(index: Path, opener: Opener, single: Path | None = None) -> Checkpoint:
    """Return the tensors that an index lists, in the files that it says; `single` is a file beside it that would do without it.

    No file outside the directory of the index is read, whatever the index says; symbolic links, of which the hub's cache consists,
    are followed.

    Raises `SourceError` if the index is damaged or does not match the files, or one of them is missing or damaged.
    """
    directory = index.parent
    weight_map = _read_index(index)
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        # the index is untrusted: only plain file names are accepted
        if shard in ("", ".", "..") or "/" in shard or "\\" in shard or "\0" in shard:
            raise SourceError(f"{index}: names the file {shard!r}, which is not a plain file name; do not use it")
        if not (directory / shard).exists():
            way = f", or remove {index.name} to convert {single.name}" if single and single.exists() else ""
            raise SourceError(
                f"{directory}: shard {shard} is missing, though {index.name} lists it; download it again{way}"
            )
    tensors: dict[str, SourceTensor] = {}
    unlisted: list[SourceTensor] = []
    opened_shards = [opener(directory / shard) for shard in shards]
    metadata, warnings = merged_headers(opened_shards)
    for shard, opened in zip(shards, opened_shards, strict=True):
        for tensor in opened.tensors:
            home = weight_map.get(tensor.name)
            if home is None:
                unlisted.append(tensor)
            elif home == shard:
                tensors[tensor.name] = tensor
    for name, shard in sorted(weight_map.items()):
        if name not in tensors:
            raise SourceError(f"{directory}: {index.name} says that {shard} holds tensor {name!r}, but it does not")
    if unlisted:
        _check_unlisted(index, unlisted, tensors)
        names = [tensor.name for tensor in unlisted]
        warnings.append(f"{index.name} does not list tensor {names[0]!r}{and_more(names)}: left out")
    files = [index, *(directory / shard for shard in shards)]
    return Checkpoint(list(tensors.values()), warnings=warnings, files=files, metadata=metadata)


def _check_unlisted(index: Path, unlisted: Sequence[SourceTensor], listed: Mapping[str, SourceTensor]) -> None:
    """Raise `SourceError` if an index lists the codes of a layer, but nothing of what they mean."""
    layers: dict[str, list[SourceTensor]] = {}
    for tensor in listed.values():
        layers.setdefault(tensor.name.rpartition(".")[0], []).append(tensor)
    for tensor in unlisted:
        prefix, _, role = tensor.name.rpartition(".")
        parts = {part.name.rpartition(".")[2]: part for part in layers.get(prefix, ())}
        if not tells_of_codes(role) or is_activation_only(role) or any(map(tells_of_codes, parts)):
            continue
        codes = next((part for own, part in parts.items() if may_be_codes(own, part)), None)
        if codes is not None:
            raise SourceError(
                f"{index.parent}: {index.name} does not list tensor {tensor.name!r}, without which {codes.name!r} cannot be "
                "decoded; add it there"
            )


def numbered(files: Sequence[Path]) -> list[Path]:
    """Return the shards of one checkpoint, NAME-00001-of-00003.safetensors, in order.

    Raises `SourceError` if their names give different totals, or one is missing.
    """
    found = {path: match for path in files for match in list(NUMBER.finditer(path.name))[-1:]}
    totals = {int(match[2]) for match in found.values()}
    if len(totals) > 1:
        some = ", ".join(sorted(path.name for path in found)[:8])
        raise SourceError(
            f"{files[0].parent}: holds shards of several checkpoints, and no index: {some}; give a directory for each"
        )
    shards = {int(match[1]): path for path, match in found.items()}
    first = min(1, *shards)
    for number in range(first, first + max(totals)):
        if number not in shards:
            path, match = next(iter(found.items()))
            name = f"{path.name[: match.start(1)]}{number:0{len(match[1])}}{path.name[match.end(1) :]}"
            raise SourceError(f"{path.parent}: shard {name} is missing; download it again")
    return [shards[number] for number in sorted(shards)]


def open_unlisted(files: Sequence[Path], opener: Opener) -> Checkpoint:
    """Return the tensors in several files without an index.

    Raises `SourceError` if one is damaged, or a tensor is in two of them.
    """
    tensors: dict[str, SourceTensor] = {}
    opened_files = [opener(path) for path in files]
    metadata, warnings = merged_headers(opened_files)
    if len(files) > 1:
        warnings.insert(
            0,
            f"no index lists the tensors of the {len(files)} shards {files[0].name} to {files[-1].name}; all are taken",
        )
    for path, opened in zip(files, opened_files, strict=True):
        for tensor in opened.tensors:
            if tensor.name in tensors:
                raise SourceError(
                    f"{path}: tensor {tensor.name!r} is in another shard too, and there is no index to choose one"
                )
            tensors[tensor.name] = tensor
    return Checkpoint(list(tensors.values()), warnings=warnings, files=files, metadata=metadata)


def merged_headers(opened: Sequence[Checkpoint]) -> tuple[dict[str, str], list[str]]:
    """Return the metadata of all shards together, and their warnings; where shards differ, the first one's text is taken."""
    metadata: dict[str, str] = {}
    differing: dict[str, None] = {}
    for checkpoint in opened:
        for key, text in checkpoint.metadata.items():
            if metadata.setdefault(key, text) != text:
                differing[key] = None
    warnings = [warning for checkpoint in opened for warning in checkpoint.warnings]
    if differing:
        keys = list(differing)
        warnings.append(
            f"metadata {keys[0]!r}{and_more(keys)} differs between the shards; taken from the first: {metadata[keys[0]][:60]!r}"
        )
    return metadata, warnings


def _read_index(path: Path) -> dict[str, str]:
    try:
        with reading(path), open_regular(path) as file:
            index = json.loads(file.read())
        weight_map = index["weight_map"]
        if not weight_map or not all(isinstance(text, str) for pair in weight_map.items() for text in pair):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SourceError(f"{path}: is not an index of shards (no usable 'weight_map'); download it again") from None
    return weight_map  # type: ignore[no-any-return]
