"""What all pages share: a single HTML file with its style and its script inside."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from datetime import datetime
from importlib import resources
from pathlib import Path

from medfast.report.text import text

# The policy makes the browser keep the promise that nothing is requested, and that no script runs
# but the one below.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} · medfast</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>
{script}</script>
</body>
</html>
"""


def write_page(path: Path, *, title: str, body: Iterable[str]) -> Path:
    """Write a page that requests nothing from outside, and return `path`.

    Args:
        path: The file. It is written beside and renamed, so that it is never seen half written.
        title: What the browser's tab shows.
        body: The page's elements in their order, as HTML; empty ones are left out.
    """
    script = _own("sort.js")
    digest = hashlib.sha256(f"\n{script}".encode()).digest()
    page = _PAGE.format(
        digest=base64.b64encode(digest).decode("ascii"),
        title=text(title),
        style=_own("style.css"),
        body="\n".join(filter(None, body)),
        script=script,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    try:
        beside.write_text(page, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def header(title: str, summary: str, facts: Mapping[str, str]) -> str:
    """Return the page's title, one line that sums it up, and some facts with the time.

    Args:
        title: As plain text.
        summary: As HTML.
        facts: What they are of -> the fact, as plain text.
    """
    now = datetime.now().astimezone()
    items = "".join(f"<li>{text(name)} <b>{text(fact)}</b></li>" for name, fact in facts.items())
    return (
        f'<header><h1>{text(title)}</h1><p class="summary">{summary}</p>'
        f'<ul class="facts">{items}<li><time datetime="{now.isoformat(timespec="seconds")}">'
        f"{now:%Y-%m-%d %H:%M}</time></li></ul></header>"
    )


def section(title: str, body: str) -> str:
    """Return a section whose anchor is the first word of its title, given as plain text."""
    anchor = text(title.partition(" ")[0].lower())
    return f'<section id="{anchor}"><h2>{text(title)}</h2>{body}</section>'


def commands(lines: Iterable[str]) -> str:
    """Return commands, each to be copied as a whole."""
    return "".join(f"<pre><code>{text(line)}</code></pre>" for line in lines)


def _own(name: str) -> str:
    return resources.files("medfast.report").joinpath(name).read_text(encoding="utf-8")
