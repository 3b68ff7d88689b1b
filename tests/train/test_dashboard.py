"""What TensorBoard's own server makes of it."""

import json
import urllib.parse
import urllib.request

import pytest
from tensorboard import program
from torch.utils.tensorboard import SummaryWriter

from mcir.train import dashboard

SETTINGS = {
    "spn": {"seed": 0, "steps": 8, "objective.contrast.name": "spn", "objective.contrast.weight": 0.1},
    "plain": {"seed": 0, "steps": 8, "objective.contrast.name": "none"},
}


@pytest.fixture(scope="module")
def get(tmp_path_factory):
    """Asks a TensorBoard over two arms of a study, of which the first was started twice."""
    folder = tmp_path_factory.mktemp("runs")
    for name, settings, first_step in (*((n, s, 0) for n, s in SETTINGS.items()), ("spn", SETTINGS["spn"], 4)):
        writer = SummaryWriter(str(folder / name / "tensorboard"), purge_step=first_step + 1)
        dashboard.describe(writer, name, settings, f"name: {name}\nsteps: 8\n", first_step)
        for step in range(first_step + 1, first_step + 5):
            writer.add_scalar("best/held/psnr", 20 + step, step)
            writer.add_scalar("loss/total", 1 / step, step)
        dashboard.close(writer)
        writer.close()
    server = program.TensorBoard()
    server.configure(argv=["tensorboard", "--logdir", str(folder), "--port", "0", "--load_fast", "false"])
    url = server.launch()

    def ask(path, body=None, **query):
        address = f"{url}data/plugin/{path}?{urllib.parse.urlencode(query)}"
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    return ask


def test_the_layout_asks_the_three_questions(get):
    layout = get("custom_scalars/layout")
    titles = [category["title"] for category in layout["category"]]
    assert titles == ["Is it learning?", "Is it fast?", "Is the contrast sane?", "If not"]  # once for all runs
    assert [len(category["chart"]) for category in layout["category"][:3]] == [2, 2, 2]  # a row each


def test_runs_compare_in_the_hparams_tab(get):
    body = {"hparamsLimit": 0, "includeMetrics": True}
    experiment = get("hparams/experiment", body)
    infos = {info["name"]: info.get("differs", False) for info in experiment["hparamInfos"]}
    assert infos.keys() == SETTINGS["spn"].keys()  # also what only one arm has
    assert next(iter(infos)) == "objective.contrast.name"  # what differs comes first
    assert [name for name, differs in infos.items() if differs] == ["objective.contrast.name"]
    assert experiment["metricInfos"][0]["name"]["tag"] == "best/held/psnr"
    listed = {"colParams": [{"metric": info["name"]} for info in experiment["metricInfos"]], "startIndex": 0}
    groups = get("hparams/session_groups", listed | {"sliceSize": 10, "allowedStatuses": ["STATUS_SUCCESS"]})
    best = {g["name"]: {m["name"]["tag"]: m["value"] for m in g["metricValues"]} for g in groups["sessionGroups"]}
    assert {name: values["best/held/psnr"] for name, values in best.items()} == {"spn": 28, "plain": 24}


def test_the_config_of_every_start_is_a_text(get):
    texts = get("text/text", run="spn/tensorboard", tag="config/text_summary")
    assert [text["step"] for text in texts] == [0, 4]
    assert "name: spn\nsteps: 8" in texts[0]["text"]
