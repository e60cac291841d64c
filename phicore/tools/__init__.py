"""Tools: functions that a model may call, the forms of its calls, and their results."""

from phicore.tools.choices import Tool, ToolUse, tool_use
from phicore.tools.formats import CallFormat, format_of
from phicore.tools.parser import Arguments, Begin, CallParser, Event, Text, message_of

__all__ = [
    "Arguments",
    "Begin",
    "CallFormat",
    "CallParser",
    "Event",
    "Text",
    "Tool",
    "ToolUse",
    "format_of",
    "message_of",
    "tool_use",
]
