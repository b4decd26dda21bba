"""The names of all properties, read from their files: rows are checked against them before any property can be imported."""

import re
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "properties"


@cache
def property_names() -> tuple[str, ...]:
    """What stands behind `def test_` in the files of `properties/`."""
    texts = (file.read_text() for file in sorted(FOLDER.glob("test_*.py")))
    return tuple(name for text in texts for name in re.findall(r"^def test_(\w+)\(", text, re.MULTILINE))
