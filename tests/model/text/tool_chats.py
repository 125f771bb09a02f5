"""Tools, calls and results for tests, and templates that write them."""

import json
from pathlib import Path

from model.text.chat_template import CHATML

# Written for these tests, with the constructs of the templates that models are released with.
FOLDER = Path(__file__).parent / "chat_templates" / "tools"
TEMPLATES = {file.stem: file.read_text(encoding="utf-8") for file in sorted(FOLDER.glob("*.jinja"))}
TEMPLATES["chatml"] = CHATML


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    function = {"name": name, "description": f"About {name}.", "parameters": parameters}
    return {"type": "function", "function": function}


def call(name, arguments, id="call12345"):
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": id, "type": "function", "function": function}


def calls(*calls, **more):
    return {"role": "assistant", "content": None, "tool_calls": list(calls)} | more


def result(content, id="call12345", name="add"):
    return {"role": "tool", "tool_call_id": id, "name": name, "content": content}


WEATHER = tool(
    "weather", city={"type": "string", "description": 'A "city"\n<b>'}, unit={"enum": ["é"]}
)
ADD = tool("add", where={"type": "object", "properties": {"x": {"type": "number"}}})
