"""A trace of some training steps by JAX's profiler, where TensorBoard's profile plugin looks for it."""

import re
from pathlib import Path

import jax

from seqmnist_jax.errors import UsageError


def parse_steps(text: str, total: int) -> range:
    """The steps of 'FIRST:LAST', both counted, from 1; an empty range for ''.

    Args:
      text: the config's value.
      total: the steps of the run.

    Raises:
      UsageError: another form, or no such steps.
    """
    found = re.fullmatch(r"(\d{1,10}):(\d{1,10})", text)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if text and not 1 <= first <= last <= total:
        raise UsageError(
            f"runtime.profile_steps is {text!r}; expected 'FIRST:LAST', the first and the last step to trace, "
            f"of 1 to train.steps = {total}, as '100:110', or '' for none."
        )
    return range(first, last + 1) if text else range(0)


class StepTrace:
    """Traces steps of a run into ``FOLDER/plugins/profile``; as a context manager, which ends a trace that goes on.

    A trace holds one dispatch or several, so dispatches must end where it begins and ends.
    """

    def __init__(self, folder: Path, steps: range):
        """A trace of these steps, or none where the range is empty."""
        self._folder = folder
        self._steps = steps
        self._is_on = False

    def ends(self, step: int) -> list[int]:
        """The steps after `step` at which a dispatch must end."""
        bounds = (self._steps.start - 1, self._steps.stop - 1) if self._steps else ()
        return [bound for bound in bounds if bound > step]

    def at(self, step: int) -> None:
        """Begins or ends the trace, once `step` steps are done."""
        is_wanted = step + 1 in self._steps
        if is_wanted and not self._is_on:
            jax.profiler.start_trace(self._folder)
        elif self._is_on and not is_wanted:
            jax.profiler.stop_trace()
        self._is_on = is_wanted

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_on:
            jax.profiler.stop_trace()
