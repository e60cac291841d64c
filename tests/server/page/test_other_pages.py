"""Pages of other origins, in a real browser, get nothing from a local server without a key."""

from __future__ import annotations

import json
import re
import urllib.request
from typing import Any

import pytest
from server.conftest import Served
from server.page.conftest import running
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route

TRIES = """async (url) => {
  const body = JSON.stringify({messages: [{role: 'user', content: 'Hi'}], max_tokens: 4});
  const chat = url + 'v1/chat/completions', method = 'POST';
  const json = {'content-type': 'application/json'};
  const said = async (promise) => {
    try { const answer = await promise; return [answer.type, answer.status, await answer.text()]; }
    catch (error) { return error.name; }
  };
  return {
    json: await said(fetch(chat, {method, body, headers: json})),
    plain: await said(fetch(chat, {method, body})),
    unread: await said(fetch(chat, {method, body, mode: 'no-cors'})),
    key: await said(fetch(chat, {method, body, headers: {...json, authorization: 'Bearer x'}})),
    models: await said(fetch(url + 'v1/models')),
    metrics: await said(fetch(url + 'metrics')),
    page: await said(fetch(url)),
    beacon: navigator.sendBeacon(chat, body),
  };
}"""
FORM = """(url) => {
  const form = document.createElement('form');
  form.action = url + 'v1/chat/completions', form.method = 'POST', form.enctype = 'text/plain';
  const field = document.createElement('input');
  field.name = '{"messages":[{"role":"user","content":"Hi"}],"max_tokens":4,"x":"';
  field.value = '"}';
  form.append(field), document.body.append(form), form.submit();
}"""


async def bad(request: Request) -> HTMLResponse:
    return HTMLResponse("<!doctype html><title>bad</title><body>")


def tokens(served: Served) -> float:
    """Return how many tokens the server has computed."""
    with urllib.request.urlopen(f"{served.url}/metrics") as answer:
        text = answer.read().decode()
    found = re.findall(r"^vllm:generation_tokens_total\{.*\} (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


@pytest.mark.parametrize("name", ["127.0.0.1", "phone.test"])
def test_page_of_another_origin_gets_nothing(served: Served, browser: Any, name: str):
    before = tokens(served)
    with running(Starlette(routes=[Route("/", bad)])) as url:
        page = browser.new_page()
        page.goto(url.replace("127.0.0.1", name))
        found = page.evaluate(TRIES, f"{served.url}/")
        assert found.pop("unread") in (["opaque", 0, ""], "TypeError")
        assert found.pop("beacon") in (True, False)  # it is sent, and nobody sees an answer
        assert set(found.values()) == {"TypeError"}
        page.evaluate(FORM, f"{served.url}/")
        page.wait_for_url(f"{served.url}/**")
        assert "may not ask this server" in page.inner_text("body")
        page.close()
    assert tokens(served) == before
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}).encode()
    urllib.request.urlopen(f"{served.url}/v1/chat/completions", body).close()
    assert tokens(served) > before


def test_name_that_is_made_to_point_here_shows_nothing(served: Served, browser: Any):
    page = browser.new_page()
    answer = page.goto(served.url.replace("127.0.0.1", "phone.test"))
    assert answer.status == 403
    assert "this server is not phone.test" in page.inner_text("body")
    page.close()
