import os
import threading
import webbrowser

import pytest

from supervisor.cli.browser import open_page

URL = "https://idp.test/authorize?a=b&c=d"


class Browser:
    def __init__(self):
        self.opened = []
        self.was_opened = threading.Event()

    def open(self, url):
        self.opened.append(url)
        self.was_opened.set()


@pytest.fixture
def browser(monkeypatch):
    made = Browser()
    monkeypatch.setattr(webbrowser, "get", lambda: made)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    return made


def join():
    for thread in threading.enumerate():
        if thread.name.endswith("(_open)"):
            thread.join(10)


@pytest.mark.parametrize("name", ["DISPLAY", "WAYLAND_DISPLAY"])
def test_a_desktop_shows_the_page(browser, name):
    open_page(URL, {name: "x"})
    assert browser.was_opened.wait(10)
    assert browser.opened == [URL]


@pytest.mark.parametrize("environment", [{}, {"DISPLAY": ""}])
def test_without_a_desktop_nothing_is_started(browser, environment):
    open_page(URL, environment)
    join()
    assert browser.opened == []


def test_root_starts_no_browser(browser, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    open_page(URL, {"DISPLAY": ":0"})
    join()
    assert browser.opened == []


def test_a_browser_for_terminals_is_not_started(monkeypatch, browser, tmp_path):
    path = tmp_path / "started"
    monkeypatch.setattr(webbrowser, "get", lambda: webbrowser.GenericBrowser(["touch", str(path)]))
    open_page(URL, {"DISPLAY": ":0"})
    join()
    assert not path.exists()


def test_no_browser_is_no_fault(monkeypatch, browser):
    def get():
        raise webbrowser.Error("could not locate runnable browser")

    monkeypatch.setattr(webbrowser, "get", get)
    open_page(URL, {"DISPLAY": ":0"})
    join()
