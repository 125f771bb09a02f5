"""Renders jinja2 templates in a separate process; model/text/jinja.py runs this file.

Templates come with downloads. The sandbox keeps them from Python's internals; the limits on time
and memory are the operating system's, since Python can neither interrupt a call into C nor refuse
memory before it is used. A template that exceeds them ends this process.

Requests and replies are lines of JSON on stdin and stdout. A request has `source`, `chat` (the
environment of chat templates, else jinja2's defaults) and `variables`; None asks for the names of
the variables that the template uses. A reply has `text`, `names`, `limit`, or `error` with `line`.
Imports nothing of this repository.
"""

import json
import os
import re
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2
    from jinja2.sandbox import SandboxedEnvironment

SECONDS = 10  # of CPU time for one rendering
MEMORY = 1 << 30  # bytes of address space
CHARACTERS = 8 << 20  # of a rendered text
OUT_OF_MEMORY, NO_JINJA2 = 3, 4  # exit codes


def main() -> None:
    """Answer requests until stdin ends."""
    import signal

    try:
        import jinja2  # noqa: F401
    except ImportError:
        os._exit(NO_JINJA2)
    _limit()
    try:
        for line in sys.stdin.buffer:
            # SIGPROF is not handled, so it ends the process, even in a call into C.
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            reply = json.dumps(_reply(json.loads(line.decode("utf-8", "surrogatepass"))))
            signal.setitimer(signal.ITIMER_PROF, 0)
            sys.stdout.write(f"{reply}\n")
            sys.stdout.flush()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


def _limit() -> None:
    """Limit memory, and in case the sandbox fails, deny writing files and starting processes."""
    import resource

    limits = {resource.RLIMIT_AS: MEMORY, resource.RLIMIT_CORE: 0}
    limits |= {resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NPROC: 0}
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _reply(request: dict) -> dict:
    from jinja2 import TemplateSyntaxError, meta

    source, variables = request["source"], request["variables"]
    try:
        if variables is None:
            environment = _environment(request["chat"])
            return {"names": sorted(meta.find_undeclared_variables(environment.parse(source)))}
        if tools := variables.get("tools"):
            variables["tools"] = json.loads(json.dumps(tools), object_hook=_Dict)
        text = _compiled(request["chat"], source).render(variables)
    except MemoryError:
        raise
    except Exception as error:  # a template may raise anything
        words = " ".join(str(error).split()) or type(error).__name__
        line = error.lineno if isinstance(error, TemplateSyntaxError) else None
        return {"error": "".join(filter(str.isprintable, words))[:500], "line": line}
    if len(text) > CHARACTERS:
        return {"limit": f"writes more than {CHARACTERS} characters"}
    return {"text": text}


def _with_marks(text: str) -> str:
    """A JSON text or a repr without escapes for the noncharacters that mark texts
    (model/text/chat_template.py): an escape begins with an odd number of backslashes."""
    escape = r"(?<!\\)((?:\\\\)*)\\ufdd([0-4])"
    return re.sub(escape, lambda found: found[1] + chr(0xFDD0 + int(found[2])), text)


# Some templates write a tool as Python does. Errors call it by its type's name.
_Dict = type(
    "dict",
    (dict,),
    {"__module__": "builtins", "__repr__": lambda self: _with_marks(dict.__repr__(self))},
)


@lru_cache(maxsize=8)
def _compiled(chat: bool, source: str) -> "jinja2.Template":
    return _environment(chat).from_string(source)


@lru_cache
def _environment(chat: bool) -> "SandboxedEnvironment":
    from jinja2.sandbox import SandboxedEnvironment

    return _chat_environment() if chat else SandboxedEnvironment()


def _chat_environment() -> "SandboxedEnvironment":
    """jinja2 with the options, functions, filter and tag that transformers gives chat templates
    (its utils/chat_template_utils.py)."""
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, around what the assistant wrote, marks tokens for training."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,  # noqa: ANN401
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        text = json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )
        return _with_marks(text)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


if __name__ == "__main__":
    main()
