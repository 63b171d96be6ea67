"""The figures of the pages are those in benchmarks/results."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")
HARDWARE = (ROOT / "docs" / "hardware.md").read_text("utf-8")
TRAIN = ("train", "train_h200")


def result(name: str) -> Any:  # noqa: ANN401 - an object or a list
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def rows_of(name: str) -> dict[str, dict[str, Any]]:
    return {row["system"]: row for row in result(name)["systems"]}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def tables(page: str, heading: str) -> list[list[list[str]]]:
    """The tables of a section, each with its header."""
    section = page.partition(f"\n{heading}\n")[2]
    section = re.split(rf"^#{{1,{heading.count('#')}}} ", section, maxsplit=1, flags=re.MULTILINE)[0]
    found: list[list[list[str]]] = []
    for block in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
        head, _, *rest = map(cells, block.splitlines())
        found.append([head, *rest])
    assert found, heading
    return found


@pytest.mark.parametrize("name", sorted(path.name for path in RESULTS.iterdir()))
def test_every_result_is_named(name: str) -> None:
    assert f"results/{name}" in PAGE + README


@pytest.mark.parametrize("name", TRAIN)
def test_training_speeds_are_the_measured_ones(name: str) -> None:
    systems = rows_of(name)
    speed = {system: row["tokens_per_second"] for system, row in systems.items()}
    shown = set()
    for head, *rows in tables(PAGE, "## Training"):
        for row in rows:
            system = re.sub(r"`(\w+)`.*", r"\1", row[0])
            found = systems.get(system)
            if head[1] != "notes/s" or found is None or not row[2].startswith(f"{speed[system]:,} ("):
                continue
            shown.add(system)
            given = dict(zip(head, row, strict=True))
            low, high = found["spread"]
            assert given["tokens/s (slowest to fastest step)"] == f"{speed[system]:,} ({low:,} to {high:,})"
            assert float(given["notes/s"]) == found["notes_per_second"]
            assert float(given["peak GiB"]) == found["peak_gib"]
            assert float(given.get("estimated") or found.get("estimated_gib") or 0) == (found.get("estimated_gib") or 0)
            for column, peer in (("x Unsloth + TRL", "unsloth_trl"), ("x tuned", "unsloth_trl_tuned")):
                if column in given:
                    assert float(given[column]) == pytest.approx(speed[system] / speed[peer], abs=0.0051)
    assert shown == systems.keys()


def test_families_are_as_the_script_prints_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    _, *printed = importlib.import_module("families").table(result("families")).splitlines()
    assert "\n".join(printed).strip() in PAGE


def test_families_with_fp8_weights_are_the_measured_ones() -> None:
    (table,) = (rows for rows in tables(PAGE, "### Other families") if len(rows[0]) == 7)
    found = [(entry["family"], row) for entry in result("families_fp8")["families"] for row in entry["systems"]]
    for (family, row), (name, system, speed, ratio, peak, estimated, first) in zip(found, table[1:], strict=True):
        assert (family, f"{row['tokens_per_second']:,}") == (name, speed)
        assert system.startswith(f"`{row['system']}`")
        assert float(ratio or 0) == (row.get("x_unsloth_trl_tuned") or 0)
        assert (float(peak), float(estimated or 0)) == (row["peak_gib"], row["estimated_gib"] or 0)
        assert float(first) == pytest.approx(row["first_step_seconds"], abs=0.05)


def test_answering_speeds_are_the_measured_ones() -> None:
    found = result("evaluate")
    sizes = sorted({row["token_budget"] for row in found["systems"]} - {None})
    speeds = {(row["system"], row["token_budget"]): row["notes_per_second"] for row in found["systems"]}
    peaks = [max(row["peak_gib"] for row in found["systems"] if row["token_budget"] == size) for size in sizes]
    (_, *rows), (_, *families) = tables(PAGE, "## Answering")
    names = ["generate", "generate_stepwise", "constrained", "likelihood", "prompts_only"]
    for name, row in zip(names, rows[:-1], strict=True):
        assert row[1:] == [f"{speeds[name, size]:.1f}" for size in sizes]
    assert rows[-1][1:] == [f"{peak:.1f}" for peak in peaks]
    assert f"{found['mean_prompt_tokens']:.0f} tokens on average" in PAGE
    names = ["generate", "constrained", "likelihood", "likelihood_padded", "prompts_only", "prompts_only_padded"]
    for run, row in zip(result("evaluate_families"), families, strict=True):
        speeds_of = {
            each["system"]: each["notes_per_second"] for each in run["systems"] if each["token_budget"] == 32768
        }
        assert row == [run["family"], *(f"{speeds_of[name]:.1f}" for name in names)]
    assert f"{speeds['recipe_32', None]:.1f} to {speeds['recipe_4', None]:.1f}" in README


def test_large_models_are_the_measured_ones() -> None:
    rows = result("offload")["rows"]
    first, second = tables(PAGE, "## Models larger than the GPU")
    alone = [row for row in rows if row["how"] == "offload" and (row["model"], row["layers"]) != ("70B", 40)]
    for row, shown in zip(alone, first[1:], strict=True):
        host = f"{row['offloaded_layers']} layers, {row['host_gib']} GiB"
        kept = " to ".join(map(str, sorted(set(row["layers_kept"]))))
        values = [row["peak_gib"], row["estimated_gib"]]
        assert shown[2:] == [f"{row['budget_gib']:g}", host, kept, f"{row['tokens_per_second']:,}", *map(str, values)]
        assert (shown[0], shown[1].split()[0]) == (row["model"], str(row["layers"]))
        assert row["peak_gib"] <= row["budget_gib"]
        assert row["estimated_gib"] == pytest.approx(row["peak_gib"], rel=0.15)
    for row, shown in zip((row for row in rows if row not in alone), second[1:], strict=True):
        assert (shown[1].strip("*"), float(shown[2])) == (f"{row['tokens_per_second']:,}", row["peak_gib"])
        assert shown[3] == (f"{row['host_gib']:.1f} GiB" if row["host_gib"] else "none")


def test_steps_of_the_135m_are_the_measured_ones() -> None:
    ((_, *rows),) = tables(PAGE, "### The 135M")
    found = [row["seconds_per_step"] for row in result("steps_135m")["rows"]]
    assert [row[1:] for row in rows] == [[f"{each:.3f}", f"{found[0] / each:.2f}"] for each in found]


def test_the_readme_s_speeds_are_the_measured_ones() -> None:
    found = rows_of("train_h200")
    ((_, *rows),) = tables(README, "## Speed")
    systems = ("unsloth_trl", "unsloth_trl_tuned", "medlit_24gib", "medlit_80gib", "medlit_80gib_fp8")
    for system, shown in zip(systems, rows, strict=True):
        assert shown[1] == f"{found[system]['tokens_per_second']:,}"
        assert float(shown[2]) == pytest.approx(found[system]["peak_gib"], abs=0.0501)


def test_what_the_tuned_peer_tried_is_named() -> None:
    tuned = rows_of("train_h200")["unsloth_trl_tuned"]
    for page in (README, PAGE):
        assert all(f"{tried['tokens_per_second']:,}" in page for tried in tuned.get("tried", [tuned]))
    peer = rows_of("train_peer_fp8")
    speeds = [f"{peer[name]['tokens_per_second']:,}" for name in ("unsloth_trl_tuned_fp8", "unsloth_trl_tuned")]
    assert f"{speeds[0]} tokens/s,\nbeside {speeds[1]} (" in PAGE


def test_folds_with_fp8_weights_are_the_measured_ones() -> None:
    fp8, sixteen_bits = (rows_of("folds_fp8")[name] for name in ("medlit_135m", "sixteen_bits"))
    text = re.sub(r"\s+", " ", PAGE.partition("With its frozen weights in FP8")[2].partition("Tried without effect")[0])
    assert (
        f"{fp8['any_of']:.1%} any-of, {fp8['strict']:.1%} strict, a macro F1 of {fp8['f1_macro']:.3f}".replace(
            "%", " %"
        )
        in text
    )
    assert (
        f"{100 * sixteen_bits['any_of']:.1f}, {100 * sixteen_bits['strict']:.1f}, {sixteen_bits['f1_macro']:.3f}"
        in text
    )
    (against,) = [each for each in result("folds_fp8")["differences"] if each["against"] == "sixteen_bits"]
    assert "{:+.1f} points any-of (95 % {:+.1f} to {:+.1f})".format(*against["any_of"]) in text


def test_speeds_of_base_models_are_the_measured_ones() -> None:
    measured = {
        entry["family"]: f"8 layers, H200: {row['tokens_per_second']:,}"
        for entry in result("families")["families"]
        for row in entry["systems"]
        if row["system"] == "medlit_80gib"
    }
    table = next(rows for rows in tables(HARDWARE, "## Other base models") if "tokens/s" in rows[0])
    shown = {row[1].strip("`"): row[6] for row in table[1:]}
    for config in ("mistral_7b", "gemma2_9b", "gemma3_4b", "qwen3_8b", "qwen25_7b", "smollm3_3b"):
        assert shown[config] == measured[config]
    assert shown["mistral_nemo_base"] == measured["mistral_nemo"]
    assert shown["llama31_8b"] == f"H200: {rows_of('train_h200')['medlit_80gib']['tokens_per_second']:,}"
