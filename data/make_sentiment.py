"""Make the shipped preferences: SmolLM2 answers the prompts, VADER scores the answers, four a prompt stay.

    python data/make_sentiment.py                     # writes the two files beside this script
    python data/make_sentiment.py --limit 8 --out /tmp

Everything is a function of the files here and the constants below. Each answer has a seed of its own (prompt,
number of the answer) and no row of a batch sees another, so the same machine makes the same files; on another
kind of processor a token may differ where float32 rounding decides it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dpo.huggingface.pretrained import Pretrained, load_pretrained
from dpo.judging.rewards import vader
from dpo.models.drawing import SamplingConfig
from dpo.models.sampling import generate

HERE = Path(__file__).parent
SOURCE = "embedded:smollm2-135m-instruct"
PHRASINGS = (
    "Write one sentence about {}.",
    "Describe {} in one sentence.",
    "Say in one sentence what you thought of {}.",
    "Sum up {} in a single sentence.",
    "Tell me in one sentence how {} turned out.",
    "Give your opinion of {} in one sentence.",
    "Someone asks you about {}. Answer in one sentence.",
    "Write one diary sentence about {}.",
    "Comment on {} in one sentence.",
    "Tell a neighbour about {} in one sentence.",
    "Write one sentence on how you felt about {}.",
)
"""Taken in turn; 11 and HELD_OUT_EVERY share no factor, so both splits see every phrasing equally often."""
HELD_OUT_EVERY = 5
SAMPLING = SamplingConfig(max_new_tokens=48, temperature=1.0, min_p=0.05)
CANDIDATES = 6
"""Answers sampled in a round."""
ROUNDS = 4
"""A prompt without four fit answers is sampled again, up to so many rounds, then left out."""
KEPT = 4
MIN_RANGE = 0.3
"""Best minus worst score that a prompt needs (VADER calls |score| < 0.05 neutral)."""
ROWS = 96
"""Answers decoded together."""


class Prompt(NamedTuple):
    """One prompt and where it belongs."""

    number: int
    split: str
    subject: str
    text: str


class Answer(NamedTuple):
    """One sampled answer that is fit to be kept."""

    text: str
    score: float


def main() -> None:
    """Sample, choose, write; print what was left out and why."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=HERE, help="directory for the two files")
    parser.add_argument("--limit", type=int, default=None, help="only the first so many prompts")
    arguments = parser.parse_args()
    prompts = read_prompts(HERE / "subjects.txt")[: arguments.limit]
    counts: Counter[str] = Counter()
    chosen = choose_for(prompts, load_pretrained(SOURCE), counts)
    for split in ("train", "eval"):
        write(arguments.out / f"sentiment_{split}.jsonl", chosen, split)
    print(*(f"{number:5d} {what}" for what, number in sorted(counts.items())), sep="\n")


def read_prompts(path: Path) -> list[Prompt]:
    """The subjects, each in one phrasing; every fifth one is held out."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    subjects = [line for line in lines if line and not line.startswith("#")]
    return [
        Prompt(
            number,
            "eval" if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else "train",
            subject,
            PHRASINGS[number % len(PHRASINGS)].format(subject),
        )
        for number, subject in enumerate(subjects)
    ]


def choose_for(
    prompts: Sequence[Prompt], pretrained: Pretrained, counts: Counter[str]
) -> dict[Prompt, list[Answer]]:
    """The kept answers of every prompt that gets there within ROUNDS; `counts` is added to."""
    answers: dict[Prompt, dict[str, Answer]] = {prompt: {} for prompt in prompts}
    chosen: dict[Prompt, list[Answer]] = {}
    for round_number in range(ROUNDS):
        unfinished = [prompt for prompt in prompts if prompt not in chosen]
        for prompt, answer in sample(unfinished, round_number, pretrained, counts):
            answers[prompt].setdefault(answer.text, answer)
        for prompt in unfinished:
            if kept := choose(list(answers[prompt].values())):
                chosen[prompt] = kept
                counts[f"prompts finished in round {round_number + 1}"] += 1
    counts["prompts left out"] += len(prompts) - len(chosen)
    return {prompt: chosen[prompt] for prompt in prompts if prompt in chosen}


def sample(
    prompts: Sequence[Prompt], round_number: int, pretrained: Pretrained, counts: Counter[str]
) -> Iterator[tuple[Prompt, Answer]]:
    """CANDIDATES answers a prompt; those that did not end in time, or are not one line, are left out."""
    tokenizer, stop = pretrained.tokenizer, pretrained.tokenizer.eos_token_id
    assert isinstance(stop, int)
    numbers = range(round_number * CANDIDATES, (round_number + 1) * CANDIDATES)
    requests = [(prompt, number) for prompt in prompts for number in numbers]
    for start in range(0, len(requests), ROWS):
        batch = requests[start : start + ROWS]
        started = time.monotonic()
        rows = generate(
            pretrained.model,
            [_prompt_ids(tokenizer, prompt) for prompt, _ in batch],
            sampling=SAMPLING,
            seeds=[prompt.number * ROUNDS * CANDIDATES + number for prompt, number in batch],
            stop_tokens=[stop],
            batch_size=ROWS,
        )
        for (prompt, _), ids in zip(batch, rows, strict=True):
            text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
            reason = _unfit(text, ended=ids[-1] == stop)
            counts[f"answers {reason or 'fit'}"] += 1
            if reason is None:
                yield prompt, Answer(text, vader(prompt.text, text))
        done, seconds = start + len(batch), time.monotonic() - started
        print(f"round {round_number + 1}: {done}/{len(requests)} answers, {seconds:.1f} s", flush=True)


def choose(answers: Sequence[Answer]) -> list[Answer] | None:
    """Four answers spread over the scores, best first; None where they can't be had.

    The best, the worst, and the answers nearest to one and two thirds of the way between them; of equal
    scores the one sampled first, so that no two kept answers tie. None with fewer than four different
    scores, or with a range below MIN_RANGE.
    """
    first_of = {answer.score: answer for answer in reversed(answers)}
    scores = sorted(first_of, reverse=True)
    if len(scores) < KEPT or scores[0] - scores[-1] < MIN_RANGE:
        return None
    best, *between, worst = scores
    upper = min(between[:-1], key=lambda score: abs(score - (2 * best + worst) / 3))
    below = [score for score in between if score < upper]
    lower = min(below, key=lambda score: abs(score - (best + 2 * worst) / 3))
    return [first_of[score] for score in (best, upper, lower, worst)]


def write(path: Path, chosen: dict[Prompt, list[Answer]], split: str) -> None:
    """One JSON line a prompt of the split, responses best first."""
    rows = [
        {
            "id": f"sentiment-{prompt.number:03d}",
            "source": "sentiment",
            "subject": prompt.subject,
            "prompt": [{"role": "user", "content": prompt.text}],
            "responses": [answer.text for answer in answers],
            "scores": [answer.score for answer in answers],
        }
        for prompt, answers in chosen.items()
        if prompt.split == split
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} prompts")


def _prompt_ids(tokenizer, prompt: Prompt) -> list[int]:
    messages = [{"role": "user", "content": prompt.text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def _unfit(text: str, *, ended: bool) -> str | None:
    if not ended:
        return f"not ended in {SAMPLING.max_new_tokens} tokens"
    if not text:
        return "empty"
    return "of several lines" if len(text.splitlines()) > 1 else None


if __name__ == "__main__":
    main()
