"""What a launch could use and does not."""

import shlex
from collections.abc import Mapping, Sequence


def unused_devices(num_devices: int, argv: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """The command that would use all devices of this machine, where there are several and no launcher started this
    process; `argv` is the process's, its program first."""
    launched = any(name in environment for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"))
    if num_devices < 2 or launched:
        return None
    command = f"accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes {num_devices} -m mcir"
    return f"one of {num_devices} GPUs is used; all of them: {command} {shlex.join(argv[1:])}"
