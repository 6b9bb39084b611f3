"""The argument of a case: the device and the file of findings."""

from __future__ import annotations

import gc
import importlib.metadata
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from fewstep.system.device import hardware

__all__ = ["Bench"]

LEFT = 2**28  # bytes that a case may leave on the card before its worker is replaced; libraries keep workspaces


class Bench:
    """The device, the sizes, and the way out for findings.

    Args:
        folder: of the findings.
        cpu: do not use a GPU.
        tiny: tiny networks.
        send: takes findings.

    Raises:
        ValueError: no GPU, and `cpu` is false.
    """

    def __init__(self, folder: Path, cpu: bool, tiny: bool, send: Callable[[dict], None]) -> None:
        if not cpu and not torch.cuda.is_available():
            raise ValueError("this torch sees no GPU. Try: --cpu --tiny, which tests the command on the processor")
        self.folder, self.tiny, self.send = folder, tiny, send
        self.device = torch.device("cpu" if cpu else "cuda:0")
        self.cuda = self.device.type == "cuda"
        self._scratch: list[tempfile.TemporaryDirectory] = []
        if cpu:
            torch.set_num_threads(1 if tiny else torch.get_num_threads())

    def describe(self) -> dict[str, str]:
        """Return the origin of the findings: hardware, software, date."""
        if self.cuda:
            return {"hardware": torch.cuda.get_device_name(), "torch": torch.__version__}
        return {"hardware": hardware(1), "torch": torch.__version__}

    def found(self, unit: str, name: str | None = None, **numbers: float) -> None:
        """Report numbers.

        Args:
            unit: of all of them.
            name: of the row; None: the case's.
            numbers: an underscore stands for a space.
        """
        self.report(unit, {key.replace("_", " "): value for key, value in numbers.items()}, name)

    def report(self, unit: str, numbers: Mapping[str, float], name: str | None = None) -> None:
        """The same for names that are no identifiers."""
        line = {"numbers": {key: float(value) for key, value in numbers.items()}, "unit": unit}
        self.send(line if name is None else {**line, "name": name})

    def note(self, text: str, name: str | None = None) -> None:
        """Report a fact that is no number."""
        self.send({"note": text} if name is None else {"note": text, "name": name})

    def check(self, name: str, allowed: float, errors: Mapping[str, float]) -> None:
        """Report relative errors as a row, which fails if one is larger than allowed, or not finite."""
        self.report("", {**errors, "allowed": allowed}, name)
        bad = {key: value for key, value in errors.items() if not value <= allowed}
        if bad:
            what = ", ".join(f"{key} {value:.1e}" for key, value in bad.items())
            self.send({"name": name, "error": f"too far off: {what}; allowed {allowed:.0e}"})

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], repeats: int = 10, warm: int = 3) -> float:
        """Wall-clock time of one call, the device's work included, after `warm` calls."""
        if self.tiny:
            repeats, warm = 1, 1
        for _ in range(warm):
            work()
        self.synchronise()
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        self.synchronise()
        return (time.perf_counter() - started) / repeats

    def installed(self, package: str) -> bool:
        """Return whether a distribution is installed, and report one that is not."""
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            self.note(f"not measured: {package} is not installed")
            return False
        return True

    def scratch(self, name: str) -> Path:
        """An empty folder, which is deleted after the case."""
        self._scratch.append(tempfile.TemporaryDirectory(prefix=f"fewstep-{name}-"))
        return Path(self._scratch[-1].name)

    def clean(self) -> bool:
        """Give files and memory back after a case; whether the next one finds the device as the first did."""
        while self._scratch:
            self._scratch.pop().cleanup()
        gc.collect()
        if not self.cuda:
            return True
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated() < LEFT
