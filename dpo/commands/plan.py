"""`dpo plan`: a training step compiled for devices that need not be there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from dpo.commands.output import write_json
from dpo.config import Config, PlanConfig
from dpo.own_code import require_own_word_for_objectives
from dpo.runs import objective_terms
from dpo.terminal import print_plain

_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Keeps the TPU's compiler from asking a metadata server which machine this is, and from complaining."""


def plan_step(config: Config, given: PlanConfig, arguments: Sequence[str]) -> bool:
    """Print the plan, of the best mesh where one is searched for; False where it does not fit."""
    require_own_word_for_objectives(objective_terms(config), arguments=arguments)
    from dpo.planning.chips import parse_topology

    topology = parse_topology(given.topology or ("cpu:1" if given.memory is None else "gpu:1"), given.memory)
    prepare_compiler(topology.num_devices)
    from dpo.planning.plan_text import plan_as_numbers, plan_as_text
    from dpo.planning.remedies import find_remedies
    from dpo.planning.search import make_plan_within_limit, search_meshes
    from dpo.planning.targets import open_target
    from dpo.planning.workloads import choose_lengths, read_decoder

    decoder = read_decoder(config.model.source)  # a misspelt model is said before lengths are asked for
    lengths = choose_lengths(
        config, prompt=given.prompt_tokens, response=given.response_tokens, responses=given.num_responses
    )
    target = open_target(topology, given.memory)
    print_plain(f"plan of {config.model.source}")
    if given.search:
        tried = search_meshes(config, target, decoder=decoder, lengths=lengths, log=print_plain)
        plan = tried[0][1]
        config = replace(config, mesh=tried[0][0])
    else:
        plan = make_plan_within_limit(config, target, decoder=decoder, lengths=lengths, log=print_plain)
    if not plan.fits:
        found = find_remedies(config, plan.memory, target, decoder=decoder, lengths=lengths, log=print_plain)
        plan = plan._replace(advice=[*found, *plan.advice])
    print_plain(plan_as_text(plan, target, compute_dtype=config.model.compute_dtype))
    if given.output is not None:
        write_json(given.output, plan_as_numbers(plan, target))
    return plan.fits


def prepare_compiler(num_devices: int) -> None:
    """Let JAX, not yet started, see so many CPU devices and no others, and find the TPU's compiler."""
    from dpo.huggingface.embedded import cache_directory

    flag = "--xla_force_host_platform_device_count"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={num_devices}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    library = cache_directory() / "libtpu" / "libtpu" / "libtpu.so"
    if library.is_file():
        os.environ.setdefault("TPU_LIBRARY_PATH", str(library))
    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)
