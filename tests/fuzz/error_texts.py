"""What every error that quotes foreign bytes has to keep to."""


def check_text(error: Exception, limit: int = 500) -> None:
    """It becomes a line of the log or of `vnet status`: printable, and not too long."""
    text = str(error)
    assert text.isprintable()
    assert len(text) < limit
