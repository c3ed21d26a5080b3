"""Makes chunks of tokens in a process of its own: `token_processes` starts this, and nothing imports it.

It reads lines of JSON from standard input, first a job, then parts, and answers each part by one line:

    {"source", "split", "expand", "reading": as `RowReading` has it, "rules": the tokenizer's, "policies"}
    [part, where to write its chunk; null to read the rows only]
    {"chunk": true} once it is written, {"summary", "count"} of rows read only, or null for who asks to do it

It is ended by the end of its input, also where whoever started it was killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo.data.chunks import Chunk, ChunkReader, TokenJob, write_chunk
from dpo.data.columns import RowReading
from dpo.data.sources import Part
from dpo.data.tokenizer_rules import make_tokenizer


def main() -> None:
    """Answer requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what a library prints is no answer
        reader = _reader(json.loads(next(sys.stdin)))
        for line in sys.stdin:
            print(json.dumps(_answer(reader, *json.loads(line))), file=answers, flush=True)


def _reader(job: Mapping[str, Any]) -> ChunkReader | None:
    tokenizer = make_tokenizer(job["rules"])
    reading = RowReading.from_json(job["reading"])
    if tokenizer is None:
        return None
    return ChunkReader(
        TokenJob(job["source"], job["split"], job["expand"], reading, tokenizer, job["policies"])
    )


def _answer(reader: ChunkReader | None, part: Sequence[Any], path: str | None) -> Any:
    """What became of a part; errors are left to who asks, which meets the same and can raise it."""
    if reader is None:
        return None
    try:
        made = reader.check(Part(*part)) if path is None else reader.tokenize(Part(*part))
        if isinstance(made, Chunk):
            assert path is not None
            write_chunk(Path(path), made)
            return {"chunk": True}
    except Exception:
        return None
    return None if made.error else {"summary": made.summary, "count": made.num_preferences}


if __name__ == "__main__":
    main()
