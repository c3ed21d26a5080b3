"""The whole training program on meshes of eight virtual devices against one device."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose
from transformers import Gemma4TextConfig, Lfm2Config, Lfm3Config, LlamaConfig, Qwen3_5TextConfig

from dpo.config import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainingConfig
from dpo.data.loader import training_loader
from dpo.data.packing import Shape
from dpo.data.tokenized import make_dataset
from dpo.huggingface.adapters import add_adapters, choose_linears, model_bindings, new_adapters
from dpo.huggingface.families import decoder_config
from dpo.huggingface.text_models import read_config
from dpo.losses import make_objective, reward_scale
from dpo.models.attention import Implementation
from dpo.models.decoder import Decoder
from dpo.models.drawing import SamplingConfig
from dpo.models.lora import Method
from dpo.models.sampling import generate
from dpo.parallel.partition import Partition
from dpo.parallel.sharding import make_mesh, parameter_rules, parameter_sharding, place, row_multiple
from dpo.planning.chips import Chip, Topology
from dpo.planning.hlo import read_program
from dpo.planning.roofline import Work
from dpo.planning.targets import Target
from dpo.planning.tracing import trace_step
from dpo.planning.workloads import Workload
from dpo.training.placement import place_batch
from dpo.training.program import make_program
from dpo.training.step import make_eval_step

VOCAB, LAYERS, STEPS, PROMPTS = 70, 3, 10, 8  # 70 columns are not divisible by 8 devices
MESHES = {sizes: MeshConfig(*sizes) for sizes in [(8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)]}


class Case(NamedTuple):
    objective: dict
    layout: str = "shared"
    micro_batches: int = 1
    responses: tuple[int, ...] = (2, 2, 2, 2)
    adapters: Method | None = None
    """None: all weights are trained."""
    layer_types: tuple[str, ...] = ()
    """Of a model with layers of several kinds; Llama without."""
    steps: int = STEPS


RAGGED = (2, 4, 3, 1)
DELTA = ("linear_attention", "full_attention", "linear_attention")
GATED = ("conv", "sliding_attention", "conv", "full_attention")
SHARING = ("full_attention", "sliding_attention", "sliding_attention", "full_attention")
CASES = {
    "pairs": Case({"name": "dpo", "beta": 0.3}),
    "ragged rankings": Case({"name": "plackett_luce", "beta": 0.3}, responses=RAGGED),
    "padded": Case({"name": "dpo", "beta": 0.3}, layout="padded"),
    "packed": Case({"name": "dpo", "beta": 0.3}, layout="packed"),
    "padded ragged rankings": Case({"name": "plackett_luce", "beta": 0.3}, "padded", responses=RAGGED),
    "adapters": Case({"name": "dpo", "beta": 0.3}, adapters=Method()),
    "adapters, padded": Case({"name": "dpo", "beta": 0.3}, "padded", adapters=Method()),
    "adapters, packed ragged rankings": Case(
        {"name": "plackett_luce", "beta": 0.3}, "packed", responses=RAGGED, adapters=Method(use_rslora=True)
    ),
    "adapters, ragged rankings in two parts": Case(
        {"name": "plackett_luce", "beta": 0.3}, "shared", 2, (3, 2, 4, 2), Method(use_dora=True)
    ),
    "packed, in two parts": Case({"name": "plackett_luce"}, "packed", 2, (3, 2, 4, 2)),
    "shared, in two parts": Case({"name": "dpo", "ld_alpha": 0.5}, "shared", 2),
    "across prompts, in two parts": Case({"name": "aot", "beta": 0.3}, "shared", 2),
    "convolutions": Case({"name": "dpo", "beta": 0.3}, layer_types=("conv", "full_attention", "conv")),
    # Norms of what the delta rule reads enlarge rounding: an ulp of the embeddings moves parameters by 1e-5
    # of their largest in two steps.
    "delta rule": Case({"name": "dpo", "beta": 0.3}, layer_types=DELTA, steps=2),
    "delta rule, packed adapters in two parts": Case(
        {"name": "dpo", "beta": 0.3}, "packed", 2, adapters=Method(), layer_types=DELTA, steps=2
    ),
    "convolutions, gates, windows": Case({"name": "dpo", "beta": 0.3}, layer_types=GATED),
    "heads of two sizes, shared keys": Case({"name": "dpo", "beta": 0.3}, layer_types=SHARING, steps=2),
    "moving mean": Case({"name": "bco", "beta": 0.3}, "packed", 1),
    "own likelihood": Case({"name": "sft"}, "shared", 2),
    "weighted by collisions": Case({"name": "dpo", "wpo": True}),
}


def make_data(case):
    """Random token ids; every prompt of a row has its own length."""
    rng = np.random.default_rng(0)
    counts = [case.responses[i % len(case.responses)] for i in range(2 * PROMPTS)]
    prompts = [rng.integers(3, VOCAB, rng.integers(2, 9)).tolist() for _ in counts]
    responses = [[rng.integers(3, VOCAB, rng.integers(1, 8)).tolist() for _ in range(n)] for n in counts]
    return make_dataset(prompts, responses)


def make_decoder(
    partition,
    *,
    kv_heads=2,
    attention: Implementation = "auto",
    adapters: Method | None = None,
    layer_types: tuple[str, ...] = (),
):
    hf_config = configuration(layer_types)(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=len(layer_types) or LAYERS,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
        pad_token_id=2,
    )
    model = Decoder(
        decoder_config(hf_config), rngs=nnx.Rngs(0), remat="full", attention=attention, partition=partition
    )
    # norms of heads four times as large would make a softmax that answers to rounding
    least = 3 if layer_types else 2
    model = jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim >= least else leaf, model)
    if adapters is not None:
        chosen = choose_linears(model_bindings(*read_config(hf_config.to_dict())), "all-linear")
        add_adapters(model, new_adapters(chosen, rank=4, alpha=8.0, seed=0), adapters)
    return model


def configuration(layer_types):
    """A class of configurations, with its own sizes of layers that do not attend."""
    if layer_types == GATED:
        return partial(Lfm3Config, layer_types=list(layer_types), head_dim=8, sliding_window=4)
    if "conv" in layer_types:
        return partial(Lfm2Config, layer_types=list(layer_types), block_auto_adjust_ff_dim=False)
    if "sliding_attention" in layer_types:
        heads = {"head_dim": 8, "global_head_dim": 12, "num_kv_shared_layers": 2, "sliding_window": 4}
        beside = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
        return partial(Gemma4TextConfig, layer_types=list(layer_types), **heads, **beside)
    if "linear_attention" not in layer_types:
        return LlamaConfig
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 8}
    dims = {"linear_key_head_dim": 8, "linear_value_head_dim": 12}
    return partial(Qwen3_5TextConfig, layer_types=list(layer_types), **heads, **dims)


class Outcome(NamedTuple):
    sums: np.ndarray
    """Log-probs of the first batch before training."""
    metrics: list[dict[str, float]]
    state: dict
    """Parameters, and the optimiser's means of all gradients and of their squares."""


def run(case, mesh, *, attention: Implementation = "auto", rules=None, kv_heads=2):
    """A case's steps on a mesh."""
    mesh_config = MeshConfig(rules=rules or {})
    config = Config(
        model=ModelConfig(log_prob_chunk=16),
        optimizer=OptimizerConfig(learning_rate=1e-3, epsilon=1e-2, schedule="constant", weight_decay=0.1),
        training=TrainingConfig(batch_size=PROMPTS, micro_batches=case.micro_batches),
        mesh=mesh_config,
    )
    data = make_data(case)
    loader = training_loader(
        data,
        batch_size=PROMPTS,
        num_steps=case.steps,
        layout=case.layout,
        micro_batches=case.micro_batches,
        rows_multiple=row_multiple(mesh),
    )
    model = make_decoder(
        Partition(mesh),
        attention=attention,
        kv_heads=kv_heads,
        adapters=case.adapters,
        layer_types=case.layer_types,
    )
    trained = nnx.Param if case.adapters is None else nnx.LoRAParam
    graphdef, *parts = nnx.split(model, trained, ...)
    layout = parameter_rules(config.mesh.rules)
    params, frozen = (
        place(part, parameter_sharding(mesh, part, layout)) for part in map(nnx.to_pure_dict, parts)
    )
    objective = make_objective(case.objective)
    program = make_program(
        config,
        objective,
        beta=reward_scale(case.objective),
        graphdef=graphdef,
        params=params,
        mesh=mesh,
        num_steps=case.steps,
    )
    score = make_eval_step(graphdef, chunk=16, needs=objective.reference_sums, mesh=mesh)
    reference = [score(params, frozen, place_batch(mesh, loader.batch(step))) for step in range(2)]
    # A reference apart from the policy, so that no metric stands at a tie.
    noise = np.random.default_rng(1).normal(size=(2, PROMPTS, data.max_responses)).astype(np.float32)
    sums = [{name: np.asarray(x) + noise[i] for name, x in mine.items()} for i, mine in enumerate(reference)]
    state = jax.jit(program.init, out_shardings=program.sharding)(params)
    metrics = []
    for step in range(case.steps):
        batch = place_batch(mesh, loader.batch(step))
        state, found = program.step(state, frozen, batch, sums[step % 2])
        metrics.append({name: float(value) for name, value in found.items()})
    trained_state = {"params": state.params, "optimizer": state.opt_state}
    return Outcome(np.asarray(reference[0]["logps"]), metrics, jax.tree.map(np.asarray, trained_state))


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def alone():
    """Outcomes on one device, each computed once."""
    outcomes = {}

    def get(name):
        if name not in outcomes:
            outcomes[name] = run(CASES[name], one_device())
        return outcomes[name]

    return get


def assert_same(ours, theirs):
    """Numbers within 1e-5, relative and near 0 absolute; parameters within 1e-5 of their largest entry.

    The optimiser's moments are sums of gradients, and of their squares, that may cancel: 1e-4.
    """
    assert_allclose(ours.sums, theirs.sums, rtol=1e-5, atol=1e-5)
    for mine, other in zip(ours.metrics, theirs.metrics, strict=True):
        for name, value in other.items():
            assert_allclose(mine[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    for (path, mine), other in zip(
        jax.tree_util.tree_leaves_with_path(ours.state), jax.tree.leaves(theirs.state), strict=True
    ):
        name = jax.tree_util.keystr(path)
        limit = 1e-5 if name.startswith("['params']") else 1e-4
        assert_allclose(mine, other, atol=limit * np.abs(other).max(), err_msg=name)


def largest_differences(ours, theirs):
    """Of metrics and of arrays, as `assert_same` measures them."""
    metrics = max(
        abs(mine[name] - value) / max(1.0, abs(value))
        for mine, other in zip(ours.metrics, theirs.metrics, strict=True)
        for name, value in other.items()
    )

    def of_arrays(ours, theirs):
        return max(
            np.abs(mine - other).max() / max(np.abs(other).max(), 1e-30)
            for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
        )

    parameters = of_arrays(ours.state["params"], theirs.state["params"])
    moments = of_arrays(ours.state["optimizer"], theirs.state["optimizer"])
    return {"metrics": f"{metrics:.1e}", "parameters": f"{parameters:.1e}", "moments": f"{moments:.1e}"}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_mesh_trains_as_one_device(name, sizes, alone):
    """With `-s`, the largest differences are printed."""
    split = run(CASES[name], make_mesh(MESHES[sizes], jax.devices()))
    print(f"{name} on {sizes}: largest differences {largest_differences(split, alone(name))}", flush=True)
    assert_same(split, alone(name))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_plain_attention_is_split_too(sizes, alone):
    mesh = make_mesh(MESHES[sizes], jax.devices())
    assert_same(run(CASES["pairs"], mesh, attention="plain"), alone("pairs"))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_devices_does_not_matter(seed, sizes, alone):
    order = np.random.default_rng(seed).permutation(8)
    mesh = make_mesh(MESHES[sizes], [jax.devices()[i] for i in order])
    assert_same(run(CASES["pairs"], mesh), alone("pairs"))


@pytest.mark.slow
def test_key_heads_that_can_not_be_split_are_whole(alone):
    mesh = make_mesh(MESHES[1, 4, 2], jax.devices())
    assert_same(run(CASES["pairs"], mesh, kv_heads=1), run(CASES["pairs"], one_device(), kv_heads=1))


@pytest.mark.slow
def test_rules_of_the_settings_change_the_layout_and_not_the_result(alone):
    mesh = make_mesh(MESHES[2, 2, 2], jax.devices())
    rules = {"mlp": [["fsdp", "tensor"], None], "embed_tokens": [None, ["tensor", "fsdp"]]}
    assert_same(run(CASES["pairs"], mesh, rules=rules), alone("pairs"))


@pytest.mark.parametrize(
    "sizes",
    [pytest.param((1, 8, 1), marks=pytest.mark.slow), pytest.param((2, 2, 2), marks=pytest.mark.ci)],
    ids=str,
)
def test_sampling_on_a_mesh_draws_the_same_tokens(sizes):
    mesh = make_mesh(MESHES[sizes], jax.devices())
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
    rules = {"sampling": SamplingConfig(max_new_tokens=8), "seeds": [1, 2, 3, 4], "stop_tokens": [2]}
    expected = generate(make_decoder(Partition()), prompts, **rules)
    graphdef, params = nnx.split(make_decoder(Partition(mesh)), nnx.Param)
    params = nnx.to_pure_dict(params)
    model = nnx.merge(graphdef, place(params, parameter_sharding(mesh, params)))
    assert generate(model, prompts, **rules) == expected


@pytest.mark.parametrize(
    "sizes",
    [pytest.param((1, 8, 1), marks=pytest.mark.slow), pytest.param((1, 4, 2), marks=pytest.mark.as_users)],
    ids=str,
)
def test_no_parameter_is_gathered_whole_and_no_logits_travel(sizes):
    """No array of a device has the shape of a whole parameter, and no collective that of logits."""
    mesh = make_mesh(MESHES[sizes], jax.devices())
    config = decoder_config(
        LlamaConfig(
            vocab_size=1088, hidden_size=64, intermediate_size=160, num_hidden_layers=6,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=2,
        )
    )  # fmt: skip
    settings = dataclasses.replace(Config(), training=TrainingConfig(micro_batches=2))
    text = compile_step(settings, config, mesh, Workload(16, 2, Shape(16, 40, 24), Work(1, 1, 1, 1), ""))
    whole = ["1088,64", "64,1088", "6,64,160", "6,160,64", "6,64,64", "6,64,32"]
    found = [shape for shape in whole if f"[{shape}]" in text]
    assert not found, f"whole parameters on one device: {found}"
    logits = [
        c
        for c in read_program(text, 8).collectives
        if any(f",{1088 // n}]" in c.arrays for n in (1, 2, 4, 8))
    ]
    assert not logits, f"logits travel: {logits}"


def compile_step(settings, decoder, mesh, workload):
    chip = Chip("test", "cpu", 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    target = Target(Topology("cpu", (8,)), chip, jax.devices(), "auto", "")
    objective = make_objective({"name": "dpo"})
    traced, _ = trace_step(
        settings, objective, decoder, beta=0.1, mesh=mesh, workload=workload, target=target
    )
    return traced.lower().compile().as_text()
