"""Formats durations for people."""


def duration(seconds: float) -> str:
    """Return a duration as a short text, such as `45s`, `7m05s` or `3h10m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
