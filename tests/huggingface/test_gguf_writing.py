"""A written GGUF file is the model again: for this project to the bit, and for llama.cpp to rounding."""

import json
from dataclasses import replace

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from ask_llama_cpp import ask_llama_cpp, run_llama_cpp
from flax import nnx
from gguf_checkpoints import BEYOND, CASES
from numpy.testing import assert_allclose
from tiny_model import CHAT_TEMPLATE, byte_tokenizer
from tiny_models import batch_arrays, write_checkpoint
from tokenizer_corpus import TEXTS
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dpo.huggingface.gguf_files import GgufFile
from dpo.huggingface.gguf_vocabulary import PROBES, find_cut
from dpo.huggingface.gguf_writing import GGUF_DTYPES, save_gguf
from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.pre_tokenizers import PRE_TOKENIZERS, make_pre_tokenizer
from dpo.huggingface.pretrained import load_decoder
from dpo.models.drawing import SamplingConfig
from dpo.models.sampling import generate

VOCABULARY = 288
_LLAMA = CASES["llama"]
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
    "lfm2": {
        **_LLAMA,
        **{"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "norm_eps": 1e-6},
        **{"conv_L_cache": 4, "block_auto_adjust_ff_dim": False, "tie_word_embeddings": True},
    },
    "hunyuan_v1_dense": {
        **_LLAMA,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0},
    },
}
ALL = CASES | BEYOND | NEWER
OTHERWISE_IN_LLAMA_CPP = {
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
    for name, values in first.items():  # Gemma's files hold 1 + scale
        tolerance = 1e-6 if case.startswith("gemma") and name.endswith("scale") else 0
        assert_allclose(second[name], values, rtol=0, atol=tolerance, err_msg=name)


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
def test_llama_cpp_makes_the_same_tokens(tmp_path):
    _, path = written("llama", tmp_path)
    ids, ends = ask_llama_cpp(path, TEXTS)
    assert ids == [small_tokenizer()(text)["input_ids"] for text in TEXTS]
    assert ends == [small_tokenizer().eos_token_id]
