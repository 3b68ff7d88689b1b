"""Makes the small copies of ../shared/golden that the tests fall back on: `python -m tests.golden.keep`."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.golden import KEPT, SEEDS, SHARED, digest, drawn

NUM_PLACES = 512
UNUSED = ("multi.", "J2", "J4", "grad.batch_statistics")  # which no test reads


def kept(key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """A small tensor or an input as it is; of another the largest value and others at random, and where they are."""
    if value.numel() <= 2 * NUM_PLACES or key == "input":
        return {key: value}
    flat = value.flatten()
    order = torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(0))[: NUM_PLACES - 1]
    places = torch.cat([flat.abs().argmax()[None], order])
    return {key: flat[places], f"{key}.places": places.int()}


def main() -> None:
    for path in sorted((SHARED / "golden").glob("*.safetensors")):
        if path.name.startswith("spn_trajectory"):  # its batches are photographs
            continue
        with safe_open(path, "pt") as file:
            meta, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        small = {key: meta[key] for key in ("source", "constants", "parameters", "loss") if key in meta}
        images: dict[str, torch.Tensor] = {}
        if "state_dict" in meta:
            small["state_dict.sha256"] = digest(json.dumps(json.loads(meta["state_dict"]), sort_keys=True))
        else:
            num_negatives = sum(key.startswith("n.") for key in tensors)
            small |= {"shape": " ".join(map(str, tensors["y"].shape)), "negatives": str(num_negatives)}
            images = drawn(SEEDS[meta["loss"]], tuple(tensors["y"].shape), num_negatives)
            for key in images.keys() & tensors.keys():
                if not torch.equal(images[key], tensors.pop(key)):
                    raise SystemExit(f"{path.name}: {key} is not what is drawn")
        rest = [kept(key, value) for key, value in tensors.items() if not key.startswith(UNUSED)]
        save_file({key: value for part in rest for key, value in part.items()}, KEPT / path.name, metadata=small)
    (KEPT / "metrics_set5.json").write_text((SHARED / "golden" / "metrics_set5.json").read_text())


if __name__ == "__main__":
    main()
