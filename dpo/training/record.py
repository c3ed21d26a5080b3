"""What a run says of its steps: one line of metrics each, warnings, and the end of a run of skipped steps."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float

from dpo.data.batch import Batch
from dpo.outcomes import UserError
from dpo.training.checkpoint import Checkpoints
from dpo.training.metrics import Metrics, as_numbers
from dpo.training.reading import Dataset
from dpo.training.tracking import Tracker
from dpo.training.watchdog import Line, Watch


class StepClock:
    """Turns a step's device metrics into its line: reading them waits for the step to end."""

    def __init__(
        self,
        dataset: Dataset,
        learning_rates: Float[np.ndarray, " S"],
        batch_size: int,
        *,
        fill: Callable[[int], float],
        skipped: int = 0,
    ):
        """`learning_rates`: of every update; asked of the device, one would wait for the step just sent.

        `fill`: of a step, the part of its positions that hold a token; this process may not have all rows.
        `skipped`: steps so far that changed nothing, so that the schedule did not move on either.
        """
        self._fill = fill
        tokens = dataset.tokens
        self._tokens = tokens.prompt_lengths * tokens.num_responses + tokens.response_lengths.sum(1)
        self._learning_rates, self._skipped = learning_rates, skipped
        self._epochs_a_step = batch_size / len(tokens)
        self.restart()

    def restart(self) -> None:
        """Leave out of the next step's time what happened since the last step."""
        self._last = time.perf_counter()

    def finish(self, step: int, batch: Batch, metrics: Metrics) -> dict[str, float]:
        """tokens/s counts real tokens with the prompt counted once a response, whatever the layout saves."""
        values = as_numbers(metrics)
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        learning_rate = float(self._learning_rates[step - self._skipped])
        self._skipped += int(values["skipped"])
        return values | {
            "learning_rate": learning_rate,
            "epoch": (step + 1) * self._epochs_a_step,
            "tokens/s": float(self._tokens[np.asarray(batch.index)].sum()) / seconds,
            "seconds": seconds,
            "fill": self._fill(step),
        }


class Record:
    """Writes the metrics of a step when the next one is under way, and stops a run of skipped steps."""

    def __init__(
        self,
        tracker: Tracker,
        dataset: Dataset,
        learning_rates: Float[np.ndarray, " S"],
        checkpoints: Checkpoints,
        *,
        fill: Callable[[int], float],
        batch_size: int,
        beta: float,
        max_skipped: int,
        earlier: Iterable[Line] = (),
    ):
        """`earlier`: the training lines of the parts of the run before this one."""
        earlier = list(earlier)
        self._tracker, self._dataset, self._checkpoints = tracker, dataset, checkpoints
        skipped = int(sum(line["skipped"] for line in earlier))
        self._clock = StepClock(dataset, learning_rates, batch_size, fill=fill, skipped=skipped)
        self._watch = Watch(beta, earlier)
        self._max_skipped = max_skipped
        self._pending: tuple[int, Batch, Metrics] | None = None
        at_the_end = itertools.takewhile(lambda line: bool(line["skipped"]), reversed(earlier))
        self._skipped_in_a_row = len(list(at_the_end))

    def restart_clock(self) -> None:
        """Leave what happened since the last step out of the next one's time."""
        self._clock.restart()

    def add(self, step: int, batch: Batch, metrics: Metrics) -> None:
        """Write the step before this one; this one is still being computed."""
        self.flush()
        self._pending = step, batch, metrics

    def flush(self) -> None:
        """Wait for the last step and write it.

        Raises:
          ValueError: after `max_skipped` steps in a row that were not finite, with their rows.
        """
        if self._pending is None:
            return
        step, batch, metrics = self._pending
        self._pending = None
        values = self._clock.finish(step, batch, metrics)
        self._tracker.log(step, values)
        for warning in self._watch.add(step, values):
            self._tracker.message(warning)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if values["skipped"] else 0
        if self._skipped_in_a_row:
            self._tell_skipped(step, batch)

    def _tell_skipped(self, step: int, batch: Batch) -> None:
        rows = [self._dataset.location(row) for row in np.asarray(batch.index)]
        self._tracker.message(f"step {step}: loss or gradient is not finite, skipped; rows {', '.join(rows)}")
        if self._skipped_in_a_row >= self._max_skipped:
            latest = self._checkpoints.latest
            good = "none was saved" if latest is None else self._checkpoints.path(latest)
            raise UserError(
                f"{self._skipped_in_a_row} steps in a row were not finite (the last: {step}, rows {rows}); "
                f"the last good checkpoint: {good}. Lower "
                "optimizer.learning_rate, or look at these rows (docs/troubleshooting.md#not-finite)"
            )
