"""What a measurement was made on."""

import datetime
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

import torch

MATRIX_FLAGS = ("avx512_bf16", "amx_bf16", "avx512_vnni")  # what decides how fast matrix products are


def describe_machine(*packages: str, device: str | torch.device = "cpu", threads: int | None = None) -> str:
    """Date, processor, threads and versions in one line.

    Args:
        packages: of which the versions are told, beside Python and torch.
        device: of type cpu or cuda, on which it was measured.
        threads: of torch; as it is set, by default.
    """
    processor = f"{_processor()}, {threads or torch.get_num_threads()} threads of {os.cpu_count()} cores"
    if torch.device(device).type == "cuda":
        processor = f"{torch.cuda.get_device_name(device)}; {processor}"
    versions = [f"{name} {version(name)}" for name in ("torch", *packages)]
    return ", ".join([str(datetime.date.today()), processor, f"Python {platform.python_version()}", *versions])


def peak_memory(device: torch.device) -> float:
    """The highest memory so far, in MiB: of the accelerator, or of this process, not of the one that started it as
    `resource.getrusage` counts it on Linux."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 1024
    import resource  # not everywhere

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10)


def machine_of(description: str) -> str:
    """What `describe_machine` says without the date."""
    return description.partition(", ")[2]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in cpuinfo.read_text().split("\n\n")[0].splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    flags = [name for name in MATRIX_FLAGS if name in fields.get("flags", "").split()]
    return fields.get("model name", platform.machine()) + (f" with {', '.join(flags)}" if flags else "")
