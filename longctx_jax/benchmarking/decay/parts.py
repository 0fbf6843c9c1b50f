"""The parts of the suite `decay`; what each has: `forms.py`."""

PARTS = ("main", "grid", "float32", "per_token", "long")
