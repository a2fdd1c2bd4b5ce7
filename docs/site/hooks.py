"""What the site has and GitHub gives by itself: the pages above docs/, and formulas, as MathML (no script, no font)."""

from __future__ import annotations

import html
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
ABOVE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE")


def on_files(files: Files, config: Any) -> Files:
    """Add the files of the repository's root that the site shows."""
    for name in ABOVE:
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links that are right in the repository into links that are right on the site, and files into pages.

    The site has its root in docs/, and shows a page's title where the repository shows its file's name.
    """
    markdown = markdown.replace("<!-- settings -->", settings())
    markdown = re.sub(r"\[(?:docs/)?([\w-]+\.md)\]\(", _by_its_title, markdown)
    if page.file.src_uri in ABOVE:
        return markdown.replace("](docs/", "](")
    return re.sub(r"\]\(\.\./(README|CHANGELOG|CONTRIBUTING|SECURITY)\.md", _on_the_site, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Draw formulas."""
    content = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', _drawn("inline"), content, flags=re.DOTALL)
    return re.sub(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', _drawn("block"), content, flags=re.DOTALL)


def settings() -> str:
    """Return a table for each section of the trainer's settings: name, type, default, text."""
    from engine.settings import OPTIONS, SECTIONS, Settings

    own = {field.name: field for field in fields(Settings)}
    parts = []
    for section in SECTIONS:
        parts += ["", f"**{section}**", "", "| setting | type | default | |", "| --- | --- | --- | --- |"]
        for name, option in OPTIONS.items():
            if option.section == section:
                kind = str(own[name].type).replace("|", "\\|")
                parts.append(f"| `{name}` | {kind} | `{own[name].default!r}` | {option.text} |")
    return "\n".join(parts)


def _by_its_title(link: re.Match[str]) -> str:
    file = next(path for path in (ROOT / "docs" / link[1], ROOT / link[1]) if path.exists())
    title = file.read_text().splitlines()[0].removeprefix("# ")
    return f"[{title}]("


def _on_the_site(link: re.Match[str]) -> str:
    return f"]({'index' if link[1] == 'README' else link[1]}.md"


def _drawn(display: str) -> Any:
    return lambda formula: convert(html.unescape(formula[1]), display=display)
