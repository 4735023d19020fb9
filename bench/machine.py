"""The machine that a figure belongs to."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

# Where the size of the last cache is not known. Twice as much is written to flush it.
DEFAULT_CACHE = 32 << 20


@dataclass(frozen=True)
class Machine:
    """Hardware and software, as a results file records them; memory and cache in bytes."""

    device: str
    name: str
    memory: int
    cache: int
    cpu: str
    cores: int
    driver: str | None
    cuda: str | None
    python: str
    packages: dict[str, str]

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


PACKAGES = ("torch", "triton", "pytorch-ignite", "timm", "ema-pytorch", "diffusers", "ema-triton")


def describe(device: torch.device) -> Machine:
    """Describe the machine that this runs on, and the device that is measured on it."""
    cpu, cores = _cpu_name(), len(os.sched_getaffinity(0))
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory, cache = properties.name, properties.total_memory, properties.L2_cache_size
    else:
        name, memory, cache = f"{cpu}, {cores} cores", _cpu_memory(), _cpu_cache()
    return Machine(
        device=device.type,
        name=name,
        memory=memory,
        cache=cache,
        cpu=cpu,
        cores=cores,
        driver=_driver() if device.type == "cuda" else None,
        cuda=torch.version.cuda,
        python=platform.python_version(),
        packages={name: version for name in PACKAGES if (version := _version(name))},
    )


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return _meminfo("MemAvailable")


def commit() -> str:
    """The commit that is measured, "+" behind it if the package or the benchmark differ from it.

    "unknown" without git, or outside of a repository.
    """
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        try:
            run = subprocess.run(
                ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
            )
        except OSError:  # git is not installed
            return ""
        return run.stdout.strip()

    changed = git("status", "--porcelain", "--", "ema_triton", "bench/*.py", "bench/peers")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _meminfo(key: str) -> int:
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found.group(1)) << 10 if found else 0


def _cpu_memory() -> int:
    return _meminfo("MemTotal")


def _cpu_cache() -> int:
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if found:
            sizes.append(int(found.group(1)) << {"K": 10, "M": 20}[found.group(2)])
    return max(sizes, default=DEFAULT_CACHE)


def _driver() -> str | None:
    try:
        run = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return run.stdout.split("\n")[0].strip() or None
