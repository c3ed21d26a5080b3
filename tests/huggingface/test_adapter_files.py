"""Adapters as peft reads and writes them, and what is refused."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from lora_cases import BY_NAME, COMBINATIONS, METHODS, bindings_of, hidden, random_adapters, with_adapters
from numpy.testing import assert_allclose, assert_array_equal
from tiny_models import TOKENS, case_config, load_case, write_checkpoint

from dpo.files import CHECKSUMS_FILE
from dpo.huggingface.adapter_files import AdapterDirectory, load_adapters
from dpo.huggingface.adapter_writing import save_adapters
from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.pretrained import load_decoder
from dpo.models.lora import Method


def logits(model):
    return np.asarray(model.logits(hidden(model)))


OFTEN = {("phi3", "dora"), ("gpt2", "lora")}
EACH = [
    pytest.param(*chosen, marks=() if chosen in OFTEN else pytest.mark.ci, id="-".join(chosen))
    for chosen in COMBINATIONS + BY_NAME
]


def save(directory, case, adapters, method, base: Path | str = "base"):
    return save_adapters(directory, adapters, method, bindings=bindings_of(case), base=str(base))


def load(directory, case):
    opened = AdapterDirectory(directory)
    return load_adapters(opened, bindings_of(case)), opened.method


@pytest.mark.parametrize(("case", "name"), EACH)
def test_saved_adapters_read_back_equal(case, name, tmp_path):
    adapters = random_adapters(case, METHODS[name])
    found, method = load(save(tmp_path / "a", case, adapters, METHODS[name]), case)
    assert method == METHODS[name]
    for before, after in zip(adapters, found, strict=True):
        for field in ("a", "b", "magnitude", "alpha"):
            assert_array_equal(getattr(before, field), getattr(after, field))


def test_a_base_at_a_revision_is_named_as_peft_reads_it(tmp_path):
    adapters = random_adapters("llama", METHODS["lora"])
    path = save(tmp_path / "a", "llama", adapters, METHODS["lora"], base="owner/name@v2")
    written = json.loads((path / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("owner/name", "v2")
    assert AdapterDirectory(path).base == "owner/name@v2"


def test_names_are_as_short_as_they_can_be(tmp_path):
    def targets(case, target_modules):
        adapters = random_adapters(case, METHODS["lora"], target_modules=target_modules)
        path = save(tmp_path / "a", case, adapters, METHODS["lora"])
        return json.loads((path / "adapter_config.json").read_text())["target_modules"]

    assert targets("llama", ["q_proj"]) == ["q_proj"]
    assert targets("gpt2", ["attn.c_proj"]) == ["attn.c_proj"]
    assert targets("gpt2", ["c_proj"]) == ["c_proj"]
    one = "model.layers.1.mlp.up_proj"
    assert targets("llama", [one]) == [one]


@pytest.mark.parametrize(("case", "name"), EACH)
def test_an_adapter_directory_is_a_model_with_the_adapter_merged(case, name, tmp_path):
    base, method = write_checkpoint(tmp_path / "base", case), METHODS[name]
    adapters = random_adapters(case, method)
    path = save(tmp_path / "adapter", case, adapters, method, base)
    expected = logits(with_adapters(load_decoder(open_checkpoint(base), attention="plain"), adapters, method))
    assert_allclose(
        logits(load_decoder(open_checkpoint(path), attention="plain")), expected, rtol=0, atol=2e-4
    )


# ---- peft itself ----


@pytest.fixture(scope="module")
def peft():
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


def torch_model(directory):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("case", "name"), EACH)
def test_peft_computes_with_our_adapter_what_we_compute(case, name, peft, tmp_path):
    base, method = write_checkpoint(tmp_path / "base", case), METHODS[name]
    adapters = random_adapters(case, method)
    path = save(tmp_path / "adapter", case, adapters, method, base)
    ours = logits(with_adapters(load_decoder(open_checkpoint(base), attention="plain"), adapters, method))
    theirs = torch_logits(peft.PeftModel.from_pretrained(torch_model(base), path))
    assert np.abs(ours - torch_logits(torch_model(base))).max() > 0.1
    magnified = 2 if case == "gemma4_text" else 1  # small layers' norms, after adapters of this size
    assert_allclose(ours, theirs, rtol=0, atol=magnified * 2e-4)


def write_with_peft(peft, base, directory, **settings):
    """An adapter that peft made, with all its tensors drawn at random; returns peft's logits."""
    import torch

    torch.manual_seed(0)
    settings = {"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings}
    model = peft.get_peft_model(torch_model(base), peft.LoraConfig(**settings)).eval()
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
        elif "magnitude" in parameter_name:
            torch.nn.init.uniform_(parameter, 0.5, 3)
    model.save_pretrained(directory)
    return torch_logits(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("case", "name"), EACH)
def test_we_compute_with_pefts_adapter_what_peft_computes(case, name, peft, tmp_path):
    base = write_checkpoint(tmp_path / "base", case)
    settings = {"target_modules": "all-linear", **METHODS[name]._asdict()}
    theirs = write_with_peft(peft, base, tmp_path / "adapter", **settings)
    adapters, method = load(tmp_path / "adapter", case)
    assert method == METHODS[name]
    ours = logits(with_adapters(load_decoder(open_checkpoint(base), attention="plain"), adapters, method))
    assert_allclose(ours, theirs, rtol=0, atol=2e-4)
    assert_allclose(
        logits(load_decoder(open_checkpoint(tmp_path / "adapter"), attention="plain")),
        theirs,
        rtol=0,
        atol=2e-4,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", METHODS)
def test_ranks_alphas_and_layers_may_differ(name, peft, tmp_path):
    base = write_checkpoint(tmp_path / "base", "llama")
    theirs = write_with_peft(
        peft,
        base,
        tmp_path / "adapter",
        target_modules=["q_proj", "down_proj"],
        layers_to_transform=[0, 2],
        rank_pattern={"layers.2.self_attn.q_proj": 5},
        alpha_pattern={"down_proj": 12},
        **METHODS[name]._asdict(),
    )
    adapters, method = load(tmp_path / "adapter", "llama")
    model = load_decoder(open_checkpoint(base), attention="plain")
    ours = logits(with_adapters(model, adapters, method))
    assert_allclose(ours, theirs, rtol=0, atol=2e-4)
    path = save(tmp_path / "again", "llama", adapters, method, base)
    again = peft.PeftModel.from_pretrained(torch_model(base), path)
    assert_allclose(torch_logits(again), theirs, rtol=0, atol=2e-4)


# ---- what is refused ----

REMEDY = "Merge it with peft"
"""It opens embeddings that peft saved, adapted heads and initialisations that changed the base, too."""


@pytest.fixture
def adapter(tmp_path):
    return save(tmp_path / "adapter", "llama", random_adapters("llama", Method()), Method())


def change(adapter, *, config=None, tensors=None):
    (adapter / CHECKSUMS_FILE).unlink(missing_ok=True)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    path = adapter / "adapter_model.safetensors"
    if tensors is not None:
        safetensors.numpy.save_file(tensors(safetensors.numpy.load_file(path)), path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; supported: 'LORA'"),
        ({"bias": "all"}, "bias is 'all'; supported: 'none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]; "),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices is \[1\]; "),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"something_new": 3}, "something_new is 3; supported: not set"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; allowed is a number above 0"),
        ({"alpha_pattern": [8]}, "alpha_pattern is .8.; allowed is an object"),
        ({"alpha_pattern": {"(": 8}}, "alpha_pattern has '.', which is no regular expression"),
    ],
)
def test_adapters_that_compute_something_else_are_refused_by_field(adapter, config, message):
    change(adapter, config=config)
    with pytest.raises(ValueError, match=message) as refused:
        AdapterDirectory(adapter)
    assert REMEDY in str(refused.value) or "; allowed is" in message


def test_the_base_is_of_the_revision_that_the_adapter_names(adapter, tmp_path):
    """Of a local directory there is but one."""
    change(adapter, config={"base_model_name_or_path": "owner/name", "revision": "v2"})
    assert AdapterDirectory(adapter).base == "owner/name@v2"
    change(adapter, config={"base_model_name_or_path": str(tmp_path), "revision": "v2"})
    assert AdapterDirectory(adapter).base == str(tmp_path)


def test_a_damaged_adapter_is_refused(adapter):
    with (adapter / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    with pytest.raises(ValueError, match=r"is damaged \(adapter_model\.safetensors: its checksum"):
        AdapterDirectory(adapter)


def test_tensors_of_other_shapes_are_refused_by_module(adapter):
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    change(adapter, tensors=lambda tensors: tensors | {name: tensors[name].ravel()})
    with pytest.raises(
        ValueError, match=r"the tensors of model\.layers\.0\.mlp\.up_proj are .*allowed are A"
    ):
        AdapterDirectory(adapter).read("model.layers.0.mlp.up_proj")


def test_tensors_that_are_missing_or_left_over_are_listed(adapter):
    def damage(tensors):
        del tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]
        return tensors | {"base_model.model.lm_head.weight": np.zeros((2, 2), np.float32)}

    change(adapter, tensors=damage)
    with pytest.raises(
        ValueError, match=rf"missing \[.*0\.mlp\.up_proj\.lora_B.*left over \[.*lm_head.*{REMEDY}"
    ):
        AdapterDirectory(adapter)


def test_an_adapter_of_another_model_is_refused_by_module(adapter, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"no linear of this model: .*q_proj.* \(such as model\.layers\.0.*\); allowed are c_attn",
    ):
        load(adapter, "gpt2")
    with pytest.raises(ValueError, match=r"_proj is \[\d+, \d+\] there and \[\d+, \d+\] in this model"):
        load(adapter, "llama-untied-biases")
    change(adapter, config={"base_model_name_or_path": str(write_checkpoint(tmp_path / "gpt2", "gpt2"))})
    with pytest.raises(ValueError, match="adapts what the base model does not have"):
        load_decoder(open_checkpoint(adapter), attention="plain")


def test_a_missing_base_and_a_missing_adapter_are_said_so(adapter, tmp_path):
    change(adapter, config={"base_model_name_or_path": "no such/place/at all"})
    with pytest.raises(ValueError, match=r"is an adapter of 'no such/place/at all': no model at"):
        open_checkpoint(adapter)
    with pytest.raises(ValueError, match=r"is no adapter: it has no adapter_config\.json"):
        AdapterDirectory(tmp_path)


def test_only_adapters_are_replaced(adapter, tmp_path):
    save(adapter, "llama", random_adapters("llama", Method(), rank=2), Method())
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 2
    base = write_checkpoint(tmp_path / "base", "llama")
    with pytest.raises(ValueError, match="holds something that is no adapter"):
        save(base, "llama", random_adapters("llama", Method()), Method())
    assert case_config("llama")["model_type"] == json.loads((base / "config.json").read_text())["model_type"]


def test_loading_does_not_change_the_model_it_is_put_on(adapter, tmp_path):
    model = load_case(tmp_path / "base", "llama", attention="plain")
    before = logits(model)
    adapted = with_adapters(model, *load(adapter, "llama"))
    assert np.abs(logits(adapted) - before).max() > 0.1
    assert_array_equal(logits(model), before)
    assert not nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
