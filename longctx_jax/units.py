"""Numbers as text, for tables and pictures."""

BYTES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def tokens_text(n: float) -> str:
    """Returns 8k for 8192, 1M for 2**20."""
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if n >= unit and n % unit == 0:
            return f"{n / unit:g}{name}"
    return f"{n:,g}" if n < 1e6 else f"{n / 1e6:.3g}M"


def number_text(value: float) -> str:
    """Returns 20k for 20000, 0.002 for itself."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def bytes_text(n_bytes: float) -> str:
    """Returns bytes as text with three digits: 16 MiB, 2.02 GiB."""
    unit = 0
    while n_bytes >= 1024 and unit < len(BYTES) - 1:
        n_bytes, unit = n_bytes / 1024, unit + 1
    digits = 0 if unit == 0 or n_bytes >= 99.95 else 1 if n_bytes >= 9.995 else 2
    text = f"{n_bytes:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {BYTES[unit]}"
