"""What of a run is pushed to the Hub, pushing it in one commit, and looking at what arrived."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qreason import __version__
from qreason.errors import HubError, InputError
from qreason.hub.access import ABOUT, NO_TOKEN, attempt, check_name
from qreason.hub.card import model_card, newest_merge, public_base
from qreason.machine.files import read_json
from qreason.machine.progress import progress_bar
from qreason.run.session import Run


@dataclass(frozen=True)
class File:
    """A file of a repository: its path there, and its content as bytes or as a local file."""

    path: str
    content: bytes | Path

    @property
    def size(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)

    def operation(self) -> Any:
        """What adds it to a commit. Each is good for one attempt."""
        from huggingface_hub import CommitOperationAdd

        return CommitOperationAdd(self.path, self.content if isinstance(self.content, bytes) else str(self.content))


# --- what is pushed --------------------------------------------------------------------------------


def collect(run: Run, repo: str, parts: Sequence[str]) -> list[File]:
    """The files of a push, the card first. Raises InputError where a part is not there."""
    files = [File(ABOUT, as_json(about(run)))]
    if "adapter" in parts:
        files += adapter_files(run, "adapter/" if "merged" in parts else "")
    if "merged" in parts:
        folder = newest_merge(run)
        if folder is None:
            raise InputError(f"{run.folder}: no merged model to push; make one with `qreason merge {run.folder}`")
        files += [File(file.name, file) for file in sorted(folder.iterdir()) if file.is_file()]
    if "gguf" in parts:
        files += gguf_files(run)
    taken = [file.path for file in files]
    if twice := sorted({path for path in taken if taken.count(path) > 1}):
        raise InputError(f"{run.folder}: two files would be {twice[0]} in {repo}; push fewer parts at a time")
    card = model_card(run, repo, parts, taken)
    return [File("README.md", card.encode()), *files]


def adapter_files(run: Run, inside: str) -> list[File]:
    """The newest adapter; a local path of the base is taken out of its configuration."""
    folder = run.adapter()
    if folder is None:
        raise InputError(f"{run.folder}: no adapter to push yet; run sft or grpo first")
    config = read_json(folder / "adapter_config.json")
    config["base_model_name_or_path"] = public_base(run)
    weights = [File(inside + file.name, file) for file in sorted(folder.glob("*.safetensors"))]
    return [File(f"{inside}adapter_config.json", as_json(config)), *weights]


def gguf_files(run: Run) -> list[File]:
    """The newest folder with GGUF files, and its Modelfile."""
    made = [file.parent for file in run.folder.glob("*/*.gguf")]
    if not made:
        raise InputError(f"{run.folder}: no GGUF files to push; an export step in the recipe makes them")
    folder = max(made, key=lambda folder: folder.stat().st_mtime)
    return [File(file.name, file) for file in (*sorted(folder.glob("*.gguf")), folder / "Modelfile") if file.is_file()]


def about(run: Run) -> dict[str, Any]:
    base = run.manifest.get("base", {})
    return {
        "qreason": __version__,
        "recipe": run.recipe.name,
        "seed": run.recipe.seed,
        "base": {"id": public_base(run), "fingerprint": base.get("fingerprint")},
        "model": run.recipe.model.model_dump(mode="json", exclude={"base"}),
        "prompt": run.recipe.data.prompt,
        "sampling": run.recipe.sampling.model_dump(mode="json"),
    }


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# --- pushing ---------------------------------------------------------------------------------------


class Pusher:
    """One push to the Hub, with the token this machine is logged in with."""

    def __init__(self, repo: str, *, public: bool, say: Callable[[str], None]) -> None:
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        self.repo, self.say = check_name(repo), say
        self.public = public
        """Whether others can see it: as asked of a new repository, as it is of one that was there."""
        self.token = get_token()
        if not self.token:
            raise InputError(f"no token for the Hub: {NO_TOKEN}")
        self.api = HfApi(token=self.token)
        self.address = f"{constants.ENDPOINT}/{repo}"

    def ask(self, what: str, call: Callable[[], Any]) -> Any:
        denied = f"take a token that may write to {self.repo}, or another name"
        return attempt(what, call, self.say, token=self.token, denied=denied)

    def check_rights(self) -> bool:
        """Whether the repository is there. InputError for a wrong token, another's name, or a public repository."""
        user = self.ask("asking whose token it is", self.api.whoami)
        names = [user["name"], *(org["name"] for org in user.get("orgs", []))]
        if self.repo.partition("/")[0].lower() not in (name.lower() for name in names):
            raise InputError(f"--to {self.repo}: the token is for {', '.join(names)}; push to one of these names")
        if not self.ask("looking for the repository", lambda: self.api.repo_exists(self.repo)):
            return False
        info = self.ask("looking at the repository", lambda: self.api.repo_info(self.repo))
        if not info.private and not self.public:
            raise InputError(f"{self.repo} is there and public; give --public to publish in it, or another name")
        self.public = not info.private
        return True

    def push(self, files: Sequence[File]) -> str:
        """Upload files and publish them in one commit; then compare what is there. Returns the address.

        Raises HubError or InputError where it ended early, and says what is on the Hub then.
        """
        there = self.check_rights()
        state = f"{self.repo} is as it was" if there else f"{self.repo} is empty, if it was created at all"
        try:
            if not there:
                create = partial(self.api.create_repo, self.repo, private=not self.public, exist_ok=True)
                self.ask("creating the repository", create)
            self.upload(files)
        except (HubError, InputError) as error:
            raise type(error)(f"{error}; nothing was published: {state}") from None
        self.commit(files, state)
        if wrong := self.differences(files):
            raise HubError(
                f"{self.address} was published, but not as sent: {', '.join(wrong[:3])}; push again, or delete it there"
            )
        return self.address

    def upload(self, files: Sequence[File]) -> None:
        """The files of a MiB and more, one by one; those that an earlier push sent are not sent again."""
        large = [file for file in files if file.size >> 20]
        with progress_bar("upload, MiB", total=sum(file.size >> 20 for file in large)) as bar:
            for file in large:
                bar.note(file.path)
                send = partial(self.api.preupload_lfs_files, self.repo, [file.operation()])
                self.ask(f"uploading {file.path}", send)
                bar.advance(file.size >> 20)

    def commit(self, files: Sequence[File], state: str) -> None:
        """One commit with all files: others see all of them or none."""

        def create() -> None:
            additions = [file.operation() for file in files]
            self.api.create_commit(self.repo, additions, commit_message=f"Pushed by qreason {__version__}")

        try:
            self.ask("publishing", create)
        except (HubError, InputError) as error:
            try:
                published = not self.differences(files)
            except (HubError, InputError):
                raise type(error)(f"{error}; whether it was published is not known: look at {self.address}") from None
            if not published:  # else only the answer was lost
                raise type(error)(f"{error}; nothing was published: {state}") from None

    def differences(self, files: Sequence[File]) -> list[str]:
        """The files that are not on the Hub with the size and the hash they have here."""
        listing = self.ask("listing the repository", lambda: list(self.api.list_repo_tree(self.repo, recursive=True)))
        tree = {entry.path: entry for entry in listing}
        return [file.path for file in files if not same(file, tree.get(file.path))]


def same(file: File, there: Any) -> bool:
    """Whether a listed file has the size and the hash of one that was sent."""
    if there is None or getattr(there, "size", None) != file.size:
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == digest(file, hashlib.sha256()))
    return bool(there.blob_id == digest(file, hashlib.sha1(f"blob {file.size}\0".encode())))


def digest(file: File, algorithm: Any) -> str:
    if isinstance(file.content, bytes):
        algorithm.update(file.content)
    else:
        with file.content.open("rb") as stream:
            while block := stream.read(1 << 20):
                algorithm.update(block)
    return str(algorithm.hexdigest())
