"""TensorBoard as a dashboard: what the first page asks, the run's settings in the HParams tab, its config as text."""

import time
from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

CHARTS = {
    "Is it learning?": {
        "PSNR of the validation sets (dB)": [r"validation/[^/]+/psnr$"],
        "loss": ["loss/total$", "loss/reconstruction$"],
    },
    "Is it fast?": {
        "images/s": ["speed/images_per_s$"],
        "share of the time: waiting for data; validating, saving": ["speed/data_wait$", "speed/maintenance$"],
    },
    "Is the contrast sane?": {
        "its share of the reconstruction loss": ["contrast/share$"],
        "age of the negatives (steps)": [r"negatives/age_\d+$"],
    },
    "If not": {
        "learning rate": ["optim/lr$"],
        "gradient norm": ["optim/grad_norm$"],
        "steps skipped; spikes": ["optim/skipped$", "watch/"],
        "weight of the contrast": ["contrast/weight$"],
        "slowest rank, times the fastest": ["speed/slowest_rank$"],
        "memory (GiB)": ["speed/memory_gib$"],
        "seconds of a save: beside the training; that training stood still": ["speed/save_s$", "speed/save_stall_s$"],
    },
}
"""The custom scalars, of which the first three rows fill a screen: title -> chart -> the scalars in it, patterns that
match from the beginning of a name."""


def describe(writer: SummaryWriter, name: str, values: Mapping[str, Any], config: str, step: int) -> None:
    """Write the layout, the settings and the config into the run's own event file.

    Args:
        name: of the run: one row of the HParams tab.
        values: the settings, flat. The tab shows the union of all runs', first those that differ, and beside them the
            last value of every scalar by name, so `best/` comes first.
        config: YAML.
        step: before the first of this start.
    """
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb

    layout = {title: {chart: ["Multiline", tags] for chart, tags in charts.items()} for title, charts in CHARTS.items()}
    writer.add_custom_scalars(layout)
    _write(writer, hparams_pb(dict(values), trial_id=name, start_time_secs=time.time()))
    writer.add_text("config", "\n".join("    " + line for line in config.splitlines()), global_step=step)
    writer.flush()


def close(writer: SummaryWriter) -> None:
    """Note in the HParams tab that the run is finished."""
    _, _, end = hparams({}, {})
    _write(writer, end)


def _write(writer: Any, summary: Any) -> None:
    """Into the run's own file: `add_hparams` would write a run of its own beside it."""
    writer.file_writer.add_summary(summary)
