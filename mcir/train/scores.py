"""What each validation of a run measured, image by image: `validation/step-00000300.json` in the run directory.

Curves can be drawn and runs compared later from these files alone, without the weights. Steps that are trained again
after a resume replace theirs.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from mcir.errors import UserError
from mcir.evaluation.evaluate import Scores
from mcir.evaluation.report import jsonable, write_whole


def save(run_dir: Path, step: int, weights: str, scores: Mapping[str, Scores]) -> None:
    """Write the scores of all sets at a step; `weights` says which were measured, `ema` or `target`."""
    sets = {name: {"keys": found.keys, "values": found.values} for name, found in scores.items()}
    content = jsonable({"step": step, "weights": weights, "sets": sets})
    write_whole(_file(run_dir, step), (json.dumps(content, allow_nan=False) + "\n").encode())


def load(run_dir: Path, steps: int) -> dict[int, dict[str, Scores]]:
    """Set -> scores of each validation up to step `steps`, by step. UserError for a file that is none of `save`'s."""
    found: dict[int, dict[str, Scores]] = {}
    for file in sorted((run_dir / "validation").glob("step-*.json")):
        try:
            content = json.loads(file.read_text())
            sets = {
                name: Scores(
                    data["keys"], {metric: [float(v) for v in column] for metric, column in data["values"].items()}
                )
                for name, data in content["sets"].items()
            }
            step = int(content["step"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{file}: is no record of a validation ({error}); remove it or restore it") from error
        if step <= steps:
            found[step] = sets
    return found


def _file(run_dir: Path, step: int) -> Path:
    return run_dir / "validation" / f"step-{step:08d}.json"
