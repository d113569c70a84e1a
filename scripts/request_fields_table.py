"""Regenerate the table of request fields in docs/api.md from the tables that the server uses.

Run: python scripts/request_fields_table.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from minisrv.frontend.apis.openai.fields import CHAT_FIELDS, COMPLETION_FIELDS
from minisrv.frontend.fields.table import Field, Treatment

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
HEAD = "| field | routes | what it does |\n|---|---|---|\n"


def table() -> str:
    """The Markdown table: a row per field, or a row per route where the routes differ."""
    rows: dict[tuple[Treatment, str, str], list[str]] = {}
    for route, fields in (("chat", CHAT_FIELDS), ("completions", COMPLETION_FIELDS)):
        for name, field in fields.items():
            rows.setdefault((field.treatment, name, _text(field)), []).append(route)
    order = list(Treatment)
    ordered = sorted(rows, key=lambda row: (order.index(row[0]), row[1]))
    lines = (f"| `{row[1]}` | {', '.join(rows[row])} | {row[2]} |\n" for row in ordered)
    return HEAD + "".join(lines)


def _text(field: Field) -> str:
    if field.treatment is not Treatment.REJECTED:
        return str(field.schema["description"]).replace("|", "\\|")
    if field.flag is not None:
        return f"Refused unless the server runs with `{field.flag}`."
    passing = ", ".join(f"`{json.dumps(value)}`" for value in (*field.neutral, None))
    return f"Refused; {passing} may be sent."


def main() -> None:
    """Replace the table in docs/api.md."""
    page = PAGE.read_text()
    found = re.search(re.escape(HEAD) + r"(\|.*\n)*", page)
    assert found is not None, "docs/api.md has no table of request fields"
    PAGE.write_text(page[: found.start()] + table() + page[found.end() :])


if __name__ == "__main__":
    main()
