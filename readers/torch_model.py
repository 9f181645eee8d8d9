"""Load a container file into a torch model, by the model's own ``load_state_dict``."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Self

import torch
from torch.nn.parameter import is_lazy

from qformat.container.reader import ContainerReader
from qformat.dtypes import DTYPES
from qformat.errors import QFormatError, SourceError
from qformat.parallel import default_jobs
from qformat.quality import Quality
from qformat.readers.decoder import Decoders, TensorDecoder
from qformat.readers.lazy_tensors import LazyTensor
from qformat.readers.torch_tensors import TORCH_DTYPES, decode, parse_dtype
from qformat.records import TensorRecord

_EXTRA_STATE = "_extra_state"


class Placement(tuple[list[str], list[str]]):  # noqa: SLOT001  which have a third part beside the pair
    """What `load_model` returns: the pair (missing, unexpected).

    Attributes
    ----------
    missing
        Sorted names of the model's parameters, buffers and extra states that the file does not hold, without those tied to one that
        it holds.
    unexpected
        Sorted names that only the file holds, without buffers that the model leaves out of its state.
    unfilled
        Sorted names of buffers that the model leaves out of its state: they keep the values that they had, which the model computes
        when it is built.
    """

    unfilled: list[str]

    def __new__(cls, missing: list[str], unexpected: list[str], unfilled: list[str]) -> Self:
        """Return the pair."""
        made = super().__new__(cls, (missing, unexpected))
        made.unfilled = unfilled
        return made

    def __getnewargs__(self) -> tuple[list[str], ...]:
        return (*self, self.unfilled)

    @property
    def missing(self) -> list[str]:
        """The first of the pair."""
        return self[0]

    @property
    def unexpected(self) -> list[str]:
        """The second of the pair."""
        return self[1]

    def __repr__(self) -> str:
        return f"Placement(missing={self.missing}, unexpected={self.unexpected}, unfilled={self.unfilled})"


def load_model(
    model: torch.nn.Module,
    path: str | bytes | os.PathLike[str] | BinaryIO,
    *,
    strict: bool = True,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    quality: float | str | Quality | None = None,
    verify: bool = True,
    jobs: int | None = None,
    root: str | None = None,
) -> Placement:
    """Load a file's tensors into a model, one after the other, in the dtypes that the model has.

    The model's own ``load_state_dict`` does it, with all hooks, extra states and conversions of older checkpoints. Memory holds the
    model and one tensor.

    Parameters
    ----------
    model
        The model. Its tensors are overwritten in place, so tied weights stay tied. Parameters and buffers on the meta device are
        made on `device` (the CPU by default) and filled.
    path
        The file, or an open file object, as in `load_file`.
    strict
        Raise if the file lacks a tensor of the model or holds one that the model has not.
    device, dtype
        Move or cast the model first.
    quality, verify, jobs, root
        As in `load_file`.

    Returns
    -------
    Placement
        The pair of missing and unexpected names, and the names of buffers that no file fills.

    Raises
    ------
    SourceError
        If model and file do not fit: with `strict`; or if a shape differs, or only one of two tensors is floating, or the file
        holds two different tensors for tied weights, or a buffer on the meta device is not in the file. A model without hooks and
        loading code of its own is unchanged then. Also if a value is too large for the model's dtype.
    QualityError
        If the quality is malformed, the file has no layered tensors, or their layers do not reach it. The model is unchanged.
    FormatError
        If the file is damaged; some tensors of the model may have been replaced.
    """
    wanted = parse_dtype(dtype)
    chosen, jobs = Quality.parse(quality), jobs or default_jobs()
    with ContainerReader(path, root=root) as container:
        decoders = Decoders(container, chosen, verify=verify)
        source = _Source(container, decoders, jobs)
        expected = _compare(model, source)
        tie = getattr(model, "tie_weights", None)
        if expected.missing and callable(tie):  # as transformers does after a model was made anew
            tie()
            expected = _compare(model, source)
        if strict and (expected.missing or expected.unexpected):
            raise source.misfit(expected)
        source.check(model)
        if wanted is not None:
            model.to(dtype=wanted)
        with _Materialized(model, device or "cpu", source) as materialized:
            if device is not None:
                model.to(device=device)
            found = source.load_into(model)
            if strict and (found.missing or found.unexpected):
                raise source.misfit(found)
            materialized.keep(found.missing)
    return found


@dataclass(frozen=True)
class _Slot:
    """A parameter or buffer of a module.

    Attributes
    ----------
    module, table, key
        Where it is: the module, and its table ``_parameters`` or ``_buffers``.
    persistent
        Whether it belongs to the state.
    plain
        Whether only torch's own code decides which tensor of a state dict it gets: no hook does, nor a loading method of a module.
    """

    module: torch.nn.Module
    table: dict[str, torch.Tensor | None]
    key: str
    persistent: bool
    plain: bool

    @property
    def tensor(self) -> torch.Tensor:
        tensor = self.table[self.key]
        assert tensor is not None
        return tensor

    def put(self, tensor: torch.Tensor) -> None:
        """Put a tensor in its place, as an attribute of the module: some modules keep lists of their parameters."""
        setattr(self.module, self.key, tensor)

    @property
    def place(self) -> object:
        """What is equal for two tensors exactly if they are tied: the same memory, seen in the same way."""
        tensor = self.tensor
        if tensor.is_meta or is_lazy(tensor) or not tensor.numel():
            return id(tensor)
        try:
            return tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride()
        except RuntimeError:  # a tensor without memory of its own
            return id(tensor)


def _is_plain(module: torch.nn.Module) -> bool:
    own = type(module)._load_from_state_dict is torch.nn.Module._load_from_state_dict
    return own and not module._load_state_dict_pre_hooks


def _modules(
    module: torch.nn.Module, prefix: str = "", *, plain: bool = True
) -> Iterator[tuple[str, torch.nn.Module, bool]]:
    """Yield the prefix, the module, and whether it and all above it are plain, of a module and all below it."""
    plain = plain and _is_plain(module)
    yield prefix, module, plain
    for name, child in module._modules.items():
        if child is not None:
            yield from _modules(child, f"{prefix}{name}.", plain=plain)


def _slots(model: torch.nn.Module) -> dict[str, _Slot]:
    """Return the parameters and buffers of a model by name; tied ones are there under each name."""
    found = {}
    for prefix, module, plain in _modules(model):
        for table, local in ((module._parameters, ()), (module._buffers, module._non_persistent_buffers_set)):
            for key, tensor in table.items():
                if tensor is not None:
                    found[prefix + key] = _Slot(module, table, key, key not in local, plain)  # type: ignore[arg-type]
    return found


class _Source:
    """The tensors of a file, as values of a state dict."""

    def __init__(self, container: ContainerReader, decoders: Decoders, jobs: int) -> None:
        self.records = {record.name: record for record in container.tensors}
        self._container = container
        self._decoders = decoders
        self._jobs = jobs
        self._failure: QFormatError | None = None  # torch makes text of the exceptions of a copy

    def decoder(self, name: str) -> TensorDecoder:
        return self._decoders.of(self.records[name])

    def values(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the values of a tensor in a floating dtype, or that of the source."""
        if self._failure:
            raise self._failure
        try:
            return decode(self.decoder(name), dtype, self._jobs)
        except QFormatError as error:
            self._failure = error
            raise

    def check(self, model: torch.nn.Module) -> None:
        """Raise `SourceError` if a tensor does not fit, or tied ones differ; `FormatError` if one cannot be decoded."""
        slots = _slots(model)
        tied: dict[object, str] = {}
        for name in sorted(set(slots) & set(self.records)):
            slot, record = slots[name], self.records[name]
            self.decoder(name)
            if not slot.plain or not slot.persistent:
                continue
            _check_fit(name, slot.tensor, record)
            first = tied.setdefault(slot.place, name)
            if first != name and not self._equal(first, name):
                raise SourceError(
                    f"{self._container.path}: tensors {first!r} and {name!r} differ, but the model ties them, so it has room for "
                    "one; untie the two in the model (tie_word_embeddings=False, say), or store only one of them"
                )
        for name, slot in slots.items():
            if slot.tensor.is_meta and not slot.persistent and name not in self.records:
                raise SourceError(
                    f"buffer {name!r} of the model is on the meta device, and no file holds it, since the model computes it when "
                    "it is built; build the model on the CPU, or only its parameters on the meta device, then load"
                )

    def _equal(self, *names: str) -> bool:
        """Return whether two tensors have the same values."""
        if _stored(self.records[names[0]]) == _stored(self.records[names[1]]):
            return True
        decoders = self._decoders.copy(keep=2)
        one, other = (decoders.of(self.records[name]) for name in names)
        if (one.record.shape, one.decoded) != (other.record.shape, other.decoded):
            return False
        return all(one.decode(chunk).data.tobytes() == other.decode(chunk).data.tobytes() for chunk in one.chunks())

    def load_into(self, model: torch.nn.Module) -> Placement:
        """Load the tensors, and return the names that do not fit."""
        state = OrderedDict((name, self._entry(name, record)) for name, record in self.records.items())
        computed = {name for name, slot in _slots(model).items() if not slot.persistent}
        for name in computed & set(state):
            del state[name]
        try:
            with _off_meta():
                result = model.load_state_dict(state, strict=False)
        except RuntimeError as error:
            if self._failure:
                raise self._failure from None
            lines = [line.strip() for line in str(error).splitlines()]
            raise SourceError(
                f"{self._container.path}: does not fit the model: {' '.join(lines[1:2] or lines)}"
            ) from None
        if self._failure:
            raise self._failure
        _settle(model)
        slots = _slots(model)
        missing = set(result.missing_keys)
        filled = {slot.place for name, slot in slots.items() if slot.persistent and name not in missing}
        missing = {name for name in missing if name not in slots or slots[name].place not in filled}
        return Placement(sorted(missing), sorted(result.unexpected_keys), sorted(computed - set(self.records)))

    def _entry(self, name: str, record: TensorRecord) -> torch.Tensor:
        if name == _EXTRA_STATE or name.endswith("." + _EXTRA_STATE):  # may be read in any way
            return self.values(name)
        dtype = TORCH_DTYPES.get(record.dtype, torch.float32)  # an unknown one fails when it is read
        return LazyTensor(record.shape, dtype, partial(self.values, name))

    def misfit(self, found: Placement) -> SourceError:
        """Return the error for names that do not fit."""
        lists = [_list(what, names) for what, names in (("missing", found[0]), ("unexpected", found[1])) if names]
        return SourceError(f"{self._container.path}: does not fit the model: {'; '.join(lists)}")


def _compare(model: torch.nn.Module, source: _Source) -> Placement:
    """Return the names that will not fit, as far as only torch's own code decides on them."""
    slots = _slots(model)
    filled = {slot.place for name, slot in slots.items() if slot.persistent and name in source.records}
    missing = [
        name
        for name, slot in slots.items()
        if slot.persistent and slot.plain and name not in source.records and slot.place not in filled
    ]
    modules = {prefix: (module, plain) for prefix, module, plain in _modules(model)}
    unexpected = [name for name in source.records if name not in slots and _is_unexpected(name, modules)]
    return Placement(sorted(missing), sorted(unexpected), [])


def _is_unexpected(name: str, modules: Mapping[str, tuple[torch.nn.Module, bool]]) -> bool:
    """Return whether only torch's own code decides on a name that no parameter or buffer has, so that nothing takes it."""
    parts = name.split(".")
    prefix = next(
        p for p in (".".join(parts[:i]) + "." * (i > 0) for i in range(len(parts) - 1, -1, -1)) if p in modules
    )
    module, plain = modules[prefix]
    takes_state = type(module).set_extra_state is not torch.nn.Module.set_extra_state
    return plain and not (takes_state and name == prefix + _EXTRA_STATE)


def _check_fit(name: str, tensor: torch.Tensor, record: TensorRecord) -> None:
    """Raise `SourceError` if a tensor of the file cannot be copied into one of the model."""
    if (
        not is_lazy(tensor)
        and tuple(tensor.shape) != record.shape
        and not (tensor.shape == () and record.shape == (1,))
    ):
        raise SourceError(f"tensor {name!r}: the model has shape {tuple(tensor.shape)}, the file {record.shape}")
    floating = record.dtype in DTYPES and DTYPES[record.dtype].floating
    if tensor.is_floating_point() != floating:
        raise SourceError(f"tensor {name!r}: the model has {tensor.dtype}, the file {record.dtype}")


def _stored(record: TensorRecord) -> object:
    """Return what is equal for two tensors only if they are stored in the same bytes."""
    segments = [(segment.length, segment.sha256) for segment in record.segments]
    return record.shape, record.dtype, record.codec, dict(record.params), segments


class _Materialized:
    """Puts tensors in memory in place of those on the meta device; tied ones stay tied. Puts back those that get no values."""

    def __init__(self, model: torch.nn.Module, device: str | torch.device, source: _Source) -> None:
        self._replaced: dict[str, tuple[_Slot, torch.Tensor]] = {}
        made: dict[int, torch.Tensor] = {}
        for name, slot in _slots(model).items():
            meta = slot.tensor
            if not meta.is_meta or is_lazy(meta):
                continue
            if id(meta) not in made:
                made[id(meta)] = _in_memory(meta, device)
                if not slot.persistent:
                    made[id(meta)].copy_(source.values(name, meta.dtype if meta.is_floating_point() else None))
            self._replaced[name] = (slot, meta)
            slot.put(made[id(meta)])

    def keep(self, missing: list[str]) -> None:
        """Leave the tensors where they are, except for those that are missing."""
        self._replaced = {name: self._replaced[name] for name in missing if name in self._replaced}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for slot, meta in self._replaced.values():
            slot.put(meta)


def _in_memory(meta: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    made = torch.empty_like(meta, device=device)
    if isinstance(meta, torch.nn.Parameter):
        return type(meta)(made, requires_grad=meta.requires_grad)
    return made


def _settle(model: torch.nn.Module) -> None:
    """Give values to lazy tensors that the model's own code has kept."""
    for module in model.modules():
        tables: list[dict[str, Any]] = [module._parameters, module._buffers, module.__dict__]
        for table in tables:
            for key, item in table.items():
                if isinstance(item, LazyTensor):
                    is_parameter = getattr(item, "_is_param", False)
                    values = item.values()
                    table[key] = torch.nn.Parameter(values, item.requires_grad) if is_parameter else values


def _off_meta() -> AbstractContextManager[object]:
    """Return a context in which torch makes tensors with values, if the caller has asked for the meta device."""
    return torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext()


def _list(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(names[:3])}{more}"
