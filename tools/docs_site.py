"""MkDocs' hook: the site has README.md for its first page, and what its pages link to outside of docs/.

Links are written for the repository, where people read them too. In the site README.md is index.md, docs/ is its root,
and everything else lies where it lies in the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tools/gpu_day/README.md")
LINK = re.compile(r"(\]\(|(?:src|srcset|href)=\")(?![a-z]+:|#|/)([^)#\"\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/, and the files that a page links to."""
    sources = {page: page for page in PAGES}
    sources |= {f"docs/{file.src_uri}": file.src_uri for file in files.documentation_pages()}
    for source in sources:
        text = (ROOT / source).read_text(encoding="utf-8")
        if source in PAGES:
            files.append(File.generated(config, _place(source), content=text))
        for target in (_target(source, link) for _, link in LINK.findall(text)):
            path = ROOT / target
            if path.is_file() and path.suffix != ".md" and files.get_file_from_path(_place(target)) is None:
                files.append(File.generated(config, _place(target), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Its links as they are in the site."""
    place = page.file.src_uri
    source = next((each for each in PAGES if _place(each) == place), f"docs/{place}")

    def moved(match: re.Match[str]) -> str:
        return match[1] + posixpath.relpath(_place(_target(source, match[2])), posixpath.dirname(place) or ".")

    return LINK.sub(moved, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings begin their code with two colons."""
    return html.replace("::</p>", ":</p>")


def _target(source: str, link: str) -> str:
    """What a link in ``source`` leads to, from the root of the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _place(path: str) -> str:
    """Where a file of the repository lies in the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")
