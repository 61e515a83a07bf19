"""Getting a repository's files from the Hub, with one sentence where that fails."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from gap_hf.errors import GaPError, first_line


def fetch(repo: str, patterns: Sequence[str], revision: str | None = None, token: str | None = None) -> Path:
    """A folder with those of a repository's files that match `patterns`, through huggingface_hub's cache.

    Raises:
        GaPError: if there is no such folder or repository, it may not be read, or the connection fails.
    """
    try:
        return Path(snapshot_download(repo, revision=revision, token=token, allow_patterns=list(patterns)))
    except HFValidationError:
        raise GaPError(f"{repo}: is no folder, and no repository's id such as 'user/model'") from None
    except Exception as error:  # of several libraries: huggingface_hub, httpx, the file system
        raise GaPError(f"{repo}: is no folder here, and the Hub does not give it: {first_line(error)}") from None
