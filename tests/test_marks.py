"""Marks of settings: which decide numbers, which are places, which an export's card leaves out."""

from dataclasses import replace

from dpo.config import Config, TrainingConfig
from dpo.config.marks import BESIDE, OFF_THE_CARD, OWN, PLACE, marked
from dpo.training.identity import resolved_settings, shared_settings

WHEN = (
    *("training.eval_every", "training.eval_samples", "training.eval_max_new_tokens"),
    *("training.profiler_steps", "training.profiler_skip"),
    *("training.save_every", "training.save_minutes", "training.keep_checkpoints", "training.keep_best"),
)
SECTIONS = ("run_dir", "mesh", "distributed")


def test_what_decides_no_number_is_as_it_was_before_there_were_marks():
    """Checkpoints of earlier versions hold these settings: another set would refuse them."""
    assert set(marked(Config, BESIDE)) == {
        *SECTIONS,
        "model.reference_store",
        *WHEN,
        *("training.max_skipped", "training.memory_limit", "training.resume", "training.allow_changed"),
        *("training.trackers", "data.token_store", "data.token_store_limit"),
        *("data.template_characters", "lora.base_name", "lora.merged"),
    }
    assert set(marked(Config, PLACE)) == {
        *("model.source", "model.reference", "lora.init", "data.train", "data.eval", "data.chat_template"),
    }
    assert set(marked(Config, OFF_THE_CARD)) == set(marked(Config, BESIDE)) - {
        *("training.max_skipped", "training.memory_limit", "data.template_characters"),
        *("lora.base_name", "lora.merged"),
    }


def test_processes_share_what_decides_when_to_meet_and_numbers_depend_on_less():
    """A process that evaluates or saves at other steps waits for the others for ever."""
    config, other = Config(), Config(training=TrainingConfig(save_every=7, keep_checkpoints=9))
    assert resolved_settings(config) == resolved_settings(other)
    differing = {
        name for name, value in shared_settings(config).items() if shared_settings(other)[name] != value
    }
    assert differing == {"training.save_every", "training.keep_checkpoints"}
    assert set(WHEN) <= shared_settings(config).keys()


def test_a_process_has_a_number_and_directories_of_its_own():
    config = Config()
    other = replace(
        config,
        run_dir="elsewhere",
        model=replace(config.model, reference_store="elsewhere"),
        distributed=replace(config.distributed, process_id=1),
    )
    assert set(marked(Config, OWN)) == {*SECTIONS, "model.reference_store"}
    assert shared_settings(config) == shared_settings(other)
