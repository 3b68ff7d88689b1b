"""Signals that ask a run to stop, and failures beside the training, agreed by all ranks: what reaches any process
stops all of them after the same step."""

import signal
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed as dist

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR1: 75}
"""75 (EX_TEMPFAIL): a checkpoint was saved, start me again with `--resume auto`. 130: interrupted by the user,
saved too."""
FAILED = 1
"""What all ranks agree on where one has failed and no signal asks for more."""


class StopRequest:
    """While entered, SIGINT, SIGTERM and SIGUSR1 are noted instead of obeyed. A second SIGINT is obeyed."""

    def __init__(self, accelerator: Accelerator, timeout_s: float = 1800) -> None:
        # A gloo group of its own: the flag never waits for the GPU. It times out like the group that trains.
        timeout = timedelta(seconds=timeout_s)
        several = accelerator.num_processes > 1
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if several else None
        self._received = 0
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in EXIT_CODES}
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if kind is None and self._pending is not None:  # all ranks have begun it
            # A tensor that gloo's thread still holds when the interpreter ends aborts the process (pytorch#179291).
            self._pending[1].wait()
            self._pending = None

    def agreed(self, failed: bool = False) -> int:
        """Exit code that a signal to any rank asks for, FAILED if one has `failed`, else 0; the same on all ranks. Call
        once a step, on all.

        The ranks' flags are reduced in the background of one step and read in the next, so that nobody waits.
        """
        own = max(self._received, FAILED * failed)
        if self._group is None:
            return own
        agreed = 0
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            agreed = int(flag)
        flag = torch.tensor(own)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending = (flag, work)
        return agreed

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == EXIT_CODES[signal.SIGINT]:
            raise KeyboardInterrupt
        self._received = max(self._received, EXIT_CODES[signal.Signals(number)])
