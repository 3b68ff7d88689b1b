"""What a command imports before it does anything: reading a config must not wait for what only a run needs."""

import subprocess
import sys

HEAVY = (
    "torchvision",
    "torch._dynamo",
    "sympy",
    "spandrel",
    "datasets",
    "pandas",
    "scipy",
    "matplotlib",
    "tensorboard",
)


def test_reading_a_config_imports_nothing_that_only_a_run_needs():
    code = (
        "import sys, mcir.config; mcir.config.load(['configs/quickstart.yaml']);"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_does_not_wait_for_torch():
    code = "import sys, mcir.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_step_imports_no_compiler(tmp_path):
    """Neither torch's, which its optimizers load to be left alone by it, nor DeepSpeed, torchvision and sympy."""
    code = (
        "import sys; from mcir.config import load; from mcir.train.engine import build_engine;"
        f"config = load(['configs/quickstart.yaml'], ['runs_dir={tmp_path}', 'steps=1', 'validation=null']);"
        "build_engine(config).fit();"
        "print([name for name in ('torch._dynamo', 'sympy', 'torchvision', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
