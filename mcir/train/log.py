"""What a log step reads, decides and shows. The only steps of a run that wait for the device."""

from typing import TYPE_CHECKING

from mcir.errors import UserError
from mcir.evaluation.pictures import sources_table
from mcir.objective.sources import PREFIX, read_sources
from mcir.train.checkpoint import is_healthy
from mcir.train.steady import UNEVEN
from mcir.train.tracking import Meter, Tracker, memory_gib

if TYPE_CHECKING:
    from mcir.train.engine import Engine


def log_step(engine: "Engine", tracker: Tracker, meter: Meter) -> None:
    """Write scalars and the status line. Collective. UserError ends a run whose gradients are not finite for too long,
    or that its watch has stopped."""
    waited = meter.waited
    values, speed = meter.read(engine.accelerator)
    uneven, slowest = engine.pace.read(engine.accelerator, waited)
    if uneven > UNEVEN and engine.accelerator.num_processes > 1:
        tracker.message(
            f"step {engine.state.step}: rank {slowest} takes {uneven:.2f} times as long as the fastest for its data "
            "and forward pass, and all wait for it: look at its host's disk, GPU clocks and other work"
        )
    watch = engine.state.watch
    if watch and watch.has_closed:
        engine.checkpointer.join()  # its report names the last good one
    watched, said = watch.report(engine.checkpointer.folder) if watch else ({}, None)
    if said:
        tracker.message(f"step {engine.state.step}: {said}")
    if engine.most_skipped > engine.config.optim.max_skipped:
        last = engine.checkpointer.latest()
        good = last if last and is_healthy(last.path) else None
        raise UserError(
            f"the gradient was not finite in {int(engine.most_skipped)} steps in a row, up to step {engine.state.step} "
            f"(more than optim.max_skipped); the last good checkpoint is {good.path if good else 'none'}. "
            "Lower the learning rate, set optim.max_grad_norm, or look at the data"
        )
    scalars = {f"optim/{name}": values.pop(name) for name in ("grad_norm", "skipped")}
    sources = read_sources(values, engine.config.data.labels)
    values = {name: value for name, value in values.items() if not name.startswith(PREFIX)}
    scalars |= {f"{PREFIX}{label}/{name}": value for label, of in sources.items() for name, value in of.items()}
    share = engine.state.contrast_share = None
    if engine.objective.weight is not None:
        share = engine.state.contrast_share = abs(values["contrast"]) / max(abs(values["reconstruction"]), 1e-12)
        scalars |= {"contrast/weight": float(engine.objective.weight.value), "contrast/share": share}
    if "error" in values:
        scalars["negatives/error"] = values.pop("error")
    scalars |= {f"loss/{name}": value for name, value in values.items()} | watched
    scalars |= {f"negatives/age_{k}": float(age) for k, age in enumerate(engine.negatives.age(engine.state.step))}
    scalars |= {
        "optim/lr": engine.config.optim.lr(engine.state.step, engine.config.steps),
        **{f"speed/{name}": value for name, value in speed.items()},
        "speed/slowest_rank": uneven,
        "speed/memory_gib": memory_gib(engine.accelerator.device),
        "data/skipped": float(engine.state.num_skipped()),
    }
    tracker.scalars(engine.state.step, scalars)
    log_save(engine, tracker)
    tracker.status(engine.state.step, values, share, speed)
    engine.record.update(step=engine.state.step, images_per_s=speed["images_per_s"])
    if sources and engine.state.step == engine.config.steps and engine.accelerator.is_main_process:
        tracker.console.print(sources_table(sources))


def log_save(engine: "Engine", tracker: Tracker) -> None:
    """Write what a save has cost, once it is there (`Checkpointer.times`)."""
    times = engine.checkpointer.times
    if "save_s" in times:
        tracker.scalars(engine.state.step, {f"speed/{name}": value for name, value in times.items()})
        engine.record.update(**times)
        times.clear()
