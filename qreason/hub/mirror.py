"""A copy of a run folder elsewhere, kept up to date while the run works: in a folder (a mounted Drive), on the Hub.

A machine that is gone takes nothing with it: the same command with the same --mirror starts from the copy.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from qreason.errors import HubError, InputError, first_line
from qreason.hub.access import attempt, check_name
from qreason.machine.files import DRAFT
from qreason.machine.progress import LIVE
from qreason.run.folder import is_run_folder
from qreason.run.lock import HOLDER, LOCK, is_empty
from qreason.run.resume import RESUME

HUB = "hf://"
LEFT_OUT = (f"*{LOCK}", f"*{HOLDER}", f"*{LIVE}", f"*{DRAFT}/*", f"*.{DRAFT}")
"""Patterns of what is of one machine, or not complete."""
Say = Callable[[str], None]


def open_mirror(target: str, run: Path, say: Say) -> Mirror:
    """The mirror of a run at a folder, or at hf://USER/REPO: there a folder named as the run's."""
    if target.startswith(HUB):
        return HubMirror(check_name(target.removeprefix(HUB).strip("/")), run, say)
    place = Path(target).expanduser() / run.name
    if run.resolve() in (place.resolve(), *place.resolve().parents):
        raise InputError(f"--mirror {target}: that is the run folder itself, or in it; name a folder elsewhere")
    return Mirror(place, run, say)


class Mirror:
    """The mirror of a run folder in another folder."""

    def __init__(self, place: Path, run: Path, say: Say) -> None:
        self.place, self.run, self.say, self.failed = place, run, say, False

    def __call__(self) -> None:
        """Bring the mirror up to date. A failure is reported once and costs the run nothing; later calls try again."""
        try:
            self.push()
            self.failed = False
        except (OSError, HubError) as error:
            if not self.failed:
                self.say(f"--mirror: the copy in {self.place} is out of date ({first_line(error)}); the run goes on")
            self.failed = True

    def push(self) -> None:
        files = {str(file.relative_to(self.run)): file for file in mirrored(self.run)}
        for name, file in files.items():
            copy_changed(file, self.place / name)
        for name in {str(file.relative_to(self.place)) for file in mirrored(self.place)} - files.keys():
            (self.place / name).unlink()

    def pull(self) -> None:
        """Fetch the run where there is none in its folder yet."""
        if not (self.run.exists() and not is_empty(self.run)) and self.fetch(self.run):
            self.say(f"{self.run}: fetched from {self.place}")

    def fetch(self, folder: Path) -> bool:
        """Copy the mirror to an empty folder, whole or not at all; False where there is none."""
        if not is_run_folder(self.place):
            return False
        draft = folder.with_name(f"{folder.name}.{DRAFT}")
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(self.place, draft)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
        return True


class HubMirror(Mirror):
    """The mirror of a run folder in a private repository of the Hub."""

    def __init__(self, repo: str, run: Path, say: Say) -> None:
        super().__init__(Path(repo) / run.name, run, say)
        self.repo = repo

    def push(self) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        api, inside = HfApi(), self.run.name

        def upload() -> None:
            api.create_repo(self.repo, private=True, exist_ok=True)
            api.upload_folder(
                repo_id=self.repo,
                folder_path=self.run,
                path_in_repo=inside,
                ignore_patterns=list(LEFT_OUT),
                delete_patterns=["*"],
                commit_message=f"{inside} of qreason",
            )

        try:
            self.ask("mirroring", upload)
        except InputError as error:  # a refused token
            raise HubError(str(error)) from None

    def fetch(self, folder: Path) -> bool:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError

        with tempfile.TemporaryDirectory() as place:

            def download() -> None:
                try:
                    HfApi().snapshot_download(self.repo, allow_patterns=f"{self.run.name}/*", local_dir=place)
                except RepositoryNotFoundError:
                    return

            self.ask("fetching the mirror", download)
            found = Path(place) / self.run.name
            return Mirror(found, self.run, self.say).fetch(folder)

    def ask(self, what: str, call: Callable[[], None]) -> None:
        denied = "take a token with write access (huggingface.co/settings/tokens)"
        attempt(f"{what} ({self.repo})", call, self.say, denied=denied)


def mirrored(folder: Path) -> list[Path]:
    """The files of a run folder in the order in which they are copied: none claims what is not there yet."""
    files = [file for file in folder.rglob("*") if file.is_file() and not is_left_out(file.relative_to(folder))]
    return sorted(files, key=lambda file: (file.name == "manifest.json", RESUME in file.parts, str(file)))


def is_left_out(file: Path) -> bool:
    return any(fnmatch(file.as_posix(), pattern) for pattern in LEFT_OUT)


def copy_changed(file: Path, copy: Path) -> None:
    """Copy a file, whole or not at all, unless the copy has its size and time."""
    now = file.stat()
    if copy.exists() and (copy.stat().st_size, int(copy.stat().st_mtime)) == (now.st_size, int(now.st_mtime)):
        return
    copy.parent.mkdir(parents=True, exist_ok=True)
    draft = copy.with_name(f"{copy.name}.{DRAFT}")
    shutil.copy2(file, draft)
    draft.replace(copy)
