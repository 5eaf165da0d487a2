"""Hooks of the documentation's site: the documents that lie outside docs/, and the links between
all of them.

mkdocs reads docs/ alone. The other documents of mkdocs.yml's nav join it here under their path in
the repository, without a copy. Links are written for the repository, where a code host follows
them; on the site they lead to the same page, picture or notebook.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = "docs/"
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")
COPIED = {".png", ".svg", ".ipynb"}  # what a page shows or offers beside other pages


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents of the nav that docs/ does not have."""
    for path in documents(config.nav):
        if files.get_file_from_path(path) is None:
            files.append(_file(path, config))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its links led from their place in the repository to their place on the site.
    What is on neither is left as it is, for mkdocs to refuse.
    """
    own = page.file.src_uri
    folder = posixpath.dirname(own if (ROOT / own).is_file() else DOCS + own)

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[0]))
        uri = target.removeprefix(DOCS)
        if files.get_file_from_path(uri) is None:
            if Path(target).suffix not in COPIED or not (ROOT / target).is_file():
                return link[0]
            files.append(_file(target, config))
        return posixpath.relpath(uri, posixpath.dirname(own) or ".")

    return LINK.sub(moved, markdown)


def documents(nav: Any) -> Iterator[str]:
    """The paths in a nav, which is a tree of lists and of {title: part}."""
    if isinstance(nav, str):
        yield nav
    elif nav:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from documents(part)


def _file(path: str, config: MkDocsConfig) -> File:
    return File.generated(config, path, abs_src_path=str(ROOT / path))
