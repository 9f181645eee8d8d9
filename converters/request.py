"""A request for a conversion, as plain values with which another process can open the same checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from qformat.converters import DEFAULT_TYPE
from qformat.converters.prune import Pruned, Pruning
from qformat.converters.sources.container import lossy_warning
from qformat.converters.sources.detect import open_checkpoint
from qformat.converters.sources.options import SourceOptions
from qformat.converters.wording import and_more
from qformat.errors import TypeSpecError
from qformat.files import source_path
from qformat.pipeline.encode import Plan, make_plans
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint, CodeCopy, QuantizedSource, SourceTensor, StoredCopy, StoredSource


@dataclass(frozen=True)
class Request:
    """A request for a conversion.

    Attributes
    ----------
    source
        The checkpoint's path or URL.
    options
        How to read it.
    type, overrides
        As for `qformat.pipeline.recipe.Recipe.parse`; None is `DEFAULT_TYPE`, or for a checkpoint that is quantized already,
        everything as it is.
    prune, prune_overrides
        As for `qformat.converters.prune.Pruning.parse`.
    allow_nonfinite
        Keep tensors with NaN or infinity raw.
    """

    source: str
    options: SourceOptions = field(default_factory=SourceOptions)
    type: str | None = None
    overrides: tuple[str, ...] = ()
    prune: float = 0.0
    prune_overrides: tuple[str, ...] = ()
    allow_nonfinite: bool = False

    def open(self) -> tuple[Checkpoint, Recipe]:
        """Return the checkpoint and the recipe for its tensors.

        Raises
        ------
        SourceError
            If it cannot be read.
        TypeSpecError
            If a type, a share or a pattern is malformed, or matches nothing.
        QualityError
            If the checkpoint does not reach the quality.
        """
        recipe = replace(Recipe.parse(DEFAULT_TYPE if self.type is None else self.type, self.overrides), sparing=True)
        pruning = Pruning.parse(self.prune, self.prune_overrides)
        checkpoint = pruning.apply(open_checkpoint(source_path(self.source), self.options))
        if self.type is None and checkpoint.quantized:
            _check_none_grows(checkpoint, recipe)
            recipe = replace(recipe, default=None)
        warnings = [*checkpoint.warnings, *_requantized(checkpoint, recipe)]
        return replace(checkpoint, warnings=warnings), recipe

    def plans(self) -> list[Plan]:
        """Return the plan of each tensor."""
        checkpoint, recipe = self.open()
        return make_plans(checkpoint.tensors, recipe, allow_nonfinite=self.allow_nonfinite)


def _requantized(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    """Return warnings of tensors that are lossy already and are given another lossy type."""
    again = [tensor for tensor in checkpoint.tensors if _is_requantized(tensor, recipe)]
    stored = [tensor for tensor in again if isinstance(tensor, StoredSource)]
    coded = [tensor for tensor in again if isinstance(tensor, QuantizedSource) and tensor not in stored]
    warnings = lossy_warning(stored)
    if coded:
        warnings.append(
            f"tensor {coded[0].name!r}{and_more(coded)}: quantized already, as {coded[0].codec}; quantized again from the decoded "
            "values, which adds to the error; without a type for it, its codes are copied"
        )
    return warnings


def _is_requantized(tensor: SourceTensor, recipe: Recipe) -> bool:
    if not isinstance(tensor, QuantizedSource):
        return False
    encoder = recipe.encoder_for(tensor)
    made_anew = not isinstance(encoder, (CodeCopy, StoredCopy))
    # what a container file holds is decoded for a lossless type, too, and no error is recorded any more
    return made_anew and (isinstance(tensor, StoredSource) or not encoder.is_lossless(tensor.dtype))


def _check_none_grows(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raise `TypeSpecError` if what is quantized would become float32 only because it is pruned."""
    for tensor in checkpoint.tensors:
        asked = any(fnmatchcase(tensor.name, pattern) for pattern, _ in recipe.overrides)
        if isinstance(tensor, Pruned) and _has_codes(tensor.source) and not asked:
            raise TypeSpecError(
                f"tensor {tensor.name!r} is quantized already, and float32 once it is pruned; give a type with -t (f32 for that)"
            )


def _has_codes(tensor: SourceTensor) -> bool:
    if isinstance(tensor, StoredSource):
        return tensor.record.error is not None
    return isinstance(tensor, QuantizedSource)
