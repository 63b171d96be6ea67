"""`make bundle-test`: install a bundle without a network, an index, a cache or a home, and train two steps.

    python tests/scripts/bundle_offline.py dist/medlit-0.1.0-cpu-python3.11-x86_64

`unshare --net` takes the network away where the kernel allows it; pip has no index either way.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FIT = ["fit", "--config", "configs/quickstart.yaml", "--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"]
NOWHERE = "http://127.0.0.1:9/"  # nothing listens on this port


def offline() -> list[str]:
    """A command prefix that takes the network away; empty where the kernel refuses."""
    prefix = ["unshare", "--net"]
    try:
        allowed = subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    return prefix if allowed else []


def timed(what: str, command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Run a command, print how long it took, and exit if it fails."""
    began = time.perf_counter()
    done = subprocess.run([*offline(), *command], cwd=folder, env=environment)
    print(f"{what}: {time.perf_counter() - began:.1f} s, exit code {done.returncode}", flush=True)
    if done.returncode:
        raise SystemExit(done.returncode)


def size(folder: Path) -> str:
    """Megabytes of a folder."""
    return f"{sum(file.lstat().st_size for file in folder.rglob('*')) / 1e6:,.0f} MB"


def main() -> None:
    """Install and train."""
    bundle = Path(sys.argv[1]).resolve()
    print(f"{bundle.name}: {size(bundle)}; no network: {bool(offline())}", flush=True)
    with tempfile.TemporaryDirectory(prefix="medlit-bundle-test-") as name:
        folder, home = Path(name) / "work", Path(name) / "home"
        folder.mkdir()
        home.mkdir()
        environment = {
            "HOME": str(home),
            "PATH": os.environ["PATH"],
            "PYTHON": getattr(sys, "_base_executable", sys.executable),
            "PIP_NO_INDEX": "1",
            "PIP_INDEX_URL": NOWHERE,
            "HF_HUB_OFFLINE": "1",
        }
        environment |= {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ}
        timed("install", ["bash", str(bundle / "install.sh")], folder, environment)
        print(f".venv: {size(folder / '.venv')}")
        timed("two steps of the quickstart", [".venv/bin/medlit", *FIT], folder, environment)
        written = folder / "logs" / "quickstart" / "version_0"
        missing = [file for file in ("checkpoints/last.ckpt", "fit_metrics.json") if not (written / file).is_file()]
        if missing:
            raise SystemExit(f"the fit left no {', '.join(missing)}")
    print("the bundle installs and trains offline")


if __name__ == "__main__":
    main()
