"""Errors of the demo."""


class DemoError(Exception):
    """The demo cannot be set up. One line: why, and what to do."""
