"""One line for each mistake of a config, also where a field takes several kinds of values."""

import pytest

from mcir.config import load, validate
from mcir.errors import UserError
from tests.runs import tiny_config

PRESETS = "'real_esrgan' or 'bsrgan'"
STEPS = "blur, sinc, resize, sample, noise, poisson, jpeg, apply, group, one_of"


@pytest.mark.parametrize(
    ("steps", "line"),
    [
        ("real", f"steps: Input should be {PRESETS}, or a list (given: 'real')"),
        (5, f"steps: Input should be {PRESETS}, or a list (given: 5)"),
        ([], "steps: Tuple should have at least 1 item after validation, not 0 (given: [])"),
        ([{"name": "blurr"}], f"steps.0.name: blurr is none of {STEPS}, do you mean blur?"),
        ([{"name": "blur", "sigma": -1}], "steps.0.sigma: Input should be greater than 0 (given: -1)"),
        ([{"name": "blur", "sigma": [1, -1]}], "steps.0.sigma.1: Input should be greater than 0 (given: -1)"),
        (
            [{"name": "group", "steps": [{"name": "noise", "sigm": 3}]}],
            "steps.0.steps.0.sigm: no such field, do you mean sigma?",
        ),
    ],
)
def test_a_field_of_several_kinds_has_one_line(tmp_path, steps, line):
    values = tiny_config(tmp_path)
    values["data"]["train"][0]["degradation"] = {"name": "chain", "scale": 2, "steps": steps}
    with pytest.raises(UserError) as error:
        validate(values, "test")
    assert str(error.value) == f"test: 1 mistake\n  data.train.0.degradation.{line}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1: 3", "1 is no name of a field; write it in quotes"),
        ("data: {train: [{2: 3}]}", "data: train: 0: 2 is no name of a field"),
        ("? [a, b]\n: 4", "('a', 'b') is no name of a field"),
    ],
)
def test_names_of_fields_are_text(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load([tmp_path / "a.yaml"])
    assert f"{tmp_path / 'a.yaml'}: {message}" in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "lines"),
    [
        ("optim.optimizer.lr", float("inf"), ["optim.optimizer.lr: Input should be a finite number (given: inf)"]),
        ("data.num_workers", -1, ["data.num_workers: Input should be greater than or equal to 0 (given: -1)"]),
        ("optim.optimizer", {"name": "adam", "lr": 1e-3, "betas": [1]}, [
            "optim.optimizer.betas.0: Input should be less than 1 (given: 1)",
            "optim.optimizer.betas.1: required and not given",
        ]),
        ("data.degrade_on_device", True, ["data.degrade_on_device: needs the degradation bicubic of every source"]),
        ("objective.contrast.weight", {"target_rati": 3}, [
            "objective.contrast.weight.target_ratio: required and not given",
            "objective.contrast.weight.target_rati: no such field, do you mean target_ratio?",
        ]),
    ],
)  # fmt: skip
def test_lines_name_what_the_user_wrote(tmp_path, field, value, lines):
    values = tiny_config(tmp_path)
    chain = {"name": "chain", "scale": 2, "steps": "real_esrgan"}
    values["data"]["train"].append(values["data"]["train"][0] | {"degradation": chain})
    *parents, last = field.split(".")
    node = values
    for part in parents:
        node = node[part]
    node[last] = value
    with pytest.raises(UserError) as error:
        validate(values, "test")
    assert str(error.value).splitlines()[1:] == [f"  {line}" for line in lines]
