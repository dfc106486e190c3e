"""Spans of time as people read them."""


def duration(seconds: float) -> str:
    """Return a span of time as a short text: `45s`, `7m05s`, `3h10m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
