"""Make `layers.safetensors` and `expected.json`: layers of several tools, and digests of the float32 values that they decode to.

Run once, in an environment with bitsandbytes, compressed-tensors, comfy-kitchen, transformers and torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional as bnb
from comfy_kitchen.backends.eager import quantization as kitchen
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

parts: dict[str, torch.Tensor] = {}
values: dict[str, torch.Tensor] = {}


def add(name: str, value: torch.Tensor, *, stacked: bool = False, **roles: torch.Tensor) -> None:
    """Add the parts of a layer and its values."""
    values[name if stacked else f"{name}.weight"] = value
    parts.update({f"{name}{'_' if stacked else '.'}{role}": part.contiguous() for role, part in roles.items()})


def bitsandbytes() -> None:
    """Add four-bit layers, with and without quantized scales, and LLM.int8."""
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for shape in ((16, 64), (10, 24)):
                codes, state = bnb.quantize_4bit(torch.randn(shape), quant_type=kind, compress_statistics=nested)
                found = state.as_dict(packed=True)
                name = f"bitsandbytes.{kind}{'.nested' if nested else ''}.{shape[1]}"
                add(name, bnb.dequantize_4bit(codes, state), weight=codes)
                parts.update({f"{name}.weight.{role}": part for role, part in found.items()})
    stored, scale, _ = bnb.int8_vectorwise_quant(torch.randn(16, 40).half())
    add("bitsandbytes.int8", bnb.int8_vectorwise_dequant(stored, scale), weight=stored, SCB=scale)


def compressed_tensors() -> None:
    """Add NVFP4, MXFP4 and MXFP8."""
    weight = torch.randn(16, 64)
    kinds: list[tuple[str, Any, dict[str, Any]]] = [
        ("nvfp4", NVFP4PackedCompressor, {"num_bits": 4, "group_size": 16, "strategy": "tensor_group"}),
        ("mxfp4", MXFP4PackedCompressor, {"num_bits": 4, "group_size": 32, "scale_dtype": torch.uint8}),
        ("mxfp8", MXFP8QuantizationCompressor, {"num_bits": 8, "group_size": 32, "scale_dtype": torch.uint8}),
    ]
    for name, tool, options in kinds:
        args = QuantizationArgs(type="float", symmetric=True, **options)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        largest = weight.reshape(16, -1, options["group_size"]).abs().amax(2) / (6 if name != "mxfp8" else 448)
        state = {
            "weight": weight,
            "weight_scale": largest if name == "nvfp4" else torch.exp2(torch.ceil(torch.log2(largest))),
        }
        factor = None
        if name == "nvfp4":
            factor = 448 / largest.amax().reshape(1)
            state["weight_scale"] = (largest * factor).to(torch.float8_e4m3fn).float()
            state["weight_global_scale"] = factor
        stored = {key: part.data for key, part in tool.compress(state, scheme).items()}
        plain = tool.decompress(dict(stored), scheme)["weight"]
        if name == "nvfp4":  # in float32: the tool rounds to bfloat16
            exact = dequantize(torch.ones(16, 64), stored["weight_scale"].float(), args=args, global_scale=factor)
            codes = torch.round(plain.float() / exact * 2) / 2
            assert torch.equal((codes * exact).bfloat16(), plain)
            plain = codes * exact
        add(f"compressed.{name}", plain.float(), **stored)


def comfyui() -> None:
    """Add NVFP4, MXFP8 and FP8, with statements."""
    weight = torch.randn(32, 96)
    factor = weight.abs().amax() / (448 * 6)
    codes, scale = kitchen.quantize_nvfp4(weight, factor)
    plain = kitchen.dequantize_nvfp4(codes, factor, scale, torch.float32)
    add("comfyui.nvfp4", plain, weight=codes, weight_scale=scale, weight_scale_2=factor, comfy_quant=told("nvfp4"))
    codes, scale = kitchen.quantize_mxfp8(weight)
    plain = kitchen.dequantize_mxfp8(codes, scale, torch.float32)
    add("comfyui.mxfp8", plain, weight=codes, weight_scale=scale.view(torch.uint8), comfy_quant=told("mxfp8"))
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        factor = weight.abs().amax() / torch.finfo(kind).max
        codes = kitchen.quantize_per_tensor_fp8(weight, factor, kind)
        plain = kitchen.dequantize_per_tensor_fp8(codes, factor, torch.float32)
        name = str(kind).removeprefix("torch.")
        add(f"comfyui.{name}", plain, weight=codes, weight_scale=factor, comfy_quant=told(name))


def told(kind: str) -> torch.Tensor:
    """Return ComfyUI's statement about a layer."""
    return torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)


def transformers() -> None:
    """Add gpt-oss's experts, blocks of FP8, also of stacked experts, and FP4 with exponents."""
    blocks, scales = torch.randint(0, 256, (2, 24, 2, 16)).byte(), torch.randint(100, 140, (2, 24, 2)).byte()
    plain = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    add("experts.gate_up_proj", plain, stacked=True, blocks=blocks, scales=scales)
    tool = Fp8Dequantize(None)
    weight, scale = torch.randn(2, 256, 128).to(torch.float8_e4m3fn), torch.rand(2, 2, 1)
    parts["experts.down_proj"] = weight
    add("experts.down_proj", tool._dequantize_one(weight, scale, torch.float32), stacked=True, scale_inv=scale)
    packed = torch.randint(-128, 128, (16, 32)).to(torch.int8)
    powers = torch.exp2(torch.randint(-9, 9, (16, 2)).float()).to(torch.float8_e8m0fnu)
    add("deepseek.fp4", tool._dequantize_one(packed, powers, torch.float32), weight=packed, scale=powers)


torch.manual_seed(0)
for make in (bitsandbytes, compressed_tensors, comfyui, transformers):
    make()
folder = Path(__file__).parent
save_file(parts, folder / "layers.safetensors")
digests = {name: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for name, value in values.items()}
(folder / "expected.json").write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n")
