"""A GGUF file is the model that it was made from; a damaged one is an error."""

import contextlib
import json
import re

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf_checkpoints import BEYOND, CASES, write_gguf, write_pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from tiny_models import TOKENS, batch_arrays, write_checkpoint

from dpo.huggingface import loading
from dpo.huggingface.gguf_architectures import ARCHITECTURES
from dpo.huggingface.gguf_files import GgufFile
from dpo.huggingface.gguf_reader import GgufContainer
from dpo.huggingface.gguf_writing import find_architecture
from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.pretrained import load_decoder
from dpo.huggingface.text_models import read_config

KINDS = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def parameters(source):
    model = load_decoder(open_checkpoint(source))
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


@pytest.mark.parametrize("case", [*CASES, *BEYOND])
def test_a_file_is_the_model_it_was_made_from(case, tmp_path):
    """The same parameters (but for Gemma's scales, stored as 1 + scale) and the same computation."""
    source, path = write_pair(tmp_path, case)
    configs = [read_config(open_checkpoint(where).config)[1] for where in (source, path)]
    assert configs[0] == configs[1]
    expected, found = parameters(source), parameters(path)
    assert expected.keys() == found.keys()
    for name in expected:
        assert_allclose(found[name], expected[name], rtol=0, atol=3e-7 if "gemma" in case else 0)


def test_every_architecture_has_a_case():
    from test_gguf_writing import ALL

    assert {find_architecture(case.split("-")[0])[0] for case in ALL} == set(ARCHITECTURES)


@pytest.mark.ci
@pytest.mark.parametrize("case", CASES)
def test_torch_reads_the_same_from_a_quantised_file(case, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    _, path = write_pair(tmp_path, case, kind="Q8_0")
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        attn_implementation="eager",
        pad_token_id=0,  # Phi3's default is beyond this vocabulary
    ).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    model = load_decoder(open_checkpoint(path))
    assert_allclose(model.logits(model.hidden(*batch_arrays(TOKENS))), expected, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_decoded_by_rows_as_whole(kind, tmp_path):
    source, path = write_pair(tmp_path, "llama", kind=kind)
    container = GgufContainer(path)
    tensor = container.tensors["blk.0.ffn_up.weight"]
    original = open_checkpoint(source).tensors(read_config(open_checkpoint(source).config)[0], [])
    quantised = gguf.quantize(original.read("model.layers.0.mlp.up_proj.weight"), tensor.kind)
    whole = container.read(tensor)
    assert_array_equal(whole, gguf.dequantize(quantised, tensor.kind))
    pieces = [container.read(tensor, slice(start, start + 7)) for start in range(0, tensor.shape[0], 7)]
    assert_array_equal(np.concatenate(pieces), whole)


def test_small_pieces_make_the_same_model(tmp_path, monkeypatch):
    _, path = write_pair(tmp_path, "llama", kind="Q8_0")
    expected = parameters(path)
    monkeypatch.setattr(loading, "MAX_PIECE_BYTES", 1000)
    for name, values in parameters(path).items():
        assert_array_equal(values, expected[name])


def test_an_output_projection_that_repeats_the_embedding_is_tied(tmp_path):
    source = write_checkpoint(
        tmp_path / "in", {"model_type": "gpt2", **CASES["gpt2"], "tie_word_embeddings": False}
    )
    import safetensors.numpy

    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    write_gguf(source, tmp_path / "x.gguf")
    assert GgufFile(tmp_path / "x.gguf").config()["tie_word_embeddings"] is True
    assert ("lm_head", "embedding") not in parameters(tmp_path / "x.gguf")


def test_what_is_missing_is_named(tmp_path):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    with pytest.raises(ValueError, match=r"llama.attention.head_count is None; allowed is a number from 1"):
        GgufFile(path).config()
    with pytest.raises(ValueError, match="no tokenizer"):
        GgufFile(path).tokenizer()
    writer = gguf.GGUFWriter(path, "clip")
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file):
        step()
    writer.close()
    with pytest.raises(ValueError, match="'clip' is not supported; supported: llama, qwen2, qwen3"):
        GgufFile(path)


def test_a_tensor_without_elements_is_refused(tmp_path):
    """Its other axes could be of any length: no file holds what they would need."""
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((0, 32), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    with pytest.raises(ValueError, match=r"token_embd\.weight of shape \[0, 32\].* allowed are one or more"):
        GgufFile(path)


def test_a_whole_number_stands_for_a_number(small_path):
    file = GgufFile(small_path)
    file.fields["qwen2.rope.freq_base"] = 1_000_000
    assert type(file.number("rope.freq_base")) is float


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scaling.type": "linear"}, {"rope_type": "default"}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_type": "default"}),
    ],
)
def test_scaling_without_a_type_is_linear_as_llama_cpp_takes_it(small_path, fields, rope):
    file = GgufFile(small_path)
    file.fields.update({f"qwen2.{key}": value for key, value in fields.items()})
    assert file.config()["rope_parameters"] == {"rope_theta": 10000.0, **rope}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("attention.causal", False, "False; supported: True, or none"),
        ("rope.scaling.attn_factor", 1.5, "1.5; supported: 1, or none"),
        ("rope.dimension_count", 8, "8; supported: all channels of a head, 16"),
    ],
)
def test_what_llama_cpp_reads_and_no_configuration_says_is_refused(small_path, key, value, said):
    file = GgufFile(small_path)
    file.fields[f"qwen2.{key}"] = value
    with pytest.raises(ValueError, match=rf"qwen2\.{re.escape(key)} is {said}"):
        file.config()


def test_a_tensor_that_does_not_fit_its_heads_is_named(tmp_path):
    file = GgufFile(write_pair(tmp_path, "llama")[1])
    file.fields["llama.attention.head_count"] = 7
    tensors = file.tensors(["model.layers.0.self_attn.q_proj.weight"])
    with pytest.raises(
        ValueError, match=r"tensor blk\.0\.attn_q\.weight of shape .* does not fit the number"
    ):
        tensors.read("model.layers.0.self_attn.q_proj.weight")


@pytest.fixture(scope="module")
def small_path(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("gguf"), "qwen2", kind="Q8_0")[1]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "gpt1", r"tokenizer\.ggml\.model is 'gpt1'; allowed: gemma4, gpt2, llama"),
        ("model", ["gpt2"], r"tokenizer\.ggml\.model is \['gpt2'\]; allowed: str"),
        ("tokens", ["a", 3], r"tokenizer\.ggml\.tokens\[1\] is 3; allowed: str"),
        ("eos_token_id", 4096, r"tokenizer\.ggml\.eos_token_id is 4096; allowed is 0 to 2"),
        ("eos_token_id", -1, r"eos_token_id is -1; allowed is 0 to"),
        ("eos_token_id", "</s>", r"eos_token_id is '</s>'; allowed: int"),
        ("merges", ["a b", "nothing"], r"tokenizer\.ggml\.merges\[1\] is 'nothing'; allowed: two tokens"),
        ("merges", ["a b", "b c"], "no tokenizer can be built from its metadata"),
        ("pre", "unheard-of", r"tokenizer\.ggml\.pre is 'unheard-of', which is not known; allowed: a\.x-4"),
        ("tokens", ["a", "b", "a"], r"tokenizer\.ggml\.tokens has 'a' twice"),
        ("token_type", [1], r"tokenizer\.ggml\.token_type has 1 entries; allowed is one a token, 3"),
    ],
)
def test_a_tokenizer_that_can_not_be_built_is_refused_by_its_field(small_path, key, value, message):
    file = GgufFile(small_path)
    file.fields["tokenizer.ggml.tokens"] = ["a", "b", "ab"]
    file.fields["tokenizer.ggml.merges"] = ["a b"]
    assert file.tokenizer()("ab").input_ids == [2]
    file.fields[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(ValueError, match=message):
        file.tokenizer()


@pytest.fixture(scope="module")
def small_file(small_path):
    return small_path.read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cut=st.integers(0, 3000) | st.just(0),
    flips=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=4),
)
def test_damage_is_an_error_or_harmless(tmp_path, small_file, cut, flips):
    """Truncations and changed bytes: a `ValueError`, or a configuration and tensors inside the file."""
    path = tmp_path / "x.gguf"
    content = bytearray(small_file)
    for position, byte in flips:
        content[position % len(content)] = byte
    path.write_bytes(content[: len(content) - cut])
    with contextlib.suppress(ValueError):
        file = GgufFile(path)
        json.dumps(file.config())
        tensors = file.tensors([])
        for name in tensors.shapes:
            with np.errstate(all="ignore"):
                assert tensors.read(name).shape == tensors.shapes[name]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_no_bytes_after_the_magic_are_more_than_an_error(tmp_path, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + content)
    with contextlib.suppress(ValueError):
        GgufFile(path)


def test_counts_beyond_the_file_are_refused_at_once(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 16)
    with pytest.raises(ValueError, match="not a readable GGUF file: 8 bytes at byte 24"):
        GgufFile(path)
    huge_array = b"\1\0\0\0\0\0\0\0k" + b"\x09\0\0\0" + b"\4\0\0\0" + b"\xff\xff\xff\xff\0\0\0\0"
    path.write_bytes(b"GGUF\3\0\0\0" + b"\0" * 8 + b"\1" + b"\0" * 7 + huge_array)
    with pytest.raises(ValueError, match="17179869180 bytes at byte"):
        GgufFile(path)


def test_parameters_have_the_dtype_that_was_asked_for(tmp_path):
    _, path = write_pair(tmp_path, "qwen2", kind="F16")
    model = load_decoder(open_checkpoint(path), param_dtype=jnp.bfloat16)
    assert model.embed_tokens.embedding[...].dtype == jnp.bfloat16
