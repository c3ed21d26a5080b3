"""`dpo generate`: a response, or a conversation, printed as it is drawn."""

from __future__ import annotations

import sys
from dataclasses import fields

from dpo.config import GenerateConfig
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
    if prompt is None:
        converse(
            pretrained,
            system=given.system,
            sampling=sampling,
            seed=given.seed,
            read=lambda: input("> "),
            write=_write,
            template_kwargs=given.template_kwargs,
        )
        return
    messages = [{"role": "system", "content": given.system}, {"role": "user", "content": prompt}]
    whole = prompt if given.system is None else messages
    kwargs = given.template_kwargs
    try:
        for piece in respond(pretrained, whole, sampling=sampling, seed=given.seed, template_kwargs=kwargs):
            _write(piece)
        _write("\n")
    except BrokenPipeError:  # as in `| head -1`: who has read enough is no error
        lead_nowhere(unguarded(sys.stdout))


def _write(piece: str) -> None:
    """A terminal shows what would act on it; a file or a pipe gets the text as it is.

    Raises:
      OSError: where it can't be written, since it is what was asked for.
    """
    stream = sys.stdout if sys.stdout.isatty() else unguarded(sys.stdout)
    print(piece, end="", file=stream, flush=True)
