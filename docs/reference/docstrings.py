"""Docstrings as the site reads them: what is `Example:` to Google is `Examples:` to griffe, and tables are text."""

import re
from typing import Any

from griffe import Extension, Object


class Docstrings(Extension):
    """Prepares each docstring before it is parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Has examples read as code, and tables of `=` shown as they are."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            rule = r"^=+(?: +=+)+$"
            table = rf"{rule}\n(?:.+\n)+?{rule}\n(?:.+\n)+?{rule}"
            obj.docstring.value = re.sub(table, r"```text\n\g<0>\n```", text, flags=re.MULTILINE)
