"""Which runs a study consists of, and which arms are refused."""

import pytest

from mcir.errors import UserError
from mcir.section import to_yaml
from mcir.study.plan import Plan, equal_steps, read_arms, steps_in_equal_time
from tests.runs import tiny_config


@pytest.fixture
def base(tmp_path):
    source = {"format": "parquet", "path": "nowhere"}
    sets = {"held": {"source": source, "degradation": {"name": "bicubic", "scale": 2}, "protocol": "sr"}}
    file = tmp_path / "base.yaml"
    file.write_text(to_yaml(tiny_config(tmp_path, seed=7, validation={"every": 2, "sets": sets})))
    return str(file)


@pytest.fixture
def overlay(tmp_path):
    def write(name, **values):
        file = tmp_path / f"{name}.yaml"
        file.write_text(to_yaml(values))
        return str(file)

    return write


def test_runs_go_seed_by_seed(base, overlay, tmp_path):
    plain, fast = overlay("plain", objective={"contrast": None}), overlay("fast", optim={"optimizer": {"lr": 0.01}})
    arms = read_arms([base], ["ema_decay=0.5"], [plain, f"both={plain}+{fast}"])
    plan = Plan(arms, 3, tmp_path / "out", None, equal_steps(arms, None))
    assert [task.name for task in plan.tasks] == [
        f"{arm}.seed{seed}" for seed in (7, 8, 9) for arm in ("plain", "both")
    ]
    last = plan.tasks[-1].config
    assert (last.seed, last.optim.optimizer.lr, last.ema_decay, last.objective.contrast) == (9, 0.01, 0.5, None)
    assert plan.changes("both") == {"optim.optimizer.lr": 0.01}
    assert Plan(arms, 9, tmp_path / "out", None, plan.steps).tasks[: len(plan.tasks)] == plan.tasks


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"data": {"crop_size": 8}},
            r"other cannot be compared with plain: they differ in data\.crop_size: 8, not 16",
        ),
        ({"batch_size": 8}, "batch_size: 8, not 4"),
        ({"arch": {"num_blocks": 3}}, r"arch\.num_blocks: 3, not 2"),
        ({"seed": 1}, "seed: 1, not 7"),
        ({"validation": {"every": 1}}, r"validation\.every"),
        (
            {"ema_decay": 0.999},
            r"the averages of decay 0\.999 are measured of it, and the averages of decay 0\.9 of plain; give",
        ),
        ({"ema_decay": None}, "the trained weights are measured of it"),
        ({"validation": None}, "arm other: has no validation section"),
        ({"objective": {"contrasts": None}}, r"objective\.contrasts: no such field, do you mean contrast"),
    ],
)
def test_wrong_arms_are_refused(base, overlay, values, said):
    with pytest.raises(UserError, match=said):
        read_arms([base], [], [overlay("plain", objective={"contrast": None}), overlay("other", **values)])


def test_an_arm_with_an_average_of_its_own_is_compared_by_what_was_trained(base, overlay):
    """DCR's and PNE's overlays follow an average, which the others' recipes may have none of."""
    arms = [overlay("plain", objective={"contrast": None}, ema_decay=None), overlay("other", ema_decay=0.999)]
    assert len(read_arms([base], ["validation.weights=target"], arms)) == 2


def test_names_are_names(base, overlay):
    plain = overlay("plain", objective={"contrast": None})
    with pytest.raises(UserError, match="two arms are called plain"):
        read_arms([base], [], [plain, plain])
    with pytest.raises(UserError, match=r"'a\.b' is no name"):
        read_arms([base], [], [f"a.b={plain}", plain])
    with pytest.raises(UserError, match="at least two"):
        read_arms([base], [], [plain])


def test_other_steps_need_a_word(base, overlay):
    plain = overlay("plain", objective={"contrast": None})
    arms = read_arms([base], [], [plain, overlay("long", steps=12)])
    with pytest.raises(UserError, match="arm long trains 12 steps, the first one 6: give --equal steps"):
        equal_steps(arms, None)
    assert equal_steps(arms, "steps") == {"plain": 6, "long": 6}
    assert steps_in_equal_time(arms, {"plain": 90.0, "long": 30.0}) == {"plain": 6, "long": 2}
    stepped = {"schedule": {"name": "multistep", "milestones": [3]}}
    arms = read_arms([base], [], [plain, overlay("stepped", optim=stepped)])
    with pytest.raises(UserError, match=r"arm stepped: optim\.schedule names steps of its own"):
        steps_in_equal_time(arms, {"plain": 90.0, "stepped": 30.0})
    pieces = {"schedule": {"name": "segments", "pieces": [{"schedule": {"name": "cosine"}}]}}
    staged = {"stages": [{"after": 3, "crop_size": 16, "batch_size": 4}]}
    for values, place in (({"optim": pieces}, "optim.schedule"), (staged, "stages")):
        (name, config), *_ = read_arms([base], [], [overlay("own", **values), overlay("same", **values)]).items()
        with pytest.raises(UserError, match=rf"arm own: {place} names steps of its own"):
            steps_in_equal_time({name: config}, {name: 1.0})


def test_arms_share_initial_weights_and_data(base, overlay, tmp_path):
    """Of one seed, whatever the objective; and no two seeds do."""
    import torch

    from mcir.train.engine import build_engine

    arms = read_arms([base], [], [overlay("plain", objective={"contrast": None}), overlay("spn")])
    tasks = Plan(arms, 2, tmp_path, None, equal_steps(arms, None)).tasks
    starts, samples = {}, {}
    for task in tasks:
        engine = build_engine(task.config.model_copy(update={"validation": None}))
        starts[task.name] = torch.cat([p.detach().flatten() for p in engine.model.parameters()])
        samples[task.name] = next(iter(engine.loader)).clean
    assert torch.equal(starts["plain.seed7"], starts["spn.seed7"])
    assert torch.equal(samples["plain.seed7"], samples["spn.seed7"])
    assert not torch.equal(starts["plain.seed7"], starts["plain.seed8"])
    assert not torch.equal(samples["plain.seed7"], samples["plain.seed8"])
