"""The fields of /v1/chat/completions about tools, and the parts of its answers that are calls."""

from __future__ import annotations

from typing import Any

from phicore.engine import Request
from phicore.generation import message_for
from phicore.server.errors import wrong_field
from phicore.server.fields import Fields
from phicore.tools import Arguments, Begin, Text
from phicore.tools.parser import new_call_id

FIELDS = ("tools", "tool_choice")


def tools_of(fields: Fields) -> dict[str, Any]:
    """Return the arguments of `Model.request` about tools.

    Raises:
        ApiError: If a field is of the wrong type.
    """
    tools, choice = fields.get("tools"), fields.get("tool_choice")
    is_parallel = fields.flag("parallel_tool_calls", True)
    if tools is not None and not isinstance(tools, list):
        raise wrong_field("tools", "expected a list of tools")
    for index, tool in enumerate(tools or []):
        if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
            raise wrong_field("tools", f"[{index}].function: expected an object")
    if choice is not None and not isinstance(choice, (str, dict)):
        raise wrong_field("tool_choice", "expected a text or an object")
    return {"tools": tools, "tool_choice": choice, "parallel_tool_calls": is_parallel}


class ToolReader:
    """Turns the text of one choice into the parts of OpenAI's API.

    Args:
        request: The request of the choice.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        use = request.tools
        self._parser = None if use is None else use.parser(is_eager=True)
        self._calls = -1

    def message(self, text: str) -> dict[str, Any]:
        """Return the message that a whole answer is."""
        return message_for(self._request, text)

    def deltas(self, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        """Return what the next text of the answer adds to the message.

        Args:
            is_last: Whether no more text follows.
        """
        if self._parser is None:
            return [{"content": text}] if text else []
        events = self._parser.push(text)
        if is_last:
            events += self._parser.flush()
        return [self._delta(event) for event in events]

    @property
    def has_calls(self) -> bool:
        """Return whether a call has come in what `deltas` has returned."""
        return self._calls >= 0

    def _delta(self, event: Text | Begin | Arguments) -> dict[str, Any]:
        match event:
            case Text():
                return {"content": event.text}
            case Begin():
                self._calls += 1
                function = {"name": event.name, "arguments": ""}
                call = {"id": new_call_id(), "type": "function", "function": function}
            case Arguments():
                call = {"function": {"arguments": event.text}}
        return {"tool_calls": [{"index": self._calls, **call}]}
