"""`python -m mcir.study.child PARENT ARGUMENTS…`: `python -m mcir ARGUMENTS…` that is asked to stop, as by a scheduler,
once the process PARENT that started it is gone. A killed study must not leave a run that trains on unseen.
"""

import os
import runpy
import signal
import sys
import threading
import time


def _stop_with(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="parent").start()


if __name__ == "__main__":
    _stop_with(int(sys.argv.pop(1)))
    runpy.run_module("mcir", run_name="__main__", alter_sys=True)
