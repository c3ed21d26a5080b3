"""`dpo generate`: a response, or a conversation, printed as it is drawn."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

from dpo.config import GenerateConfig
from dpo.files import WriteError
from dpo.runs import model_of
from dpo.terminal import lead_nowhere, unguarded


def answer(given: GenerateConfig, prompt: str | None) -> None:
    """Respond to the prompt; without one, to line after line of standard input."""
    import jax.numpy as jnp

    from dpo.huggingface.pretrained import load_pretrained
    from dpo.models.drawing import SamplingConfig
    from dpo.pages.chat import converse, respond
    from dpo.training.program import enable_compilation_cache

    enable_compilation_cache()
    names = [field.name for field in fields(SamplingConfig)]
    sampling = SamplingConfig(**{name: getattr(given, name) for name in names})
    pretrained = load_pretrained(model_of(given.model), compute_dtype=jnp.dtype(given.compute_dtype))
    asked: dict[str, Any] = {
        "sampling": sampling,
        "seed": given.seed,
        "template_kwargs": given.template_kwargs,
        "template_characters": given.template_characters,
        "on_cut": lambda: _say_cut(given.max_new_tokens),
    }
    try:
        if prompt is None:
            converse(pretrained, system=given.system, read=lambda: input("> "), write=_write, **asked)
            return
        messages = [{"role": "system", "content": given.system}, {"role": "user", "content": prompt}]
        for piece in respond(pretrained, prompt if given.system is None else messages, **asked):
            _write(piece)
        _write("\n")
    except BrokenPipeError:  # as in `| head -1`: who has read enough is no error
        lead_nowhere(unguarded(sys.stdout))


def _say_cut(longest: int) -> None:
    """Beside what was asked for: a response without its end looks like one that is bad."""
    print(f"\n(cut off at {longest} tokens: --max_new_tokens)", file=sys.stderr, flush=True)


def _write(piece: str) -> None:
    """A terminal shows what would act on it; a file or a pipe gets the text as it is.

    Raises:
      BrokenPipeError: where nobody reads any more, so that no more needs to be drawn.
      WriteError: where it can't be written, since it is what was asked for.
    """
    stream = sys.stdout if sys.stdout.isatty() else unguarded(sys.stdout)
    try:
        print(piece, end="", file=stream, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        lead_nowhere(stream)  # what waits in it would fail once more at the end
        raise WriteError(f"standard output could not be written: {error.strerror or error}") from error
