"""What an API calls the fields of the neutral request.

The readers and the processes behind the frontend report faults under neutral names, those of a
chat completion. A sentence about a field begins with its name, so the API's own name can stand
there instead when the sentence is written.
"""

from __future__ import annotations

from collections.abc import Mapping

from minisrv.errors import MinisrvError


class FieldNames:
    """A table from neutral paths to an API's own paths; in both, `*` stands for an index.

    The longest prefix of a path that the table holds is replaced. Other paths stay as they are.
    """

    def __init__(self, table: Mapping[str, str]) -> None:
        self._table = {tuple(path.split(".")): own.split(".") for path, own in table.items()}

    def __or__(self, table: Mapping[str, str]) -> FieldNames:
        names = FieldNames(table)
        names._table = self._table | names._table
        return names

    def own(self, path: str) -> str:
        """The API's own name of the field at the neutral `path`."""
        parts = path.split(".")
        for length in range(len(parts), 0, -1):
            pattern = tuple("*" if part.isdecimal() else part for part in parts[:length])
            if pattern in self._table:
                indexes = (part for part in parts[:length] if part.isdecimal())
                own = [next(indexes) if part == "*" else part for part in self._table[pattern]]
                return ".".join([*own, *parts[length:]])
        return path

    def name_field_of(self, error: MinisrvError) -> None:
        """Put the API's own name into `error`, in `param` and at the beginning of the sentence."""
        if error.param is not None:
            error.rename_field(self.own(error.param))


NEUTRAL_NAMES = FieldNames({})
