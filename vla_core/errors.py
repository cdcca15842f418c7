"""The error that a user can act on: one line, printed without a traceback by the command line."""


class VlaError(ValueError):
    """What was found, what was expected, the choices and what to do, in one line."""


def choices(names: object) -> str:
    """Format the available names for an error message."""
    listed = sorted(str(name) for name in names)  # type: ignore[attr-defined]
    return ", ".join(listed) if listed else "(none)"
