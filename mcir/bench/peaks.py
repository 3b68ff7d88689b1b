"""What known GPUs could compute at most."""

import re

PEAKS = {  # dense TFLOP/s in bf16 (and fp16), in TF32 and, without tensor cores, in fp32, from NVIDIA's data sheets
    "H100 PCIe": (756, 378, 51),
    "H100 NVL": (835, 417, 60),
    "H200 NVL": (835, 417, 60),
    "H100": (989, 494, 67),
    "H200": (989, 494, 67),
    "A100": (312, 156, 19.5),
    "L40S": (362, 183, 91.6),
    "A10G": (70, 35, 31.2),
    "A10": (125, 62.5, 31.2),
    "RTX 4090": (165, 82.6, 82.6),
    "RTX 3090": (71, 35.6, 35.6),
    "V100": (125, None, 15.7),
    "T4": (65, None, 8.1),
}
PEAK_OF = {"bf16": 0, "fp16": 0, "tf32": 1, "fp32": 2}


def utilisation(flops: int, ms: float, device: str, precision: str) -> float | None:
    """Share of the peak arithmetic of a device, where its name is known."""
    peak = next((peaks[PEAK_OF[precision]] for name, peaks in PEAKS.items() if re.search(rf"\b{name}\b", device)), None)
    return None if peak is None else flops / (ms / 1e3) / (peak * 1e12)
