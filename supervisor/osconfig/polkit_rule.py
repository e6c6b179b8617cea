"""The polkit rule that lets users start and stop their own VNet (polkit(8), rules.d). Pure.

systemd passes the unit and what is to be done with it as details of
org.freedesktop.systemd1.manage-units.
"""

from typing import Final

FILE_NAME: Final = "50-vnet.rules"

_RULE: Final = """\
// Who sits at this machine, in a session that is active, may start and stop the VNet named after them.
polkit.addRule(function (action, subject) {
    if (action.id == "org.freedesktop.systemd1.manage-units" &&
        subject.local && subject.active &&
        action.lookup("unit") == "vnet@" + subject.user + ".service" &&
        ["start", "stop", "restart"].indexOf(action.lookup("verb")) >= 0) {
        return polkit.Result.YES;
    }
});
"""


def rule() -> str:
    """The text of the rule."""
    return _RULE
