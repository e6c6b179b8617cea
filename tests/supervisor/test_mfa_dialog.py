import msgspec
from hypothesis import given
from hypothesis import strategies as st

from ipc import prompts as p
from supervisor.cli.mfa_dialog import (
    AskLine,
    Dialog,
    DropKey,
    GivePin,
    Say,
    Send,
    ShowPage,
    UseKey,
)

CHALLENGE = p.WebauthnChallenge(
    origin="https://t.demo.test", rp_id="t.demo.test", challenge=b"1", credential_ids=[b"key"]
)
RENEWED = msgspec.structs.replace(CHALLENGE, challenge=b"2")
PAGE = "https://idp.test/authorize"
SSO = p.SsoChallenge(redirect_url=PAGE, provider="okta")
ASSERTION = p.WebauthnAssertion(
    credential_id=b"key", client_data=b"{}", authenticator_data=b"a", signature=b"s"
)


def opened(prompt_id="1", **changes):
    values = {
        "id": prompt_id,
        "target": f"app {prompt_id}",
        "cluster": "demo.test",
        "user": "alice",
        "seconds_left": 99.6,
        "takes_code": True,
    }
    return p.PromptOpened(**(values | changes))


class Talk:
    """A dialog with its commands in short."""

    def __init__(self, *sources):
        self.dialog = Dialog()
        for source in sources or (0,):
            assert self.dialog.connected(source) == []

    def hear(self, message, source=0):
        return short(self.dialog.heard(source, message))

    def __getattr__(self, name):
        return lambda *arguments: short(getattr(self.dialog, name)(*arguments))


def short(commands):
    """Questions as ?, sentences as they are, messages without their source."""
    found = []
    for command in commands:
        match command:
            case Say(""):
                pass
            case Say(text):
                found.append(text)
            case AskLine(_, is_secret):
                found.append("?secret" if is_secret else "?")
            case Send(source, message):
                found.append((source, message))
            case _:
                found.append(command)
    return found


def test_a_code_is_asked_for_and_sent_to_the_proxy_that_waits():
    talk = Talk(0, 7)
    said = talk.hear(opened(), 7)
    assert said == ["app 1 in demo.test waits for a second factor of alice, 100 s are left", "?"]
    assert talk.line(" 123 456\n") == [DropKey(), (7, p.Answer(id="1", code="123456"))]
    assert talk.hear(p.PromptAnswered(id="1"), 7) == []
    assert talk.hear(p.PromptClosed(id="1", outcome="app 1 can be used now"), 7) == [
        "app 1 can be used now"
    ]


def test_it_is_done_when_everything_that_waited_has_an_outcome():
    talk = Talk(0, 1)
    assert not talk.dialog.is_done
    talk.hear(p.Waiting(), 0)
    assert not talk.dialog.is_done
    talk.hear(opened(), 1)
    talk.hear(p.Waiting(), 1)
    talk.line("123456")
    assert not talk.dialog.is_done
    talk.hear(p.PromptClosed(id="1", outcome="done"), 1)
    assert talk.dialog.is_done
    assert talk.dialog.has_shown


def test_nothing_waits():
    talk = Talk()
    talk.hear(p.Waiting())
    assert talk.dialog.is_done
    assert not talk.dialog.has_shown


def test_prompts_come_one_at_a_time_the_oldest_first():
    talk = Talk()
    talk.hear(opened("1"))
    assert talk.hear(opened("2")) == []
    assert talk.hear(opened("3")) == []
    # The cluster judges one answer at a time, and a user reads one outcome at a time.
    assert talk.line("1") == [DropKey(), (0, p.Answer(id="1", code="1"))]
    assert talk.hear(p.PromptAnswered(id="1")) == []
    outcome, shown, question = talk.hear(p.PromptClosed(id="1", outcome="app 1 can be used now"))
    assert outcome == "app 1 can be used now"
    assert shown.startswith("app 2")
    assert question == "?"


def test_an_answer_that_was_not_taken_is_asked_for_again_with_the_reason():
    talk = Talk()
    talk.hear(opened())
    talk.line("1")
    talk.hear(p.PromptAnswered(id="1"))
    said = talk.hear(opened(problem="invalid totp token"))
    assert said == ["app 1 in demo.test: not taken: invalid totp token", "?"]
    assert not talk.dialog.is_done


def test_an_empty_line_leaves_a_prompt_for_later():
    talk = Talk()
    talk.hear(opened())
    talk.hear(opened("2"))
    talk.hear(p.Waiting())
    assert talk.line("")[1].startswith("app 2")
    assert talk.line("\n") == [DropKey()]
    assert talk.dialog.is_done
    assert talk.dialog.unanswered == 2
    assert talk.hear(p.PromptClosed(id="1", outcome="nobody")) == []
    assert talk.dialog.unanswered == 1


def test_n_declines():
    talk = Talk()
    talk.hear(opened())
    assert talk.line(" N ") == [DropKey(), (0, p.Decline(id="1"))]
    assert talk.hear(p.PromptClosed(id="1", outcome="declined")) == ["declined"]


def test_what_closes_while_it_is_asked_makes_room_for_the_next():
    talk = Talk()
    talk.hear(opened())
    talk.hear(opened("2"))
    said = talk.hear(p.PromptClosed(id="1", outcome="nobody gave it in time"))
    assert said[:2] == [DropKey(), "nobody gave it in time"]
    assert said[2].startswith("app 2")


def test_an_answer_of_somebody_else_is_enough():
    talk = Talk()
    talk.hear(opened())
    talk.hear(p.Waiting())
    assert talk.hear(p.PromptAnswered(id="1")) == [
        DropKey(),
        "app 1 in demo.test: answered elsewhere",
    ]
    assert talk.line("123456") == []
    assert not talk.dialog.is_done
    assert talk.hear(p.PromptClosed(id="1", outcome="app 1 can be used now")) != []
    assert talk.dialog.is_done


def test_the_prompts_of_a_proxy_that_ends_go_with_it():
    talk = Talk(0, 1)
    talk.hear(opened("1"), 0)
    talk.hear(opened("2"), 0)
    talk.hear(opened("3"), 1)
    talk.hear(p.Waiting(), 1)
    said = talk.gone(0)
    assert said[1].startswith("app 1 in demo.test: the proxy has ended")
    assert said[-2].startswith("app 3")
    talk.line("1")
    talk.hear(p.PromptClosed(id="3", outcome="done"), 1)
    assert talk.dialog.is_done


def test_a_line_that_is_no_code_is_not_sent():
    talk = Talk()
    talk.hear(opened())
    assert talk.line("1" * 65) == ["that is no code", "?"]
    assert talk.line("12\x1b34") == ["that is no code", "?"]


def test_a_security_key_is_used_with_a_challenge_of_its_own():
    talk = Talk()
    said = talk.hear(opened(webauthn=CHALLENGE))
    # Not with the first one: another prompt may have made the cluster forget it.
    assert said[1:] == [(0, p.RenewChallenge(id="1")), "?"]
    assert talk.hear(opened(webauthn=RENEWED)) == [UseKey(RENEWED)]
    assert talk.touch_wanted() == ["touch your security key", "?"]
    assert talk.signed(ASSERTION) == [DropKey(), (0, p.Answer(id="1", webauthn=ASSERTION))]


def test_a_code_may_be_typed_while_the_key_blinks():
    talk = Talk()
    talk.hear(opened(webauthn=CHALLENGE))
    talk.hear(opened(webauthn=RENEWED))
    assert talk.line("1") == [DropKey(), (0, p.Answer(id="1", code="1"))]
    assert talk.signed(ASSERTION) == []


def test_a_challenge_that_others_renewed_replaces_the_old_one():
    talk = Talk()
    talk.hear(opened(webauthn=CHALLENGE))
    talk.hear(opened(webauthn=CHALLENGE))
    assert talk.hear(opened(webauthn=RENEWED)) == [UseKey(RENEWED)]
    assert talk.hear(opened()) == [DropKey()]


def test_only_a_key_is_registered():
    talk = Talk()
    talk.hear(opened(webauthn=CHALLENGE, takes_code=False))
    assert talk.line("123456") == ["a code is not taken here", "?"]
    assert talk.line("n") == [DropKey(), (0, p.Decline(id="1"))]


def test_a_key_that_fails_leaves_the_code():
    talk = Talk()
    talk.hear(opened(webauthn=CHALLENGE))
    assert talk.key_failed("it was pulled out") == ["it was pulled out", "?"]
    assert talk.line("1")[-1] == (0, p.Answer(id="1", code="1"))


def test_the_line_after_a_question_for_the_pin_is_the_pin():
    talk = Talk()
    talk.hear(opened(webauthn=CHALLENGE))
    assert talk.pin_wanted() == ["?secret"]
    assert talk.line("1234\n") == [GivePin("1234"), "?"]
    assert talk.line("123456")[-1] == (0, p.Answer(id="1", code="123456"))


def test_the_question_for_a_pin_ends_with_its_prompt():
    talk = Talk()
    talk.hear(opened(webauthn=CHALLENGE))
    talk.hear(opened("2"))
    talk.pin_wanted()
    talk.hear(p.PromptClosed(id="1", outcome="nobody"))
    assert talk.line("123456")[-1] == (0, p.Answer(id="2", code="123456"))
    assert talk.pin_wanted() == [GivePin("")]


def test_without_input_only_keys_can_answer():
    talk = Talk()
    talk.hear(opened("1"))
    talk.hear(opened("2", webauthn=CHALLENGE))
    said = talk.end_of_input()
    assert said[0] == DropKey()
    assert said[1].startswith("app 2")
    assert said[-1] == (0, p.RenewChallenge(id="2"))
    assert talk.hear(opened("3")) == []
    assert talk.signed(ASSERTION) == [DropKey(), (0, p.Answer(id="2", webauthn=ASSERTION))]
    said = talk.hear(p.PromptClosed(id="2", outcome="done"))
    assert said == ["done", "app 3 in demo.test waits for a code"]
    assert talk.dialog.unanswered == 2


def test_a_page_is_told_and_shown_and_the_browser_answers():
    talk = Talk()
    said = talk.hear(opened(sso=SSO, takes_code=False))
    page = f"to sign in at okta, open this address in your browser: {PAGE}"
    assert said[1:] == [page, ShowPage(PAGE), "?"]
    assert talk.hear(p.PromptAnswered(id="1", is_by_browser=True)) == [
        DropKey(),
        "app 1 in demo.test: answered in the browser",
    ]
    assert talk.hear(p.PromptClosed(id="1", outcome="app 1 can be used now")) != []


def test_a_page_is_shown_once_for_each_request():
    talk = Talk()
    talk.hear(opened(sso=SSO, webauthn=CHALLENGE))
    # A new challenge for the key leaves the page as it is.
    assert talk.hear(opened(sso=SSO, webauthn=RENEWED)) == [UseKey(RENEWED)]
    talk.hear(p.PromptAnswered(id="1", is_by_browser=True))
    other = p.SsoChallenge(redirect_url="https://idp.test/2")
    said = talk.hear(opened(sso=other, problem="denied"))
    assert said == [
        "app 1 in demo.test: not taken: denied",
        "to sign in, open this address in your browser: https://idp.test/2",
        ShowPage("https://idp.test/2"),
        "?",
    ]


def test_all_ways_to_answer_are_offered_at_once():
    for changes, ways in [
        ({}, "code"),
        ({"takes_code": False, "sso": SSO}, "browser"),
        ({"sso": SSO}, "browser, or code"),
        ({"webauthn": CHALLENGE}, "security key, or code"),
        ({"webauthn": CHALLENGE, "sso": SSO}, "security key, browser, or code"),
    ]:
        *_, question = Dialog().heard(0, opened(**changes))
        assert question == AskLine(f"{ways} (empty: later, n: decline): ")


def test_without_input_a_browser_can_answer():
    talk = Talk()
    talk.hear(opened(sso=SSO))
    talk.hear(p.Waiting())
    assert talk.end_of_input() == []
    assert not talk.dialog.is_done
    talk.hear(p.PromptAnswered(id="1", is_by_browser=True))
    assert talk.hear(p.PromptClosed(id="1", outcome="done")) == ["done"]
    assert talk.dialog.is_done
    assert [ShowPage(PAGE)] == talk.hear(opened("2", sso=SSO))[2:]


def test_nothing_a_proxy_says_moves_the_cursor():
    talk = Talk()
    said = talk.hear(opened(target="app \x1b[2J\n", cluster="\r", user="\x07"))
    said += talk.hear(p.PromptClosed(id="1", outcome="\x1b]0;x\x07"))
    assert all(text.isprintable() for text in said if isinstance(text, str))


EVENTS = st.one_of(
    st.builds(
        lambda i, w, o, s: ("heard", s, opened(i, webauthn=w, sso=o)),
        st.sampled_from("123"),
        st.sampled_from([None, CHALLENGE]),
        st.sampled_from([None, SSO]),
        st.integers(0, 1),
    ),
    st.builds(lambda i: ("heard", 0, p.PromptAnswered(id=i)), st.sampled_from("1234")),
    st.builds(lambda i: ("heard", 0, p.PromptClosed(id=i, outcome="x")), st.sampled_from("1234")),
    st.just(("heard", 0, p.Waiting())),
    st.builds(lambda s: ("gone", s), st.integers(0, 1)),
    st.builds(lambda t: ("line", t), st.sampled_from(["", "n", "123456", "x" * 100])),
    st.just(("end_of_input",)),
    st.just(("signed", ASSERTION)),
    st.just(("touch_wanted",)),
    st.just(("pin_wanted",)),
    st.just(("key_failed", "why")),
)


@given(st.lists(EVENTS, max_size=40))
def test_whatever_happens_only_what_waits_is_answered(events):
    dialog, waiting = Dialog(), {}
    for source in (0, 1):
        dialog.connected(source)
    for name, *arguments in events:
        if name == "heard":
            source, message = arguments
            if isinstance(message, p.PromptOpened):
                waiting.setdefault(message.id, source)
            elif isinstance(message, p.PromptClosed):
                waiting.pop(message.id, None)
        elif name == "gone":
            waiting = {i: s for i, s in waiting.items() if s != arguments[0]}
        before = dict(waiting)
        for command in getattr(dialog, name)(*arguments):
            if isinstance(command, Send):
                assert before[command.message.id] == command.source
    for prompt_id in list(waiting):
        dialog.heard(0, p.PromptClosed(id=prompt_id, outcome="x"))
    dialog.gone(0)
    dialog.gone(1)
    assert dialog.is_done
