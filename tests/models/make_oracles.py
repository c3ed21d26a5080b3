"""Compare every family with transformers' torch models; write tests/models/oracles.json and docs/models.md.

    python -m tests.models.make_oracles            the families
    python -m tests.models.make_oracles --smollm2  the embedded model

Needs torch. The numbers kept are what transformers computes in float32, so that tests without torch hold the
decoder to them. `--smollm2` makes those of the embedded model, as transformers itself reads its file.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from dpo.models.embedded import fetch_embedded
from dpo.models.families import FAMILIES, find_family
from dpo.models.sampling import SamplingConfig, generate
from tests.models.tiny_models import CASES, ORACLES, TOKENS, batch_arrays, load_case, write_checkpoint

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
SMOLLM2 = ORACLES.with_name("smollm2_oracle.json")
NEW_TOKENS = 32


def main() -> None:
    transformers.logging.set_verbosity_error()
    if "--smollm2" in sys.argv:
        SMOLLM2.write_text(json.dumps(smollm2_oracle()) + "\n")
        return
    ORACLES.write_text(_lines({case: torch_oracle(case) for case in CASES}))
    DOCS.write_text(table({case: measure(case) for case in CASES}))


def _lines(oracles: dict[str, Any]) -> str:
    """One line a case, so that a change of one is a change of one line."""
    lines = [f"{json.dumps(case)}: {json.dumps(oracle)}" for case, oracle in oracles.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def torch_model(directory: Path) -> Any:
    """transformers' model of a checkpoint, which must fill it exactly.

    Eager attention, which has every family's details; but Falcon's (transformers 5.23) counts ALiBi twice, in
    the mask and in the scores, so it is held to the default, SDPA.
    """
    falcon = json.loads((directory / "config.json").read_text())["model_type"] == "falcon"
    model, report = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="sdpa" if falcon else "eager",
        output_loading_info=True,
    )
    assert not any(report.values()), report
    return model.eval()


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def torch_greedy(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def torch_oracle(case: str) -> dict[str, Any]:
    """A few numbers of one case: logits at three positions, and the log-prob of each row's tokens."""
    with tempfile.TemporaryDirectory() as scratch:
        model = torch_model(write_checkpoint(Path(scratch), case))
        logits = torch_logits(model, TOKENS)
        log_probs = torch.log_softmax(torch.tensor(logits), dim=-1).numpy()
        scored = np.take_along_axis(log_probs[:, :-1], TOKENS[:, 1:, None], axis=-1)[..., 0]
        return {
            "logits": np.round(logits[1, [0, 11, 23], :8].astype(float), 6).tolist(),
            "log_probs": np.round(scored.astype(float), 6).tolist(),
            "greedy": torch_greedy(model, TOKENS[0, :9].tolist()),
        }


def measure(case: str) -> dict[str, Any]:
    """What `docs/models.md` says of a case: the largest difference of logits, and greedy agreement."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = write_checkpoint(Path(scratch), case)
        theirs, ours = torch_model(directory), load_case(directory, case)
        hidden = ours.hidden(*batch_arrays(TOKENS))
        difference = np.abs(np.asarray(ours.logits(hidden)) - torch_logits(theirs, TOKENS)).max()
        prompt = TOKENS[0, :9].tolist()
        greedy = SamplingConfig(max_new_tokens=NEW_TOKENS, temperature=0.0)
        tokens = generate(ours, [prompt], sampling=greedy, seeds=[0], stop_tokens=[])[0]
    expected = torch_greedy(theirs, prompt)
    agreed = next(
        (i for i, pair in enumerate(zip(tokens, expected, strict=True)) if pair[0] != pair[1]), NEW_TOKENS
    )
    return {"difference": float(difference), "agreed": agreed}


def table(measured: dict[str, dict[str, Any]]) -> str:
    rows = [
        f"| {case} | {find_family(case.split('-')[0]).architecture} | {m['difference']:.1e} | {m['agreed']} |"
        for case, m in measured.items()
    ]
    return "\n".join(
        [
            "# Models",
            "",
            "Written by `python -m tests.models.make_oracles`; edit that instead. Every line is a tiny",
            "random checkpoint (odd sizes, windows shorter than the input, rope scaling on) run here and by",
            f"transformers {transformers.__version__} in float32 on a CPU: the largest absolute difference",
            f"of logits, and how many of {NEW_TOKENS} greedily decoded tokens agree.",
            "",
            f"Supported `model_type`: {', '.join(f'`{name}`' for name in FAMILIES)}.",
            "Rope scaling: default, linear, dynamic, llama3, yarn, longrope. An unsupported architecture or",
            "configuration value is an error that says what is supported. Weights: safetensors (one file or",
            "an index) for all, GGUF for Llama. Dropout fields have no effect: nothing is dropped.",
            "",
            "| case | architecture | largest difference of logits | equal greedy tokens |",
            "|---|---|---|---|",
            *rows,
            "",
            "## LoRA",
            "",
            "LoRA, rsLoRA and DoRA on any linear of these families, peft's adapters in and out, frozen",
            "weights in bfloat16 or int8: see [lora.md](lora.md).",
            "",
        ]
    )


def smollm2_oracle() -> dict[str, Any]:
    """Logits and a greedy response of the embedded model, as transformers reads its GGUF file."""
    path = fetch_embedded("embedded:smollm2-135m-instruct")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Write one sentence about the hotel."}],
        add_generation_prompt=True,
        tokenize=False,
    )
    tokens = tokenizer(text)["input_ids"]
    logits = torch_logits(model, np.asarray([tokens]))[0]
    return {
        "text": text,
        "tokens": tokens,
        "columns": list(range(0, 49152, 6007)),
        "logits": np.round(logits[:, ::6007].astype(float), 5).tolist(),
        "greedy": torch_greedy(model, tokens),
    }


if __name__ == "__main__":
    main()
