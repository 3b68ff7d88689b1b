"""Validates rendered Kubernetes manifests offline, with unknown fields refused; runs in the environment of
tests/cluster/install.sh. Reads YAML documents from standard input, prints every fault, exits 1 if there is any."""

import re
import sys
from typing import Any, get_args

import kubernetes_validate
import yaml
from kubeflow_trainer_api import models
from pydantic import BaseModel, ValidationError

MODELS = {
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "JobSet": models.JobsetV1alpha2JobSet,
}


def model_in(annotation: Any) -> Any:
    """The model in Optional[...], List[...] and the like, if any."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := model_in(inner))), None)


def unknown(value: Any, model: Any, where: str) -> list[str]:
    """Paths of keys that the model does not have: the generated models ignore them."""
    if isinstance(value, list):
        return [fault for i, item in enumerate(value) for fault in unknown(item, model, f"{where}[{i}]")]
    if not isinstance(value, dict) or model is None or "actual_instance" in model.model_fields:
        return []
    fields = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    faults = []
    for key, inner in value.items():
        if key not in fields:
            faults.append(f"{where}.{key}: unknown")
        else:
            faults += unknown(inner, model_in(fields[key]), f"{where}.{key}")
    return faults


def is_quantity(fault: Any) -> bool:
    """Whether the fault is a quantity such as 64Gi, which the generated models take for an object."""
    is_model = fault.get("ctx", {}).get("class_name") == "IoK8sApimachineryPkgApiResourceQuantity"
    return is_model and re.fullmatch(r"\d+(\.\d+)?(m|[kMGTP]i?)?", str(fault["input"])) is not None


def core(manifest: dict[str, Any]) -> list[str]:
    try:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{manifest['kind']}: {'.'.join(map(str, error.path))}: {error.message}"]
    return []


def custom(manifest: dict[str, Any]) -> list[str]:
    """A JobSet or a kind of Kubeflow Trainer, and each Job in it as Kubernetes would check it."""
    model = MODELS[manifest["kind"]]
    faults = unknown(manifest, model, manifest["kind"])
    try:
        model.model_validate(manifest)
    except ValidationError as error:
        faults += [
            f"{manifest['kind']}.{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
            for fault in error.errors()
            if not is_quantity(fault)
        ]
    spec = manifest["spec"].get("template", manifest)["spec"]
    for job in spec.get("replicatedJobs", []):
        metadata = {"name": job["name"]} | job["template"].get("metadata", {})
        faults += core({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job["template"]["spec"]})
    return faults


def main() -> None:
    manifests = list(yaml.safe_load_all(sys.stdin))
    faults = [fault for m in manifests for fault in (custom(m) if m["kind"] in MODELS else core(m))]
    print("\n".join(faults) or f"{len(manifests)} manifests are valid")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
