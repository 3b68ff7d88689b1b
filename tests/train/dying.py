"""Kills a piece of work at each of its system calls, through Linux's ptrace: the work runs in a forked child, which
stops before every call; the n-th is never made. Nothing of the child is simulated: what it has done by then is on the
disk."""

import ctypes
import os
import platform
import signal
from collections.abc import Callable, Iterator

TRACEME, SYSCALL, SETOPTIONS, GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
TRACESYSGOOD, EXITKILL = 1, 0x100000
CHANGING = {
    "x86_64": {1, 2, 18, 20, 74, 75, 77, 82, 83, 84, 87, 257, 258, 263, 264, 285, 316},
    "aarch64": {34, 35, 38, 46, 47, 56, 64, 66, 68, 82, 83, 276},
}
"""Numbers of the calls that change files: open, write, fsync, truncate, rename, mkdir, rmdir, unlink and their kin."""
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
    numbers = CHANGING.get(platform.machine()) if changing else None
    n = 0
    while True:
        prepare()
        n += 1
        ended = _run(work, n, numbers)
        yield n
        if ended:
            return


def _run(work: Callable[[], object], n: int, numbers: set[int] | None) -> bool:
    """Whether the work came to its end before its n-th system call."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            ptrace(TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        raise OSError("ptrace is not allowed")
    ptrace(SETOPTIONS, child, data=ctypes.c_void_p(TRACESYSGOOD | EXITKILL))
    info = (ctypes.c_uint64 * 11)()  # struct ptrace_syscall_info: op in the first byte, the number after 24
    while True:
        ptrace(SYSCALL, child)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the work failed"
            return True
        if not os.WIFSTOPPED(status):
            raise AssertionError(f"the work died by itself: {status}")
        if os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:
            continue
        ptrace(GET_SYSCALL_INFO, child, ctypes.sizeof(info), info)
        entered = info[0] & 0xFF == 1
        n -= entered and (numbers is None or info[3] in numbers)
        if entered and n == 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
