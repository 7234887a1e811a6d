"""mistral chat: a pipe, and a terminal with its commands, keys and history."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import termios
import time

import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console
from scripted import END, Characters, Model

from mistral_core.cli import main, repl
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.errors import InputError, MissingExtraError, MistralError, OutputExistsError
from mistral_core.pipelines.conversation import Conversation

PATH = str(TINY_CHECKPOINT)
TORCH = ("--backend", "torch", "--max-new-tokens", "8")


def answer(text):
    return [*Characters().encode(text, False), END]


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "mistral"


class Terminal:
    """A Repl with keys to press and a screen to read."""

    def __init__(self, pipe, *says, **options):
        talk = Conversation(Model([id for text in says for id in answer(text)]), Characters(), **options)
        self.screen = io.StringIO()
        session = repl._session(input=pipe, output=DummyOutput())
        console = Console(file=self.screen, highlight=False, width=200)
        self.repl, self.pipe, self.talk = repl.Repl(talk, console=console, session=session), pipe, talk

    def types(self, keys):
        """What the screen shows after these keys and Ctrl-D."""
        self.pipe.send_text(keys + "\x04")
        assert self.repl.run() == 0
        return self.screen.getvalue()

    def takes(self, text):
        """What the screen shows after a command."""
        self.screen.seek(0)
        self.screen.truncate()
        self.repl.take(text)
        return self.screen.getvalue()

    @property
    def said(self):
        return [each["content"] for each in self.talk.messages if each["role"] == "user"]


@pytest.fixture
def pipe():
    with create_pipe_input() as made:
        yield made


# A pipe


def piped(monkeypatch, text, *arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return main(["chat", PATH, *TORCH, *arguments])


def test_a_pipe_is_answered_once_and_only_the_answer_is_printed(monkeypatch, capsys):
    assert piped(monkeypatch, "Emma was\n") == 0
    out, err = capsys.readouterr()
    assert out == " not at all pleased. She was not\n"
    assert "no chat format" in err
    assert "tokens/s" in err


def test_a_pipe_as_json(monkeypatch, capsys):
    assert piped(monkeypatch, "Emma was", "--json", "--raw", "--stop", "pleased") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == " not at all "
    assert found["ended"] == "stop"
    assert found["messages"] == [
        {"role": "user", "content": "Emma was"},
        {"role": "assistant", "content": " not at all "},
    ]


@pytest.mark.parametrize(
    ("text", "arguments", "says"),
    [
        ("\n", (), "nothing to answer"),
        ("a", ("--system", "S"), "no system prompt"),
        ("a", ("--num-beams", "2"), "num_beams"),
        ("a b" * 4096, (), "4096"),
    ],
)
def test_mistakes_are_errors_of_one_line(monkeypatch, capsys, text, arguments, says):
    assert piped(monkeypatch, text, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err


@pytest.mark.parametrize("command", ["chat", "generate", "mask", "tokenize"])
@pytest.mark.parametrize(
    ("sent", "says"), [(b"a\xff", "not UTF-8 at byte 1"), (b"", "nothing to"), (b"\n", "nothing to")]
)
def test_a_pipe_that_is_no_text_is_an_error(monkeypatch, capsys, command, sent, says):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(sent), encoding="utf-8"))
    assert main([command, PATH]) == 2
    assert says in capsys.readouterr().err


# What the terminal needs


@pytest.mark.parametrize("name", ["rich", "prompt_toolkit"])
def test_a_missing_package_names_its_extra(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"mistral-frameworks\[chat\]"):
        repl.require()


def test_a_pipe_needs_neither(monkeypatch):
    code = f"""
import sys
sys.modules["rich"] = sys.modules["prompt_toolkit"] = None
from mistral_core.cli import main
sys.exit(main(["chat", {PATH!r}]))
"""
    found = subprocess.run([sys.executable, "-c", code], input="", capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "nothing to answer" in found.stderr


# Lines


def test_a_line_is_said_and_answered(pipe):
    terminal = Terminal(pipe, "one", "two")
    shown = terminal.types("a\rbc\r")
    assert terminal.said == ["a", "bc"]
    assert re.search(r"one\n4 tokens, [0-9.]+ tokens/s\ntwo\n", shown)


def test_lines_that_belong_together(pipe):
    terminal = Terminal(pipe, "x", "x", "x")
    terminal.types("one\\\rtwo\r" + "one\x1b\rtwo\r" + "\x1b[200~one\r\ntwo\x1b[201~\r")
    assert terminal.said == ["one\ntwo"] * 3


def test_ctrl_c_clears_the_line(pipe):
    terminal = Terminal(pipe, "x")
    terminal.types("wrong\x03right\r")
    assert terminal.said == ["right"]


def test_an_empty_line_says_nothing(pipe):
    terminal = Terminal(pipe)
    terminal.types("\r  \r")
    assert terminal.said == []


def test_an_error_keeps_the_session(pipe):
    terminal = Terminal(pipe, "x", messages=[{"role": "tool", "content": "a"}])
    shown = terminal.types("a\r/reset\r/nothing\rb\r")
    assert "got 'tool'" in shown
    assert "/nothing: no such command" in shown
    assert terminal.said == ["b"]


def test_history_is_the_user_s_own(pipe, state):
    Terminal(pipe, "x").types("hello\r")
    file = state / "chat_history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "+hello" in file.read_text()
    with create_pipe_input() as again:
        terminal = Terminal(again, "x")
        terminal.types("\x1b[A\r")  # the line before
        assert terminal.said == ["hello"]


def test_history_that_cannot_be_kept_is_no_error(pipe, state):
    state.parent.mkdir()
    state.write_text("not a directory")
    terminal = Terminal(pipe, "x")
    terminal.types("hello\r")
    assert terminal.said == ["hello"]


# Commands


def test_an_unknown_command_names_the_nearest(pipe):
    terminal = Terminal(pipe)
    for typed, near in (("/regn", "/regen"), ("/Stats", "/stats"), ("/safe a", "/save"), ("/zzz", "/help")):
        with pytest.raises(InputError, match=f"{near}\\b"):
            terminal.takes(typed)
    with pytest.raises(InputError, match="takes nothing"):
        terminal.takes("/quit now")


def test_a_text_may_begin_with_a_slash(pipe):
    terminal = Terminal(pipe, "x", "y")
    terminal.takes("/etc/hosts is a file")
    terminal.takes(" /help is a word")
    assert terminal.said == ["/etc/hosts is a file", " /help is a word"]


def test_commands_do_what_help_says(pipe):
    terminal = Terminal(pipe, "one", "two", "six")
    shown = terminal.takes("/help")
    assert all(f"/{name}" in shown for name in repl.COMMANDS)
    assert "no answer yet" in terminal.takes("/stats")
    assert "no system prompt" in terminal.takes("/system")
    assert "system prompt: S T" in terminal.takes("/system S T")
    terminal.takes("a")
    assert "two" in terminal.takes("/regen")
    stats = terminal.takes("/stats")
    assert "prompt:  7 tokens, 6 of them from the cache (4 tokens were taken back), 1 computed" in stats
    assert "context: 11 of 400 tokens, 3 messages" in stats
    terminal.takes("/reset")
    assert terminal.talk.messages == [{"role": "system", "content": "S T"}]
    assert "no system prompt" in terminal.takes("/system -")
    with pytest.raises(EOFError):
        terminal.takes("/quit")


def test_a_conversation_is_saved_and_loaded(pipe, tmp_path):
    terminal, file = Terminal(pipe, "one", "two"), tmp_path / "a chat.json"
    terminal.takes("a")
    assert "2 messages written" in terminal.takes(f"/save {file}")
    messages = list(terminal.talk.messages)
    assert json.loads(file.read_text()) == {"messages": messages}
    terminal.takes("/reset")
    with pytest.raises(OutputExistsError, match="/save!"):
        terminal.takes(f"/save {file}")
    assert "2 messages read" in terminal.takes(f"/load {file}")
    assert terminal.talk.messages == messages
    terminal.takes("b")
    terminal.takes(f"/save! {file}")
    assert len(json.loads(file.read_text())["messages"]) == 4
    assert [each.name for each in tmp_path.iterdir() if each.name != "state"] == ["a chat.json"]


@pytest.mark.parametrize(
    "text", ["", "[", "[]", '{"messages": 1}', '{"messages": ["a"]}', '{"messages": [{"role": "x", "content": "a"}]}']
)
def test_what_is_no_conversation_is_not_loaded(pipe, tmp_path, text):
    terminal, file = Terminal(pipe, "one"), tmp_path / "a"
    terminal.takes("a")
    file.write_text(text)
    with pytest.raises(MistralError):
        terminal.takes(f"/load {file}")
    assert len(terminal.talk.messages) == 2


@pytest.mark.parametrize("command", ["/save", "/load", "/save \0", "/load /nowhere/at/all", "/save! /"])
def test_a_name_that_is_no_file_is_an_error(pipe, command):
    with pytest.raises(MistralError):
        Terminal(pipe).takes(command)


def test_a_device_is_not_read(pipe):  # it may have no end
    with pytest.raises(InputError, match="must be a file with a saved conversation"):
        Terminal(pipe).takes("/load /dev/null")


# What an answer may not do


def test_an_answer_cannot_command_the_terminal(pipe):
    assert repl.printable("a\x1b]0;title\x07\r\x9b2J\u202e\n\tb\u00e9\U0001f600\ud800") == (
        "a\\x1b]0;title\\x07\\r\\x9b2J\\u202e\n\tb\u00e9\U0001f600\\ud800"
    )
    terminal = Terminal(pipe, "[red]a[/red] [bold")
    assert "[red]a[/red] [bold" in terminal.takes("a")
    terminal.repl._show("\x1b[2J")
    assert "\x1b" not in terminal.screen.getvalue()


# Ctrl-C while an answer is written


def test_the_first_ctrl_c_ends_the_answer_and_the_second_takes_the_turn_back(pipe, monkeypatch):
    terminal, shown, before = Terminal(pipe, "abcdef", "ghijkl"), [], signal.getsignal(signal.SIGINT)

    def interrupted(times):
        def show(piece):
            shown.append(piece)
            if len(shown) == 2:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)

        return show

    terminal.repl._show = interrupted(1)
    assert "stopped" in terminal.takes("a")
    assert terminal.talk.messages[-1]["content"] == "ab"
    assert signal.getsignal(signal.SIGINT) is before
    terminal.talk.model.says.clear()
    terminal.talk.model.says += answer("x")
    shown.clear()
    terminal.repl._show = interrupted(2)
    with pytest.raises(KeyboardInterrupt):
        terminal.talk.model.says[:0] = Characters().encode("ghij", False)
        terminal.takes("b")
    assert len(terminal.talk.messages) == 2


# The real thing


START = """
import os, signal, sys, time
from mistral_core.cli import main, repl
os.close(os.open(os.ttyname(0), os.O_RDWR))  # the terminal of this session, so that Ctrl-C is its signal

def show(chat, piece):
    shown(chat, piece)
    while "pleased" in piece and signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        time.sleep(0.01)  # the answer is not at its end when Ctrl-C comes, however busy the machine is

shown, repl.Repl._show = repl.Repl._show, show
sys.exit(main(sys.argv[1:]))
"""


class Pty:
    """A command in a terminal of its own."""

    def __init__(self, *arguments):
        self.seen = ""
        self.terminal, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.command = subprocess.Popen(
            [sys.executable, "-c", START, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)

    def types(self, keys, then, seconds=600):
        """Press keys, where there are some at the prompt, and read until a pattern is on the screen."""
        start, deadline = len(self.seen), time.monotonic() + seconds
        while keys and not self.is_at_prompt() and time.monotonic() < deadline:
            time.sleep(0.01)
        self._press(keys, then, start, deadline)

    def is_stopped(self, then, seconds=600):
        """Press Ctrl-C while an answer comes, and read until a pattern is on the screen."""
        assert not self.is_at_prompt()
        self._press("\x03", then, len(self.seen), time.monotonic() + seconds)

    def is_at_prompt(self):
        """Whether keys come one by one, and Ctrl-C is one of them."""
        return not termios.tcgetattr(self.terminal)[3] & termios.ICANON

    def _press(self, keys, then, start, deadline):
        os.write(self.terminal, keys.encode())
        while not re.search(then, self.seen[start:], re.DOTALL):
            assert select.select([self.terminal], [], [], max(0, deadline - time.monotonic()))[0], self.seen
            try:
                self.seen += os.read(self.terminal, 4096).decode(errors="replace")
            except OSError:
                pytest.fail(f"it ended: {self.seen}")

    def ends(self):
        """The exit status."""
        with contextlib.suppress(OSError):  # what the end of a terminal reads like
            while os.read(self.terminal, 4096):
                pass
        os.close(self.terminal)
        return self.command.wait()


def test_a_chat_in_a_terminal():
    terminal = Pty("chat", PATH, "--backend", "torch", "--max-new-tokens", "4000")
    try:
        terminal.types("", "lists the commands.*>")
        terminal.types("Emma was\r", "pleased")
        terminal.is_stopped("tokens/s, stopped.*>")
        terminal.types("/stats\r", "context: .*>")
        terminal.types("half a line\x03", "line.*>")
        os.write(terminal.terminal, b"\x04")
        assert terminal.ends() == 0
    finally:
        terminal.command.kill()
