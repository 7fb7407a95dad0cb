"""The machine that a number was measured on: what doubts about the number need, and nothing that names its owner."""

import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from sparsesurvey.device import check_device

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Machine:
    """Hardware, driver and versions; no host name, no user, no path. What does not apply is an empty string."""

    device: str  # "cpu" or "cuda"
    name: str  # processor or GPU model
    cores: int  # processor cores this process may use, or multiprocessors of the GPU
    threads: int  # torch.get_num_threads()
    memory_gib: int  # of the device, rounded
    os: str
    driver: str
    cuda: str
    python: str
    torch: str
    triton: str
    cupy: str
    commit: str  # of the library, "+dirty" when its files were edited

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"machine.device must be cpu or cuda, got {self.device!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            least = {"cores": 1, "threads": 1, "memory_gib": 0}.get(field.name)
            if least is None and not isinstance(value, str):
                raise ValueError(f"machine.{field.name} must be text, got {value!r}")
            if least is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"machine.{field.name} must be an integer of at least {least}, got {value!r}")
        for name in ("name", "os", "python", "torch"):
            if not getattr(self, name):
                raise ValueError(f"machine.{name} must not be empty")
        if not re.search("[a-z0-9]", self.name.lower()):
            raise ValueError(f"machine.name must have a letter or a digit, got {self.name!r}")

    @classmethod
    def current(cls, device: str | torch.device = "cpu") -> "Machine":
        """The machine that this process runs on, seen as ``device``; ValueError where there is no such device."""
        where = check_device(device)
        if where.type == "cuda":
            card = torch.cuda.get_device_properties(where)
            name, cores, memory = card.name, card.multi_processor_count, card.total_memory
        else:
            name, cores, memory = _processor(), _cores(), _memory()
        return cls(
            device=where.type, name=name, cores=cores, threads=torch.get_num_threads(),
            memory_gib=round(memory / 2**30), os=f"{platform.system()} {platform.machine()}",
            driver=_driver() if where.type == "cuda" else "",
            cuda=(torch.version.cuda or "") if where.type == "cuda" else "",
            python=platform.python_version(), torch=torch.__version__,
            triton=_version("triton", "pytorch-triton"), cupy=_version("cupy-cuda13x", "cupy-cuda12x", "cupy"),
            commit=_commit(),
        )

    @property
    def slug(self) -> str:
        """A folder name for this kind of machine: ``intel-xeon-processor-2-cores``, ``nvidia-h200``."""
        name = re.sub(r"\((r|tm|c)\)", " ", self.name.lower())
        if self.device == "cpu":
            name += f" {self.cores} core{'s' * (self.cores > 1)}"
        return re.sub("[^a-z0-9]+", "-", name).strip("-")[:80]

    def __str__(self) -> str:
        name = " ".join(re.sub(r"\((R|TM|C)\)", "", self.name, flags=re.I).split())
        return name if self.device == "cuda" else f"{name}, {self.cores} core{'s' * (self.cores > 1)}"

    def to_dict(self) -> dict[str, str | int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> "Machine":
        """Inverse of ``to_dict``; ValueError names a field that is missing, unknown or of the wrong kind."""
        check_fields(data, {field.name for field in fields(cls)}, "machine")
        return cls(**data)


def check_fields(data: object, allowed: set[str], what: str) -> None:
    """Raise ValueError unless ``data`` is a dict with exactly the allowed fields."""
    if not isinstance(data, dict):
        raise ValueError(f"{what} must be a JSON object, got {type(data).__name__}")
    for name in sorted(allowed - data.keys()):
        raise ValueError(f"{what} has no field {name!r}")
    for name in sorted(data.keys() - allowed):
        raise ValueError(f"{what} has the unknown field {name!r}; known: {', '.join(sorted(allowed))}")


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(\S.*)$", text, flags=re.M)
    return found[1].strip() if found else platform.processor() or platform.machine() or "unknown processor"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


@lru_cache(maxsize=1)
def _driver() -> str:
    try:
        found = re.search(r"Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)", Path("/proc/driver/nvidia/version").read_text())
        if found:
            return found[1]
    except OSError:
        pass
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]


def _version(*names: str) -> str:
    """Version of the first of these distributions that is installed, without importing it."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


@lru_cache(maxsize=1)
def _commit() -> str:
    """Commit of the checkout that the library is run from when this is first asked, or "" where it was installed without one."""
    # A package inside somebody else's checkout (a virtual environment in a repository) is not tracked by it.
    if not _output("git", "ls-files", "__init__.py"):
        return ""
    changed = _output("git", "status", "--porcelain", "--", ".", ":(exclude)recorded")
    return _output("git", "rev-parse", "--short=12", "HEAD") + ("+dirty" if changed else "")


def _output(*command: str) -> str:
    """What a command prints, run in the package's folder; "" where it fails or does not exist."""
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # a status must not lock the index of somebody who commits
    try:
        done = subprocess.run(command, cwd=PACKAGE, env=quiet, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
