"""Upload of an export to the Hugging Face hub, through its own library. Private unless requested otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.students.export.facts import is_hub_name
from fewstep.system.errors import SettingsError
from fewstep.system.out_folder import MARKER

__all__ = ["Repository"]


class Repository:
    """A model repository on the hub, created if it does not exist.

    Args:
        name: owner/name.
        public: make a new repository public; an existing one keeps its visibility.

    Raises:
        SettingsError: an invalid name, no library, no login, or no permission to write.
    """

    def __init__(self, name: str, public: bool = False) -> None:
        if not is_hub_name(name):
            raise SettingsError(f"--push-to-hub must be a name on the hub (owner/name), got {name!r}")
        try:
            import httpx
            import huggingface_hub
        except ImportError:
            raise SettingsError("--push-to-hub needs huggingface_hub: pip install 'fewstep[t2i]'") from None
        # the library's errors of names, logins and answers are of the first two kinds
        self._fails: tuple[type[Exception], ...] = (OSError, ValueError, httpx.HTTPError)
        self.name, self._api = name, huggingface_hub.HfApi()
        self._say("create_repo", repo_id=name, private=not public, exist_ok=True)

    def push(self, folder: Path) -> str:
        """Upload a folder as one commit; returns its address.

        Raises:
            SettingsError: the hub refuses it, or cannot be reached.
        """
        made = self._say(
            "upload_folder",
            repo_id=self.name,
            folder_path=str(folder),
            ignore_patterns=[MARKER],
            commit_message="Upload an export of fewstep",
        )
        return str(made)

    def _say(self, method: str, **arguments: Any) -> Any:
        try:
            return getattr(self._api, method)(**arguments)
        except self._fails as error:
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise SettingsError(
                f"--push-to-hub {self.name}: {first}. Try: `hf auth login`, or a repository that is yours"
            ) from None
