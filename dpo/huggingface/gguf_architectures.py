"""llama.cpp's architectures: what a file's metadata mean as a configuration, and how its tensors differ.

What a file cannot say (llama.cpp has it in its code) is said here, with a comment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gguf
import numpy as np

from dpo.huggingface import gguf_changes as changes
from dpo.huggingface.foreign_json import JsonObject
from dpo.huggingface.gguf_metadata import GgufMetadata, published
from dpo.outcomes import UserError

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that hold divisors of rotary frequencies; they become configuration."""


class Architecture(NamedTuple):
    """One row of the table."""

    names: gguf.MODEL_ARCH
    """llama.cpp's names of the tensors."""
    configure: Callable[[GgufMetadata], JsonObject]
    """The configuration, but for what all have in common."""
    change: changes.Change | None = None
    """What the conversion did to some tensors."""
    numbers: Mapping[str, str] = {}
    """Tensors of one number, by name with `{layer}`, and the key of the metadata that lists them."""


def _common(file: GgufMetadata, model_type: str) -> JsonObject:
    heads, kv_heads = file.num_heads
    return {
        "model_type": model_type,
        "hidden_size": file.count("embedding_length"),
        "intermediate_size": file.count("feed_forward_length"),
        "num_hidden_layers": file.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": file.count("attention.key_length", file.count("embedding_length") // heads),
        "max_position_embeddings": file.count("context_length"),
    }


def _rms(file: GgufMetadata, model_type: str, **choices: Any) -> JsonObject:
    return {
        **_common(file, model_type),
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(file),
        **choices,
    }


def _llama(file: GgufMetadata) -> JsonObject:
    """Llama, and Mistral, which llama.cpp calls by the same name."""
    window = file.find("attention.sliding_window", None)
    config = _rms(file, "llama" if window is None else "mistral", hidden_act="silu")
    if window is not None:
        return {**config, "sliding_window": window}
    return {
        **config,
        "head_dim": file.count("attention.key_length", _default_head_dim(file)),
        "attention_bias": file.has("blk.0.attn_q.bias"),
        "mlp_bias": file.has("blk.0.ffn_up.bias"),
    }


def _qwen2(file: GgufMetadata) -> JsonObject:
    return _rms(file, "qwen2", hidden_act="silu", use_sliding_window=False)


def _qwen3(file: GgufMetadata) -> JsonObject:
    has_bias = file.has("blk.0.attn_q.bias")
    return _rms(file, "qwen3", hidden_act="silu", use_sliding_window=False, attention_bias=has_bias)


def _gemma2(file: GgufMetadata, model_type: str = "gemma2", largest: int = 46) -> JsonObject:
    config = _rms(file, model_type, hidden_activation="gelu_pytorch_tanh", attention_bias=False)
    # llama.cpp: the largest model (27B, known by its layers) scales by its width a head, others by the head's
    width = config["hidden_size"] // config["num_attention_heads"]
    is_largest = config["num_hidden_layers"] == largest
    return {
        **config,
        "query_pre_attn_scalar": width if is_largest else config["head_dim"],
        "attn_logit_softcapping": file.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": file.number("final_logit_softcapping", 30.0),
        "sliding_window": file.count("attention.sliding_window", 4096),
    }


def _gemma3(file: GgufMetadata) -> JsonObject:
    config = _gemma2(file, "gemma3_text", largest=62)
    # llama.cpp: every sixth layer sees everything, the others have a base of 10,000 unless the file says more
    return {
        **config,
        "attn_logit_softcapping": file.find("attn_logit_softcapping", None),
        "final_logit_softcapping": file.find("final_logit_softcapping", None),
        "layer_types": _layer_types(file, 6),
        "rope_parameters": _two_ropes(file, config["rope_parameters"]),
    }


def _gemma4(file: GgufMetadata) -> JsonObject:
    slides, shared = _sliding_layers(file)
    by_size = {each: slides.index(each) for each in dict.fromkeys(slides)}
    local, wide = by_size.get(True, 0), by_size.get(False, 0)
    kv_heads = file.by_layer("attention.head_count_kv", int)
    hidden = file.by_layer("feed_forward_length", int)
    return {
        "model_type": "gemma4_text",
        "hidden_size": file.count("embedding_length"),
        "intermediate_size": hidden[0],
        "use_double_wide_mlp": hidden[-1] == 2 * hidden[0],
        "num_hidden_layers": file.num_layers,
        "num_attention_heads": file.count("attention.head_count"),
        "num_key_value_heads": kv_heads[local],
        "num_global_key_value_heads": kv_heads[wide],
        "head_dim": file.count("attention.key_length_swa"),
        "global_head_dim": file.count("attention.key_length"),
        "attention_k_eq_v": not file.has(f"blk.{wide}.attn_v.weight"),
        "attention_bias": False,
        "num_kv_shared_layers": shared,
        "layer_types": ["sliding_attention" if each else "full_attention" for each in slides],
        "sliding_window": file.count("attention.sliding_window"),
        "hidden_size_per_layer_input": file.whole("embedding_length_per_layer_input"),
        "vocab_size_per_layer_input": file.tensor("token_embd.weight").shape[0],
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": file.count("context_length"),
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon"),
        "final_logit_softcapping": file.number("final_logit_softcapping", 30.0) or None,  # llama.cpp: 30
        "rope_parameters": _two_ropes(file, _proportional(file)),
    }


def _sliding_layers(file: GgufMetadata) -> tuple[list[bool], int]:
    """Which of Gemma 4's layers slide, and how many of the last read the keys and values of others."""
    slides, shared = (
        file.by_layer("attention.sliding_window_pattern", bool),
        file.whole("attention.shared_kv_layers", 0),
    )
    first = file.num_layers - shared
    # llama.cpp: they read those of the last two layers before them, a sliding one and a global one
    if shared and (first < 2 or slides[first - 2 : first] != [True, False]):
        raise UserError(
            f"{file.path}: gemma4.attention.shared_kv_layers is {shared} of {file.num_layers}; llama.cpp "
            "computes those that come after a sliding and then a global layer"
        )
    return slides, shared


def _proportional(file: GgufMetadata) -> JsonObject:
    """Rotation of some channels of a whole head: those that do not turn have a divisor beyond all others."""
    divisors = file.values("rope_freqs.weight")
    turning = int((divisors == 1).sum())
    channels = file.count("attention.key_length")
    if turning == 0 or len(divisors) != channels // 2 or not (divisors[turning:] == changes.STILL).all():
        raise UserError(f"{file.path}: rope_freqs.weight holds divisors that are not Gemma 4's")
    share = 2 * turning / channels
    if share * channels // 2 < turning:  # a quotient that was rounded down
        share = math.nextafter(share, 1)
    return {
        "rope_type": "proportional",
        "rope_theta": file.number("rope.freq_base", 10000.0),
        "partial_rotary_factor": share,
    }


def _phi3(file: GgufMetadata) -> JsonObject:
    config = _rms(file, "phi3", hidden_act="silu", sliding_window=file.find("attention.sliding_window", None))
    if not config["sliding_window"]:
        config["sliding_window"] = None
    return config | {"original_max_position_embeddings": _original_length(file)}


def _stablelm(file: GgufMetadata) -> JsonObject:
    has_second_norm = file.has("blk.0.ffn_norm.weight")
    return {
        **_common(file, "stablelm"),
        "hidden_act": "silu",
        "layer_norm_eps": file.number("attention.layer_norm_epsilon"),
        "rope_parameters": _rope(file),
        "use_qkv_bias": file.has("blk.0.attn_q.bias"),
        "qk_layernorm": file.has("blk.0.attn_q_norm.weight"),
        "use_parallel_residual": file.find("use_parallel_residual", not has_second_norm),
    }


def _gpt2(file: GgufMetadata) -> JsonObject:
    return {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_embd": file.count("embedding_length"),
        "n_layer": file.num_layers,
        "n_head": file.count("attention.head_count"),
        "n_positions": file.count("context_length"),
        "n_inner": file.count("feed_forward_length"),
        "layer_norm_epsilon": file.number("attention.layer_norm_epsilon"),
    }


def _falcon(file: GgufMetadata) -> JsonObject:
    """Falcon 7B's layout, or 40B's with two norms; without biases, in parallel, with rotary positions."""
    heads, kv_heads = file.num_heads
    return {
        "model_type": "falcon",
        "activation": "gelu",
        "hidden_size": file.count("embedding_length"),
        "ffn_hidden_size": file.count("feed_forward_length"),
        "num_hidden_layers": file.num_layers,
        "num_attention_heads": heads,
        "num_kv_heads": kv_heads,
        "multi_query": kv_heads == 1,
        "new_decoder_architecture": file.has("blk.0.attn_norm_2.weight"),
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
        "layer_norm_epsilon": file.number("attention.layer_norm_epsilon"),
        "max_position_embeddings": file.count("context_length"),
        "rope_parameters": _rope(file),
    }


def _default_head_dim(file: GgufMetadata) -> int:
    """A head's channels where a file does not say: of Llama what turns."""
    share = file.count("embedding_length") // file.num_heads[0]
    return file.count("rope.dimension_count", share) if file.architecture == "llama" else share


def _rope(file: GgufMetadata) -> JsonObject:
    """Rotary parameters as Hugging Face writes them."""
    head_dim = file.count("attention.key_length", _default_head_dim(file))
    turned = file.count("rope.dimension_count", head_dim)
    common: JsonObject = {"rope_theta": file.number("rope.freq_base", 10000.0)}
    if file.architecture in ("phi3", "stablelm", "qwen35"):
        common["partial_rotary_factor"] = turned / head_dim
    elif turned != head_dim:
        raise UserError(
            f"{file.path}: {file.architecture}.rope.dimension_count is {turned}; supported: all channels of "
            f"a head, {head_dim}"
        )
    if file.has("rope_factors_long.weight"):
        factors = {
            f"{kind}_factor": file.values(f"rope_factors_{kind}.weight").tolist()
            for kind in ("short", "long")
        }
        attention = file.find("rope.scaling.attn_factor", None)
        if attention is not None:
            common["attention_factor"] = attention
        length = {"original_max_position_embeddings": _original_length(file)}
        return {**common, "rope_type": "longrope", **length, **factors}
    if file.has("rope_freqs.weight"):
        return _llama3_rope(file, common, turned)
    # llama.cpp: linear where no type is named, by a factor that older files name otherwise
    scaling = file.find("rope.scaling.type", "linear")
    factor = file.number("rope.scaling.factor", file.number("rope.scale_linear", 0.0))
    if scaling == "none" or (scaling == "linear" and factor in (0, 1)):
        return {**common, "rope_type": "default"}
    if scaling == "linear":
        return {**common, "rope_type": "linear", "factor": factor}
    if scaling == "yarn":
        return {
            **common,
            "rope_type": "yarn",
            "factor": file.number("rope.scaling.factor"),
            "original_max_position_embeddings": file.count("rope.scaling.original_context_length"),
        }
    raise UserError(f"{file.path}: rope.scaling.type is {scaling!r}; supported: none, linear, yarn, longrope")


def _llama3_rope(file: GgufMetadata, common: JsonObject, dim: int) -> JsonObject:
    """The parameters of Llama 3.1's scaling from the divisors that it came to.

    The file holds one divisor a frequency only; all released models share the parameters tried here.
    """
    divisors = file.values("rope_freqs.weight")
    low, high, length = 1.0, 4.0, file.count("rope.scaling.original_context_length", 8192)
    factor = published(divisors.max().item())
    inv_freq = 1 / common["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    kept = np.clip((length * inv_freq / (2 * np.pi) - low) / (high - low), 0, 1)
    expected = 1 / ((1 - kept) / factor + kept)
    if expected.shape != divisors.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise UserError(f"{file.path}: rope_freqs.weight holds divisors that are not Llama 3's")
    return {
        **common,
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }


def _original_length(file: GgufMetadata) -> int:
    return file.count("rope.scaling.original_context_length", file.count("context_length"))


def _arcee(file: GgufMetadata) -> JsonObject:
    biases = {"attention_bias": file.has("blk.0.attn_q.bias"), "mlp_bias": file.has("blk.0.ffn_up.bias")}
    return _rms(file, "arcee", hidden_act="relu2", **biases)


def _smollm3(file: GgufMetadata) -> JsonObject:
    # llama.cpp: every fourth layer has no positions
    has_rope = [int((layer + 1) % 4 != 0) for layer in range(file.num_layers)]
    return _rms(file, "smollm3", hidden_act="silu", use_sliding_window=False, no_rope_layers=has_rope)


def _ernie(file: GgufMetadata) -> JsonObject:
    return _rms(file, "ernie4_5", hidden_act="silu", use_bias=file.has("blk.0.attn_q.bias"))


def _seed_oss(file: GgufMetadata) -> JsonObject:
    biases = {
        "attention_bias": file.has("blk.0.attn_q.bias"),
        "attention_out_bias": file.has("blk.0.attn_output.bias"),
    }
    return _rms(file, "seed_oss", hidden_act="silu", mlp_bias=False, **biases)


def _apertus(file: GgufMetadata) -> JsonObject:
    return _rms(file, "apertus", hidden_act="xielu", attention_bias=file.has("blk.0.attn_q.bias"))


def _olmo2(file: GgufMetadata) -> JsonObject:
    """OLMo 2, and OLMo 3, which llama.cpp calls by the same name; its layers with a window do not scale."""
    window = file.find("attention.sliding_window", None)
    if not window:
        return _rms(file, "olmo2", hidden_act="silu", attention_bias=False)
    config = _rms(file, "olmo3", hidden_act="silu", attention_bias=False, sliding_window=window)
    rope = config["rope_parameters"]
    ropes = _two_ropes(file, rope, base=rope["rope_theta"])
    return {**config, "layer_types": _layer_types(file, 4), "rope_parameters": ropes}


def _mistral3(file: GgufMetadata) -> JsonObject:
    """Ministral 3, whose queries grow with their position."""
    config = _rms(file, "ministral3", hidden_act="silu", sliding_window=None)
    rope = {
        **config["rope_parameters"],
        "original_max_position_embeddings": _original_length(file),
        "llama_4_scaling_beta": file.number("attention.temperature_scale", 0.0),
    }
    if rope["rope_type"] == "yarn":
        rope["beta_fast"] = file.number("rope.scaling.yarn_beta_fast", 32.0)
        rope["beta_slow"] = file.number("rope.scaling.yarn_beta_slow", 1.0)
        magnitude = file.number("rope.scaling.yarn_log_multiplier", 0.0)
        # llama.cpp: the other magnitude is 1
        rope |= {"mscale": 1.0, "mscale_all_dim": magnitude} if magnitude else {}
    return {**config, "rope_parameters": rope}


def _exaone4(file: GgufMetadata) -> JsonObject:
    layers, window = file.num_layers, file.find("attention.sliding_window", None)
    # llama.cpp: 64 layers are the 32B's, which have windows; others turn nowhere where a file names one
    if layers == 64:
        choices = {"sliding_window": window or 4096, "layer_types": _layer_types(file, 4)}
    elif not window:
        choices = {"sliding_window": None, "layer_types": ["full_attention"] * layers}
    else:
        raise UserError(
            f"{file.path}: exaone4.attention.sliding_window is {window} and there are {layers} layers; "
            "llama.cpp computes windows where there are 64"
        )
    return _rms(file, "exaone4", hidden_act="silu", **choices)


def _layer_types(file: GgufMetadata, every: int) -> list[str]:
    """The layers' kinds where every so many, unless the file says another number, one sees everything."""
    every = file.count("attention.sliding_window_pattern", every)
    return [
        "sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(file.num_layers)
    ]


def _two_ropes(file: GgufMetadata, whole: JsonObject, *, base: float = 10000.0) -> JsonObject:
    """The rotation of layers that see everything, and of those with a window, which do not scale."""
    local = {"rope_type": "default", "rope_theta": file.number("rope.freq_base_swa", base)}
    return {"full_attention": whole, "sliding_attention": local}


def _hunyuan(file: GgufMetadata) -> JsonObject:
    return _rms(file, "hunyuan_v1_dense", hidden_act="silu", attention_bias=False)


def _lfm2(file: GgufMetadata) -> JsonObject:
    kv_heads, layers = file.find("attention.head_count_kv"), file.num_layers
    by_layer = kv_heads if isinstance(kv_heads, list) else [kv_heads] * layers
    return {
        **_common(file, "lfm2"),
        "norm_eps": file.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(file),
        "layer_types": ["full_attention" if heads else "conv" for heads in by_layer],
        "conv_L_cache": file.count("shortconv.l_cache"),
        "conv_bias": False,
        "block_auto_adjust_ff_dim": False,
    }


def _qwen35(file: GgufMetadata) -> JsonObject:
    ahead = file.find("nextn_predict_layers", 0)
    if ahead != 0:
        raise UserError(
            f"{file.path}: qwen35.nextn_predict_layers is {ahead!r}; supported are files without layers that "
            "predict several tokens"
        )
    every, layers = file.count("full_attention_interval", 4), file.num_layers  # llama.cpp: 4
    attends = [(layer + 1) % every == 0 for layer in range(layers)]
    recurrent = file.fields.get("qwen35.attention.recurrent_layers")
    if isinstance(recurrent, list):
        attends = [not each for each in recurrent]
    heads, (keys, values) = file.count("ssm.state_size"), file.heads("delta")
    if file.count("ssm.inner_size") != heads * values:
        raise UserError(
            f"{file.path}: qwen35.ssm.inner_size is {file.count('ssm.inner_size')}; supported: "
            f"ssm.state_size times ssm.time_step_rank, {heads * values}"
        )
    return _rms(
        file,
        "qwen3_5_text",
        hidden_act="silu",
        attention_bias=False,
        layer_types=["full_attention" if each else "linear_attention" for each in attends],
        linear_conv_kernel_dim=file.count("ssm.conv_kernel"),
        linear_num_key_heads=keys,
        linear_num_value_heads=values,
        linear_key_head_dim=heads,
        linear_value_head_dim=heads,
    )


def _granite(file: GgufMetadata) -> JsonObject:
    config = _rms(file, "granite", hidden_act="silu", attention_bias=file.has("blk.0.attn_q.bias"))
    return {
        **config,
        "mlp_bias": file.has("blk.0.ffn_up.bias"),
        "attention_multiplier": file.number("attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": file.number("embedding_scale", 1.0),
        "residual_multiplier": file.number("residual_scale", 1.0),
        "logits_scaling": file.number("logit_scale", 1.0),
    }


def _gemma(file: GgufMetadata) -> JsonObject:
    return _rms(file, "gemma", hidden_act="gelu_pytorch_tanh", attention_bias=False)


_ARCH = gguf.MODEL_ARCH
_XIELU = {
    f"model.layers.{{layer}}.mlp.act_fn.{name}": f"xielu.{name}"
    for name in ("alpha_p", "alpha_n", "beta", "eps")
}
ARCHITECTURES = {
    "llama": Architecture(_ARCH.LLAMA, _llama, changes.INTERLEAVED),
    "qwen2": Architecture(_ARCH.QWEN2, _qwen2),
    "qwen3": Architecture(_ARCH.QWEN3, _qwen3),
    "gemma": Architecture(_ARCH.GEMMA, _gemma, changes.OFFSET_NORMS),
    "gemma2": Architecture(_ARCH.GEMMA2, _gemma2, changes.OFFSET_NORMS),
    "gemma3": Architecture(_ARCH.GEMMA3, _gemma3, changes.OFFSET_NORMS),
    "gemma4": Architecture(_ARCH.GEMMA4, _gemma4),
    "phi3": Architecture(_ARCH.PHI3, _phi3),
    "stablelm": Architecture(_ARCH.STABLELM, _stablelm),
    "gpt2": Architecture(_ARCH.GPT2, _gpt2, changes.TURNED_CONV1D),
    "falcon": Architecture(_ARCH.FALCON, _falcon, changes.UNGROUPED),
    "smollm3": Architecture(_ARCH.SMOLLM3, _smollm3, changes.INTERLEAVED),
    "arcee": Architecture(_ARCH.ARCEE, _arcee, changes.INTERLEAVED),
    "granite": Architecture(_ARCH.GRANITE, _granite, changes.INTERLEAVED),
    "ernie4_5": Architecture(_ARCH.ERNIE4_5, _ernie),
    "seed_oss": Architecture(_ARCH.SEED_OSS, _seed_oss),
    "apertus": Architecture(_ARCH.APERTUS, _apertus, numbers=_XIELU),
    "olmo2": Architecture(_ARCH.OLMO2, _olmo2),
    "mistral3": Architecture(_ARCH.MISTRAL3, _mistral3, changes.INTERLEAVED),
    "exaone4": Architecture(_ARCH.EXAONE4, _exaone4),
    "lfm2": Architecture(_ARCH.LFM2, _lfm2, changes.SQUEEZED),
    "qwen35": Architecture(_ARCH.QWEN35, _qwen35, changes.DELTA_RULE),
    "hunyuan-dense": Architecture(_ARCH.HUNYUAN_DENSE, _hunyuan),
}
"""llama.cpp's architectures that are read and written."""
