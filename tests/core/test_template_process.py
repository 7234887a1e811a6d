"""What templates try, and the process that they try it in."""

import ast
import contextlib
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mistral_core.errors import MissingExtraError, TemplateError, TemplateSecurityError, TemplateTimeoutError
from mistral_core.text.templates.prompt import render, segments
from mistral_core.text.templates.sandbox import process as template_process
from mistral_core.text.templates.sandbox import worker as template_worker
from mistral_core.text.templates.sandbox.process import PROCESS, TemplateProcess

MESSAGES = [{"role": "user", "content": "hello"}]


def rendered(template, /, **variables):
    return render(template, messages=MESSAGES, **variables)


@pytest.fixture(autouse=True)
def _still_serving():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert rendered("{{ messages[0].content }}") == "hello"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # kB


@pytest.fixture(autouse=True, scope="module")
def _patient():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template_process, "SECONDS", 120.0)  # the machine may be busy
        yield


@contextlib.contextmanager
def impatient():
    rendered("")  # started
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template_process, "SECONDS", 0.3)
        yield


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% if ''.__class__ %}{% endif %}",
        "{% for x in ''.__class__ %}{% endfor %}",
        "{{ ''.__class__ == 1 }}",
        "{{ ''.__class__|length }}",
        "{{ ''|attr('__class__') }}",
        "{{ (''|attr('__class__'))|attr('__mro__') }}",
        "{{ ['a']|map(attribute='__class__')|join }}",
        "{{ ['a']|map('attr', '__class__')|join }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{a.__class__}'.format_map({'a': 1}) }}",
        "{{ ('{0.__class__}'|string).format(messages) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ messages[0].pop('role') }}",
        "{{ messages.sort() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['sys'] }}",
        "{{ tojson.__globals__ if tojson is defined else dict.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ range.__globals__ }}",
        "{{ self.__init__ }}",
        "{{ (messages|select).gi_frame }}",
        "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
        "{% set ns = namespace(__call__=range) %}",
        "{% set ns = namespace({'__class__': 1}.items()) %}",
        "{% set ns = namespace() %}{% set ns.__html__ = range %}",
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{% from 'x' import y %}",
        "{% extends 'x' %}",
    ],
)
def test_119_a_template_stays_in_its_sandbox(template):
    with pytest.raises(TemplateSecurityError, match="refused"):
        rendered(template)


@pytest.mark.parametrize("name", ["lipsum", "cycler", "joiner", "__builtins__", "open", "environment", "context"])
def test_119_there_is_nothing_else_to_reach(name):
    with pytest.raises(TemplateError, match=f"'{name}' is undefined"):
        rendered(f"{{{{ {name}() }}}}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
        "{{ 10 ** (10 ** 8) }}",
        "{% set ns = namespace(x=7) %}{% for a in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    ],
)
def test_120_an_endless_template_is_ended(template):
    with impatient(), pytest.raises(TemplateTimeoutError, match="not done after 0.3 s"):
        rendered(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ '%1000000000d' % 1 }}",
        "{{ '%1000000000d'|format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ 'a'|center(10 ** 9) }}",
        "{{ [0] * 10 ** 8 }}",
        "{{ 'a' * 10 ** 11 }}",
        "{% set ns = namespace(x='a') %}{% for _ in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[0]) %}{% for _ in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    ],
)
def test_120_memory_is_bounded(template):
    with pytest.raises(TemplateError, match="needs more than 512 MB"):
        rendered(template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for _ in range(20) %}{{ 'a' * 1000000 }}{% endfor %}", "longer than 16 MB"),
        ("{{ range(10 ** 9) }}", "OverflowError: Range too big"),
        ("{{ lipsum(n=100000) }}", "'lipsum' is undefined"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{% macro m(x) %}{{ caller(x) }}{% endmacro %}{% call(x) m(1) %}{{ m(x) }}{% endcall %}", "No caller"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "Recursion|died|nested"),
        ("{{ " + "[" * 300 + "]" * 300 + " }}", "Recursion|died|nested|SyntaxError"),
        ("{{ " + "-" * 5000 + "1 }}", "Recursion|died|nested"),
        ("{{ 1" + "+1" * 20000 + " }}", "Recursion|died|nested"),
        ("{% if 1 %}" * 2000 + "{% endif %}" * 2000, "Recursion|died|nested|indent"),
    ],
)
def test_120_what_is_too_much_is_an_error(template, message):
    with pytest.raises(TemplateError, match=message):
        rendered(template)


def test_a_prompt_of_almost_16_mb_is_rendered():
    text = rendered("{% for _ in range(15) %}{{ 'é' * 500000 }}{% endfor %}")
    assert len(text) == 7_500_000


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("\n{% if %}", "line 2: Expected an expression"),
        ("{% nonsense %}", "unknown tag 'nonsense'"),
        ("{{ 'a' + 1 }}", "line 1: TypeError: "),
        ("\n\n{{ 1 / 0 }}", "line 3: ZeroDivisionError: "),
        ("{{ messages[0].name + 'a' }}", "has no attribute 'name'"),
        ("{{ undefined_name }}", "'undefined_name' is undefined"),
        ("{{ '\\ud800' }}", "UnicodeEncodeError"),
        ("{{ 'a'.encode('zip') }}", "chat template, line 1: "),
        ("{{ messages|tojson(indent=namespace()) }}", "TypeError"),
    ],
)
def test_121_a_template_s_mistakes_are_template_errors(template, message):
    with pytest.raises(TemplateError, match=message):
        rendered(template)


def test_121_what_a_template_says_is_quoted():
    with pytest.raises(TemplateError, match=r"line 1: it refuses, in its own words, 'no  \[31mway'; change the"):
        rendered("{{ raise_exception('no\\n\\x1b[31mway') }}")
    with pytest.raises(TemplateError) as caught:
        rendered("{{ raise_exception('a' * 1000000) }}")
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("name", ["raise_exception", "range", "namespace", "tojson", "_x", "template", "personna"])
def test_123_a_variable_is_one_that_the_template_reads(name):
    template = "{{ raise_exception }}{{ range }}{{ namespace }}{{ _x }}{{ persona }}"
    with pytest.raises(TemplateError, match=f"is called '{name}'; it reads persona"):
        rendered(template, **{name: "x"})


def test_one_template_leaves_nothing_to_the_next():
    rendered("{% set x = 1 %}{% macro m() %}{% endmacro %}{% set ns = namespace(y=1) %}")
    assert rendered("{{ x is defined }} {{ m is defined }} {{ ns is defined }}") == "False False False"


# The process


def worker():
    rendered("")
    return PROCESS._process


def test_the_process_is_used_again():
    assert worker().pid == worker().pid


def test_the_process_is_replaced_after_a_timeout_and_after_its_death():
    first = worker()
    with impatient(), pytest.raises(TemplateTimeoutError):
        rendered("{{ 10 ** (10 ** 8) }}")
    second = worker()
    assert second.pid != first.pid
    assert first.returncode is not None
    second.kill()
    second.wait()
    assert worker().pid != second.pid


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_the_process_inherits_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with open(tmp_path / "file", "w") as file:
        os.set_inheritable(file.fileno(), True)
        process = TemplateProcess()
        try:
            process.ask({"template": "", "variables": {}, "own": [], "now": 0})
            proc = Path(f"/proc/{process._process.pid}")
            assert {each.name for each in (proc / "fd").iterdir()} == {"0", "1", "2"}
            assert b"hf_secret" not in (proc / "environ").read_bytes()
            assert os.readlink(proc / "cwd") == "/"
        finally:
            process.close()


def test_120_a_worker_whose_parent_is_gone_ends_itself():
    request = {"template": "{{ 10 ** (10 ** 8) }}", "variables": {}, "own": [], "now": 0, "seconds": 0.2}
    command = [sys.executable, "-I", template_worker.__file__]
    line = json.dumps(request).encode() + b"\n"
    run = subprocess.run(command, input=line, stdout=subprocess.PIPE, timeout=600, check=False)
    assert run.returncode == -signal.SIGALRM


def test_the_worker_imports_nothing_of_this_package():
    imported = set()
    for node in ast.walk(ast.parse(Path(template_worker.__file__).read_text())):
        imported |= {name.name for name in node.names} if isinstance(node, ast.Import) else set()
        imported |= {node.module} if isinstance(node, ast.ImportFrom) and node.level == 0 else set()
        assert not (isinstance(node, ast.ImportFrom) and node.level)
    assert {name.partition(".")[0] for name in imported} - {"__future__", "jinja2"} <= sys.stdlib_module_names


def test_threads_share_the_process():
    found, threads = {}, []
    for at in range(8):
        show = lambda at=at: found.update({at: [rendered(f"{{{{ {at} * {n} }}}}") for n in range(10)]})  # noqa: E731
        threads.append(threading.Thread(target=show))
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == {at: [str(at * n) for n in range(10)] for at in range(8)}


FORK = """
import os
from mistral_core.text.templates.prompt import render
from mistral_core.text.templates.sandbox.process import PROCESS

def shown(text):
    return render("{{ messages[0].content }}", messages=[{"role": "user", "content": text}])

shown("a")
mine = PROCESS._process.pid
PROCESS._lock.acquire()  # as another thread might hold it
child = os.fork()
if child == 0:
    assert shown("child") == "child" and PROCESS._process.pid != mine
    os._exit(0)
PROCESS._lock.release()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert shown("parent") == "parent" and PROCESS._process.pid == mine
print(mine)
"""


def test_a_fork_has_its_own_process_and_the_end_ends_it():
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORK], capture_output=True, text=True, timeout=600, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")  # and no warning
    with pytest.raises(ProcessLookupError):
        os.kill(int(run.stdout), 0)


def test_without_jinja2_the_message_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="need jinja2; pip install"):
        TemplateProcess().ask({})


def test_jinja2_with_known_ways_out_is_refused(monkeypatch, tmp_path):
    (tmp_path / "jinja2.py").write_text("raise ImportError('jinja2 3.1.5 is too old')")
    monkeypatch.setattr(template_process, "_paths", lambda: [str(tmp_path)])
    with pytest.raises(MissingExtraError, match=r"3.1.5 is too old; pip install 'jinja2>=3.1.6'"):
        TemplateProcess().ask({})
    monkeypatch.setattr(template_worker.importlib.metadata, "version", lambda name: "3.1.5")
    with pytest.raises(ImportError, match=r"jinja2 3.1.5 is too old"):
        template_worker.make_environment()


def test_a_worker_that_cannot_start_is_a_template_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(TemplateError, match="no process for it"):
        TemplateProcess().ask({})
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(TemplateError, match="died"):
        TemplateProcess().ask({})


def test_segments_do_not_try_again_after_a_timeout():
    endless = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    template = "{% if '[' not in messages[0].content %}" + endless + "{% endif %}"
    with impatient(), pytest.raises(TemplateTimeoutError):
        segments(template, controls=["[INST]"], messages=[{"role": "user", "content": "[INST]"}])
