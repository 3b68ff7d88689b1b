"""The results of check.py as BENCHMARKS.md shows them: python -m tests.gpu.markdown results.json"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.report import table

CONTRASTS = "ways to compute the contrast"


def report(results: Sequence[dict[str, Any]]) -> str:
    """`results`: check.py's, part by part."""
    found = {part["name"]: part for part in results}
    environment = found["environment"]["found"]
    lines = [
        "## On a GPU",
        "",
        f"By `bash tests/gpu/run.sh`: {environment.get('machine', 'unknown')}, commit {environment.get('commit')}.",
        "",
    ]
    if not environment.get("gpu"):
        lines += ["No GPU was at hand: sizes are small, and the numbers only say that the script runs.", ""]
    for name in ("tests", "launches"):
        if name in found:
            part = found[name]
            outcome = part["fault"] or part["found"].get("result") or "passed"
            lines.append(f"- {name}: {outcome.splitlines()[0]}")
    launched = found.get("launches", {}).get("found", {})
    rows = [
        [name, r.get("fault", "trained and resumed").splitlines()[0], _number(r.get("resumed_differs_by"), ".1e")]
        for name, r in launched.items()
    ]
    if rows:
        lines += ["", table(["launch file, precision", "40 steps", "resumed differs by"], rows)]
    rows = []
    for part in results:
        if part["name"] in ("environment", "tests", "launches", CONTRASTS):
            continue
        r, ms = part["found"], part["found"].get("compared_ms", {})
        if part["fault"]:
            rows.append([part["name"], part["fault"].splitlines()[0], *[""] * 7])
            continue
        whole = sum(r["parts_ms"].values())
        ratio = f"**{ms['mcir'] / ms['reference']:.2f}**" if "reference" in ms else ""
        rows.append(
            [
                f"{part['name']}, batch {r['batch_size']}, crop {r['crop_size']}",
                f"{ms['mcir']:.1f}",
                ratio,
                f"{ms['mcir'] / ms['plain']:.2f}",
                *(f"{r['parts_ms'][p] / whole:.0%}" for p in ("target", "negatives", "features")),
                f"{r['data_wait']:.1%}",
                "" if r["mfu"] is None else f"{r['mfu']:.0%}",
            ]
        )
    if rows:
        header = "4 negatives,ms/step,time / reference,time / plain,target,negatives,features,data wait,MFU"
        lines += ["", table(header.split(","), rows)]
    if CONTRASTS in found:
        lines += ["", *_contrasts(found[CONTRASTS])]
    return "\n".join(lines) + "\n"


def _contrasts(part: dict[str, Any]) -> list[str]:
    if part["fault"]:
        return [f"- {CONTRASTS}: {part['fault'].splitlines()[0]}"]
    ms, differ = part["found"]["ms"], part["found"]["differ"]
    rows = [
        [way, f"{took:.1f}", f"{took / ms['as it is']:.2f}", _number(differ.get(way), ".1e")]
        for way, took in ms.items()
    ]
    return [table(["contrast", "ms/step", "/ as it is", "gradient differs by"], rows)]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    print(report(json.loads(Path(sys.argv[1]).read_text())), end="")
