"""Who is told of a run: Accelerate's trackers, each opened by itself, continued on resume, and let go where it fails.

Accelerate opens its trackers and logs to them in one go, where the first that fails takes the others and the run along.
What they have in common is used as it is (`store_init_configuration`, `log`, `log_images`, `finish`); here stand the
arguments and calls in which the clients differ. Main process only. Credentials, addresses and modes are the
environment's: what a client reads there goes before what is given here, and none of it is written down.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from mcir.errors import UserError

PACKAGES = {"comet_ml": "comet-ml", "mlflow": "mlflow-skinny"}
"""What pip calls those that it calls otherwise."""


def require_installed(names: Sequence[str]) -> None:
    """UserError naming the command that installs what is missing."""
    there = {str(name) for name in get_available_trackers()}
    missing = [name for name in names if name not in there]
    if missing:
        packages = " ".join(PACKAGES.get(name, name) for name in missing)
        raise UserError(f"tracking.to: {', '.join(missing)} not installed: pip install {packages}")


def start(name: str, run_dir: Path, project: str, first_step: int, run_id: str | None) -> GeneralTracker:
    """The tracker, writing from now on: into the remote run of that id, or a new one. Raises what its client raises."""
    arguments: dict[str, Any] = {}
    match name:
        case "tensorboard":
            # Scalars of steps that are trained again after a resume replace the earlier ones.
            project, arguments = name, {"logging_dir": str(run_dir), "purge_step": first_step}
        case "wandb":
            arguments = {"id": run_id, "resume": "allow" if run_id else None}
            arguments["name"] = os.environ.get("WANDB_NAME", run_dir.name)
            arguments["dir"] = os.environ.get("WANDB_DIR", str(run_dir))
            project = os.environ.get("WANDB_PROJECT", project)
        case "mlflow":
            arguments = {"run_id": run_id, "run_name": run_dir.name}
            _use_store(run_dir)
        case "comet_ml":
            import comet_ml

            arguments = {"experiment_key": run_id, "experiment_config": comet_ml.ExperimentConfig(name=run_dir.name)}
            project = os.environ.get("COMET_PROJECT_NAME", project)
        case "trackio":
            arguments = {"name": run_id or run_dir.name, "resume": "allow"}
        case "aim":
            arguments = {"logging_dir": os.environ.get("AIM_REPO", str(run_dir)), "run_hash": run_id}
        case "clearml":
            # By itself it would read what TensorBoard writes, and show all of it twice.
            arguments = {"task_name": os.environ.get("CLEARML_TASK", run_dir.name), "auto_connect_frameworks": False}
            arguments["continue_last_task"] = run_id or False
            project = os.environ.get("CLEARML_PROJECT", project)
        case "dvclive":
            arguments = {"dir": str(run_dir / "dvclive"), "resume": run_id is not None, "save_dvc_exp": False}
        case "swanlab":
            arguments = {"experiment_name": run_dir.name, "logdir": str(run_dir / "swanlog")}
            arguments |= {"id": run_id, "resume": "must"} if run_id else {}
    tracker = LOGGER_TYPE_TO_CLASS[name](project, **arguments)
    tracker.start()
    if name == "clearml":
        tracker.tracker.set_initial_iteration(0)  # a continued task counts steps from where it was, and so do we
    return tracker


def id_of(tracker: GeneralTracker) -> str | None:
    """By which `start` finds the remote run again; None where the run directory itself is all there is to know."""
    run = tracker.tracker
    match tracker.name:
        case "wandb" | "clearml":
            return run.id
        case "mlflow":
            return run.info.run_id
        case "comet_ml":
            return run.get_key()
        case "trackio" | "dvclive":
            return getattr(run, "name", "dvclive")
        case "aim":
            return run.hash
        case "swanlab":
            return run.id
    return None


def configure(tracker: GeneralTracker, values: Mapping[str, Any], config_file: Path, is_new: bool) -> None:
    """Give it the run's settings (`flat`) and the file of its config."""
    if tracker.name != "mlflow":
        tracker.store_init_configuration(dict(values))
        return
    if is_new:  # MLflow's parameters cannot be changed: what a later start changed is in the file
        tracker.store_init_configuration({_plain(name): value for name, value in values.items()})
    tracker.log_artifact(str(config_file))


def log(tracker: GeneralTracker, values: Mapping[str, float], step: int) -> None:
    """Scalars of a step."""
    plain = tracker.name == "mlflow"
    tracker.log({_plain(name) if plain else name: value for name, value in values.items()}, step=step)


def show(tracker: GeneralTracker, name: str, picture: np.ndarray, step: int) -> None:
    """One picture, (H, W, 3) uint8."""
    match tracker.name:
        case "tensorboard":
            tracker.log_images({name: picture[None]}, step=step, dataformats="NHWC")
        case "wandb" | "swanlab":
            tracker.log_images({name: [picture]}, step=step)
        case "aim" | "clearml":
            tracker.log_images({name: picture}, step=step)
        case "mlflow":
            import mlflow

            mlflow.log_image(picture, key=_plain(name), step=step, synchronous=True)
        case "comet_ml":
            tracker.tracker.log_image(picture, name=name, step=step)
        case "trackio":
            import trackio

            tracker.log({name: trackio.Image(picture)}, step=step)
        case "dvclive":
            tracker.tracker.log_image(f"{name}.png", picture)


def finish(tracker: GeneralTracker, status: str) -> None:
    """Close it. `status`: FINISHED, KILLED (to go on later) or FAILED, for those that show it."""
    match tracker.name:
        case "wandb":
            tracker.tracker.finish(exit_code=int(status == "FAILED"))
        case "mlflow":
            import mlflow

            mlflow.end_run(status)
            _leave_store()
        case _:
            tracker.finish()


def flat(values: Any, path: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings by their dotted path, as trackers want them: `{"optim.optimizer.lr": 0.001}`. Fields that are
    null are left out; a list of plain values is its text."""
    if isinstance(values, Mapping):
        items = [(str(key), value) for key, value in values.items()]
    elif isinstance(values, list | tuple) and any(isinstance(value, Mapping | list | tuple) for value in values):
        items = [(str(i), value) for i, value in enumerate(values)]
    else:
        plain = values if isinstance(values, bool | int | float | str) else str(list(values)) if values else None
        return {} if plain is None else {path: plain}
    return {name: v for key, value in items for name, v in flat(value, f"{path}.{key}" if path else key).items()}


_own_store: str | None = None
"""MLflow's place below the run directory, while it is in use: MLflow knows one place a process."""


def _use_store(run_dir: Path) -> None:
    import mlflow

    global _own_store
    if "MLFLOW_TRACKING_URI" not in os.environ:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else it wants a database, for which it needs more
        _own_store = (run_dir / "mlruns").absolute().as_uri()
        mlflow.set_tracking_uri(_own_store)


def _leave_store() -> None:
    import mlflow

    global _own_store
    if _own_store:
        _own_store = None
        nowhere: Any = None  # it takes that, and its annotation does not say so
        mlflow.set_tracking_uri(nowhere)


def _plain(name: str) -> str:
    """MLflow's names: letters, digits and a few signs."""
    return re.sub(r"[^\w ./:-]", "_", name, flags=re.ASCII)
