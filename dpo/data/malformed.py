"""What is said of a row that cannot be read."""

from __future__ import annotations

from dpo.outcomes import UserError


class MalformedRowError(UserError):
    """A row that cannot be read: which field, a short countable reason, and what is allowed."""

    def __init__(self, field: str, reason: str, detail: str) -> None:
        super().__init__(f"field '{field}': {detail} [{reason}]")
        self.field, self.reason, self.detail = field, reason, detail
