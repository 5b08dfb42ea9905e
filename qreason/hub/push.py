"""The files of a push to the Hub, pushing them in one commit, and comparing what arrived."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qreason import __version__
from qreason.errors import HubError, InputError, hide, redact
from qreason.hub.access import ABOUT, NO_TOKEN, attempt, check_name
from qreason.hub.card import model_card, newest_export, newest_merge, public_base
from qreason.machine.files import read_json
from qreason.run.session import Session

# --- what is pushed --------------------------------------------------------------------------------


def collect(run: Session, repo: str, parts: Sequence[str]) -> list[Any]:
    """The files of a push as huggingface_hub's additions, the card first; InputError for a missing part."""
    from huggingface_hub import CommitOperationAdd

    found: list[dict[str, Path | bytes]] = [{ABOUT: as_json(about(run))}]
    if "adapter" in parts:
        found.append(adapter_files(run, "adapter/" if "merged" in parts else ""))
    if "merged" in parts:
        found.append(merged_files(run))
    if "gguf" in parts:
        found.append(gguf_files(run))
    paths = [path for files in found for path in files]
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise InputError(f"{run.folder}: two files would be {twice[0]} in {repo}; push fewer parts at a time")
    found.insert(0, {"README.md": model_card(run, repo, parts, paths).encode()})
    return [CommitOperationAdd(path, content) for files in found for path, content in files.items()]


def adapter_files(run: Session, inside: str) -> dict[str, Path | bytes]:
    """The newest adapter; its configuration names the base without a local path."""
    folder = run.disk.adapter()
    if folder is None:
        raise InputError(f"{run.folder}: no adapter to push yet; run sft or grpo first")
    config = {**read_json(folder / "adapter_config.json", dict[str, Any]), "base_model_name_or_path": public_base(run)}
    weights = {inside + file.name: file for file in sorted(folder.glob("*.safetensors"))}
    return {f"{inside}adapter_config.json": as_json(config), **weights}


def merged_files(run: Session) -> dict[str, Path | bytes]:
    folder = newest_merge(run)
    if folder is None:
        raise InputError(f"{run.folder}: no merged model to push; make one with `qreason merge {run.folder}`")
    return {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}


def gguf_files(run: Session) -> dict[str, Path | bytes]:
    """The newest folder with GGUF files, and its Modelfile."""
    folder = newest_export(run)
    if folder is None:
        raise InputError(f"{run.folder}: no GGUF files to push; an export step in the recipe makes them")
    return {file.name: file for file in (*sorted(folder.glob("*.gguf")), folder / "Modelfile") if file.is_file()}


def about(run: Session) -> dict[str, Any]:
    base = run.disk.manifest.get("base", {})
    return {
        "qreason": __version__,
        "recipe": run.recipe.name,
        "seed": run.recipe.seed,
        "base": {"id": public_base(run), "fingerprint": base.get("fingerprint")},
        "model": run.recipe.model.model_dump(mode="json", exclude={"base"}),
        **{key: value for key in ("prompt", "system") if (value := getattr(run.recipe.data, key))},
        "sampling": run.recipe.sampling.model_dump(mode="json"),
    }


def as_json(value: Any) -> bytes:
    return (redact(json.dumps(value, indent=2, ensure_ascii=False)) + "\n").encode()


# --- pushing ---------------------------------------------------------------------------------------


class Pusher:
    """One push to the Hub, with the token of this machine's login."""

    def __init__(self, repo: str, *, public: bool, say: Callable[[str], None]) -> None:
        from huggingface_hub import HfApi, constants, get_token

        self.repo, self.say = check_name(repo), say
        self.public = public
        """Whether others can see it: as requested for a new repository, unchanged for an existing one."""
        self.token = get_token()
        if not self.token:
            raise InputError(f"no token for the Hub: {NO_TOKEN}")
        hide(self.token)
        self.api = HfApi(token=self.token)
        self.address = f"{constants.ENDPOINT}/{repo}"

    def ask(self, what: str, call: Callable[[], Any]) -> Any:
        denied = f"use a token that may write to {self.repo}, or another name"
        return attempt(what, call, self.say, denied=denied)

    def check_rights(self) -> bool:
        """Whether the repository exists; InputError for a wrong token, another user's name, or a public repository."""
        user = self.ask("asking whose token it is", self.api.whoami)
        names = [user["name"], *(org["name"] for org in user.get("orgs", []))]
        if self.repo.partition("/")[0].lower() not in (name.lower() for name in names):
            raise InputError(f"--to {self.repo}: the token is for {', '.join(names)}; push to one of these names")
        if not self.ask("looking for the repository", lambda: self.api.repo_exists(self.repo)):
            return False
        info = self.ask("looking at the repository", lambda: self.api.repo_info(self.repo))
        if not info.private and not self.public:
            raise InputError(f"{self.repo} exists and is public; give --public to publish in it, or another name")
        self.public = not info.private
        return True

    def push(self, files: Sequence[Any]) -> str:
        """Publish files in one commit, all or none, and compare the repository with them; returns the address.

        Raises HubError or InputError where it failed; the message says what is on the Hub then.
        """
        there = self.check_rights()
        state = f"{self.repo} is as it was" if there else f"{self.repo} is empty, if it was created at all"

        def publish() -> None:
            if not there:
                self.api.create_repo(self.repo, private=not self.public, exist_ok=True)
            # copies: an addition caches what it found on the Hub and would not check again
            additions = [copy.copy(file) for file in files]
            self.api.create_commit(self.repo, additions, commit_message=f"Pushed by qreason {__version__}")

        try:
            self.ask("publishing", publish)
        except (HubError, InputError) as error:
            try:
                missing = self.differences(files)
            except (HubError, InputError):
                raise type(error)(f"{error}; whether it was published is not known: look at {self.address}") from None
            if missing:  # otherwise only the answer was lost
                raise type(error)(f"{error}; nothing was published: {state}") from None
        if wrong := self.differences(files):
            raise HubError(
                f"{self.address} was published, but not as sent: {', '.join(wrong[:3])}; push again, or delete it there"
            )
        return self.address

    def differences(self, files: Sequence[Any]) -> list[str]:
        """The files that are not on the Hub with the local size and hash."""
        from huggingface_hub.errors import RepositoryNotFoundError

        def listing() -> dict[str, Any]:
            try:
                return {entry.path: entry for entry in self.api.list_repo_tree(self.repo, recursive=True)}
            except RepositoryNotFoundError:
                return {}

        tree = self.ask("listing the repository", listing)
        return [file.path_in_repo for file in files if not same(file, tree.get(file.path_in_repo))]


def same(file: Any, there: Any) -> bool:
    """Whether a listed file has the size and the hash of one that was sent."""
    from huggingface_hub.utils.sha import git_hash

    if there is None or getattr(there, "size", None) != file.upload_info.size:
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == file.upload_info.sha256.hex())
    with file.as_file() as stream:  # a few MB at most: the Hub stores larger files in LFS
        return bool(there.blob_id == git_hash(stream.read()))
