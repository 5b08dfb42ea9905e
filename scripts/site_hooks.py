"""What mkdocs.yml asks of MkDocs: documents outside docs/ become pages, and links between all of them stay valid."""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, join, normpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "readme.md",
    "LOG.md": "log.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "data/helpdesk/README.md": "helpdesk.md",
}
"""Document of the repository -> its page; those of docs/ keep their names."""
SOURCES = {page: document for document, page in PAGES.items()}
LINK = re.compile(r"(?<=\]\()(?!https?:)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents outside docs/."""
    for document, page in PAGES.items():
        text = (ROOT / document).read_text("utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they lead on the site; a file that is no page is named by its path instead."""
    document = SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def lead(link: re.Match[str]) -> str:
        target = normpath(join(dirname(document), link[1]))
        return PAGES.get(target, target.removeprefix("docs/") if target.startswith("docs/") else link[1])

    text = LINK.sub(lead, markdown)
    return re.sub(r"\[([^\]]+)\]\(LICENSE\)", r"\1", text)
