"""Datasets of the Hub, over its HTTP interface on this machine: the same as on a disk, as they are; what is said."""

import json
import os
import re
import shutil
import subprocess
import sys
from hashlib import sha1
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mcir.data.loader import Loader
from mcir.data.stream import DataConfig
from tests.data.test_sources import expected_rows
from tests.hub import serve
from tests.runs import png, write_dataset


@pytest.fixture
def dataset(tmp_path) -> Path:
    return write_dataset(tmp_path / "parquet", num_rows=21, num_shards=3, scale=2)


def of_the_hub(code: str, folder: Path, endpoint: str, **environment: str) -> Any:
    """What a process prints, as JSON, for which `endpoint` is the Hub; `opened(...)` is there for it."""
    before = (
        "import json\n"
        "from hashlib import sha1\n"
        "from mcir.data.loader import Loader\nfrom mcir.data.stream import DataConfig\n"
        "from mcir.data.sources import HubSource\n"
        "from mcir.errors import UserError\n"
        "def opened(repo, **source):\n"
        "    try:\n        return HubSource(format='hub', repo=repo, **source).open()\n"
        "    except UserError as error:\n        return str(error)\n"
    )
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home")} | environment
    command = [sys.executable, "-c", before + code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_dataset_of_the_hub_is_the_same_as_on_a_disk(dataset, tmp_path):
    """Its rows, and in workers its order, too; they must not share the connections of the process they come from."""
    shutil.copytree(dataset, tmp_path / "hub/owner/name")
    train: dict[str, Any] = {"degradation": None}
    data = {"crop_size": 16, "num_workers": 2, "shuffle_buffer": 4}
    code = (
        "rows = [(row.key, sha1(row.clean).hexdigest()) for row in opened('owner/name')]\n"
        f"train = {train} | {{'source': {{'format': 'hub', 'repo': 'owner/name'}}}}\n"
        f"data = DataConfig.model_validate({data} | {{'train': [train]}})\n"
        "batches = iter(Loader(data, scale=2, batch_size=6, seed=0))\n"
        "batches = [next(batches) for _ in range(7)]\n"
        "clean = [sha1(batch.clean.numpy()).hexdigest() for batch in batches]\n"
        "print(json.dumps([rows, [batch.key for batch in batches], clean]))"
    )
    with serve(tmp_path / "hub") as hub:
        rows, keys, clean = of_the_hub(code, tmp_path, hub.endpoint)
    assert rows == [[key, sha1(clean).hexdigest()] for key, clean, _ in expected_rows(dataset)]
    local = {"train": [train | {"source": {"format": "parquet", "path": str(dataset)}}], "num_workers": 0}
    loader = Loader(DataConfig.model_validate(data | local), scale=2, batch_size=6, seed=0)
    batches = list(islice(loader, 7))
    assert keys == [batch.key for batch in batches]
    assert clean == [sha1(batch.clean.numpy()).hexdigest() for batch in batches]


def test_little_more_than_what_is_read_is_fetched_from_the_hub(tmp_path):
    rng = np.random.default_rng(0)
    columns = {
        "key": [str(i) for i in range(24)],
        "clean": [{"bytes": rng.bytes(2**20), "path": None} for _ in range(24)],
    }
    file = tmp_path / "hub/owner/name/train.parquet"
    file.parent.mkdir(parents=True)
    pq.write_table(pa.table(columns), file, row_group_size=4, compression="none")
    code = "units = opened('owner/name')\nprint(sum(len(list(units.rows(u, 0))) for u in (5, 1, 3, 0, 2, 4)))"
    with serve(tmp_path / "hub") as hub:
        assert of_the_hub(code, tmp_path, hub.endpoint) == 24
        assert 1 < hub.num_bytes / file.stat().st_size < 1.1


def test_what_the_hub_does_not_have(tmp_path):
    write_dataset(tmp_path / "hub/owner/name", num_rows=4, num_shards=1)
    (tmp_path / "hub/owner/text").mkdir(parents=True)
    (tmp_path / "hub/owner/text/a.csv").write_text("a,b\n1,2\n")
    code = "print(json.dumps([opened('owner/other'), opened('owner/text'), opened('owner/name', split='test')]))"
    with serve(tmp_path / "hub") as hub:
        missing, text, split = of_the_hub(code, tmp_path, hub.endpoint)
    assert missing.startswith("the Hub dataset owner/other cannot be opened (")
    assert missing.endswith("); check name, network and HF_HUB_OFFLINE")
    assert re.search(
        r"owner/text is not stored as Parquet: split train has .*a\.csv; .* revision: refs/convert/parquet$", text
    )
    assert split == "the Hub dataset owner/name has no split test; it has train"


CARD = """---
configs:
- config_name: x2
  data_files: [{split: train, path: x2/train-*}, {split: test, path: x2/test-*}]
- config_name: x4
  data_files: [{split: train, path: x4/train-*}]
---
"""


def test_named_configurations_and_columns_of_other_names(tmp_path):
    """And the Hub's own Parquet copy of a dataset that is stored otherwise."""
    image = png(np.zeros((4, 4, 3), np.uint8))
    expected = {}
    for place in ("x2/train-0", "x2/test-0", "x4/train-0"):
        file = tmp_path / f"hub/owner/name/{place}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pictures = [{"bytes": image + bytes([i]) + place.encode(), "path": None} for i in range(2)]
        pq.write_table(pa.table({"image_id": [7, 8], "hr": pictures, "lr": pictures[::-1], "caption": ["", ""]}), file)
        expected[place] = [sha1(pictures[i]["bytes"]).hexdigest() for i in (0, 1)]
    (tmp_path / "hub/owner/name/README.md").write_text(CARD)
    copy = tmp_path / "hub/owner/copy/default/partial-train/0000.parquet"
    copy.parent.mkdir(parents=True)
    shutil.copy(file, copy)
    code = (
        "columns = {'clean': 'hr', 'degraded': 'lr', 'key': 'image_id'}\n"
        "def rows(repo, **source):\n"
        "    units = opened(repo, **source)\n"
        "    return units if isinstance(units, str) else [\n"
        "        (row.key, sha1(row.clean).hexdigest(), sha1(row.degraded).hexdigest()) for row in units]\n"
        "print(json.dumps([\n"
        "    rows('owner/name', config='x2', columns=columns),\n"
        "    rows('owner/name', config='x2', split='test', columns=columns | {'key': None}),\n"
        "    rows('owner/copy', revision='refs/convert/parquet', split='partial-train', columns=columns),\n"
        "    rows('owner/name', columns=columns), rows('owner/name', config='x3'), rows('owner/name', config='x4'),\n"
        "    rows('owner/name', config='x4', columns=columns | {'degraded': 'caption2'}),\n"
        "]))"
    )
    with serve(tmp_path / "hub") as hub:
        train, test, copied, *said = of_the_hub(code, tmp_path, hub.endpoint)
    assert train == [["7", *expected["x2/train-0"]], ["8", *expected["x2/train-0"][::-1]]]
    assert test == [["test-0-0", *expected["x2/test-0"]], ["test-0-1", *expected["x2/test-0"][::-1]]]
    assert copied == [["7", *expected["x4/train-0"]], ["8", *expected["x4/train-0"][::-1]]]
    assert said[0] == "the Hub dataset owner/name has several configurations: give `config`, one of ['x2', 'x4']"
    assert said[1] == "the Hub dataset owner/name has no configuration 'x3'; it has ['x2', 'x4']"
    assert said[2].startswith(
        "owner/name has no column clean (it has caption, hr, image_id, lr); a dataset has `clean`"
    )
    assert said[3].startswith("owner/name has no column caption2 (it has ")


@pytest.mark.slow  # huggingface_hub tries five times, for 23 s
def test_a_hub_that_falls_silent(tmp_path):
    write_dataset(tmp_path / "hub/owner/name", num_rows=4, num_shards=1)
    code = (
        "import datasets, os, urllib.request\n"
        "datasets.config.STREAMING_READ_MAX_RETRIES = 1\n"
        "units = opened('owner/name')\n"
        "urllib.request.urlopen(os.environ['HF_ENDPOINT'] + '/silence')\n"
        "try:\n    list(units)\n"
        "except UserError as error:\n    print(json.dumps([str(error), opened('owner/name')]))\n"
    )
    with serve(tmp_path / "hub") as hub:
        inside, opening = of_the_hub(code, tmp_path, hub.endpoint)
    assert re.search(r"00000\.parquet, rows 0 to 3 \(row group 0\) cannot be read: ", inside)
    assert inside.endswith("the network or the Hub fails: start again later to continue")
    assert re.search(
        r"^the Hub dataset owner/name cannot be opened \(.*\); check name, network and HF_HUB_OFFLINE$", opening
    )


def test_the_hub_is_not_asked_when_offline(tmp_path):
    """One sentence that names the dataset and the variable, at once."""
    with serve(tmp_path) as hub:
        error = of_the_hub("print(json.dumps(opened('owner/name')))", tmp_path, hub.endpoint, HF_HUB_OFFLINE="1")
    assert error.startswith("the Hub dataset owner/name cannot be opened (")
    assert "HF_HUB_OFFLINE" in error


def test_a_packed_dataset_is_pushed_and_read_back(tmp_path):
    """Through the command line; what another pack had there goes, and other splits are not lost to a new card."""
    for i in range(3):
        (tmp_path / "clean").mkdir(exist_ok=True)
        (tmp_path / f"clean/{i}.png").write_bytes(png(np.full((8, 8, 3), i, np.uint8)))
    (tmp_path / "hub/owner/name").mkdir(parents=True)
    (tmp_path / "hub/owner/name/train-00000-of-00009.parquet").write_bytes(b"of before")
    (tmp_path / "hub/owner/split").mkdir()
    (tmp_path / "hub/owner/split/test-00000-of-00001.parquet").write_bytes(b"of another split")
    code = (
        "import contextlib, io, os, sys\n"
        "from mcir.cli import main\n"
        "def said(repo, output):\n"
        "    sys.argv = ['mcir', 'data', 'pack', 'clean', output, '--num-shards', '2', '--num-workers', '0']\n"
        "    sys.argv += ['--push', repo]\n"
        "    out, err = io.StringIO(), io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):\n"
        "        main()\n"
        "    return out.getvalue(), err.getvalue().splitlines()[-1]\n"
        f"os.chdir({str(tmp_path)!r})\n"
        "pushed, refused, wrong = said('owner/name', 'out'), said('owner/split', 'out2'), said('a b', 'out3')\n"
        "units = opened('owner/name')\n"
        "keys = units if isinstance(units, str) else [row.key for row in units]\n"
        "del os.environ['HF_TOKEN']\n"
        "print(json.dumps([pushed, refused[1], wrong[1], said('owner/new', 'out4')[1], keys]))"
    )
    with serve(tmp_path / "hub") as hub:
        pushed, *refused, keys = of_the_hub(code, tmp_path, hub.endpoint, HF_TOKEN="hf_token")
        assert f"{hub.endpoint}/datasets/owner/name: in a config, source: {{format: hub, repo: owner/name" in pushed[0]
    assert sorted(keys) == ["0", "1", "2"]
    names = {file.name for file in (tmp_path / "hub/owner/name").iterdir()}
    assert names == {"README.md", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"}
    for said, message in zip(
        refused, ("it holds test-00000", "the Hub does not take it", "the token (HF_TOKEN"), strict=True
    ):
        assert message in said
    assert not any((tmp_path / f"out{i}").exists() for i in (2, 3, 4))
