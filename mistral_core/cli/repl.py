"""The terminal of `mistral chat`: commands, lines to edit, and answers that cannot touch more than their own lines."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import extras
from ..disk import files, strict_json
from ..errors import InputError, MistralError, OutputExistsError, UnsafeFileError
from ..pipelines.conversation import Conversation, Turn
from ..telling import printable

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History
    from rich.console import Console

COMMANDS = {
    "help": ("", "this list"),
    "reset": ("", "start over; the system prompt stays"),
    "system": ("[TEXT]", "show the system prompt, or set it; - removes it"),
    "save": ("FILE", "write the conversation as JSON"),
    "save!": ("FILE", "the same, in the place of a file"),
    "load": ("FILE", "go on with a saved conversation"),
    "regen": ("", "another answer in the place of the last one"),
    "stats": ("", "what the last answer took, and what of the cache it could use"),
    "quit": ("", "leave"),
}
"""Command -> what it takes, and what it does."""
KEYS = "Alt-Enter, or a backslash before Enter: a new line. Ctrl-C: stop the answer, or clear the line. Ctrl-D: leave."
LINE = re.compile(r"/([A-Za-z]+!?)(?:\s+(.*))?\s*", re.DOTALL)
CONVERSATION_BYTES = 16 << 20


def require() -> None:
    """Raise MissingExtraError where what an interactive chat needs is not installed."""
    for name in ("rich", "prompt_toolkit"):
        extras.require(name, "chat", what="a chat in a terminal, not through a pipe,")


class Repl:
    """Reads a line, answers it or obeys it, until there are no more; errors of this project keep the session."""

    def __init__(
        self, conversation: Conversation, *, console: Console | None = None, session: PromptSession[str] | None = None
    ) -> None:
        self.conversation = conversation
        self.console = _console() if console is None else console
        self.session = _session() if session is None else session

    def run(self) -> int:
        """The whole conversation; 0 when the user leaves."""
        self._note("/help lists the commands.")
        while True:
            try:
                # bytes that are no UTF-8 come as surrogates
                text = self.session.prompt("> ").encode(errors="replace").decode()
                self.take(text)
            except KeyboardInterrupt:
                continue
            except EOFError:
                return 0
            except MistralError as error:
                self._note(f"mistral: {error}", "red")

    def take(self, text: str) -> None:
        """Say a text, or obey a command; raises EOFError to leave."""
        command = LINE.fullmatch(text)
        if command is not None:
            self._obey(*command.groups(default=""))
        elif text.strip():
            self._answer(lambda: self.conversation.say(text, on_text=self._show))

    def _obey(self, name: str, argument: str) -> None:
        argument = argument.strip()
        if name not in COMMANDS:
            near = difflib.get_close_matches(name.lower(), COMMANDS, n=1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists them."
            raise InputError(f"/{name}: no such command; {hint} A text may begin with / after a space.")
        if argument and not COMMANDS[name][0]:
            raise InputError(f"/{name}: it takes nothing, {argument[:40]!r} was found; leave it out.")
        getattr(self, f"_{name.replace('!', '_over')}")(argument)

    def _help(self, argument: str) -> None:
        for name, (takes, does) in COMMANDS.items():
            self._note(f"{f'/{name} {takes}':16}{does}")
        self._note(KEYS)

    def _reset(self, argument: str) -> None:
        self.conversation.reset()
        self._note("a new conversation")

    def _system(self, argument: str) -> None:
        if argument:
            self.conversation.system = None if argument == "-" else argument
        system = self.conversation.system
        self._note("no system prompt" if system is None else f"system prompt: {system}")

    def _save(self, argument: str, replace: bool = False) -> None:
        path = _path(argument)
        save(path, self.conversation.messages, replace=replace)
        self._note(f"{path}: {len(self.conversation.messages)} messages written")

    def _save_over(self, argument: str) -> None:
        self._save(argument, replace=True)

    def _load(self, argument: str) -> None:
        path = _path(argument)
        self.conversation.load(read(path))
        self._note(f"{path}: {len(self.conversation.messages)} messages read")

    def _regen(self, argument: str) -> None:
        if not self.conversation.generation.do_sample:
            self._note("the likeliest tokens again; start with --temperature for others")
        self._answer(lambda: self.conversation.regenerate(on_text=self._show))

    def _stats(self, argument: str) -> None:
        turn = self.conversation.last
        if turn is None:
            self._note("no answer yet")
            return
        first, note = f"{turn.first_token_seconds:.2f} s", f" ({turn.note})" if turn.note else ""
        self._note(
            f"answer:  {turn.new_tokens} tokens in {turn.seconds:.2f} s, the first after {first}\n"
            f"prompt:  {turn.prompt_tokens} tokens, {turn.reused} of them from the cache{note}, "
            f"{turn.prompt_tokens - turn.reused} computed\n"
            f"context: {turn.prompt_tokens + turn.new_tokens} of {self.conversation.limit} tokens, "
            f"{len(self.conversation.messages)} messages"
        )

    def _quit(self, argument: str) -> None:
        raise EOFError

    def _answer(self, ask: Callable[[], str]) -> None:
        try:
            with _stopped_by_ctrl_c(self.conversation):
                answer = ask()
        except BaseException:
            self.console.print()
            raise
        turn = self.conversation.last
        assert turn is not None
        self.console.print()
        self._note(summary(turn))
        if not answer:
            self._note("no text came, so nothing was kept")
        if turn.forgotten:
            self._note(f"the oldest {turn.forgotten} messages were forgotten")

    def _show(self, piece: str) -> None:
        self._print(piece, "cyan", end="", soft_wrap=True)  # pieces come without a whole line to wrap

    def _note(self, text: str, style: str = "dim") -> None:
        self._print(text, style)

    def _print(self, text: str, style: str, **options: Any) -> None:
        from rich.text import Text

        self.console.print(Text(printable(text), style=style), **options)


def summary(turn: Turn) -> str:
    """One line of what an answer took."""
    why = {"stopped": ", stopped", "length": ", cut at its greatest length"}.get(turn.ended, "")
    return f"{turn.new_tokens} tokens, {turn.new_tokens / max(turn.seconds, 1e-9):.1f} tokens/s{why}"


def save(path: Path, messages: list[dict[str, Any]], *, replace: bool) -> None:
    """Write {"messages": [...]} atomically; raises OutputExistsError unless a file may be replaced."""
    if not replace and os.path.lexists(path):
        raise OutputExistsError(f"{path}: it is there already; /save! replaces it, or choose another name.")
    files.write_file(path, (json.dumps({"messages": messages}, ensure_ascii=False, indent=1) + "\n").encode())


def read(path: Path) -> list[Any]:
    """The messages of a file that `save` wrote; raises CheckpointNotFoundError, LimitExceededError, InputError."""
    try:
        messages = strict_json.read_object(path, error=InputError, max_bytes=CONVERSATION_BYTES).get("messages")
    except UnsafeFileError as cause:
        raise InputError(f"{path} must be a file with a saved conversation.") from cause
    if not isinstance(messages, list):
        raise InputError(f'{path} must be {{"messages": [...]}}, as /save writes it; it has no list of messages.')
    return messages


def _path(name: str) -> Path:
    path = files.as_path(name)
    if not path.name or "\0" in name:
        raise InputError(f"{name!r} is no file name; write one after the command.")
    return path


@contextlib.contextmanager
def _stopped_by_ctrl_c(conversation: Conversation) -> Iterator[None]:
    """The first Ctrl-C ends the answer after its next token, a second one takes the turn back at once."""

    def stop(*_: Any) -> None:
        conversation.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _session(**terminal: Any) -> PromptSession[str]:
    """Lines with history, commands completed by Tab, and several lines as one text; pasted ones stay together."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline()
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.newline()

    return PromptSession(
        history=_history(),
        key_bindings=keys,
        multiline=True,
        prompt_continuation=". ",
        completer=WordCompleter([f"/{name}" for name in COMMANDS], sentence=True),
        complete_while_typing=False,
        **terminal,
    )


def _history() -> History:
    """Of all sessions, in a file of the user's own where that is possible."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Private(FileHistory):
        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):  # a full disk is no reason to end a conversation
                super().store_string(string.encode(errors="replace").decode())

    state = os.environ.get("XDG_STATE_HOME") or os.path.join("~", ".local", "state")
    path = files.as_path(state) / "mistral" / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
        path.chmod(0o600)
    except OSError:
        return InMemoryHistory()
    return Private(str(path))
