"""Errors of the conversations between processes, named by whose fault they are."""


class ConversationError(Exception):
    """Base: this conversation cannot go on."""


class MalformedMessageError(ConversationError):
    """The bytes are no message of this protocol version, or more than allowed."""


class ForbiddenMessageError(ConversationError):
    """A well-formed message that this sender may not send here."""


class PeerGoneError(ConversationError):
    """The other end closed the conversation or died."""


class BusyError(ConversationError):
    """The other end does not read fast enough: the queue is full. Try later or give up."""
