"""The kernels of the ecosystem are the plain attention behind the same mask, in values and gradients."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_rows import make_layout, make_qkv
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import Mesh
from numpy.testing import assert_allclose, assert_array_equal

from dpo.huggingface.embedded import cache_directory
from dpo.huggingface.shapes import read_shape
from dpo.huggingface.text_models import read_config
from dpo.models.attention import (
    attend,
    attend_plain,
    check_implementation,
    choose_implementation,
    visible,
)
from dpo.models.attention_blocked import SAVED_NAMES
from dpo.models.attention_fast import attend_cudnn, attend_splash, block_size
from dpo.models.decoder import Decoder
from dpo.parallel.partition import AXES, ONE_DEVICE, Partition

C = 8
ROOT = Path(__file__).parents[2]

# Groups as (prompt length, response lengths): pairs that share prompts, ragged branches, padding at the end.
ROWS = (((30, (25, 14)), (20, (9, 12))), ((70, (40, 28)),))


def value_and_gradients(attention, q, k, v, cotangent, real):
    """Of what a real token gets; and the output itself."""

    def loss(q, k, v):
        out = attention(q, k, v)
        return jnp.sum(jnp.where(real, out * cotangent, 0).astype(jnp.float32)), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)


def assert_same_as_plain(
    attention, *, heads, length=140, dtype=jnp.float32, tolerance=2e-5, window=None, **how
):
    layout = make_layout(ROWS, length)
    mask, real = visible(**layout, window=window), (layout["group"] != 0)[..., None, None]
    q, k, v, cotangent = make_qkv(len(ROWS), length, heads, C, dtype)
    (_, out), gradients = value_and_gradients(
        partial(attention, mask=mask, scale=0.3, **how), q, k, v, cotangent, real
    )
    q, k, v, cotangent = (x.astype(jnp.float32) for x in (q, k, v, cotangent))
    (_, expected), by_plain = value_and_gradients(
        partial(attend_plain, mask=mask, scale=0.3, **how), q, k, v, cotangent, real
    )
    compare = partial(assert_allclose, rtol=tolerance, atol=tolerance)
    compare(np.asarray(out, np.float32), np.where(real, expected, 0))
    for ours, theirs in zip(gradients, by_plain, strict=True):
        compare(np.asarray(ours, np.float32), theirs)
        assert_array_equal(np.where(real, 0, ours), 0)


splash = partial(attend_splash, interpret=True)
cudnn = partial(attend_cudnn, kernel="xla")


@pytest.mark.parametrize(
    ("heads", "options"),
    [((4, 2), {}), ((2, 2), {"window": 17, "softcap": 0.7})],
    ids=["grouped heads", "window and soft-capping"],
)
def test_splash_is_plain(heads, options):
    """Rows of 140 slots, which are padded to two blocks."""
    options = dict(options)
    assert_same_as_plain(splash, heads=heads, window=options.pop("window", None), **options)


def test_splash_in_bfloat16():
    assert_same_as_plain(splash, heads=(2, 1), dtype=jnp.bfloat16, tolerance=6e-2)


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("length", [140, 141])
def test_the_way_to_cudnn_is_plain(heads, length):
    """The same call with XLA's kernel: mask, scale, padding to an even length."""
    assert_same_as_plain(cudnn, heads=heads, length=length, window=jnp.asarray(17))
    assert_same_as_plain(cudnn, heads=heads, length=length, dtype=jnp.bfloat16, tolerance=6e-2)


@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=["split", "whole"])
@pytest.mark.parametrize("implementation", ["splash", "cudnn", pytest.param("ranges", marks=pytest.mark.ci)])
def test_a_mesh_changes_nothing(implementation, heads):
    """Rows over two devices, heads over two where they can be split."""
    layout = make_layout(ROWS, 140)
    partition = Partition(Mesh(np.asarray(jax.devices()[:4]).reshape(1, 2, 2), AXES))
    q, k, v, cotangent = make_qkv(len(ROWS), 140, heads, C)
    real = (layout["group"] != 0)[..., None, None]

    def attention(q, k, v, implementation=implementation, partition=ONE_DEVICE):
        window = jnp.asarray(17)
        return attend(
            q, k, v, **layout, scale=0.3, window=window, implementation=implementation, partition=partition
        )

    ours = value_and_gradients(partial(attention, partition=partition), q, k, v, cotangent, real)
    plain = value_and_gradients(partial(attention, implementation="plain"), q, k, v, cotangent, real)
    assert_allclose(ours[0][0], plain[0][0], rtol=2e-5, atol=2e-4)
    for got, expected in zip(ours[1], plain[1], strict=True):
        assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("length", "block"), [(100, 128), (512, 512), (640, 128), (1100, 384), (1536, 512), (4224, 512)]
)
def test_blocks_are_large_where_rows_grow_little(length, block):
    assert block_size(length) == block


def on(platform):
    class Elsewhere(Partition):
        @property
        def platform(self):
            return platform

    return Elsewhere()


@pytest.mark.parametrize(
    ("platform", "length", "expected"),
    [("cpu", 64, "blocked"), ("tpu", 4096, "plain"), ("gpu", 64, "ranges")],
)
def test_auto_is_what_was_measured(platform, length, expected):
    choose = partial(choose_implementation, partition=on(platform), length=length)
    assert choose("auto", has_key_bias=False) == expected
    assert choose("auto", has_key_bias=True) == "plain"
    assert choose("plain", has_key_bias=False) == "plain"


@pytest.mark.parametrize(
    ("implementation", "platform", "model", "reason"),
    [
        ("splash", "cpu", {}, "splash needs a tpu and the platform is cpu"),
        ("cudnn", "cpu", {}, "cudnn needs a gpu and the platform is cpu"),
        ("ranges", "cpu", {}, "ranges needs a gpu and the platform is cpu"),
        ("ranges", "gpu", {"has_key_bias": True}, "ALiBi"),
        ("splash", "tpu", {"has_key_bias": True}, "ALiBi"),
        ("blocked", "cpu", {"has_key_bias": True}, "ALiBi"),
        ("cudnn", "gpu", {"softcap": 50.0}, r"no soft-capping, which this model has \(50.0\)"),
        ("cudnn", "gpu", {"dtype": jnp.dtype("float32")}, "the compute dtype is float32"),
    ],
)
def test_what_does_not_go_together_is_said(implementation, platform, model, reason):
    fits = {"dtype": jnp.dtype("bfloat16"), "softcap": None, "has_key_bias": False}
    with pytest.raises(ValueError, match=rf"{reason}.*Allowed here: auto, plain"):
        check_implementation(implementation, partition=on(platform), **fits | model)
    check_implementation("plain", partition=on(platform), **fits | model)


def test_a_model_checks_its_attention_when_it_is_made():
    config = read_config(read_shape("shape:smollm2-135m"))[1]
    with pytest.raises(ValueError, match="attention splash needs a tpu and the platform is cpu"):
        nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), attention="splash"))


def test_the_forward_kernel_is_not_run_again():
    """Under rematerialisation its output and its normaliser are saved: one kernel forward, two backward."""
    layout = make_layout(ROWS, 140)
    q, k, v, _ = make_qkv(len(ROWS), 140, (2, 1), C)
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)

    def loss(q):
        attention = partial(attend, **layout, scale=0.3, implementation="splash")
        return jax.checkpoint(attention, policy=policy)(q, k, v).sum()

    found = sorted(kernels(jax.make_jaxpr(jax.grad(loss))(q)))
    assert [name.split("_")[2] for name in found] == ["dkv", "dq", "fwd"]


def kernels(jaxpr):
    """Names of the kernels that a program calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation.params["name"]
            continue
        for value in equation.params.values():
            if isinstance(value, ClosedJaxpr | Jaxpr):
                yield from kernels(value)


@pytest.mark.slow
def test_a_step_with_splash_is_compiled_for_a_tpu(tmp_path):
    """Two layers, heads of 64, rows of 1,024, on 4 chips: the memory of plain attention's scores is saved."""
    library = Path(os.environ.get("TPU_LIBRARY_PATH", cache_directory() / "libtpu" / "libtpu" / "libtpu.so"))
    if not library.is_file():
        pytest.skip(f"{library} is not there (see dpo plan --topology v5e:2x2)")
    small = {"hidden_size": 384, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1024}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(read_shape("shape:smollm2-135m") | small | heads))
    plans = {}
    for attention in ("plain", "splash"):
        output = tmp_path / f"{attention}.json"
        subprocess.run(
            [
                *(sys.executable, "-m", "dpo", "plan", str(ROOT / "configs" / "scaling.yaml")),
                *("--topology", "v5e:2x2", "--model.source", str(tmp_path)),
                *("--prompt_tokens=512", "--response_tokens=256", "--training.batch_size=16"),
                *("--data.max_length=1024", "--data.row_length=1024"),
                *(f"--model.attention={attention}", "--output", str(output)),
            ],
            env={**os.environ, "TPU_LIBRARY_PATH": str(library)},
            check=True,
        )
        plans[attention] = json.loads(output.read_text())
    plain, splash = plans["plain"], plans["splash"]
    assert splash["memory"]["temporaries"] < 0.7 * plain["memory"]["temporaries"]
    assert splash["bytes_accessed"] < 0.7 * plain["bytes_accessed"]


def test_cudnn_s_call_is_made_for_a_gpu(monkeypatch):
    """Shapes, dtypes and the mask pass its own checks, forward and backward; running it needs a GPU."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    layout = make_layout(ROWS, 141)
    q, k, v, _ = make_qkv(len(ROWS), 141, (4, 2), C, jnp.bfloat16)
    gradient = jax.grad(lambda q: attend_cudnn(q, k, v, visible(**layout), scale=0.3).sum())
    text = jax.jit(gradient).trace(q).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax(" in text
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward(" in text
