"""Templates that misbehave: each ends in one line, and the next template renders as before."""

import os
import resource
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from model.errors import InputError
from model.text import jinja
from tests.support import ROOT

FAILED, MEMORY = "T failed: ", "T needs more than 1 GiB of memory"


def render(source, **variables):
    return jinja.render("T", source, variables)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("{{ 'a' * 10**10 }}", MEMORY),
        ("{{ '%99999999999d' % 1 }}", MEMORY),
        ("{{ '{:>99999999999}'.format(1) }}", MEMORY),
        ("{{ 'a' | center(10**10) }}", MEMORY),
        ("{{ 'a\nb' | indent(2000000000) }}", MEMORY),
        (
            "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
            "{% endfor %}",
            MEMORY,
        ),
        ("{{ (range(100000) | list * 10000) | batch(2) | list }}", MEMORY),
        ("{{ 'ab' * 9000000 }}", "T writes more than 8388608 characters"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", f"{FAILED}maximum recursion depth"),
        ("{{ " + "(" * 100_000 + "1", f"{FAILED}maximum recursion depth"),
        ("{{ 1" + "+1" * 50_000 + " }}", f"{FAILED}maximum recursion depth"),
        ("{% if 1 %}" * 3_000, f"{FAILED}maximum recursion depth"),
        ("{{ range(10**9) | list }}", f"{FAILED}Range too big"),
        ("{{ 1 // 0 }}", f"{FAILED}integer division or modulo by zero"),
        ("a\n{% nonsense %}", "T failed in line 2: Encountered unknown tag 'nonsense'"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", f"{FAILED}access to attribute"),
        ("{{ x.a.b }}", f"{FAILED}'dict object' has no attribute 'a'"),
        ("{% include 'x' %}", f"{FAILED}no loader"),
    ],
)
def test_templates_that_misbehave(source, error):
    """Guards against memory and stack that run out, a shell, and tracebacks: one line each."""
    with pytest.raises(InputError) as raised:
        render(source, x={})
    assert str(raised.value).startswith(error) and "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600
    assert render("{{ x }}", x="\ufdd0é\ud83d😀\n") == "\ufdd0é\ud83d😀\n"


def test_time_limit(tmp_path, monkeypatch):
    """Guards against a loop, or one call into C, that never ends; here after a tenth of a second
    of CPU time."""
    file = tmp_path / "worker.py"
    text = Path(jinja.worker.__file__).read_text()
    assert "\nSECONDS = 10 " in text
    file.write_text(text.replace("\nSECONDS = 10 ", "\nSECONDS = 0.1 "))
    monkeypatch.setattr(jinja.worker, "__file__", str(file))
    jinja._stop_all()
    loop = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
    for source in (loop, "{{ (7 ** (10 ** 7)) ** 30 }}"):
        with pytest.raises(InputError, match="^T takes longer than 10 s$"):
            render(source)
    assert render("{{ x }}", x=1) == "1"
    jinja._stop_all()


def test_limits_of_the_process():
    """Guards what is left if the sandbox fails: no file is written, no process started."""
    assert render("a") == "a"
    for limit, value in (("AS", 1 << 30), ("FSIZE", 0), ("NPROC", 0), ("CORE", 0)):
        number = getattr(resource, f"RLIMIT_{limit}")
        assert resource.prlimit(jinja._idle[-1].pid, number) == (value, value)


def test_interrupted_while_it_renders(monkeypatch):
    """Guards against Ctrl-C during a template, after which every reply would be the last one's."""
    exchange = jinja._exchange

    def interrupted(process, data):
        process.stdin.write(data)
        raise KeyboardInterrupt

    monkeypatch.setattr(jinja, "_exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        render("old")
    monkeypatch.setattr(jinja, "_exchange", exchange)
    assert render("new") == "new"


def test_killed_by_the_system():
    """Guards against a traceback or a hang if the process is killed, while idle or at work."""
    render("a")
    jinja._idle[-1].kill()
    jinja._idle[-1].wait()
    assert render("b") == "b"
    process = jinja._idle[-1]
    process.send_signal(signal.SIGSTOP)
    timer = threading.Timer(0.05, process.kill)
    timer.start()
    with pytest.raises(InputError, match=r"T is not rendered: .* ended \(SIGKILL\)"):
        render("c")
    timer.join()


def test_no_thread_waits_for_anothers_template():
    """Guards against a slow template of one problem that stops all work which needs a template."""
    render("a")
    process, results = jinja._idle[-1], []
    process.send_signal(signal.SIGSTOP)  # a template that takes for ever
    slow = threading.Thread(target=lambda: results.append(render("slow")))
    slow.start()
    while process in jinja._idle:
        pass
    assert render("fast") == "fast"
    assert not results
    process.send_signal(signal.SIGCONT)
    slow.join()
    assert results == ["slow"]


def test_threads_and_forks():
    """Guards against replies that reach another thread, or another process, than asked."""
    wrong = []

    def ask(name):
        wrong.extend(i for i in range(50) if render("{{ x }}", x=[name, i]) != f"[{name}, {i}]")

    threads = [threading.Thread(target=ask, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    before = jinja._idle[-1].pid
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        os._exit(render("child") != "child" or jinja._idle[-1].pid == before)
    assert render("parent") == "parent"
    assert os.waitpid(child, 0)[1] == 0
    assert jinja._idle[-1].pid == before


PARENT = """
import sys
from model.text import jinja
jinja.render("T", "a", {})
print(jinja._idle[-1].pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.cli
@pytest.mark.parametrize("killed", [False, True])
def test_ends_with_its_parent(killed):
    """Guards against a process that is left over when the command ends or is killed, and against
    a command that waits for it forever."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, **pipes) as parent:
        worker = os.pidfd_open(int(parent.stdout.readline()))
        try:
            if killed:
                parent.kill()
            _, errors = parent.communicate(timeout=60)
            assert errors == b""
            assert select.select([worker], [], [], 60)[0]  # readable when it has ended
        finally:
            os.close(worker)


@pytest.mark.cli
def test_without_jinja2(tmp_path):
    """Guards against a traceback where jinja2 is not installed."""
    (tmp_path / "jinja2.py").write_text("raise ImportError")
    code = "from model.text import jinja; jinja.render('T', 'a', {})"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.stderr.endswith("templates need the package jinja2: pip install jinja2\n")
