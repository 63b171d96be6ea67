"""An adapter and its card for the Hugging Face Hub: said by default, sent with `--push`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medlit.errors import UserError
from medlit.paths import HUB_TOKENS, hub_is_offline
from medlit.tools.export.verify import FILE

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Repository:
    """Where an adapter goes.

    Attributes:
        name: owner/name.
        push: really send.
        private: make a new repository private.
        token: from the environment.
    """

    name: str
    push: bool
    private: bool
    token: str | None

    @classmethod
    def of(cls, options: argparse.Namespace) -> Repository:
        """Read the flags and the environment; nothing is asked of the Hub.

        Raises:
            UserError: there is no repository's name, or a push has no token or no network.
        """
        if not _NAME.fullmatch(options.repo or ""):
            raise UserError(f"repo: {options.repo!r} is not the name of a repository; give owner/name.")
        token = next((os.environ[name] for name in HUB_TOKENS if os.environ.get(name)), None)
        if options.push and token is None:
            raise UserError("push: set HF_TOKEN to a token that may write to the repository.")
        if options.push and hub_is_offline():
            raise UserError("push: HF_HUB_OFFLINE is set; unset it where there is a network.")
        return cls(options.repo, options.push, not options.public, token)

    def check_base(self, base_model: str) -> None:
        """Check that others can have the base model too.

        Raises:
            UserError: it is a folder of this machine.
        """
        if Path(base_model).expanduser().exists() or base_model.startswith((".", "/", "~")):
            raise UserError(
                "to: an adapter on the Hub names its base model, and this one's is a folder of this machine; fine-tune"
                " from a model of the Hub, or export with --to adapter."
            )

    def send(self, folder: Path, client: HfApi | None = None) -> None:
        """Send a folder's files, or say which would be sent.

        Args:
            folder: the export.
            client: of the Hub; by default one with the token.

        Raises:
            UserError: the Hub refuses or is out of reach; the folder stays.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        files = sent(folder)
        kind = "private" if self.private else "public"
        if not self.push:
            size = sum((folder / name).stat().st_size for name in files)
            print(f"medlit: nothing is sent; --push would send to {self.name} (if new, {kind}), {size / 1e6:.1f} MB:")
            for name in files:
                print(f"  {name}")
            return
        client = client or HfApi(token=self.token)
        try:
            client.create_repo(self.name, private=self.private, exist_ok=True)
            done = client.upload_folder(
                repo_id=self.name,
                folder_path=str(folder),
                allow_patterns=files,
                commit_message="Adapter and model card, by medlit",
            )
        except (HfHubHTTPError, OSError) as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"push: the Hub did not take it ({said}); {folder} is whole, so try again.") from error
        print(f"medlit: sent to {done}", file=sys.stderr)


def sent(folder: Path) -> list[str]:
    """Files of an export that go to the Hub: all but the comparison, which names notes by their ids."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name != FILE)
