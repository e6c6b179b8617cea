"""Who tells the user's desktop of a question: over D-Bus on Linux, nobody elsewhere."""

import sys

from workers.proxy.teleport.mfa import MfaQuestion

if sys.platform == "linux":
    from workers.proxy.notification import DesktopNotifier
else:

    class DesktopNotifier:
        """Says nothing; `vnet mfa --watch` shows the questions."""

        def __call__(self, question: MfaQuestion) -> None:
            """Nothing."""

        async def close(self) -> None:
            """Nothing runs."""


__all__ = ["DesktopNotifier"]
