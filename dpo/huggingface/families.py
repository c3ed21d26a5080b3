"""Model families: what a Hugging Face configuration means for the decoder.

A family is one row of `FAMILIES`: which values of its configuration are supported, what they mean as a
`DecoderConfig`, and its table of weight names. Nothing else in the package knows a family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from dpo.huggingface.classic_configurations import (
    falcon,
    gpt2,
    gpt_neo,
    gpt_neox,
    mpt,
    opt,
    stablelm,
)
from dpo.huggingface.llama_configurations import (
    apertus,
    arcee,
    ernie,
    exaone4,
    gemma,
    gemma2,
    gemma3,
    gemma4,
    granite,
    granite_hybrid,
    hunyuan,
    lfm2,
    lfm3,
    llama_family,
    ministral,
    ministral3,
    mistral,
    nanochat,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    qwen3_next,
    qwen35,
    seed_oss,
    smollm3,
)
from dpo.huggingface.weight_names import (
    APERTUS_RULES,
    ERNIE_RULES,
    EXAONE_RULES,
    GEMMA2_RULES,
    GEMMA4_RULES,
    GPT2_RULES,
    GPT_NEO_RULES,
    GPT_NEOX_RULES,
    GRANITE_HYBRID_RULES,
    HEAD_NORM_RULES,
    HUNYUAN_RULES,
    LFM2_RULES,
    LFM3_RULES,
    LLAMA_RULES,
    MPT_RULES,
    NANOCHAT_RULES,
    OLMO2_RULES,
    OPT_RULES,
    PHI3_RULES,
    QWEN3_NEXT_RULES,
    QWEN35_RULES,
    STABLELM_RULES,
    Rule,
    falcon_rules,
    unread_of_readers,
)
from dpo.models.decoder_config import DecoderConfig
from dpo.models.parts import XIELU_BETA, XIELU_EPS
from dpo.models.rotary import Rope
from dpo.outcomes import UserError, told_by


class Family(NamedTuple):
    """One row of the table."""

    architecture: str
    """Class name in `config.json`."""
    prefix: str
    """What every tensor name but the output head's begins with; some checkpoints leave it out."""
    configure: Callable[[PreTrainedConfig], DecoderConfig]
    """What the configuration describes."""
    rules: tuple[Rule, ...] | Callable[[DecoderConfig], tuple[Rule, ...]]
    allowed: dict[str, tuple[Any, ...]] = {}  # noqa: RUF012
    """Values of configuration fields for which the decoder computes the same as transformers."""
    ignored: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$",)
    """Patterns of buffers, which follow from the configuration."""
    unread: Callable[[DecoderConfig], tuple[str, ...]] = lambda config: ()
    """Patterns of weights that neither transformers nor the decoder uses; a run says which there are."""
    constants: Mapping[str, float] = {}
    """Tensors of one number that are no parameters, by name with `{layer}`."""
    is_part: bool = False
    """Whether its tensors are some of a larger model's."""


def decoder_config(hf: PreTrainedConfig) -> DecoderConfig:
    """Translate a configuration; one `ValueError` lists everything in it that is not supported."""
    family = find_family(hf.model_type)
    problems = [
        f"{name} is {getattr(hf, name)!r}; supported: {', '.join(map(repr, values))}"
        for name, values in family.allowed.items()
        if getattr(hf, name) not in values
    ]
    if not getattr(hf, "is_causal", True):  # of any family: transformers masks by it, wherever it comes from
        problems.append(f"is_causal is {hf.is_causal!r}; supported: True")
    if not problems:
        try:
            config = family.configure(hf)
            problems = _contradictions(config)
        except (ValueError, ArithmeticError, LookupError, TypeError) as error:  # of values that do not fit
            problems = [str(error) if isinstance(error, UserError) else told_by(error)]
        if not problems:
            return config
    raise UserError(f"unsupported {hf.model_type} configuration:\n  " + "\n  ".join(problems))


def _contradictions(config: DecoderConfig) -> list[str]:
    """What a decoder cannot have, in the configuration's names."""
    found = []
    for count in config.kv_head_counts:
        if config.num_heads % count:
            found.append(
                f"num_attention_heads is {config.num_heads}; supported: a multiple of num_key_value_heads, "
                f"{count}"
            )
    by_layer = (
        ("layer_types", config.windows),
        ("layer_types", config.layer_kinds),
        ("no_rope_layers", config.layer_rope),
    )
    for name, values in by_layer:
        if len(values) != config.num_layers:
            found.append(
                f"{name} is for {len(values)} layers; supported: num_hidden_layers, {config.num_layers}"
            )
    if not all(isinstance(window, int) and window >= 1 for window in config.windows):
        found.append("sliding_window is not set, and layer_types has layers that need it")
    for rope, size in _ropes_on_heads(config):
        if not 1 <= len(rope.inv_freq) <= size // 2 or not _is_finite(rope):
            found.append(
                f"rope_parameters make {len(rope.inv_freq)} frequencies for a head of {size} "
                "channels; supported: finite ones, one for each two channels at most"
            )
    factors = (config.attention_scale, config.embedding_scale, config.residual_scale, config.logit_scale)
    if not all(math.isfinite(factor) for factor in factors):
        found.append(f"its factors are {', '.join(map(str, factors))}; supported: finite numbers")
    return found


def _ropes_on_heads(config: DecoderConfig) -> list[tuple[Rope, int]]:
    """Each rotation with the size of the heads that it turns, once."""
    pairs = {
        (index, config.of_kind(kind).head_dim)
        for kind, index in zip(config.layer_kinds, config.layer_rope, strict=False)
    }
    return [(config.ropes[index], size) for index, size in sorted(pairs) if index < len(config.ropes)]


def _is_finite(rope: Rope) -> bool:
    long = rope.long_inv_freq or rope.inv_freq
    numbers = (*rope.inv_freq, *long, rope.attention_factor)
    return len(long) == len(rope.inv_freq) and all(math.isfinite(number) for number in numbers)


def find_family(model_type: str) -> Family:
    """The family of a configuration's `model_type`; `ValueError` lists those there are."""
    if model_type not in FAMILIES:
        allowed = ", ".join([*FAMILIES, *WRAPPERS])
        raise UserError(f"model_type {model_type[:80]!r} is not supported; supported: {allowed}")
    return FAMILIES[model_type]


def classifier_architecture(model_type: str) -> str | None:
    """Class name of the sequence classifier on a family's decoder; None where transformers has none."""
    if model_type in WRAPPERS:
        return None
    stem = find_family(model_type).architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    return _CLASSIFIERS.get(model_type, f"{stem}ForSequenceClassification")


_CAUSAL = {"use_bidirectional_attention": (None, False)}
_GEMMA4 = {
    "use_bidirectional_attention": (None, False, "vision"),
    "enable_moe_block": (False,),
}
"""Bidirectional attention is of images, where it is not of `all`."""
_BUFFERS = (
    r"\.rotary_emb\.inv_freq$",
    r"\.attn\.(attention\.)?(masked_)?bias$",
    r"\.attention\.(masked_)?bias$",
)


def _predictors(config: DecoderConfig) -> tuple[str, ...]:
    """What predicts several tokens at once, which transformers does not read either."""
    return (r"^mtp\.",)


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "model.", llama_family, LLAMA_RULES),
    "mistral": Family("MistralForCausalLM", "model.", mistral, LLAMA_RULES),
    "qwen2": Family("Qwen2ForCausalLM", "model.", qwen2, LLAMA_RULES),
    "qwen3": Family("Qwen3ForCausalLM", "model.", qwen3, (*LLAMA_RULES, *HEAD_NORM_RULES)),
    "smollm3": Family("SmolLM3ForCausalLM", "model.", smollm3, LLAMA_RULES),
    "gemma": Family("GemmaForCausalLM", "model.", gemma, LLAMA_RULES, _CAUSAL),
    "gemma2": Family("Gemma2ForCausalLM", "model.", gemma2, GEMMA2_RULES, _CAUSAL),
    "gemma3_text": Family("Gemma3ForCausalLM", "model.", gemma3, (*GEMMA2_RULES, *HEAD_NORM_RULES), _CAUSAL),
    "gemma4_text": Family(
        "Gemma4ForCausalLM", "model.", gemma4, GEMMA4_RULES, _GEMMA4, unread=unread_of_readers
    ),
    "phi3": Family("Phi3ForCausalLM", "model.", phi3, PHI3_RULES),
    "arcee": Family("ArceeForCausalLM", "model.", arcee, LLAMA_RULES),
    "seed_oss": Family("SeedOssForCausalLM", "model.", seed_oss, LLAMA_RULES),
    "ministral": Family("MinistralForCausalLM", "model.", ministral, LLAMA_RULES),
    "ministral3": Family("Ministral3ForCausalLM", "model.", ministral3, LLAMA_RULES),
    "exaone4": Family("Exaone4ForCausalLM", "model.", exaone4, EXAONE_RULES),
    "hunyuan_v1_dense": Family("HunYuanDenseV1ForCausalLM", "model.", hunyuan, HUNYUAN_RULES),
    "ernie4_5": Family("Ernie4_5ForCausalLM", "model.", ernie, ERNIE_RULES),
    "nanochat": Family("NanoChatForCausalLM", "model.", nanochat, NANOCHAT_RULES),
    "apertus": Family(
        "ApertusForCausalLM",
        "model.",
        apertus,
        APERTUS_RULES,
        constants={
            "model.layers.{layer}.mlp.act_fn.beta": XIELU_BETA,
            "model.layers.{layer}.mlp.act_fn.eps": XIELU_EPS,
        },
    ),
    "olmo3": Family("Olmo3ForCausalLM", "model.", olmo3, OLMO2_RULES),
    "olmo2": Family("Olmo2ForCausalLM", "model.", olmo2, OLMO2_RULES),
    "granite": Family("GraniteForCausalLM", "model.", granite, LLAMA_RULES),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        "model.",
        granite_hybrid,
        GRANITE_HYBRID_RULES,
        {"num_local_experts": (0,), "position_embedding_type": (None, "rope")},
    ),
    "lfm2": Family("Lfm2ForCausalLM", "model.", lfm2, LFM2_RULES),
    "lfm3": Family("Lfm3ForCausalLM", "model.", lfm3, LFM3_RULES),
    "qwen3_5_text": Family("Qwen3_5ForCausalLM", "model.", qwen35, QWEN35_RULES, unread=_predictors),
    "qwen3_next": Family("Qwen3NextForCausalLM", "model.", qwen3_next, QWEN3_NEXT_RULES, unread=_predictors),
    "stablelm": Family("StableLmForCausalLM", "model.", stablelm, STABLELM_RULES),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "transformer.",
        gpt2,
        GPT2_RULES,
        {
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        _BUFFERS,
    ),
    "gpt_neox": Family("GPTNeoXForCausalLM", "gpt_neox.", gpt_neox, GPT_NEOX_RULES, {}, _BUFFERS),
    "gpt_neo": Family("GPTNeoForCausalLM", "transformer.", gpt_neo, GPT_NEO_RULES, {}, _BUFFERS),
    "opt": Family(
        "OPTForCausalLM",
        "model.",
        opt,
        OPT_RULES,
        {
            "do_layer_norm_before": (True,),
            "_remove_final_layer_norm": (False,),
            "layer_norm_elementwise_affine": (True,),
        },
    ),
    "falcon": Family("FalconForCausalLM", "transformer.", falcon, falcon_rules),
    "mpt": Family("MptForCausalLM", "transformer.", mpt, MPT_RULES, {"expansion_ratio": (4,)}),
}
"""Every supported `model_type`."""

WRAPPERS = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma4": "Gemma4ForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "lfm2_vl": "Lfm2VlForConditionalGeneration",
    "lfm3_vl": "Lfm3VlForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "exaone4_5": "Exaone4_5_ForConditionalGeneration",
}
"""`model_type` of models that see, of which the text model is read → class name in `config.json`."""

_CLASSIFIERS = {
    "gemma3_text": "Gemma3TextForSequenceClassification",
    "qwen3_5_text": "Qwen3_5TextForSequenceClassification",
    **dict.fromkeys(
        ("apertus", "ernie4_5", "gemma4_text", "granite", "granitemoehybrid", "lfm2", "lfm3", "nanochat")
    ),
}
"""Where the name is not the causal model's with another ending."""
