"""What accelerators can compute at most, as their vendor prints it. Plain arithmetic, no torch.

In: the name of a device, as CUDA or a scheduler gives it. Out: dense TFLOP/s. It is what model FLOPs utilisation (MFU) is a
share of: operations of the model a second, by `models.cost`, over this peak. A CPU has no such number: what it
reaches depends on clocks under vector load, so there it is for the user to say (`scale.peak_tflops`).
"""

import re

PEAK_TFLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    ("H200", {"bfloat16": 989.4, "float32": 66.9}),
    ("H100 PCIe", {"bfloat16": 756.0, "float32": 51.2}),
    ("H100 NVL", {"bfloat16": 835.5, "float32": 60.0}),
    ("H100", {"bfloat16": 989.4, "float32": 66.9}),
    ("A100", {"bfloat16": 312.0, "float32": 19.5}),
    ("L40S", {"bfloat16": 362.0, "float32": 91.6}),
    ("L4", {"bfloat16": 121.0, "float32": 30.3}),
)
"""Dense TFLOP/s that NVIDIA prints, by whole words of the device's name; the first match counts. float32 is without TF32."""


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Dense TFLOP/s of a device; None for one that is not in the table."""
    return next((peaks[precision] for words, peaks in PEAK_TFLOPS if re.search(rf"\b{words}\b", device_name)), None)
