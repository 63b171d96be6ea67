"""Commands beside Lightning's: each is a module with `run(args) -> exit code`."""

import json
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from medlit.errors import UserError


def print_table(
    title: str,
    headings: Iterable[str],
    rows: Iterable[Sequence[str]],
    numbers: Container[str] = (),
    styles: Iterable[str] = (),
) -> None:
    """Print a table without markup; `numbers` names the right-aligned columns, `styles` are rich's, one per row."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in headings:
        is_number = heading in numbers
        table.add_column(heading, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    for row, style in zip_longest(rows, styles):
        table.add_row(*row, style=style)
    console = Console(markup=False, emoji=False)
    with console.capture() as text:  # where nothing reads the output, rich's own printing would end with exit code 1
        console.print(table)
    print(text.get(), end="", flush=True)


def recorded_settings(path: Path, *trainer: str) -> list[str]:
    """What a verb recorded in its run folder, as an argument that further flags override.

    The seed, the settings of notes and model but not the adapter that it started from, and these of the trainer.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        settings = {"seed_everything": config["seed_everything"], "data": dict(config["data"])}
        kept = {name: config["trainer"][name] for name in trainer if config["trainer"][name] is not None}
        settings |= {"model": config["model"] | {"adapter": None}, "trainer": kept}
        return ["--config", json.dumps(settings)]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        verb = path.stem.removeprefix("config_")
        raise UserError(f"run_dir: {path} is missing or damaged; run 'medlit {verb}' for it again.") from None


def license_of(base_model: str, revision: str | None = None, *, cached: bool = False) -> dict[str, str]:
    """A base model's license as the Hub's metadata (license, license_name, license_link) and its title.

    A local folder's own card comes first, then `export/card.yaml`, then the card on the Hub, which may have to be
    `cached`; else it is `unknown`.
    """
    from huggingface_hub import ModelCard, hf_hub_download

    words = yaml.safe_load(Path(__file__).with_name("export").joinpath("card.yaml").read_text(encoding="utf-8"))
    folder, name = Path(base_model).expanduser(), base_model.rpartition("/")[2].removeprefix("builtin:").lower()
    known = next((found for prefix, found in words["licenses"].items() if name.startswith(prefix)), ("unknown",))
    own: dict[str, Any] = {}
    if folder.is_dir() or known == ("unknown",):
        card = folder / "README.md"
        with suppress(OSError, ValueError, yaml.YAMLError):  # there is no card, or no network
            if not folder.is_dir():
                card = Path(hf_hub_download(base_model, "README.md", revision=revision, local_files_only=cached))
            own = ModelCard.load(card).data.to_dict()
    keys = ("license", "title", "license_name", "license_link")  # in the order of a row of card.yaml
    if not isinstance(own.get("license"), str) or own["license"] == "unknown":
        return dict(zip(keys, known, strict=False))
    title = f"license `{own.get('license_name') or own['license']}`"
    return {key: str(value) for key, value in own.items() if key in keys and value} | {"title": title}
