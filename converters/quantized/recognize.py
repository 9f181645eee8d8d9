"""Find the layers of a checkpoint that another tool has quantized: by their tensors, checked against the configuration.

To support another layout, write a module with the two functions of a row of `LAYOUTS`, and add the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qformat.converters.quantized import awq, bitnet, compressed_tensors, fp8, gptq
from qformat.converters.quantized.claims import Claims
from qformat.converters.quantized.layer import Layout, each, layers_of
from qformat.converters.quantized.refused import check_readable
from qformat.converters.sources.options import SourceOptions
from qformat.pipeline.source import SourceTensor

# Models with layers whose code multiplies from the other side (transformers' Conv1D), which GPTQ's layout does not show
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")

LAYOUTS = (
    Layout(compressed_tensors.is_packed, each(compressed_tensors.packed_tensor, compressed_tensors.PACKED_ROLES)),
    Layout(compressed_tensors.is_bytes, each(compressed_tensors.byte_tensor, compressed_tensors.BYTE_ROLES)),
    Layout(bitnet.is_bitnet, each(bitnet.bitnet_tensor, bitnet.ROLES)),
    Layout(fp8.is_fp8, fp8.fp8_tensors),
    Layout(gptq.is_gptq, gptq.gptq_tensors),
    Layout(awq.is_awq, each(awq.awq_tensor, awq.ROLES)),
)


@dataclass(frozen=True)
class Recognized:
    """The tensors of a checkpoint, with each quantized layer as one tensor.

    Attributes
    ----------
    tensors
        Tensors of the checkpoint that belong to no quantized layer, then one for each layer.
    warnings
        Warnings for the user, a line each.
    quantized
        Whether a layer is quantized in a known layout.
    claimed
        Whether the configuration says so.
    """

    tensors: list[SourceTensor]
    warnings: list[str]
    quantized: bool
    claimed: bool


def recognize(
    tensors: Sequence[SourceTensor], configs: Mapping[str, Mapping[str, Any]], options: SourceOptions
) -> Recognized:
    """Join the tensors of each quantized layer.

    Parameters
    ----------
    tensors
        All tensors of a checkpoint.
    configs
        The JSON objects of config.json, quantize_config.json and quantization_config.json, as far as there are such files.
    options
        How to read it.

    Raises
    ------
    SourceError
        If a layer is damaged, contradicts the configuration, or has an unknown format.
    """
    claims = Claims.of(configs, options.gptq_format)
    layers = layers_of(tensors)
    for layer in layers:
        check_readable(layer, claims)
    matches = [(layout, [layer for layer in layers if layout.matches(layer)]) for layout in LAYOUTS]
    found = [layout.read(own, claims) for layout, own in matches if own]
    coded = [tensor for part in found for tensor in part.tensors]
    replaced = {name for part in found for name in part.replaced}
    warnings = [warning for part in found for warning in part.warnings]
    if not coded and claims.method:
        warnings.append(
            f"{claims.method}, but no tensor is quantized in a known layout: they stay as they are if no type is given"
        )
    model = configs.get("config.json", {}).get("model_type")
    if model in _TRANSPOSED and any(map(gptq.is_gptq, layers)):
        warnings.append(
            f"GPTQ: models of type {model} keep some matrices as [in, out], and those of quantized layers are [out, in] here"
        )
    plain = [tensor for tensor in tensors if tensor.name not in replaced]
    return Recognized([*plain, *coded], warnings, bool(coded), claims.method is not None)
