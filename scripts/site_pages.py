"""Hooks of MkDocs (mkdocs.yml): some files outside docs/ are part of the site too.

Links are written as the repository needs them; here they are rewritten where the site has a page
at another place.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
CELL = re.compile(r"<td.*?</td>", re.DOTALL)

# Files of the repository, and their pages in the site.
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "python/minisrv/checkpoint/demo_model/README.md": "demo_model.md",
}
OUTSIDE |= {
    f"benchmark/results/{path.name}": f"results/{path.name}"
    for path in sorted((ROOT / "benchmark" / "results").iterdir())
    if path.suffix in (".md", ".svg")
}
INSIDE = {page: path for path, page in OUTSIDE.items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/."""
    for path, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Return the text of a page with the links that the site needs."""
    own = page.file.src_uri
    folder = posixpath.dirname(INSIDE.get(own, f"docs/{own}"))

    def rewrite(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        target = OUTSIDE.get(path, path.removeprefix("docs/"))
        if path == target:  # a file that the site does not have: --strict reports it
            return match[1]
        return posixpath.relpath(target, posixpath.dirname(own))

    return LINK.sub(rewrite, markdown)


def on_page_content(html: str, **_: object) -> str:
    """Return the HTML of a page, with plain bars for those escaped in the code of its tables."""
    return CELL.sub(lambda match: match[0].replace(r"\|", "|"), html)
