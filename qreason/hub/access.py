"""Requests to the Hub: repository names, retries, one-line errors; fetching an adapter."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from qreason.errors import HubError, InputError, RunFolderError, first_line, hide, redact
from qreason.machine.files import read_json

ATTEMPTS = 4
WAIT_SECONDS = 2.0
"""Before the second attempt; doubled each time."""
ABOUT = "qreason.json"
"""The file about an adapter for another qreason: its base, the system prompt, the sampling."""
NO_TOKEN = "log in with `hf auth login`, or set HF_TOKEN to a token with write access (huggingface.co/settings/tokens)"
Result = TypeVar("Result")


def check_name(repo: str) -> str:
    """The name of a repository, USER/NAME; InputError for anything else."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        valid = repo.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise InputError(
            f"{repo}: not a repository name; write USER/NAME, of letters, digits, '-', '_' and '.', at most 96 long"
        )
    return repo


def attempt(what: str, call: Callable[[], Result], say: Callable[[str], None], *, denied: str) -> Result:
    """Call the Hub; retry while it or the connection fails.

    Raises InputError for a refused token (403: `denied` is the cure), HubError otherwise.
    """
    for turn in range(ATTEMPTS):
        try:
            return call()
        except KeyboardInterrupt:
            raise HubError(f"{what} was interrupted; run the same command again to continue") from None
        except Exception as error:
            status, reason = explain(error)
            if status in (401, 403):
                cure = NO_TOKEN if status == 401 else denied
                raise InputError(f"{what}: the Hub refused the token ({status}); {cure}") from None
            if (status is not None and status != 429 and status < 500) or turn == ATTEMPTS - 1:
                raise HubError(
                    f"{what} failed ({redact(reason)[:200]}); run the same command again to continue"
                ) from None
            say(f"{what}: {status or 'no connection'}, trying again")
            time.sleep(WAIT_SECONDS * 2**turn)
    raise AssertionError("the last turn returns or raises")


def explain(error: Exception) -> tuple[int | None, str]:
    """The HTTP status behind an error (None: no answer, 0: not an HTTP error), and its message."""
    import httpx

    cause: BaseException | None = error
    while cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None or isinstance(cause, (httpx.TransportError, ConnectionError)):
            return status, first_line(cause) if isinstance(cause, Exception) else str(cause)
        cause = cause.__cause__
    return 0, first_line(error)


def fetch_adapter(repo: str, revision: str | None, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """An adapter's folder and its qreason.json ({} without one): one on this machine, or downloaded from the Hub.

    Raises InputError where there is no such repository or no adapter in it.
    """
    folder = Path(repo).expanduser()
    if not folder.is_dir():
        folder = download_adapter(repo, revision, say)
    elif revision:
        raise InputError(f"{repo}: a folder has no revisions; leave --revision out")
    places = [place for place in (folder, folder / "adapter") if (place / "adapter_config.json").is_file()]
    if not places or not (places[0] / "adapter_model.safetensors").is_file():
        raise InputError(
            f"{repo}: no adapter there (adapter_config.json, adapter_model.safetensors); a whole model is no adapter: "
            "give it as model.base of a recipe"
        )
    try:
        about = read_json(folder / ABOUT)
    except RunFolderError:
        about = {}
    return places[0], about if isinstance(about, dict) else {}


def download_adapter(repo: str, revision: str | None, say: Callable[[str], None]) -> Path:
    """The snapshot of an adapter's repository in the Hub's cache."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    check_name(repo)
    disable_progress_bars()
    wanted = [ABOUT, *(f"{inside}adapter_{name}" for inside in ("", "adapter/") for name in ("config.json", "model*"))]

    def download() -> Path | str:
        try:
            return Path(HfApi().snapshot_download(repo, revision=revision, allow_patterns=wanted))
        except RepositoryNotFoundError:
            return f"{repo} is not on the Hub, or private: check the name, or log in with `hf auth login`"
        except RevisionNotFoundError:
            return f"{repo} has no revision {revision}; leave out --revision, or name a branch, tag or commit"

    hide(get_token() or "")
    folder = attempt(f"fetching {repo}", download, say, denied="ask its owner for access")
    if isinstance(folder, str):
        raise InputError(folder)
    return folder
