"""The process in which chat templates are rendered: run as a script, it knows nothing of this package.

Requests and answers are JSON, one a line; jinja2's sandbox keeps a template in, and where it fails,
limits of memory, files and time are left.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import random
import re
import resource
import signal
import sys
import time
from datetime import datetime
from functools import lru_cache
from typing import Any

MAX_TEMPLATE_BYTES = 128 << 10
MAX_PROMPT_BYTES = 16 << 20
MAX_ARGUMENT_BYTES = 16 << 20
MAX_MEMORY = 512 << 20
"""Bytes of address space."""

OLDEST_JINJA2 = (3, 1, 6)  # of older ones, ways out of the sandbox are known
LONGEST_MESSAGE = 2000
CACHED_TEMPLATES = 32
TEMPLATE_FILE = "<template>"
"""What jinja2 calls the file of a template that came as a string."""


class WordsOfTemplateError(Exception):
    """Raised by `raise_exception` in a template."""


class RefusedError(Exception):
    """A prompt or a variable that is not allowed."""


def main(paths: list[str]) -> None:
    """Answer requests until there are no more; `paths` lead to jinja2."""
    sys.path += paths
    try:
        renderer = Renderer()
    except ImportError as cause:
        _answer({"error": "start", "message": str(cause)})
        return
    # what opens files the first time, before none can be opened: the time zone, codecs, modules imported on demand
    renderer.environment.from_string("{{ 'é\\n' | pprint }}").render(when=time.localtime())
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    limit_resources()
    _answer({"ready": True})
    for line in sys.stdin.buffer:
        _answer(renderer.answer(line))


def _answer(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


def limit_resources() -> None:
    """Bound memory; no core dump, no file is opened from here on and none written."""
    for kind, most in (
        (resource.RLIMIT_AS, MAX_MEMORY),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit of address space
            resource.setrlimit(kind, (most, most))


class Renderer:
    """A sandbox and the templates compiled in it."""

    def __init__(self) -> None:
        self.environment = make_environment()
        self.compiled = lru_cache(CACHED_TEMPLATES)(self._compile)
        self.names = lru_cache(CACHED_TEMPLATES)(self._names)

    def answer(self, line: bytes) -> dict[str, Any]:
        """`{"text": ...}` or `{"error": kind, "message": ..., "line": ...}`; dies when `seconds` are over."""
        import jinja2

        template = None
        try:
            request = json.loads(line)
            # should the parent be gone, nobody else ends a template that never does
            signal.setitimer(signal.ITIMER_REAL, request["seconds"])
            self._check_names(request)
            template = self.compiled(request["template"])
            return {"text": self._text(template, request)}
        except WordsOfTemplateError as error:
            return _error("words", error, template)
        except jinja2.exceptions.SecurityError as error:
            return _error("security", error, template)
        except RefusedError as error:
            return _error("refused", error, template)
        except MemoryError:
            return {"error": "memory"}
        except jinja2.TemplateError as error:
            return _error("template", error, template)
        except Exception as error:  # a template can raise anything: 1 / 0, 'a' + 1, endless macros
            return _error("template", error, template, prefix=f"{type(error).__name__}: ")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _text(self, template: Any, request: dict[str, Any]) -> str:
        # one moment and one seed for all renderings of a prompt: they are compared
        self.environment.now = datetime.fromtimestamp(request["now"])
        self.environment.said = request.get("said", ("", ""))
        random.seed(request["now"])
        pieces, size = [], 0
        for piece in template.root_render_func(template.new_context(request["variables"])):
            pieces.append(piece)
            size += len(piece.encode())
            if size > MAX_PROMPT_BYTES:
                raise RefusedError(f"the prompt is longer than {MAX_PROMPT_BYTES >> 20} MB")
        return "".join(pieces)

    def _check_names(self, request: dict[str, Any]) -> None:
        own = request["own"]
        unknown = sorted(set(own) - self.names(request["template"])) if own else []
        if unknown:
            known = ", ".join(sorted(self.names(request["template"]) - set(request["variables"]))) or "none"
            raise RefusedError(f"no variable of the template is called {unknown[0]!r}; it reads {known}")

    def _compile(self, source: str) -> Any:
        from jinja2 import nodes
        from jinja2.exceptions import SecurityError

        parsed = self.environment.parse(source)
        for kind in (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends):
            if parsed.find(kind) is not None:
                raise SecurityError("it reads another template")
        return self.environment.from_string(parsed)

    def _names(self, source: str) -> frozenset[str]:
        from jinja2 import meta

        read = meta.find_undeclared_variables(self.environment.parse(source))
        return frozenset(name for name in read if name not in self.environment.globals and not name.startswith("_"))


def make_environment() -> Any:
    """jinja2 as transformers sets it up, less what does no chat template any good; raises ImportError."""
    import jinja2
    import jinja2.debug
    import jinja2.ext
    import jinja2.meta

    version = importlib.metadata.version("jinja2")
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < OLDEST_JINJA2:
        raise ImportError(f"jinja2 {version} is too old")
    environment: Any = make_sandbox()(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=make_undefined(),
        extensions=[jinja2.ext.loopcontrols, make_generation_tag()],
    )
    for name in ("lipsum", "cycler", "joiner"):
        del environment.globals[name]

    def strftime_now(format: str) -> str:
        return environment.now.strftime(format)

    def make_dict(*pairs: Any, **items: Any) -> dict[Any, Any]:
        return dict(*pairs, **items)  # not the class: it has attributes

    functions = (("raise_exception", raise_exception), ("strftime_now", strftime_now), ("dict", make_dict))
    environment.globals.update(functions, namespace=make_namespace())
    environment.filters["tojson"] = tojson
    environment.said = ("", "")  # before and after what an assistant says
    return environment


def raise_exception(message: Any) -> None:
    """What templates call to refuse a conversation."""
    raise WordsOfTemplateError(str(message))


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as transformers writes it; jinja2's own escapes what HTML would mistake."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def make_undefined() -> Any:
    """What a name without a value is: false and empty as jinja2 has it, but an error where it would be printed.

    A key that a message lacks prints as nothing, as published templates expect.
    """
    from jinja2 import Undefined
    from jinja2.utils import missing

    class Nothing(Undefined):
        __slots__ = ()

        def __str__(self) -> str:
            if self._undefined_obj is missing:
                self._fail_with_undefined_error()
            return ""

    return Nothing


def make_sandbox() -> Any:
    """jinja2's sandbox, in which what is forbidden is an error at once, not a value that prints as nothing."""
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise SecurityError(f"it reaches for {attribute!r} of {type(obj).__name__}")

    return Sandbox


def make_namespace() -> Any:
    """jinja2's `namespace`, whose attributes cannot pose as Python's own."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    class PublicNamespace(Namespace):
        def __init__(*args: Any, **attributes: Any) -> None:  # no `self`: a template may use that name
            given = dict(*args[1:], **attributes)
            for name in given:
                _check_public(name)
            Namespace.__init__(args[0], given)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_public(name)
            super().__setitem__(name, value)

    def _check_public(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"it gives a namespace the attribute {name!r}")

    return PublicNamespace


def make_generation_tag() -> Any:
    """`{% generation %}`, with which templates mark what an assistant says: what it holds, between marks if asked."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (nodes.Output([self.call_method(name)], lineno=line) for name in ("begin", "end"))
            return nodes.Scope([begin, *body, end], lineno=line)

        def begin(self) -> str:
            environment: Any = self.environment
            return str(environment.said[0])

        def end(self) -> str:
            environment: Any = self.environment
            return str(environment.said[1])

    return Generation


def _error(kind: str, error: Exception, template: Any, prefix: str = "") -> dict[str, Any]:
    message = (prefix + str(getattr(error, "message", None) or error))[:LONGEST_MESSAGE]
    return {"error": kind, "message": message, "line": getattr(error, "lineno", None) or _line(error, template)}


def _line(error: Exception, template: Any) -> int | None:
    """The line of a template that an error comes from."""
    line, trace = None, error.__traceback__
    while trace is not None and template is not None:
        if trace.tb_frame.f_code.co_filename == TEMPLATE_FILE:
            line = template.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
    return line


if __name__ == "__main__":
    main(sys.argv[1:])
