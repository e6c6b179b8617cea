from hypothesis import given
from hypothesis import strategies as st

from demo.cluster.faults import NO_FAULTS, Faults, parse_faults


def test_each_line_is_one_fault():
    text = (
        "auth_down\n\n# nothing\nslow_list 1.5 # here\nleaf_offline a.test\nleaf_offline b.test\n"
    )
    assert parse_faults(text) == (
        Faults(auth_down=True, slow_list_seconds=1.5, leaf_offline=frozenset({"a.test", "b.test"})),
        (),
    )


def test_unknown_lines_are_told_and_change_nothing():
    text = "auth_up\nslow_list\nslow_list soon\nslow_list nan\nauth_down now\n"
    faults, unknown = parse_faults(text)
    assert faults == NO_FAULTS
    assert unknown == ("auth_up", "slow_list", "slow_list soon", "slow_list nan", "auth_down now")


@given(st.text())
def test_any_text_is_taken(text):
    parse_faults(text)
