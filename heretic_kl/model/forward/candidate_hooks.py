"""Several candidates in one batch: each edits its own rows. Knows nothing about how plans are made.

Rows of one candidate follow each other: all of the first one, then all of the second, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from heretic_kl.ablation import Operator, Plan
from heretic_kl.errors import MeasurementError
from heretic_kl.model.forward.hooks import passed_on
from heretic_kl.model.sites.architecture import Architecture, Site
from heretic_kl.model.sites.stack import stream_out_of, with_stream_out


class CandidateRows:
    """How many rows of the running batch each candidate has; rows may leave."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = list(counts)

    @property
    def rows(self) -> int:
        """Of the whole batch."""
        return sum(self.counts)

    def slices(self) -> Iterator[tuple[int, slice]]:
        """Each candidate that has rows, with its rows."""
        start = 0
        for slot, count in enumerate(self.counts):
            if count:
                yield slot, slice(start, start + count)
            start += count

    def set_rows(self, candidates_of_rows: Sequence[int]) -> None:
        """Count rows anew from the candidate of each, in order."""
        counts = [0] * len(self.counts)
        for slot in candidates_of_rows:
            counts[slot] += 1
        self.counts = counts


@contextmanager
def edited_by_candidate(
    architecture: Architecture, plans: Sequence[Plan], candidate_rows: CandidateRows
) -> Iterator[None]:
    """Apply each plan to its own rows until the block is left.

    Raises:
        MeasurementError: while running, a site's output is not laid out by rows.
    """
    with ExitStack() as handles:
        for key in dict.fromkeys(key for plan in plans for key in plan):
            site = architecture.site(key)
            device = site.device
            operators = [
                plan[key].to(device) if key in plan else None  # this candidate leaves it alone
                for plan in plans
            ]
            hook = _candidate_hook(site, operators, candidate_rows)
            handles.enter_context(site.module.register_forward_hook(hook, with_kwargs=True))
        yield


def _candidate_hook(
    site: Site, operators: Sequence[Operator | None], candidate_rows: CandidateRows
) -> Callable[[nn.Module, Any, Any, Any], Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any, returned: Any) -> Any:
        output = stream_out_of(returned)
        # Experts give their tokens sequence by sequence in one dimension.
        per_row, odd = divmod(output.shape[0], candidate_rows.rows)
        if odd:
            raise MeasurementError(
                f"{type(module).__name__} gives {output.shape[0]} rows for {candidate_rows.rows} "
                "in the batch: candidates cannot share one; use --parallel-candidates 1"
            )
        rest = passed_on(site, args, kwargs)
        edited = output.clone() if None in operators else torch.empty_like(output)
        for slot, rows in candidate_rows.slices():
            operator = operators[slot]
            if operator is not None:
                part = slice(rows.start * per_row, rows.stop * per_row)
                if rest is None:
                    edited[part] = operator(output[part])
                else:
                    edited[part] = operator(output[part] - rest[part]) + rest[part]
        return with_stream_out(returned, edited)

    return hook
