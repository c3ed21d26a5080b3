"""Models that see: their text model scores as in transformers, and an export carries the rest as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from lora_cases import merged
from numpy.testing import assert_allclose, assert_array_equal
from test_gguf_writing import VOCABULARY, small_tokenizer
from tiny_model import byte_tokenizer
from tiny_models import TOKENS, batch_arrays
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from dpo.huggingface.carried import find_carried
from dpo.huggingface.gguf_writing import save_gguf
from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.pretrained import load_decoder
from dpo.huggingface.saving import save_pretrained
from dpo.huggingface.text_models import read_config, text_fields
from dpo.huggingface.weight_names import SPELLINGS, find_spelling
from dpo.parallel.sharding import make_mesh

torch = pytest.importorskip("torch")
from torch_models import torch_logits  # noqa: E402

_TEXT = {
    "vocab_size": 89,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
_SEEN = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 8, "patch_size": 4},
}
_QWEN_SEEN = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 48}
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 3]}
_YARN = {
    **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    **{
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.4,
    },
}
CASES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**_TEXT, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": _SEEN,
        **{"mm_tokens_per_image": 4, "image_token_index": 80},
    },
    "gemma4": {
        "text_config": {
            **{**_TEXT, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
            **{"global_head_dim": 20, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
            **{"hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"},
        },
        "vision_config": {
            **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "patch_size": 4},
            **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
            **{"position_embedding_size": 16, "pooling_kernel_size": 1},
        },
        "audio_config": None,
        "image_token_id": 81,
    },
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral", "sliding_window": 7},
        "vision_config": {**_SEEN, "model_type": "pixtral"},
        **{"image_token_index": 80, "tie_word_embeddings": False},
    },
    "mistral3-ministral3": {
        "text_config": {**_TEXT, "model_type": "ministral3", "rope_parameters": _YARN},
        "vision_config": {**_SEEN, "model_type": "pixtral"},
        "image_token_index": 80,
    },
    "llava": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_SEEN, "model_type": "clip_vision_model"},
        "image_token_index": 80,
    },
    "qwen2_vl": {
        "text_config": {**_TEXT, "head_dim": 8, "rope_parameters": {**_SECTIONS, "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 48},
        "tie_word_embeddings": True,
    },
    "qwen2_5_vl": {
        "text_config": {**_TEXT, "head_dim": 8, "rope_parameters": {**_SECTIONS, "mrope_section": [1, 1, 2]}},
        "vision_config": _QWEN_SEEN,
    },
    "qwen3_5": {
        "text_config": {
            **_TEXT,
            "layer_types": ["linear_attention", "full_attention"],
            "rope_parameters": {**_SECTIONS, "mrope_section": [1, 1, 1], "partial_rotary_factor": 0.5},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
            **{"linear_key_head_dim": 12, "linear_value_head_dim": 6},
        },
        "vision_config": {**_QWEN_SEEN, "num_position_embeddings": 16},
    },
    "qwen3_vl": {
        "text_config": {**_TEXT, "rope_parameters": _SECTIONS},
        "vision_config": {**_QWEN_SEEN, "deepstack_visual_indexes": [0]},
        "tie_word_embeddings": True,
    },
    "lfm2_vl": {
        "text_config": {
            **{**_TEXT, "num_hidden_layers": 3, "block_auto_adjust_ff_dim": False, "conv_L_cache": 3},
            **{"model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv"]},
        },
        "vision_config": {**_SEEN, "model_type": "siglip2_vision_model", "num_patches": 4},
        **{"projector_hidden_size": 20, "image_token_id": 80},
    },
    "lfm3_vl": {
        "text_config": {
            **{**_TEXT, "num_hidden_layers": 3, "conv_L_cache": 4, "sliding_window": 6},
            **{"model_type": "lfm3", "layer_types": ["conv", "sliding_attention", "full_attention"]},
        },
        "vision_config": {
            **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "patch_size": 4},
            **{"num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]},
        },
        **{"projector_hidden_size": 20, "image_token_id": 80, "video_token_id": 81},
        **{"vision_start_token_id": 82, "vision_end_token_id": 83},
    },
    "internvl": {
        "text_config": {**_TEXT, "model_type": "qwen3"},
        "vision_config": {**_SEEN, "image_size": [8, 8], "patch_size": [4, 4]},
        **{"image_token_id": 80, "tie_word_embeddings": False},
    },
    "exaone4_5": {
        "text_config": {
            **{**_TEXT, "model_type": "exaone4", "num_hidden_layers": 3, "sliding_window": 5},
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        "vision_config": {**_QWEN_SEEN, "num_key_value_heads": 1},
        **{"image_token_id": 80, "video_token_id": 81},
    },
}
QUICK = ("gemma3", "mistral3-ministral3", "qwen3_vl")
"""The others differ in their configurations alone."""


def write(directory: Path, case: str, **changes: Any) -> Path:
    """transformers' own model of a case, with random weights, and settings for images beside it."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[case.split("-")[0]].from_dict(CASES[case] | changes)
    model = AutoModelForImageTextToText.from_config(config).float()
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn_like(parameter) * 0.25 + (parameter.ndim == 1) * ("norm" in name)
    model.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text('{"image_size": 8}')
    return directory


def torch_model(directory: Path) -> Any:
    found: Any = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, report = found
    assert not any(report.values()), report
    return model.eval()


def logits(directory: Path) -> np.ndarray:
    model = load_decoder(open_checkpoint(directory))
    return np.asarray(model.logits(model.hidden(*batch_arrays(TOKENS))))


def export(source: Path, target: Path, **how: Any) -> Path:
    checkpoint = open_checkpoint(source)
    return save_pretrained(
        load_decoder(checkpoint),
        target,
        hf_config=checkpoint.config,
        tokenizer=None,
        carried=checkpoint.carried(),
        **how,
    )


def stored(directory: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in directory.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(path)
    return found


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_text_scores_as_in_transformers_and_the_export_opens_there(case: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in", case)
    expected = torch_logits(torch_model(source), TOKENS)
    assert_allclose(logits(source), expected, rtol=0, atol=2e-4)
    out = export(source, tmp_path / "out", max_shard_size=20_000)
    assert_array_equal(torch_logits(torch_model(out), TOKENS), expected)
    before, after = stored(source), stored(out)
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert_array_equal(after[name], values, err_msg=name)
    assert json.loads((out / "preprocessor_config.json").read_text()) == {"image_size": 8}
    assert_array_equal(logits(out), logits(source))


def respelled(source: Path, target: Path, number: int) -> Path:
    """The same checkpoint under the names that other versions of transformers write."""
    tensors = stored(source)
    old, new = find_spelling(tensors), SPELLINGS[number]
    assert old is not None
    renamed = {}
    for name, values in tensors.items():
        pairs = [(a, b) for a, b in zip(old, new, strict=True) if name.startswith(a)]
        here = pairs[0][1] + name.removeprefix(pairs[0][0]) if pairs else name.removeprefix("model.")
        renamed[here if pairs or number else f"model.{here}"] = values
    target.mkdir()
    shutil.copy(source / "config.json", target)
    safetensors.numpy.save_file(renamed, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(("case", "number"), [("llava", 0), ("llava", 1), ("qwen2_5_vl", 2)])
def test_all_spellings_of_names_are_read_and_kept(case: str, number: int, tmp_path: Path) -> None:
    source = write(tmp_path / "in", case)
    other = respelled(source, tmp_path / "other", number)
    assert_array_equal(logits(other), logits(source))
    out = export(other, tmp_path / "out")
    assert stored(out).keys() == stored(other).keys()
    assert_array_equal(torch_logits(torch_model(out), TOKENS), torch_logits(torch_model(source), TOKENS))


def test_what_is_carried_keeps_its_dtype_and_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "in", "gemma3")
    out = export(source, tmp_path / "out", dtype="bfloat16")
    carried = find_carried(out)
    assert {carried.tensors.stored(name)[0] for name in carried.names} == {"F32"}
    assert {carried.tensors.stored(name)[0] for name in carried.tensors.shapes} == {"F32", "BF16"}
    assert "multi_modal_projector (2)" in str(carried)
    assert "vision_tower (" in str(carried)


def test_what_is_carried_is_copied_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in", "gemma3")
    monkeypatch.setattr("dpo.huggingface.weights._RUN_BYTES", 7)
    carried = find_carried(source)
    carried.write_tensors(tmp_path / "x.safetensors", carried.names)
    for name, values in safetensors.numpy.load_file(tmp_path / "x.safetensors").items():
        assert_array_equal(values, stored(source)[name])
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"tensor vision_tower\S+ ends before its"):
        carried.write_tensors(tmp_path / "y.safetensors", carried.names)


def test_a_head_of_its_own_is_kept_although_the_configuration_ties_it(tmp_path: Path) -> None:
    source = write(tmp_path / "in", "mistral3")
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    expected = torch_logits(torch_model(source), TOKENS)
    assert_allclose(logits(source), expected, rtol=0, atol=2e-4)
    out = export(source, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert_array_equal(torch_logits(torch_model(out), TOKENS), expected)


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("case", ["gemma3", pytest.param("lfm3_vl", marks=pytest.mark.slow)])
def test_adapters_have_the_names_of_transformers_modules(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from dpo.huggingface.adapter_writing import save_adapters
    from dpo.huggingface.adapters import (
        add_adapters,
        choose_linears,
        get_adapters,
        model_bindings,
        new_adapters,
    )
    from dpo.models.lora import Method

    source = write(tmp_path / "in", case)
    checkpoint = open_checkpoint(source)
    bindings = model_bindings(*read_config(checkpoint.config))
    adapters = new_adapters(choose_linears(bindings, "all-linear"), rank=2, alpha=4.0, seed=0)
    adapters = [each._replace(b=np.ones(each.b.shape, np.float32) / 8) for each in adapters]
    model = load_decoder(checkpoint)
    add_adapters(model, adapters, Method(use_rslora=False, use_dora=False))
    directory = save_adapters(
        tmp_path / "adapter", *get_adapters(model, bindings), bindings=bindings, base=str(source)
    )
    theirs = peft.PeftModel.from_pretrained(torch_model(source), directory).eval()
    plain = merged(model)
    ours = np.asarray(plain.logits(plain.hidden(*batch_arrays(TOKENS))))
    assert np.abs(ours - logits(source)).max() > 0.1
    assert_allclose(ours, torch_logits(theirs, TOKENS), rtol=0, atol=2e-4)
    assert_allclose(logits(directory), ours, rtol=0, atol=2e-4)


def test_a_gguf_file_has_the_text_model_alone(tmp_path: Path) -> None:
    text = CASES["gemma3"]["text_config"] | {"vocab_size": VOCABULARY, "sliding_window": 6}
    text |= {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "num_hidden_layers": 6,
        "query_pre_attn_scalar": 12,
    }
    source = write(tmp_path / "in", "gemma3", text_config={k: text[k] for k in text if k != "layer_types"})
    checkpoint = open_checkpoint(source)
    path = save_gguf(
        load_decoder(checkpoint),
        tmp_path / "x.gguf",
        hf_config=text_fields(checkpoint.config),
        tokenizer=small_tokenizer(),
    )
    assert_allclose(logits(path), logits(source), rtol=0, atol=1e-5)


def test_what_is_not_supported_is_named(tmp_path: Path) -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "gptj"}}
    with pytest.raises(
        ValueError, match="text_config of model_type 'gptj' is not supported; supported: llama"
    ):
        read_config(config)
    source = write(tmp_path / "in", "gemma3")
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = -1
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json: text_config: num_hidden_layers is -1; allowed"):
        open_checkpoint(source)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_run_trains_the_text_and_carries_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo.cli import main

    tokenizer = byte_tokenizer()
    text = CASES["gemma3"]["text_config"] | {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    source = write(tmp_path / "in", "gemma3", text_config=text)
    tokenizer.save_pretrained(source)
    rows = [{"prompt": f"number {i}", "chosen": "yes, very good", "rejected": "no"} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    settings = [f"--run_dir={run}", f"--model.source={source}", f"--data.train={tmp_path / 'rows.jsonl'}"]
    settings += ["--training.steps=2", "--training.batch_size=8", "--optimizer.learning_rate=1e-2"]
    monkeypatch.setattr("dpo.training.preparation.make_mesh", one_device(make_mesh))
    assert main(["train", *settings, f"--model.reference_store={tmp_path / 'store'}"]) == 0
    assert "an export carries as they are" in capsys.readouterr().out.replace("\n", " ")
    before, after = stored(source), stored(run / "export")
    assert before.keys() == after.keys()
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == {name for name in before if name.startswith("language_model.")}
    torch_model(run / "export")


def one_device(make: Any) -> Any:
    """The same mesh of the first device alone."""
    return lambda config: make(config, jax.devices()[:1])
