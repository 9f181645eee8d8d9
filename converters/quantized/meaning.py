"""The keys of quantization configurations: a list of those that are understood, so that no other is ignored.

Layouts check those that describe how codes are packed. The others here tell how a tool found its codes, or how a model runs with
quantized inputs; they leave the weights as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qformat.converters.quantized.claims import Claim, Claims
from qformat.errors import SourceError

_PACKING = """
    quant_method method quant_algo quant_type quantization_type format checkpoint_format packing_format backend version bits
    w_bit wbits nbits num_bits group_size q_group_size sym symmetric zero_point desc_act actorder dynamic extra_config
    regex_config config_groups weight_block_size block_structure weight_scale_semantics linear_class quantization_mode
    is_marlin_format pack_dtype quantization_bit load_in_8bit load_in_4bit _load_in_8bit _load_in_4bit data_type scale_dtype
    zp_dtype pack_impl mode weights bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_quant_storage bnb_4bit_compute_dtype
    llm_int8_threshold quant_config weight_quant_params tensor_names tensor_storage scale_fmt expert_dtype axis packing
    quantized_layers is_mx quantization quantization_config qformat_weight weight_scale_method compress_statistics block_size
    model_quant_type quantized _type _data _tensor_data_names fmt quant_storage bnb_4bit_blocksize
"""
_LAYERS = """
    ignore ignored_layers ignored_modules exclude_modules modules_to_not_convert modules_to_convert skip_modules lm_head
    llm_int8_skip_modules linear_weights_not_to_quantize block_name_to_quantize quant_block_list to_quant_block_names
    modules_in_block_to_quantize module_name_preceding_first_block inside_layer_modules supported_types quant_lm_head targets
    include_input_output_embeddings untie_embedding_weights quantize_embeddings exclude_layers layers
"""
_ACTIVATIONS = """
    activation_scheme activations input_activations output_activations act_bits act_group_size act_sym act_dynamic act_data_type
    activation_scale_ub kv_cache_scheme kv_cache_quant_algo kv_cache_dtype static_kv_dtype static_attention_dtype
    static_kv_granularity static_attention_granularity qscheme_act hyb_act dynamic_activation kv_cache_quant_config
    kv_cache_config
"""
_HISTORY = """
    provider model_quant_type kv_quant_type fa_quant_type damp_percent damp_auto_increment true_sequential static_groups
    model_name_or_path model_file_base_name model_type meta quantizer uri dataset tokenizer batch_size pad_token_id
    max_input_length cache_block_outputs cache_examples_on_gpu use_cuda_fp16 model_seqlen use_exllama exllama_config
    disable_exllama mse act_group_aware gptaq foem v2 v2_alpha v2_memory_device offload_to_disk offload_to_disk_path fallback
    failsafe hessian mock_quantization parallel_packing device telemetry activation_checkpointing autoround_version amp
    enable_minmax_tuning enable_norm_bias_tuning enable_quanted_input gradient_accumulate_steps iters lr low_gpu_mem_usage
    minmax_lr nsamples seqlen train_bs lr_scheduler optimizer seed not_use_best_mse super_bits super_group_size enable_alg_ext
    enable_adam disable_opt_rtn momentum use_quant_input sampler low_cpu_mem_usage enable_torch_compile model_dtype
    quantization_status global_compression_ratio run_compressed dequantize use_optimized_inference observer observer_kwargs
    do_fuse fuse_max_seq_len modules_to_fuse exllama_version llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight producer
    compute_dtype tune_metadata strategy type calibration auto_forward_data_parallel dense_vram_strategy
    dense_vram_strategy_devices moe_vram_strategy moe_vram_strategy_devices gc_mode wait_for_submodule_finalizers moe
    compute_device_filter calibration_data_device calib_dataset calib_size rms_norm_eps view_as_float quant_scale quant_zero
    offload_meta scale_quant_params zero_quant_params export_format low_bit_optimizer is_calibrated format_version
    modelopt_state
"""
_KNOWN = frozenset(f"{_PACKING} {_LAYERS} {_ACTIVATIONS} {_HISTORY}".split())
# Words of keys that change what weights are, or what a model computes with them
_CHANGES = re.compile(
    r"rotat|hadamard|transform|smooth|pre_?quant|prequant|norm|svd|low_?rank|lora|adapter|residual|codebook|lut|spars|outlier|perm"
    r"|equaliz|offset|semantic|affine|shift|scaled|correct|delta|compensat|prun|bitmask|2_?4|ternary|lattice|vector"
)
# What a model needs to run, whatever its weights are
_NEEDED = ("use_rms_norm",)


def check_keys(claims: Claims) -> list[str]:
    """Return warnings about keys that are not known.

    Raises
    ------
    SourceError
        If a key means that the weights are others than their codes say.
    """
    unknown: list[Claim] = []
    for claim in claims.every():
        if claim.key in _KNOWN or claim.key in _NEEDED or _is_neutral(claim) or _is_layer(claim):
            continue
        if _CHANGES.search(claim.key.lower()) and claim.key not in _NEEDED:
            raise SourceError(
                f"{claim}: the weights are others than their codes say, in a way that cannot be undone here; use the model as it "
                "was before quantization"
            )
        unknown.append(claim)
    return [f"{unknown[0]}{_more(unknown)}, which is not known here: ignored"] if unknown else []


def needed_by_model(claims: Claims) -> Claim | None:
    """Return what a file says that a model needs to run, though its weights are plain numbers."""
    return next((claim for claim in claims.all(*_NEEDED) if not _is_neutral(claim)), None)


def _is_layer(claim: Claim) -> bool:
    """Return whether a key is the name of a layer, which its layout looks at."""
    quanto = isinstance(claim.value, dict) and claim.value.keys() <= {"weights", "activations"}
    return quanto or not claim.key.isidentifier()


def _is_neutral(claim: Claim) -> bool:
    """Return whether a value means that something is not used."""
    value = claim.value
    if isinstance(value, dict):
        return all(_is_neutral(Claim(claim.where, key, inner)) for key, inner in value.items())
    return value in (None, False, "", 0, [], "dense", "none") and not isinstance(value, dict)


def _more(claims: Sequence[Claim]) -> str:
    others = list(dict.fromkeys(claim.key for claim in claims if claim.key != claims[0].key))
    return f" (and {', '.join(map(repr, others[:8]))})" if others else ""
