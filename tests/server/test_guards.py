"""Who may ask: keys, hosts, origins."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from server.conftest import HI, WAIT_S, Served, ready
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from phicore import Model
from phicore.server import app
from phicore.server.page import Page

BODY: dict[str, Any] = {"messages": HI, "max_tokens": 1}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def closed(model: Model) -> Iterator[Served]:
    with ready(
        model,
        api_keys=["first key", "sécond"],
        allowed_hosts=["example.org"],
        cors_origins=["https://app.example.org"],
    ) as served:
        yield served


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer first key"},
        {"authorization": "bearer first key"},
        {"X_Api_Key": "first key"},
        {"X_Api_Key": "sécond".encode().decode("latin-1")},
    ],
    ids=str,
)
def test_key_opens(closed: Served, headers: dict[str, str]):
    assert closed.post(CHAT, BODY, **headers)[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer first"},
        {"Authorization": "Bearer "},
        {"Authorization": "Basic first key"},
        {"X_Api_Key": "first key "},
        {"X_Api_Key": "FIRST KEY"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "path", [CHAT, "/chat/completions", "/v1/models", "/metrics", "/tokenize", "/v1/nothing"]
)
def test_without_the_key_nothing_opens(closed: Served, path: str, headers: dict[str, str]):
    if headers.get("X_Api_Key") == "first key ":
        headers = {"X_Api_Key": "first key x"}  # white space at the end is no part of a header
    status, answer, found = closed.ask("POST", path, BODY, **headers)
    assert status == 401
    assert answer["error"]["type"] == "authentication_error"
    assert answer["error"]["code"] == "invalid_api_key"
    assert found["www-authenticate"] == "Bearer"


def test_client_raises_authentication_error(closed: Served):
    client = closed.client.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError):
        client.models.list()
    assert closed.client.with_options(api_key="first key").models.list().data


@pytest.mark.parametrize("path", ["/health", "/openapi.json"])
def test_health_and_description_need_no_key(closed: Served, path: str):
    assert closed.get(path)[0] == 200


def test_keys_are_compared_whole_and_all_of_them(monkeypatch: pytest.MonkeyPatch):
    """The comparison takes the same time for every key: it never stops early."""
    import hmac

    from phicore.server import guards

    calls: list[bool] = []
    real = hmac.compare_digest

    def counting(a: Any, b: Any) -> bool:
        calls.append(len(a) == len(b))
        return real(a, b)

    monkeypatch.setattr(guards.hmac, "compare_digest", counting)
    keys = guards.Keys(None, ["a", "bb", "ccc"])  # type: ignore[arg-type]
    assert keys._is_known("a")
    assert not keys._is_known("a" * 100)
    assert calls == [True] * 6


@pytest.mark.parametrize(
    "host", ["localhost:1", "127.0.0.1", "[::1]:80", "192.0.2.1", "Example.ORG"]
)
def test_own_names_and_addresses_are_hosts(closed: Served, host: str):
    assert closed.get("/health", Host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "", "[", "a@localhost.x"]
)
def test_other_host_is_refused(closed: Served, host: str):
    """A page may let its name point to this machine (DNS rebinding)."""
    status, answer, _ = closed.get("/health", Host=host)
    assert status == 403
    assert answer["error"]["code"] == "host_not_allowed"


def test_request_with_two_lengths_is_the_last_of_its_connection(served: Served):
    """A proxy may take one length and the server the other; what follows would be smuggled in."""
    second = f"GET /metrics HTTP/1.1\r\nHost: {served.url[7:]}\r\n\r\n"
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {served.url[7:]}\r\n"
    lengths = f"Content-Length: {5 + len(second)}\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(served.address, timeout=WAIT_S) as connection:
        connection.sendall(f"{head}{lengths}0\r\n\r\n{second}".encode())
        found = b""
        while part := connection.recv(65536):
            found += part
    assert found.startswith(b"HTTP/1.1 400")
    assert found.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("origin", ["http://[", "null", "http://a@evil.example", "\xbd"])
def test_origin_that_is_malformed_is_refused(closed: Served, origin: str):
    """An address with half a bracket ended in a traceback and status 500."""
    status, answer, _ = closed.get("/health", Origin=origin)
    assert status == 403
    assert answer["error"]["code"] == "origin_not_allowed"


def test_page_of_another_site_may_not_send(served: Served):
    """A browser sends such a request without asking first, whatever the answer allows."""
    headers = {"Origin": "https://evil.example", "Content_Type": "text/plain"}
    status, answer, found = served.post(CHAT, BODY, **headers)
    assert status == 403
    assert answer["error"]["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in found
    assert served.post(CHAT, BODY, Origin=served.url)[0] == 200  # the server's own page


def test_cors_is_off_unless_origins_are_named(served: Served, closed: Served):
    asks = {
        "Origin": "https://app.example.org",
        "Access_Control_Request_Method": "POST",
        "Access_Control_Request_Headers": "authorization,content-type",
    }
    status, _, found = served.ask("OPTIONS", CHAT, **asks)
    assert status == 403
    assert not any(name.startswith("access-control") for name in found)
    status, _, found = closed.ask("OPTIONS", CHAT, **asks)
    assert status == 200
    assert found["access-control-allow-origin"] == "https://app.example.org"
    assert "authorization" in found["access-control-allow-headers"].lower()
    given = {"Origin": "https://app.example.org", "Authorization": "Bearer first key"}
    status, _, found = closed.post(CHAT, BODY, **given)
    assert status == 200
    assert found["access-control-allow-origin"] == "https://app.example.org"
    assert closed.post(CHAT, BODY, **{**given, "Origin": "https://evil.example"})[0] == 403


def test_application_can_be_mounted_in_another(model: Model):
    """The parent does not run the life of what it mounts; the first request starts it."""
    mounted = app(model, names=["tiny"], api_keys=["key"])
    client = TestClient(Starlette(routes=[Mount("/llm", mounted)]))
    assert client.post(f"/llm{CHAT}", json=BODY).status_code == 401
    assert client.post(f"/llm{CHAT}", json=BODY, headers={"x-api-key": "key"}).status_code in (
        200,
        503,  # the thread has only just been started
    )
    service = mounted.state.service
    while client.get("/llm/health").status_code == 503:
        pass
    answer = client.post(f"/llm{CHAT}", json=BODY, headers={"x-api-key": "key"})
    assert answer.status_code == 200
    service.close()
    assert not service.is_alive
    assert client.post(f"/llm{CHAT}", json=BODY, headers={"x-api-key": "key"}).status_code == 503


def test_files_of_the_page_come_with_a_policy_and_without_a_key(tmp_path: Path):
    (tmp_path / "index.html").write_text("<!doctype html><title>phicore</title>")
    (tmp_path / "page.js").write_text("export {}")
    application = Starlette(exception_handlers={})
    application.router.default = Page(tmp_path)
    client = TestClient(application)
    for path in ("/", "/page.js"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.get("/absent.js").status_code == 404
    assert client.get("/../secret").status_code == 404
    assert client.post("/").status_code == 404


def test_without_a_folder_there_is_no_page(tmp_path: Path):
    application = Starlette()
    application.router.default = Page(tmp_path / "absent")
    assert TestClient(application).get("/").status_code == 404
