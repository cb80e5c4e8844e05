"""How messages name many things: the first few, and how many more."""


def listed(names: list[str], most: int = 3) -> str:
    """The first few names, and how many more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


__all__ = ["listed"]
