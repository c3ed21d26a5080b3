"""Responses of a model to prompts, kept in a journal so that a second start goes on where the first ended.

A response is a function of the weights, the prompt, the sampling rules and its seed, and all of these are in
its key. The seed is a hash of the run's seed, the player, the prompt and the response's number: it depends
neither on the other prompts nor on the temperature.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from dpo.data.templates import LIMITS, TEMPLATE_DATE
from dpo.data.tokenization import tokenize_prompts
from dpo.data.tokenizer_calls import decode_ids
from dpo.huggingface.adapter_files import AdapterDirectory
from dpo.huggingface.model_names import is_adapter, split_on_base
from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.pretrained import Pretrained, stop_tokens
from dpo.judging.journal import Journal
from dpo.judging.rewards import Prompt
from dpo.models.drawing import SamplingConfig
from dpo.models.sampling import generate
from dpo.models.vocabulary import require_known
from dpo.regular_files import require_regular


class Request(NamedTuple):
    """One response to sample."""

    prompt: Prompt
    number: int
    """Counts the responses to one prompt."""
    sampling: SamplingConfig
    context: Mapping[str, Any] | None = None
    """Tools, documents and template arguments of the prompt's row."""

    @property
    def asks(self) -> Any:
        """What stands for the prompt in keys: with its context, where it has one."""
        return self.prompt if self.context is None else [self.prompt, self.context]


class Sample(NamedTuple):
    """One sampled response."""

    text: str
    prompt_tokens: list[int]
    tokens: list[int]
    has_ended: bool
    """False: cut off at the largest number of new tokens."""


class Player(NamedTuple):
    """A model that answers."""

    role: str
    """Its part, such as policy; two parts of one model draw different responses."""
    source: str
    identity: str
    """Stands for the weights and the tokenizer."""


def sample_responses(
    player: Player,
    requests: Sequence[Request],
    *,
    journal: Journal,
    load: Callable[[], Pretrained],
    seed: int,
    batch_size: int,
    chat_template: str | None = None,
    template_date: str = TEMPLATE_DATE,
    template_kwargs: Mapping[str, Any] | None = None,
    template_characters: int = LIMITS.characters,
    log: Callable[[str], None],
) -> list[Sample]:
    """A response for every request. The model is loaded only where the journal lacks one."""
    seeds = [_derive_seed(seed, player.role, request) for request in requests]
    template: list[Any] = [chat_template, template_date]
    template += [template_kwargs] if template_kwargs else []
    keys = [
        _digest("sample", player.identity, template, request.asks, asdict(request.sampling), row_seed)
        for request, row_seed in zip(requests, seeds, strict=True)
    ]
    missing = [i for i, key in enumerate(keys) if key not in journal.lines]
    log(f"{player.role}: {len(keys) - len(missing)} of {len(keys)} responses are there ({player.source})")
    if missing:
        pretrained = load()
        stop, tokenizer = stop_tokens(pretrained), pretrained.tokenizer
        prompts = tokenize_prompts(
            [requests[i].prompt for i in missing],
            tokenizer,
            chat_template=chat_template,
            template_date=template_date,
            template_kwargs=template_kwargs,
            template_characters=template_characters,
            contexts=[requests[i].context for i in missing],
        )
        require_known(prompts, pretrained.model.config, source=player.source)
        ids_of = dict(zip(missing, prompts, strict=True))
        for batch in _batches(missing, requests, ids_of, batch_size):
            rows = generate(
                pretrained.model,
                [ids_of[i] for i in batch],
                sampling=requests[batch[0]].sampling,
                seeds=[seeds[i] for i in batch],
                stop_tokens=stop,
                batch_size=batch_size,
            )
            for i, tokens in zip(batch, rows, strict=True):
                line = _line(player, requests[i], seeds[i], ids_of[i], tokens, stop)
                text = decode_ids(tokenizer, tokens, skip_special_tokens=True).strip()
                journal.append({"key": keys[i], **line, "response": text})
            log(f"{player.role}: {sum(key in journal.lines for key in keys)} of {len(keys)} responses")
    return [_as_sample(journal.lines[key]) for key in keys]


def model_identity(source: str) -> str:
    """A text that changes when the weights or the tokenizer do, without loading them.

    The hash of a directory's or a GGUF file's content, and of the model under an adapter; elsewhere the
    pinned name (with the hub's commit).
    """
    path, base = split_on_base(source) or (Path(source).expanduser(), None)
    if not path.exists():
        return open_checkpoint(source).source
    names = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*.jinja")
    files = [path] if path.is_file() else sorted(file for name in names for file in path.glob(name))
    digest = hashlib.sha256()
    for file in (file for file in files if not file.is_dir()):
        require_regular(file)
        digest.update(file.name.encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    if path.is_dir() and is_adapter(path):
        digest.update(model_identity(base or AdapterDirectory(path).base).encode())
    return f"sha256:{digest.hexdigest()}"


def _derive_seed(seed: int, role: str, request: Request) -> int:
    return int(_digest("seed", seed, role, request.asks, request.number)[:8], 16)


def _batches(
    missing: Sequence[int], requests: Sequence[Request], ids_of: dict[int, list[int]], batch_size: int
) -> list[list[int]]:
    """Requests of the same rules and similar prompt length together."""
    batches: list[list[int]] = []
    for rules in dict.fromkeys(requests[i].sampling for i in missing):
        mine = [i for i in missing if requests[i].sampling == rules]
        mine.sort(key=lambda i: len(ids_of[i]))
        batches += [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    return batches


def _line(
    player: Player, request: Request, seed: int, prompt: list[int], tokens: list[int], stop: list[int]
) -> dict[str, object]:
    return {
        "player": player.role,
        "model": player.source,
        "identity": player.identity,
        "prompt": request.prompt,
        "number": request.number,
        "sampling": asdict(request.sampling),
        "seed": seed,
        "prompt_tokens": prompt,
        "tokens": tokens,
        "ended": tokens[-1] in stop,
    }


def _as_sample(line: Mapping[str, Any]) -> Sample:
    return Sample(line["response"], line["prompt_tokens"], line["tokens"], line["ended"])


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
