"""Publishing a folder on the Hub: one commit, which also takes away what an earlier one left of the other form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from gap_hf.checkpoint import CONFIG_NAME, MASKS_NAME
from gap_hf.errors import GaPError
from gap_hf.packed.reader_files import LAYOUT, READER

# What a form of a model consists of: left in the repository beside a newer commit's files, transformers might read it first.
MODEL_FILES = ("model*.safetensors", "model*.safetensors.index.json", CONFIG_NAME, MASKS_NAME, READER, LAYOUT)
# Of a run and not of a model, and most of it pickled.
RUN_FILES = (".*", "_*", "*.pt", "*.pth", "*.bin", "trainer_state.json", "gap_worker*")


def is_model_file(name: str) -> bool:
    """Whether a name at the top of a repository is that of weights, masks, or the reader beside them."""
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in MODEL_FILES)


def files_of(folder: Path) -> dict[str, Path]:
    """What of a model's folder is published: files at its top, by name, without those that only a resumed run needs."""
    return {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and not any(fnmatchcase(path.name, pattern) for pattern in RUN_FILES)
    }


def create(api: HfApi, repo: str, *, private: bool | None = None) -> str:
    """Make a model repository if there is none; one that exists keeps its visibility.

    Returns:
        Its whole id, with the user's name in front.

    Raises:
        GaPError: if the Hub refuses or cannot be reached.
    """
    with hub_errors(repo):
        return api.create_repo(repo, private=private, exist_ok=True).repo_id


def publish(
    api: HfApi, repo: str, files: Mapping[str, Path], *, message: str, revision: str | None = None
) -> CommitInfo:
    """Put files into a repository in one commit, so that nobody ever loads half of them.

    Args:
        api: Has the endpoint and the token.
        repo: An existing model repository's id.
        files: By their path in the repository. Weights, masks and readers at its top that are not among them are deleted there.
        message: Of the commit.
        revision: A branch that exists; the main one if None.

    Raises:
        GaPError: if the Hub refuses, cannot be reached, or got another commit meanwhile. Nothing is published then, but where it says that a
            commit landed or that this is not known.
    """
    with hub_errors(repo):
        found = api.model_info(repo, revision=revision)
        names = {sibling.rfilename for sibling in found.siblings or []}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, str(path)) for name, path in files.items()
        ]
        stale = sorted(name for name in names - files.keys() if is_model_file(name))
        operations += [CommitOperationDelete(name) for name in stale]
        try:
            return api.create_commit(
                repo, operations, commit_message=message, revision=revision, parent_commit=found.sha, repo_type="model"
            )
        except Exception as error:
            # A gateway's 5xx says as little of whether the commit landed as a closed line.
            status = _status(error)
            if status is not None and status < 500:
                raise
            how = "the connection was lost" if status is None else f"the Hub answers {status}"
            try:
                landed = api.model_info(repo, revision=revision).sha != found.sha
            except Exception:
                raise GaPError(
                    f"{repo}: {how} and whether it has taken the commit is not known; look at what it has before you push again"
                ) from error
            if landed:
                raise GaPError(
                    f"{repo}: {how} when the Hub had taken a commit; look at what it has before you push again"
                ) from error
            raise


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """What huggingface_hub and the network say, as one sentence that names the repository and what would help."""
    try:
        yield
    except GaPError:
        raise
    except Exception as error:  # of several libraries: huggingface_hub, its HTTP client, the file system
        raise GaPError(f"{repo}: nothing was published: {_reason(error)}") from error


def _status(error: BaseException | None) -> int | None:
    """What the Hub answered; the upload of a large file wraps the error that has it."""
    while error is not None:
        if (status := getattr(getattr(error, "response", None), "status_code", None)) is not None:
            return int(status)
        error = error.__cause__
    return None


def _reason(error: BaseException) -> str:
    status = _status(error)
    if status == 401:
        return "the Hub answers 401; expected a token that may write to it: log in with `hf auth login`, or give one"
    if status == 403:
        return "the Hub answers 403; this token may not write to it"
    if status == 404:
        return "the Hub answers 404; expected a repository and branch that exist and that this token may see"
    if status in (409, 412):
        return f"the Hub answers {status}; somebody else has pushed meanwhile, so push again"
    if status is not None:
        return f"the Hub answers {status}; try again later"
    said = [_first_line(error)]
    while error.__cause__ is not None:
        error = error.__cause__
    if (cause := _first_line(error)) not in said:
        said.append(cause)
    return ": ".join(said)


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return text.removesuffix(".") or type(error).__name__
