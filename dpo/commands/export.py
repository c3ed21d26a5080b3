"""`dpo export`: a checkpoint for `transformers`, `peft` or llama.cpp, and for the hub where asked."""

from __future__ import annotations

from dpo.commands.checks import load_run
from dpo.config import ExportConfig
from dpo.terminal import print_plain


def export_run(given: ExportConfig) -> None:
    """Write the directory or file, say where it is, and push it to the hub if it has an id there."""
    config = load_run(given.run)
    from dpo.training.export import export_checkpoint
    from dpo.training.hub import push_to_hub, require_repository
    from dpo.training.program import enable_compilation_cache

    if given.hub_id is not None:
        require_repository(given.hub_id, private=given.hub_private)
    enable_compilation_cache()
    path, step = export_checkpoint(given, config)
    print_plain(f"the policy after {step} steps: {path}")
    if given.hub_id is not None:
        message = f"The policy after {step} steps"
        print_plain(push_to_hub(path, given.hub_id, private=given.hub_private, message=message))
