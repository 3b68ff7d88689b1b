import pytest
from pydantic import ValidationError

from mcir.objective.schedule import Schedule


def test_stages_are_due_where_their_own_period_says():
    stages = [{"until": 10, "every": 2}, {"until": 15, "every": 3}, {"every": 5}]
    schedule = Schedule(update_every=stages)
    due = [step for step in range(1, 31) if schedule.last_update(step) == step]
    assert due == [2, 4, 6, 8, 10, 12, 15, 20, 25, 30]
    assert [schedule.last_update(step) for step in (1, 11, 14, 19)] == [0, 10, 12, 15]
    assert Schedule.model_validate(schedule.model_dump(mode="json")) == schedule


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"update_every": []}, "each stage but the last"),
        ({"update_every": [{"until": 5, "every": 1}]}, "each stage but the last"),
        ({"update_every": [{"every": 1}, {"every": 2}]}, "each stage but the last"),
        ({"update_every": [{"until": 5, "every": 1}, {"until": 5, "every": 2}, {"every": 1}]}, "must rise"),
        ({"update_every": 100, "trigger": 0.02}, "either update_every or a trigger"),
        ({"update_every": None}, "either update_every or a trigger"),
        ({"view_sigma": [3, 1]}, "low, high"),
    ],
)
def test_contradictions(values, message):
    with pytest.raises(ValidationError, match=message):
        Schedule(**values)


def test_a_trigger_takes_the_place_of_the_period():
    schedule = Schedule(trigger=0.022)
    assert schedule.update_every is None
    assert Schedule.model_validate(schedule.model_dump(mode="json")) == schedule
