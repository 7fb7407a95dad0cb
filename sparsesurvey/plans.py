"""Plans that are kept for as long as they are right: of a layer whose values are trained, or of several together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsesurvey.structure import Plan


class Made(NamedTuple):
    plan: Plan
    state: Any  # addresses and counts of writes
    held: list[Tensor]  # the tensors themselves, so that their addresses stay theirs
    copied: list[Tensor]  # the values of a plan that does not last, as they were


class Plans:
    """Plans by name, each made when it is first wanted, and again once it would no longer be right.

    ``lasting``: a plan reads the values where they are (see ``Block.lasting``), and is right until they move. Any other may
    have copied them, so it is made again once they were written to. torch counts writes, but not those of its fused
    optimizers: hence ``forget``, after which copies are compared with the values before they are trusted.
    """

    def __init__(self, lasting: bool) -> None:
        self.lasting, self.trained = lasting, False
        self.made: dict[str, Made] = {}
        self.copies: dict[torch.dtype, list[Tensor]] = {}

    def find(self, name: str, values: Sequence[Tensor], places: Sequence[Tensor], dtype: torch.dtype,
             make: Callable[[list[Tensor]], Plan]) -> Plan:
        """The plan ``make(values)``, of these values in ``dtype`` and of ``places``, the other tensors of what is packed."""
        held = [part.detach() for part in (*values, *places)]
        values = held[:len(values)]
        lasting = self.lasting and all(part.is_contiguous() for part in values)
        writes = [-1 if part.is_inference() else part._version for part in (held[len(values):] if lasting else held)]
        state = dtype, lasting, [part.data_ptr() for part in held], writes
        if lasting and values[0].dtype != dtype:
            values = self.lowered(values, dtype)
        made = self.made.get(name)
        if made is None or made.state != state or (self.trained and not all(map(torch.equal, made.copied, values))):
            copied = [] if lasting else [part.clone() for part in values]
            made = self.made[name] = Made(make([part.to(dtype) for part in values]), state, held, copied)
        return made.plan

    def lowered(self, values: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The values as they are now in another dtype, at addresses that lasting plans know."""
        kept = self.copies.get(dtype, [])
        if [(copy.shape, copy.device) for copy in kept] != [(part.shape, part.device) for part in values]:
            with torch.inference_mode(False):  # what is made under it could not be written to later
                kept = self.copies[dtype] = [torch.empty_like(part, dtype=dtype) for part in values]
        for copy, part in zip(kept, values):
            copy.copy_(part)
        return kept

    def forget(self) -> None:
        """A gradient of the values was made: they are about to change, in a way that may not be counted."""
        if not self.lasting:
            self.trained = True
            self.made.clear()
