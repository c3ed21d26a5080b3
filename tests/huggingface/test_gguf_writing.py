"""A written GGUF file is the model again: for this project to the bit, and for llama.cpp to rounding."""

import itertools
import json
from dataclasses import replace

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from ask_llama_cpp import ask_llama_cpp, run_llama_cpp
from flax import nnx
from gguf_checkpoints import BEYOND, CASES
from gguf_vocabularies import LINES, lines_fields
from numpy.testing import assert_allclose, assert_array_equal
from tiny_model import CHAT_TEMPLATE, byte_tokenizer
from tiny_models import batch_arrays, case_config, write_checkpoint
from tokenizer_corpus import TEXTS
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dpo.huggingface.gguf_files import GgufFile
from dpo.huggingface.gguf_tokenizer import make_tokenizer
from dpo.huggingface.gguf_vocabulary import PROBES, find_cut
from dpo.huggingface.gguf_writing import GGUF_DTYPES, save_gguf
from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.pre_tokenizers import PRE_TOKENIZERS, make_pre_tokenizer
from dpo.huggingface.pretrained import load_decoder
from dpo.models.drawing import SamplingConfig
from dpo.models.sampling import generate

VOCABULARY = 288
_LLAMA = CASES["llama"]
_GEMMA4 = {
    **{name: size for name, size in _LLAMA.items() if name != "hidden_act"},
    **{"num_hidden_layers": 6, "head_dim": 16, "global_head_dim": 44, "sliding_window": 5},
    **{"num_global_key_value_heads": 1, "attention_k_eq_v": True, "num_kv_shared_layers": 2},
    **{"use_double_wide_mlp": True, "hidden_size_per_layer_input": 8, "final_logit_softcapping": 3.0},
    **{"vocab_size_per_layer_input": VOCABULARY, "tie_word_embeddings": True},
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.75,
        },
    },
}
NEWER = {
    "gemma": {**_LLAMA, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
    "smollm3": {
        **_LLAMA,
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "tie_word_embeddings": True,
    },
    "arcee": {**_LLAMA, "hidden_act": "relu2"},
    "granite": {
        **_LLAMA,
        **{"embedding_multiplier": 6.0, "logits_scaling": 4.0, "residual_multiplier": 0.3},
        "attention_multiplier": 0.2,
    },
    "granitemoehybrid": {
        **_LLAMA,
        **{"shared_intermediate_size": 96, "num_local_experts": 0, "num_experts_per_tok": 0},
        **{"layer_types": ["attention"] * 2, "position_embedding_type": "rope", "mamba_n_heads": 4},
        **{"embedding_multiplier": 6.0, "logits_scaling": 4.0, "attention_multiplier": 0.2},
    },
    "ernie4_5": {**_LLAMA, "tie_word_embeddings": True},
    "seed_oss": {**_LLAMA, "attention_out_bias": False},
    "olmo2": {**_LLAMA},
    "apertus": {
        **{name: size for name, size in _LLAMA.items() if name != "hidden_act"},
        "rope_parameters": {
            **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0},
            **{"high_freq_factor": 4.0, "original_max_position_embeddings": 16},
        },
    },
    "apertus-biases": {
        **{name: size for name, size in _LLAMA.items() if name != "hidden_act"},
        "attention_bias": True,
    },
    "olmo3": {
        **_LLAMA,
        **{"num_hidden_layers": 8, "sliding_window": 5},
        "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 2,
        "rope_parameters": case_config("olmo3")["rope_parameters"],
    },
    "ministral3": {
        **_LLAMA,
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "llama_4_scaling_beta": 0.4},
            **{"original_max_position_embeddings": 8, "beta_fast": 24.0, "beta_slow": 1.5},
            **{"mscale": 1.0, "mscale_all_dim": 1.0},
        },
    },
    "exaone4": {**_LLAMA, "sliding_window": None, "layer_types": ["full_attention"] * 2},
    "exaone4-windows": {
        **_LLAMA,
        **{"num_hidden_layers": 64, "sliding_window": 5},
        "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 16,
    },
    "lfm2": {
        **_LLAMA,
        **{"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "norm_eps": 1e-6},
        **{"conv_L_cache": 4, "block_auto_adjust_ff_dim": False, "tie_word_embeddings": True},
    },
    "qwen3_5_text": {
        **_LLAMA,
        **{"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_conv_kernel_dim": 4},
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "tie_word_embeddings": True},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "gemma3_text-global": {
        **{name: size for name, size in CASES["gemma3_text"].items() if name != "layer_types"},
        "num_hidden_layers": 6,
    },
    "gemma4_text": _GEMMA4,
    "gemma4_text-dense": {
        **_GEMMA4,
        **{"num_kv_shared_layers": 0, "use_double_wide_mlp": False, "hidden_size_per_layer_input": 0},
        **{"final_logit_softcapping": None, "attention_k_eq_v": False, "head_dim": 14},
    },
    "hunyuan_v1_dense": {
        **_LLAMA,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0},
    },
}
ALL = CASES | BEYOND | NEWER
OTHERWISE_IN_LLAMA_CPP = {
    "gemma3_text": "it stops where no layer sees everything",
    "phi3-window": "it sees beyond Phi-3's window",
    "phi3-longrope": "it chooses divisors by the length of its cache, not of the text",
}
"""Where llama.cpp computes something else than the family's own code."""
GELU = ("gemma", "gpt2", "falcon")
"""Families for which llama.cpp's CPU code looks GELU up in a table of float16."""


def small_tokenizer():
    """Every byte, and two merges: llama.cpp opens no vocabulary without."""
    tokenizer = byte_tokenizer()
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    size = len(tokenizer)
    spec["model"]["vocab"] |= {"th": size, "the": size + 1}
    spec["model"]["merges"] = [["t", "h"], ["th", "e"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        chat_template=CHAT_TEMPLATE,
    )


def model_of(case, directory, **choices):
    config = {"model_type": case.split("-")[0], **ALL[case], "vocab_size": VOCABULARY, **choices}
    config = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None} | config
    return load_decoder(open_checkpoint(write_checkpoint(directory / "in", config))), config


def written(case, directory, **how):
    model, config = model_of(case, directory)
    tokenizer = small_tokenizer()
    return model, save_gguf(model, directory / "x.gguf", hf_config=config, tokenizer=tokenizer, **how)


def parameters(model):
    return {
        ".".join(map(str, path)): np.asarray(leaf[...])
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


@pytest.mark.parametrize("case", ALL)
def test_a_written_file_is_the_same_model(case, tmp_path):
    model, path = written(case, tmp_path)
    again = load_decoder(open_checkpoint(path))
    first, second = parameters(model), parameters(again)
    assert list(first) == list(second)
    rounded = {"gemma": "scale", "qwen3_5": ("scale", "A_log")}
    for name, values in first.items():  # files hold 1 + scale, and -exp(A_log)
        is_rounded = any(case.startswith(each) and name.endswith(rounded[each]) for each in rounded)
        tolerance = 1e-6 if is_rounded else 0
        assert_allclose(second[name], values, rtol=0, atol=tolerance, err_msg=name)


def test_linear_attention_is_stored_as_llama_cpp_reads_it(tmp_path):
    """Value head k * 3 + j, of key head k, is at j * 2 + k; what else differs is a formula."""
    path = written("qwen3_5_text", tmp_path)[1]
    container = GgufFile(path).container
    assert container.fields["qwen35.full_attention_interval"] == 2
    assert container.fields["qwen35.rope.dimension_sections"] == [2, 1, 1, 0]
    source = safetensors.numpy.load_file(tmp_path / "in" / "model.safetensors")
    theirs = {name.removeprefix("model.layers.0."): values for name, values in source.items()}

    def stored(name):
        return container.read(container.tensors[f"blk.0.{name}"])

    before = 2 * 2 * 8
    qkv, conv = theirs["linear_attn.in_proj_qkv.weight"], theirs["linear_attn.conv1d.weight"][:, 0]
    assert_array_equal(stored("attn_qkv.weight")[:before], qkv[:before])
    assert_array_equal(stored("ssm_conv1d.weight")[:before], conv[:before])
    for key, j in itertools.product(range(2), range(3)):
        own, other = j * 2 + key, key * 3 + j
        here, there = slice(own * 8, own * 8 + 8), slice(other * 8, other * 8 + 8)
        assert_array_equal(stored("attn_qkv.weight")[before:][here], qkv[before:][there])
        assert_array_equal(stored("ssm_conv1d.weight")[before:][here], conv[before:][there])
        assert_array_equal(stored("attn_gate.weight")[here], theirs["linear_attn.in_proj_z.weight"][there])
        out = theirs["linear_attn.out_proj.weight"]
        assert_array_equal(stored("ssm_out.weight")[:, here], out[:, there])
        for name, values in (("alpha", "in_proj_a"), ("beta", "in_proj_b")):
            row = theirs[f"linear_attn.{values}.weight"][other]
            assert_array_equal(stored(f"ssm_{name}.weight")[own], row)
        assert_array_equal(stored("ssm_dt.bias")[own], theirs["linear_attn.dt_bias"][other])
        assert_allclose(stored("ssm_a")[own], -np.exp(theirs["linear_attn.A_log"][other]), rtol=1e-6)
    assert_array_equal(stored("attn_norm.weight"), 1 + theirs["input_layernorm.weight"])
    assert_array_equal(stored("ssm_norm.weight"), theirs["linear_attn.norm.weight"])


def test_the_numbers_of_xielu_are_in_the_metadata_as_they_are_learned(tmp_path):
    """llama.cpp takes their softplus itself."""
    path = written("apertus", tmp_path)[1]
    container = GgufFile(path).container
    source = safetensors.numpy.load_file(tmp_path / "in" / "model.safetensors")
    for name in ("alpha_p", "alpha_n", "beta", "eps"):
        expected = [source[f"model.layers.{layer}.mlp.act_fn.{name}"].item() for layer in range(2)]
        assert_array_equal(container.fields[f"xielu.{name}"], expected)
    assert not [name for name in container.tensors if "act_fn" in name]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            b"xielu.alpha_p",
            b"xielu.alpha_q",
            r"xielu\.alpha_p is None; allowed is one float, or one a layer, 2",
        ),
        (np.full(2, 0.5, "<f4"), np.asarray([0.5, 0.25], "<f4"), r"act_fn\.beta is 0\.25; supported: 0\.5"),
        (np.full(2, -1e-6, "<f4"), np.full(2, np.nan, "<f4"), r"act_fn\.eps is nan; supported: -1e-06"),
    ],
)
def test_an_xielu_that_a_file_does_not_have_or_that_is_another_is_refused(before, after, message, tmp_path):
    path = written("apertus", tmp_path)[1]
    content = path.read_bytes()
    assert content.count(bytes(before)) == 1
    path.write_bytes(content.replace(bytes(before), bytes(after)))
    with pytest.raises(ValueError, match=message):
        load_decoder(open_checkpoint(path))


@pytest.mark.parametrize("dtype", GGUF_DTYPES)
def test_matrices_are_stored_as_asked_and_norms_in_float32(dtype, tmp_path):
    model, path = written("llama", tmp_path, dtype=dtype)
    container = GgufFile(path).container
    kinds = {name: tensor.kind.name.lower() for name, tensor in container.tensors.items()}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == dtype
    assert kinds["blk.0.attn_norm.weight"] == "f32"
    values = parameters(model)["embed_tokens.embedding"]
    kind = GGUF_DTYPES[dtype]
    expected = values if dtype == "f32" else gguf.dequantize(gguf.quantize(values, kind), kind)
    np.testing.assert_array_equal(container.read(container.tensors["token_embd.weight"]), expected)


def test_tokenizer_ends_template_and_licence_are_in_the_file(tmp_path):
    _, path = written("llama", tmp_path, licence="apache-2.0", generation_config={"eos_token_id": [1, 65]})
    file, before = GgufFile(path), small_tokenizer()
    after = file.tokenizer()
    assert [after(text)["input_ids"] for text in TEXTS] == [before(text)["input_ids"] for text in TEXTS]
    assert after.chat_template == CHAT_TEMPLATE
    assert file.licence == "apache-2.0"
    assert sorted(file.generation_config()["eos_token_id"]) == [0, 1, 65]


def test_any_two_different_cuts_differ_on_the_probes():
    found = {}
    for kind in PRE_TOKENIZERS.values():
        cut = make_pre_tokenizer(kind)
        pieces = tuple(tuple(piece for piece, _ in cut.pre_tokenize_str(text)) for text in PROBES)
        found.setdefault(pieces, set()).add(kind.splits)
    assert [splits for splits in found.values() if len(splits) > 1] == []


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "tekken", "smollm"])
def test_a_cut_is_found_by_what_it_does(name):
    kind = PRE_TOKENIZERS[name]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = make_pre_tokenizer(kind)
    assert PRE_TOKENIZERS[find_cut(backend, kind.ignores_merges)].splits == kind.splits


def refused(
    match, directory, case, *, generation_config=None, dtype="f32", model_type=None, softcap=None, **sizes
):
    model, config = model_of(case, directory, **sizes)
    if softcap is not None:
        model.config = replace(model.config, attention_softcap=softcap)
    config |= {} if model_type is None else {"model_type": model_type}
    with pytest.raises(ValueError, match=match):
        save_gguf(
            model,
            directory / "x.gguf",
            hf_config=config,
            tokenizer=small_tokenizer(),
            generation_config=generation_config,
            dtype=dtype,
        )
    assert not (directory / "x.gguf").exists()


def test_what_a_file_cannot_say_is_refused(tmp_path):
    refused("model_type mpt is not written as a GGUF file; supported: ", tmp_path, "llama", model_type="mpt")
    many = {"eos_token_id": [1, 65, 66, 67]}
    refused("ends of a response, and the model has more", tmp_path, "llama", generation_config=many)
    message = r"cannot say this configuration:\n  attention_softcap is 3\.0"
    refused(message, tmp_path, "granite", softcap=3.0)
    message = r"blocks of 32 numbers, and rows of blk.0.ffn_down.weight have 40"
    refused(message, tmp_path, "llama", dtype="q8_0", intermediate_size=40)


def test_keys_and_values_that_llama_cpp_would_take_of_others_are_refused(tmp_path):
    """It takes those of the last two layers that have some, a sliding one and a global one."""
    types = [*["full_attention", "sliding_attention"] * 2, "sliding_attention", "full_attention"]
    refused(
        "those that come after a sliding and then a global layer", tmp_path, "gemma4_text", layer_types=types
    )


@pytest.mark.slow
def test_what_a_file_of_layers_that_recur_cannot_say_is_refused(tmp_path):
    refused(
        "llama.cpp computes the delta rule where they are equal",
        tmp_path,
        "qwen3_5_text",
        linear_key_head_dim=4,
    )
    types = ["linear_attention", "full_attention", "full_attention"]
    message = r"cannot say this configuration:\n  layer_kinds is"
    refused(message, tmp_path, "qwen3_5_text", layer_types=types)
    refused(r"cannot say this configuration:\n  convolution_bias", tmp_path, "lfm2", conv_bias=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in ALL if case not in OTHERWISE_IN_LLAMA_CPP])
def test_llama_cpp_computes_the_same(case, tmp_path):
    """Logits of every position of a prompt, and 32 greedy tokens."""
    model, path = written(case, tmp_path)
    prompt = ((np.arange(12) * 29 + 5) % 250 + 2).tolist()
    logits, greedy = run_llama_cpp(path, prompt, 32)
    ours = model.logits(model.hidden(*batch_arrays(np.asarray([prompt]))))[0]
    assert_allclose(np.asarray(ours), logits, rtol=0, atol=2e-2 if case.startswith(GELU) else 1e-3)
    sampling = SamplingConfig(max_new_tokens=32, temperature=0.0)
    assert generate(model, [prompt], sampling=sampling, seeds=[0], stop_tokens=[]) == [greedy]
    assert jnp.isfinite(ours).all()


@pytest.mark.slow
def test_llama_cpp_makes_the_same_of_gemma_4s_kind_of_tokens(tmp_path):
    fields = lines_fields()
    prefixed = {f"tokenizer.{key}": value for key, value in fields.items()}
    tokenizer = make_tokenizer(tmp_path, prefixed, architecture="gemma4", max_length=lambda: 64)
    size = len(fields["ggml.tokens"])
    sizes = {"vocab_size": size, "vocab_size_per_layer_input": size}
    model, config = model_of("gemma4_text", tmp_path, **sizes)
    path = save_gguf(model, tmp_path / "x.gguf", hf_config=config, tokenizer=tokenizer)
    ids, ends = ask_llama_cpp(path, TEXTS + LINES)
    ours = tokenizer(TEXTS + LINES, add_special_tokens=False)["input_ids"]
    assert [text for text, a, b in zip(TEXTS + LINES, ours, ids, strict=True) if a != b] == []
    assert ends == sorted(GgufFile(path).generation_config()["eos_token_id"])


@pytest.mark.slow
def test_llama_cpp_makes_the_same_tokens(tmp_path):
    _, path = written("llama", tmp_path)
    ids, ends = ask_llama_cpp(path, TEXTS)
    assert ids == [small_tokenizer()(text)["input_ids"] for text in TEXTS]
    assert ends == [small_tokenizer().eos_token_id]
