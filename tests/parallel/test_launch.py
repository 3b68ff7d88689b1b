"""The command for all GPUs is the user's own, behind a launcher that takes it."""

import shlex

import pytest
from accelerate.commands.launch import launch_command_parser

from mcir.parallel.launch import unused_devices

ARGV = ["/venv/bin/mcir", "train", "configs/a b.yaml", "optim.optimizer.lr=1e-4", "name='x y'"]


def test_the_command_with_the_users_own_arguments():
    sentence = unused_devices(4, ARGV, {})
    assert sentence is not None
    words = shlex.split(sentence.partition(": ")[2])
    assert words[:2] == ["accelerate", "launch"]
    known = launch_command_parser().parse_args(words[2:])
    assert (known.config_file, known.num_processes, known.module) == ("launch/accelerate/ddp.yaml", 4, True)
    assert [known.training_script, *known.training_script_args] == ["mcir", *ARGV[1:]]


@pytest.mark.parametrize("name", ["WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"])
def test_nothing_is_said_under_a_launcher_or_of_one_device(name):
    assert unused_devices(4, ARGV, {name: "no"}) is None
    assert unused_devices(1, ARGV, {}) is None
    assert unused_devices(0, ARGV, {}) is None
