"""The mixer that docs/contract.md shows as one from outside: its code is that of the page."""

import re

from tests.tiny import PROJECT

PAGE = PROJECT / "docs" / "contract.md"
CODE = re.search(r"<!-- a mixer from outside.*?```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
exec(compile(CODE, str(PAGE), "exec"))
