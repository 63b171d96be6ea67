"""The image installs what `make install` does and the service, holds no notes or weights, and does not run as root."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINES = re.sub(r"^ *#.*\n", "", (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " "), flags=re.MULTILINE)
INSTRUCTIONS = [(line.split()[0], line.partition(" ")[2]) for line in LINES.splitlines() if line.strip()]


def values(instruction: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS if name == instruction]


def copied() -> set[str]:
    """What the image gets from the checkout."""
    return {name for rest in values("COPY") if "--from" not in rest for name in rest.split()[:-1]}


def installs(text: str, pip: str) -> list[list[str]]:
    """Arguments of each installation."""
    commands = re.findall(rf"{re.escape(pip)} (.*?)(?= +&& |$)", text, re.MULTILINE)
    return [[word for word in shlex.split(command) if word != "--no-cache-dir"] for command in commands]


def test_the_packages_are_those_of_make_install() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8").replace("$(BUILD)", "$BUILD").replace("$$", "$")
    recipe = makefile.partition("\n$(RUNTIME):")[2].partition("\n$(TOOLS):")[0]
    torch, locked, own = installs(recipe, "$(PIP)")
    ours_torch, ours_locked, ours = installs("\n".join(values("RUN")), "/opt/medlit/bin/pip install")
    assert ours_locked == locked
    assert ours_locked[-1] == "requirements/serve.txt"
    assert [*ours[:-1], "--editable", ours[-1]] == own  # a copy instead of a link to the checkout
    lines = "grep -E '^torch(vision)?==' "
    assert (ours_torch[:2], torch[:2]) == (["--constraint", "requirements/base.txt"],) * 2
    assert ours_torch[2:] == ["--requirement", "torch.txt"]
    assert f'{lines}"requirements/$BUILD.txt" > torch.txt' in LINES
    assert f"$({lines}requirements/$BUILD.txt)" in recipe
    assert all((ROOT / "requirements" / f"{build}.txt").is_file() for build in ("cpu", "gpu"))


def test_only_what_is_copied_reaches_the_build() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == copied()
    assert all((ROOT / name).exists() for name in copied())


def test_it_runs_as_a_user_and_from_the_library_s_python() -> None:
    assert values("USER") == ["1000"]
    assert {image.split()[0] for image in values("FROM")} == {"python:3.12-slim"}
    assert values("ENTRYPOINT") == ['["medlit"]']


def test_mounts_are_those_of_the_docs_and_the_network_is_the_callers_choice() -> None:
    page = (ROOT / "docs" / "deployment.md").read_text("utf-8")
    for folder in ("/notes", "/weights", "/medlit/logs"):
        assert f":{folder}" in page
        assert folder in LINES
    assert "HF_HOME=/weights" in LINES
    assert "HF_HUB_OFFLINE" not in LINES
    assert "-e HF_HUB_OFFLINE=1" in page
