"""The tokens before each token in its own sequence, for layers that look back a fixed number of positions.

slot         0 1 2 3 4 5 6 7 8 9
tokens       p p p a a b b|q c .       two groups and padding
branch       0 0 0 1 1 2 2|0 1 0
1 before     - 0 1 2 3 2 5|- 7 -       the first token of a response follows its prompt's last
2 before     - - 0 1 2 1 2|- - -       and never a sibling, or another group
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def find_predecessors(
    group: Int[Array, "R T"], branch: Int[Array, "R T"], count: int
) -> list[Int[Array, "R T"]]:
    """Slots of the 1st to the `count`-th token before each; -1 where there is none."""
    slot = jnp.broadcast_to(jnp.arange(group.shape[1])[None, :], group.shape)
    last_prompt = jax.lax.cummax(jnp.where((branch == 0) & (group != 0), slot, -1), axis=1)
    follows = (_shifted(group) == group) & (_shifted(branch) == branch)
    has_prompt = (branch != 0) & (_at(group, last_prompt) == group)
    first = jnp.where(follows, slot - 1, jnp.where(has_prompt, last_prompt, -1))
    first = jnp.where(group == 0, -1, first)
    found = [first]
    while len(found) < count:
        found.append(_at(first, found[-1]))
    return found[:count]


def take_slots(x: Float[Array, "R T D"], slots: Int[Array, "R S"]) -> Float[Array, "R S D"]:
    """What stands in these slots of each row; zeros for -1."""
    taken = jnp.take_along_axis(x, jnp.maximum(slots, 0)[:, :, None], axis=1)
    return jnp.where((slots >= 0)[:, :, None], taken, jnp.zeros((), x.dtype))


def look_back(
    last: Float[Array, "R W D"], x: Float[Array, "R S D"], group: Int[Array, "R S"]
) -> tuple[list[Float[Array, "R S D"]], Float[Array, "R W D"]]:
    """What stands 1 … W before each of a row's further tokens, and the last W of all; `group` 0 is padding.

    Padding is at the end of a row: no token looks back over it.
    """
    width, length = last.shape[1], x.shape[1]
    joined = jnp.concatenate([last, x.astype(last.dtype)], axis=1)
    before = [joined[:, width - j : width - j + length] for j in range(1, width + 1)]
    ends = (group != 0).sum(1)[:, None] + jnp.arange(width)[None, :]
    return before, take_slots(joined, ends)


def _shifted(x: Int[Array, "R T"]) -> Int[Array, "R T"]:
    """Of the slot before; -1 in front of the first."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)), constant_values=-1)


def _at(x: Int[Array, "R T"], slots: Int[Array, "R T"]) -> Int[Array, "R T"]:
    return jnp.where(slots >= 0, jnp.take_along_axis(x, jnp.maximum(slots, 0), axis=1), -1)
