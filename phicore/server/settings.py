"""The settings of a server. The command line derives its options from the fields."""

from __future__ import annotations

from dataclasses import dataclass

from phicore.settings import check_settings, setting

LONGEST_S = 1e6
"""The largest number of seconds, eleven days: the system counts milliseconds in 31 bits."""


@dataclass(frozen=True)
class Settings:
    """What a server allows and how it behaves."""

    max_queue: int = setting(
        64,
        "Number of answers that may wait while others are computed. Further requests get status "
        "503 and are told when to try again.",
        expected="0 or more",
        check=lambda n: n >= 0,
        metavar="N",
    )
    max_answer: int | None = setting(
        None,
        "The largest number of tokens of an answer, whatever a request asks for.",
        expected="1 or more",
        check=lambda n: n >= 1,
        metavar="N",
        shown_default="what the context holds",
    )
    max_prompt: int | None = setting(
        None,
        "The largest number of tokens of a prompt.",
        expected="1 or more",
        check=lambda n: n >= 1,
        metavar="N",
        shown_default="what the context holds",
    )
    max_body: int = setting(
        4 * 2**20,
        "The largest number of bytes of a request's body.",
        expected="1 or more",
        check=lambda n: n >= 1,
        metavar="BYTES",
    )
    time_limit: float = setting(
        3600.0,
        "The longest time that a request may take, in seconds, the time in the queue included.",
        expected=f"more than 0, at most {LONGEST_S:g}",
        check=lambda s: 0 < s <= LONGEST_S,
        metavar="SECONDS",
    )
    patience: float = setting(
        60.0,
        "How long a client may take to read what it was sent, or to send its request, in seconds.",
        expected=f"more than 0, at most {LONGEST_S:g}",
        check=lambda s: 0 < s <= LONGEST_S,
        metavar="SECONDS",
    )
    ping: float = setting(
        10.0,
        "Send a comment in a stream after this many seconds without text, so that nobody between "
        "closes the connection.",
        expected=f"more than 0, at most {LONGEST_S:g}",
        check=lambda s: 0 < s <= LONGEST_S,
        metavar="SECONDS",
    )
    grace: float = setting(
        30.0,
        "After SIGTERM, the time in seconds for answers that are under way.",
        expected=f"0 to {LONGEST_S:g}",
        check=lambda s: 0 <= s <= LONGEST_S,
        metavar="SECONDS",
    )
    plugin_limit: float = setting(
        60.0,
        "How long code of a plugin may keep all answers waiting, in seconds. Then they fail, and "
        "/health says 503 until it returns. The backend may take longer, since it compiles.",
        expected=f"more than 0, at most {LONGEST_S:g}",
        check=lambda s: 0 < s <= LONGEST_S,
        metavar="SECONDS",
    )
    any_model: bool = setting(
        False, "Answer requests for any model name; many programs send a fixed one."
    )
    warmup: bool = setting(
        False,
        "Compile what requests need before the first one comes. /health tells when that is done.",
    )
    log_text: bool = setting(False, "Log the bodies of requests, which contain the users' texts.")

    def __post_init__(self) -> None:
        check_settings(self)
