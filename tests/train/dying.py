"""Kills a piece of work at each of its system calls, through Linux's ptrace: the work runs in a forked child, whose
threads stop before every call; the n-th is never made. Nothing of the child is simulated: what it has done by then is
on the disk."""

import ctypes
import os
import platform
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress

TRACEME, SYSCALL, SETOPTIONS, GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
TRACESYSGOOD, TRACECLONE, EXITKILL = 1, 8, 0x100000
EVERY_THREAD = 0x40000000  # __WALL
CHANGING = {
    "x86_64": {1, 2, 18, 20, 74, 75, 77, 82, 83, 84, 87, 257, 258, 263, 264, 285, 316},
    "aarch64": {34, 35, 38, 46, 47, 56, 64, 66, 68, 82, 83, 276},
}
"""Numbers of the calls that change files: open, write, fsync, truncate, rename, mkdir, rmdir, unlink and their kin."""
FUTEX = {"x86_64": 202, "aarch64": 98}
"""By which threads wait for each other, a little more or less often each time: never counted."""
libc = ctypes.CDLL(None, use_errno=True)


def ptrace(request: int, pid: int, address: int = 0, data: object = None) -> None:
    if libc.ptrace(ctypes.c_long(request), ctypes.c_long(pid), ctypes.c_void_p(address), data) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")


def killed_at_each_call(
    prepare: Callable[[], object], work: Callable[[], object], changing: bool = False
) -> Iterator[int]:
    """Yields n after `prepare()` and then `work()`, killed before its n-th system call, until it comes to its end.

    `changing`: counts only calls that change files: before the others the disk is as before the next of these. OSError
    where tracing is not allowed.
    """
    machine = platform.machine()
    n = 0
    while True:
        prepare()
        n += 1
        ended = _run(work, n, CHANGING.get(machine) if changing else None, FUTEX.get(machine))
        yield n
        if ended:
            return


def _run(work: Callable[[], object], n: int, numbers: set[int] | None, futex: int | None) -> bool:
    """Whether the work came to its end before its n-th system call."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setpgid(0, 0)  # so that its threads, and no other child, are waited for
            ptrace(TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            work()
            code = 0
        finally:
            os._exit(code)
    stopped, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        raise OSError("ptrace is not allowed")
    ptrace(SETOPTIONS, child, data=ctypes.c_void_p(TRACESYSGOOD | TRACECLONE | EXITKILL))
    info = (ctypes.c_uint64 * 11)()  # struct ptrace_syscall_info: op in the first byte, the number after 24
    while True:
        with suppress(ProcessLookupError):  # a thread that ends with its process
            ptrace(SYSCALL, stopped)
        stopped, status = os.waitpid(-child, EVERY_THREAD)
        while not os.WIFSTOPPED(status) and stopped != child:
            stopped, status = os.waitpid(-child, EVERY_THREAD)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the work failed"
            return True
        if not os.WIFSTOPPED(status):
            raise AssertionError(f"the work died by itself: {status}")
        if os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:
            continue
        ptrace(GET_SYSCALL_INFO, stopped, ctypes.sizeof(info), info)
        entered = info[0] & 0xFF == 1
        n -= entered and (info[3] != futex if numbers is None else info[3] in numbers)
        if entered and n == 0:
            os.kill(child, signal.SIGKILL)
            while os.waitpid(-child, EVERY_THREAD)[0] != child:
                pass
            return False
