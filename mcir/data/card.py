"""The README.md of a packed dataset: what `datasets` and the Hub read in its front matter, and what a person asks.

It lists the shards with their checksums; `checksums` reads them back, so that `mcir data inspect` can compare.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from mcir.data.options import Options
from mcir.data.pairs import Pairs

_ROW = re.compile(r"^\| (\S+\.parquet) \| ([\d,]+) \| ([\d,]+) \| `([0-9a-f]{64})` \|$", re.MULTILINE)


def dataset_card(shards: Sequence[Path], pairs: Pairs, options: Options) -> str:
    """Front matter and text. It depends on the shards and options only (no date), like the shards themselves."""
    metadata = [pq.read_metadata(shard) for shard in shards]
    num_rows = sum(data.num_rows for data in metadata)
    num_bytes = sum(data.row_group(i).total_byte_size for data in metadata for i in range(data.num_row_groups))
    file_bytes = sum(shard.stat().st_size for shard in shards)
    columns = options.columns(pairs)
    paired = "degraded" in columns
    features = "".join(f"\n  - name: {name}\n    dtype: image" for name in columns)
    table = "".join(
        f"| {shard.name} | {data.num_rows:,} | {shard.stat().st_size:,} | `{file_sha256(shard)}` |\n"
        for shard, data in zip(shards, metadata, strict=True)
    )
    cut = "whole, in their original bytes" + (" (clean ones cut to their centre)" if pairs.centre_crop else "")
    if options.crop_size is not None:
        step = options.crop_step or options.crop_size
        cut = f"sub-images of {options.crop_size} pixels, {step} apart, as lossless {options.crop_format}"
    order = "in the order of their keys" if options.seed is None else f"shuffled with seed {options.seed}"
    made = f", made of `clean` by {options.degradation!r}" if options.degradation else ""
    degraded = (
        f"| `degraded` | Image | the input{made}; its sides are those of `clean` / {options.scale(pairs)}, "
        "rounded down |\n"
        if paired
        else ""
    )
    further = "".join(f"| `{name}` | Image | a further image of the size of `clean` |\n" for name in pairs.columns)
    return f"""---
pretty_name: {_quoted(pairs.title or options.split)}
task_categories:
- image-to-image
size_categories:
- {_size_category(num_rows)}
configs:
- config_name: default
  data_files:
  - split: {options.split}
    path: {options.split}-*.parquet
dataset_info:
  features:{features}
  - name: key
    dtype: string
  splits:
  - name: {options.split}
    num_bytes: {num_bytes}
    num_examples: {num_rows}
  download_size: {file_bytes}
  dataset_size: {num_bytes}
---
# {pairs.title or "Images"}

{num_rows:,} rows from {len(pairs.samples):,} {"pairs of images" if paired else "images"}, {cut}, {order}.
{pairs.note.capitalize() + "." if pairs.note else ""}
Packed with `mcir data pack`. The images keep the licence of their dataset.

| column | type | |
|---|---|---|
| `clean` | Image | the target |
{degraded}{further}| `key` | string | names the sample; unique |

| shard | rows | bytes | sha256 |
|---|---|---|---|
{table}"""


def checksums(card: str) -> dict[str, tuple[int, int, str]]:
    """Shard name -> (rows, bytes, sha256), as the card lists them."""
    return {
        name: (int(rows.replace(",", "")), int(size.replace(",", "")), sha256)
        for name, rows, size, sha256 in _ROW.findall(card)
    }


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _size_category(count: int) -> str:
    """The Hub's own vocabulary."""
    limits = [(10**3, "1K"), (10**4, "10K"), (10**5, "100K"), (10**6, "1M"), (10**7, "10M")]
    below = None
    for limit, name in limits:
        if count < limit:
            return f"{below}<n<{name}" if below else f"n<{name}"
        below = name
    return "n>10M"
