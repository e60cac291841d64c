"""Chat templates that want all of the time or the memory, or the process that renders them."""

from __future__ import annotations

import pytest
from hostile.conftest import TRIES, tries, watched
from hypothesis import example, given
from hypothesis import strategies as st

from phicore.errors import TokenizerError
from phicore.text import template_budget
from phicore.text.chat_template import PHI3_TEMPLATE, ChatTemplate, _environment
from phicore.text.template_budget import MOST_SOURCE

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Because."},
    {"role": "user", "content": "a" * 100},
]
R = "range(100000)"
DOUBLED = "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = BODY %}{% endfor %}"
DAG = (
    "{% set n = namespace(l=['a'], m=['a'], t=('a',)) %}{% for i in range(60) %}"
    "{% set n.l = [n.l, n.l] %}{% set n.m = [n.m, n.m] %}{% set n.t = (n.t, n.t) %}{% endfor %}"
)
BOMBS = [
    "{{ 'a' * 10**10 }}",
    "{{ ['a'] * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ 10**10**10 }}",
    "{{ 2**(2**40) }}",
    DOUBLED.replace("BODY", "n.s + n.s"),
    DOUBLED.replace("BODY", "n.s ~ n.s"),
    DOUBLED.replace("BODY", "[n.s, n.s]|join"),
    DOUBLED.replace("BODY", "n.s.replace('a', n.s)"),
    DOUBLED.replace("BODY", "n.s|replace('a', n.s)"),
    DOUBLED.replace("BODY", "'{0}{0}'.format(n.s)"),
    DOUBLED.replace("BODY", "'{a}{a}'.format_map({'a': n.s})"),
    DOUBLED.replace("BODY", "'%s%s' % (n.s, n.s)"),
    DOUBLED.replace("BODY", "'%s%s'|format(n.s, n.s)"),
    DOUBLED.replace("BODY", "n.s.join(['a', n.s, n.s])"),
    DOUBLED.replace("BODY", "(n.s|list + n.s|list)|join"),
    "{% set n = namespace(s='ab') %}{% for i in range(60) %}"
    "{% set s %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = s %}{% endfor %}",
    "{% macro f(s) %}{{ s }}{{ s }}{% endmacro %}{% set n = namespace(s='ab') %}"
    "{% for i in range(60) %}{% set n.s = f(n.s) %}{% endfor %}",
    "{% set n = namespace(i=3) %}{% for i in range(60) %}{% set n.i = n.i * n.i %}{% endfor %}",
    *(
        DAG + each
        for each in ("{{ n.l }}", "{{ n.l|tojson }}", "{{ n.l ~ '' }}", "{{ n.l|string }}")
    ),
    *(DAG + each for each in ("{{ n.l == n.m }}", "{{ n.l in [n.m] }}", "{{ n.l is eq(n.m) }}")),
    *(DAG + each for each in ("{{ {n.t: 1} }}", "{{ {'a': 1}[n.t] }}", "{{ dict([(n.t, 1)]) }}")),
    *(
        DAG + each
        for each in ("{{ [n.l, n.m]|sort }}", "{{ [n.t]|unique|list }}", "{{ n.l|pprint }}")
    ),
    *(
        DAG + each
        for each in ("{{ '%s' % n.l }}", "{{ '{}'.format(n.l) }}", "{{ '{!r}'.format(n.l) }}")
    ),
    *(DAG + each for each in ("{{ [n.m].index(n.l) }}", "{{ {'a': 1}.get(n.t) }}", "{{ n.l|e }}")),
    "{% for i in range(10**9) %}{% endfor %}",
    f"{{% for i in {R} %}}{{% for j in {R} %}}{{% endfor %}}{{% endfor %}}",
    f"{{% for i in {R} %}}{{% for j in {R} if false %}}{{% endfor %}}{{% endfor %}}",
    f"{{% for i in {R} %}}" + "{% if i < 0 %}a{% endif %}" * 10000 + "{% endfor %}",
    f"{{% for i in {R} %}}" + "{% if true %}a{% endif %}" * 10000 + "{% endfor %}",
    f"{{% for i in {R} %}}{{{{ {R}|sum }}}}{{% endfor %}}",
    f"{{% set r = {R} %}}{{% for i in {R} %}}{{{{ r|select|list|length }}}}{{% endfor %}}",
    f"{{% for i in {R} %}}{{{{ " + R + "|select" * 500 + "|list }}{% endfor %}",
    f"{{% for i in {R} recursive %}}{{{{ loop({R}) }}}}{{% endfor %}}",
    f"{{% set n = namespace(l=[]) %}}{{% for i in {R} %}}{{% set n.l = n.l + [i] %}}{{% endfor %}}",
    f"{{% for i in {R} %}}{{{{ 'abc' * 100 }}}}{{% endfor %}}",
    f"{{% for i in {R} %}}{{{{ range(1000)|list }}}}{{% endfor %}}",
    f"{{{{ {R}|map('batch', 10)|list }}}}",
    f"{{{{ {R}|map('string')|map('center', 100000)|join }}}}",
    f"{{{{ {R}|map('default', 'a' * 10000, true)|join }}}}",
    f"{{{{ ({R}|batch(1)|list)|sum(start=[]) }}}}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 60
    + "a"
    + "{% endcall %}" * 60,
    *(f"{{{{ 'x'.{name}(10**10) }}}}" for name in ("center", "ljust", "rjust", "zfill")),
    "{{ '\t\t'.expandtabs(10**9) }}",
    "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "{{ 'x'|center(10**10) }}",
    "{{ 'x\ny'|indent(10**10) }}",
    "{{ ('\n' * 100000)|indent('x' * 100000) }}",
    "{{ [1]|batch(10**10, 'x')|list }}",
    "{{ [1]|slice(10**10)|list }}",
    "{{ ('a ' * 100000)|wordwrap(1, true, 'x' * 100000) }}",
    "{{ ('http://a.b ' * 10000)|urlize(target='x' * 100000) }}",
    "{{ ('<a' * 100000)|striptags }}",
    "{{ ('<!--' * 100000)|striptags }}",
    "{{ messages|tojson(indent=10**10) }}",
    "{{ messages|tojson(indent='x' * 10**8) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%.1000000000f' % 1.0 }}",
    "{{ ('%(a)s' * 100000) % {'a': 'a' * 100000} }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**10) }}",
    "{{ '{:.{p}f}'.format(1.0, p=10**9) }}",
    "{{ ('{0}' * 10000).format('a' * 100000) }}",
    "{{ ('a' * 100000).rsplit('ab' * 100000) }}",
    "{{ ('a' * 10**7).strip('abcdefgh' * 10**6) }}",
    "{{ lipsum(n=10**9) }}",
    "{{ strftime_now('%1000000000Y') }}",
    "{{ strftime_now('%Y' * 10**7) }}",
    "{{ cycler(*range(100000)).next() }}" * 100,
    "{{ '9' * 10**7 | int }}",
    "{{ ('f' * 10**7)|int(base=16) }}",
    "{{ " + "(" * 10000 + "1" + ")" * 10000 + " }}",
    "{{ " + "[" * 10000 + "]" * 10000 + " }}",
    "{{ " + "1+" * 50000 + "1 }}",
    "{{ a" + ".a" * 50000 + " }}",
    "{{ a" + "|e" * 50000 + " }}",
    "{{ not " * 3000 + "1",
    "{{ " + "not " * 50000 + "1 }}",
    "{{ " + "-" * 50000 + "1 }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{% for i in [1] %}" * 50 + "a" + "{% endfor %}" * 50,
    "{% set n = namespace(l=[]) %}{% for i in "
    + R
    + " %}{% set n.l = [n.l] %}{% endfor %}{{ n.l }}",
    "{#" * 100000,
    "{{ '" + "\\" * 100000,
    "{%- " * 50000,
    " " * MOST_SOURCE + " ",
    "{% raw %}" * 30000,
]
"""Templates that would take much time or memory, or break Python, if nothing kept them from it."""
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}{{ ''['__class__'].x }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{0.__init__.__globals__}'.format_map({'0': namespace}) }}",
    "{{ ['{0.__class__}']|map('format', 1)|list }}{{ ('{0.__class__}'.format)(1).x.y }}",
    "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__.x }}",
    "{{ strftime_now.__code__.co_consts }}",
    "{{ dict.fromkeys.__func__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ self.__init__.__globals__ }}",
    "{{ loop._iterator.gi_frame }}",
    "{% for m in messages|map('upper') %}{{ loop._iterable.gi_frame.f_globals }}{% endfor %}",
    "{{ (messages|map('e')).gi_frame.f_back.f_globals }}",
    "{{ (messages|map('e')).gi_code.co_consts }}",
    "{{ environment.filters }}",
    "{{ bounds_tick.call }}",
    "{{ messages.append({'role': 'user'}) }}",
    "{{ messages[0].update(role='assistant') }}",
    "{{ messages|map(attribute='__class__.__mro__')|list }}",
    "{{ messages|groupby('__class__.__mro__')|list }}",
    "{{ messages|sort(attribute='__class__.__mro__') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('id') }}",
    "{% extends '/etc/passwd' %}",
]
"""Templates that reach for what is not theirs."""
SECRETS = ("<class", "<function", "<module", "<frame", "<code", "root:", "'__", "built-in function")


@pytest.fixture(autouse=True)
def _smaller_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save time by default: a template that takes all of the budget is stopped earlier."""
    if not TRIES:
        monkeypatch.setattr(template_budget, "MOST_WORK", 100_000)


def rendered(source: str) -> str | None:
    """Render a template; return the prompt, None if it is refused in one line."""
    with watched("templates"):
        try:
            return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(
                MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}], documents=None
            )
        except TokenizerError as error:
            line = str(error)
    assert "\n" not in line
    assert len(line) < 400
    return None


@pytest.mark.parametrize("source", BOMBS, ids=[f"{bomb:.60}" for bomb in BOMBS])
def test_template_with_a_bomb_is_refused_in_a_line_or_harmless(source: str):
    prompt = rendered(source)
    assert prompt is None or len(prompt) < 2**25


@pytest.mark.parametrize("source", ESCAPES)
def test_template_cannot_leave_its_sandbox(source: str):
    shown = "{% for m in messages %}{{ m.content }}{% endfor %}"
    prompt = rendered(shown + source)
    assert not any(secret in (prompt or "") for secret in SECRETS), prompt


# ---- random programs -----------------------------------------------------------------------

NAMES = ["x", "n.s", "n.l", "m", "loop", "messages", "tools", "bos_token", "f", "namespace", "dict"]
ATOMS = [*NAMES, "'ab'", "'%s%d'", "'{}{:>9}'", "'\\n'", "1", "7", "10**6", "100000", "-1", "1.5"]
ATOMS += ["none", "true", "[]", "{}", "range(1000)", R, "messages[0]", "cycler", "joiner"]
OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "!=", "<", "in", "and", "or"]
FILTERS, TESTS = sorted(_environment().filters), sorted(_environment().tests)
METHODS = [
    name
    for kind in (str, list, dict)
    for name in dir(kind)
    if not name.startswith("__") or name in ("__class__", "__mul__", "__getattribute__")
]


def _compound(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    args = st.lists(inner, max_size=3).map(", ".join)
    binary = st.sampled_from(OPERATORS)
    return st.one_of(
        st.builds("({} {} {})".format, inner, binary, inner),
        st.builds("{}|{}({})".format, inner, st.sampled_from(FILTERS), args),
        st.builds("({} is {}({}))".format, inner, st.sampled_from(TESTS), inner),
        st.builds("({}).{}({})".format, inner, st.sampled_from(METHODS), args),
        st.builds("{}|map('{}', {})|list".format, inner, st.sampled_from(FILTERS), inner),
        st.builds("[{}]".format, args),
        st.builds("({},)".format, inner),
        st.builds("{{{}: {}}}".format, inner, inner),
        st.builds("({})[{}:{}]".format, inner, inner, inner),
        st.builds("({})[{}]".format, inner, inner),
        st.builds("{}({})".format, st.sampled_from(NAMES), args),
        st.builds("({} if {} else {})".format, inner, inner, inner),
    )


EXPRESSIONS = st.recursive(st.sampled_from(ATOMS), _compound, max_leaves=8)


def _blocks(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("{{% for m in {} %}}{}{{% endfor %}}".format, EXPRESSIONS, inner),
        st.builds(
            "{{% for m in {} if {} %}}{}{{% endfor %}}".format, EXPRESSIONS, EXPRESSIONS, inner
        ),
        st.builds("{{% for m in {} recursive %}}{}{{% endfor %}}".format, EXPRESSIONS, inner),
        st.builds("{{% if {} %}}{}{{% else %}}{}{{% endif %}}".format, EXPRESSIONS, inner, inner),
        st.builds("{{% macro f(x) %}}{}{{% endmacro %}}{{{{ f({}) }}}}".format, inner, EXPRESSIONS),
        st.builds("{{% set x %}}{}{{% endset %}}".format, inner),
        st.builds("{{% call f({}) %}}{}{{% endcall %}}".format, EXPRESSIONS, inner),
        st.builds("{{% filter {} %}}{}{{% endfilter %}}".format, st.sampled_from(FILTERS), inner),
        st.builds("{{% generation %}}{}{{% endgeneration %}}".format, inner),
        st.builds("{{% block b %}}{}{{% endblock %}}".format, inner),
    )


SIMPLE = st.one_of(
    st.builds("{{{{ {} }}}}".format, EXPRESSIONS),
    st.builds("{{% set n.s = {} %}}".format, EXPRESSIONS),
    st.builds("{{% set n.l = [n.l, {}] %}}".format, EXPRESSIONS),
    st.builds("{{% set x = {} %}}".format, EXPRESSIONS),
)
PROGRAMS = st.recursive(SIMPLE, _blocks, max_leaves=8)
START = "{% set n = namespace(s='ab', l=[]) %}{% set x = 'ab' %}"


@tries(50)
@given(PROGRAMS)
def test_random_template_is_refused_in_a_line_or_renders(program: str):
    rendered(START + program)


REAL = (
    PHI3_TEMPLATE,
    "{%- if tools %}{{- tools | tojson(indent=2) }}{%- endif %}{%- set ns = namespace(last='') %}"
    "{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) and false %}"
    "{{- raise_exception('no') }}{%- endif %}{%- set ns.last = m.content | trim %}"
    "{{- '<|' ~ m['role'] ~ '|>' + ns.last.split('</think>')[-1].lstrip('\\n') }}{%- endfor %}",
)


@st.composite
def _damaged(draw: st.DrawFn) -> str:
    """Draw a real template in which pieces are left out, repeated or replaced."""
    source = draw(st.sampled_from(REAL))
    for _ in range(draw(st.integers(1, 6))):
        start, size = draw(st.integers(0, len(source))), draw(st.integers(0, 40))
        piece = draw(
            st.one_of(
                st.just(""),
                st.text(max_size=8),
                st.sampled_from(["{%", "%}", "{{", "}}", "{#", "|", "'", "*10**9", "[::-1]", "("]),
                st.just(source[start : start + size] * 3),
            )
        )
        source = source[:start] + piece + source[start + size :]
    return source


@tries(25)
@given(_damaged())
@example("{% for m in messages %}{{ m.content }}{% endfor %}")
def test_damaged_template_is_refused_in_a_line_or_renders(source: str):
    rendered(source)
