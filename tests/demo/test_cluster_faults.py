import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.cluster.faults import NO_FAULTS, Faults, parse_faults, watch_faults


def test_each_line_is_one_fault():
    text = (
        "auth_down\n\n# nothing\nslow_list 1.5 # here\nleaf_offline a.test\nleaf_offline b.test\n"
    )
    assert parse_faults(text) == (
        Faults(auth_down=True, slow_list_seconds=1.5, leaf_offline=frozenset({"a.test", "b.test"})),
        (),
    )


def test_every_fault_has_its_line():
    text = (
        "unavailable\nhang\nmfa_refused\nrotate_ca\nlogout\nno_vnet_config\nother_user bob@a.test\n"
        "node_offline a\nnode_offline b\nhost_certificate expired\n"
        "clock -90.5\ndeny  access denied: requires a trusted device  # text\n"
    )
    assert parse_faults(text) == (
        Faults(
            unavailable=True,
            hang=True,
            mfa_refused=True,
            rotate_ca=True,
            logout=True,
            no_vnet_config=True,
            other_user="bob@a.test",
            node_offline=frozenset({"a", "b"}),
            host_certificate="expired",
            clock_seconds=-90.5,
            deny="access denied: requires a trusted device",
        ),
        (),
    )


@pytest.mark.parametrize(
    "line",
    [
        "node_offline",
        "host_certificate",
        "host_certificate odd",
        "deny",
        "other_user",
        "other_user ../bob",
        "other_user a b",
        "clock",
        "clock 1e99",
    ],
)
def test_line_with_an_impossible_value_is_told(line):
    assert parse_faults(line) == (NO_FAULTS, (line,))


def test_unknown_lines_are_told_and_change_nothing():
    text = "auth_up\nslow_list\nslow_list soon\nslow_list nan\nauth_down now\n"
    faults, unknown = parse_faults(text)
    assert faults == NO_FAULTS
    assert unknown == ("auth_up", "slow_list", "slow_list soon", "slow_list nan", "auth_down now")


@given(st.text())
def test_any_text_is_taken(text):
    parse_faults(text)


def test_what_is_in_effect_can_be_seen(tmp_path):
    path, applied = tmp_path / "faults", []

    async def apply(faults):
        applied.append(faults)

    async def shows(text):
        async with asyncio.timeout(20):
            while (tmp_path / "faults.taken").read_text() != text:
                await asyncio.sleep(0.01)

    async def scene():
        path.write_text("auth_down\n")
        watcher = asyncio.create_task(watch_faults(path, apply))
        async with asyncio.timeout(20):
            while not (tmp_path / "faults.taken").exists():
                await asyncio.sleep(0.01)
        await shows("auth_down\n")
        assert applied == [Faults(auth_down=True)]
        path.write_text("auth_down  # again\n")
        await shows("auth_down  # again\n")
        assert len(applied) == 1
        path.unlink()
        await shows("")
        assert applied[-1] == NO_FAULTS
        watcher.cancel()

    asyncio.run(scene())
