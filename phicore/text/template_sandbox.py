"""The sandbox of chat templates: Jinja's, whose templates also charge a budget."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, cast

from jinja2 import nodes
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from phicore.text.template_budget import (
    CALL,
    CURRENT,
    MOST_BITS,
    MOST_SOURCE,
    PER_COST,
    ExceededError,
    length,
)
from phicore.text.template_operations import (
    Formatter,
    bound_percent,
    bound_product,
    bounded_function,
    charge_text,
)


class _Namespace(Namespace):
    """A namespace that does not show what it contains, which may be itself, many times."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Own:
    """A function that the transformed template calls, and that no template can name."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call


def _tick(cost: int) -> None:
    budget = CURRENT.get()
    budget.spend(cost)
    budget.make(cost * PER_COST)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also bounds time and memory.

    `bound` must be called when all filters and tests are there. Templates must be compiled and
    rendered within `Budget.applied`.
    """

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=lambda value: CURRENT.get().written(value), **options)
        self.globals.pop("lipsum")  # random words, as many as a template likes
        self.globals["namespace"] = _Namespace
        self.bounds_tick = _Own(_tick)
        self.bounds_made = _Own(lambda value: CURRENT.get().made(value))
        self.bounds_read = _Own(lambda value: CURRENT.get().read(value))
        self.bounds_written = _Own(lambda value: CURRENT.get().written(value))
        self.bounds_looped = _Own(lambda values, cost: CURRENT.get().looped(values, cost))

    def bound(self) -> None:
        """Let all filters and tests charge the budget."""
        all_named: list[tuple[dict[str, Any], bool]] = [(self.filters, False), (self.tests, True)]
        for named, is_test in all_named:
            named.update({n: bounded_function(n, named[n], is_test) for n in named})

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Join the pieces of a text."""
        budget, size, kept = CURRENT.get(), 0, []
        for piece in pieces:
            size += len(piece)
            budget.room(size)
            budget.spend(1)
            kept.append(piece)
        return budget.made("".join(kept))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MOST_SOURCE:
            raise ExceededError(f"it has more than {MOST_SOURCE} characters")
        tree: nodes.Template = _Metering().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):  # its hash looks at all of it
            CURRENT.get().walk(argument)
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = CURRENT.get()
        budget.spend(1)
        if operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            budget.room(length(left) + length(right))
        elif operator == "*":
            if isinstance(left, Sized) or isinstance(right, Sized):
                bound_product(budget, left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > MOST_BITS:
                raise ExceededError("it computes with too large numbers")
        elif operator == "%" and isinstance(left, (str, bytes)):
            budget.walk(right)
            bound_percent(budget, left, right)
        return budget.made(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if type(function) is _Own:
            return function.call(*args)
        budget = CURRENT.get()
        budget.spend(CALL)
        if isinstance(function, LoopContext):
            budget.spend(sum(length(value) for value in args))
        elif not isinstance(function, (Macro, BlockReference)):
            is_method = isinstance(function, types.BuiltinMethodType)
            owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
            if is_method and isinstance(owner, (str, bytes)):
                args = tuple(list(v) if isinstance(v, Iterator) else v for v in args)
                charge_text(budget, owner, name, args)
            elif is_method and not isinstance(owner, dict):
                budget.walk(owner)  # a list, whose items are compared
            budget.walk(*args, *kwargs.values())
            if is_method and name == "get":
                return super().call(context, function, *args, **kwargs)
        return budget.made(super().call(context, function, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        text, is_map = value.__self__, value.__name__ == "format_map"

        def format(*args: Any, **kwargs: Any) -> str:
            if is_map:
                ((kwargs,), args) = args, ()
            CURRENT.get().walk(text)
            return str(Formatter(self).vformat(text, args, kwargs))

        return format


class _Metering(NodeTransformer):
    """Lets a template charge the budget."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802  # jinja2's name
        costs = _cost(node.body), _cost([] if node.test is None else [node.test])
        self.generic_visit(node)
        if node.test is not None:
            node.iter = _call("looped", cast(nodes.Expr, node.iter), nodes.Const(costs[1]))
        node.body.insert(0, _ticking(node, costs[0]))
        return node

    def _with_body(self, node: Any) -> nodes.Node:
        cost = _cost(node.body)
        self.generic_visit(node)
        node.body.insert(0, _ticking(node, cost))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _with_body  # noqa: N815

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _unless_constant("read", node.expr)
        for operand in node.ops:
            operand.expr = _unless_constant("read", operand.expr)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [_unless_constant("written", each) for each in node.nodes]
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.key = _unless_constant("read", node.key)
        return node

    def _literal(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else _unless_constant("made", node)

    visit_List = visit_Tuple = visit_Dict = _literal  # noqa: N815

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("made", node) if isinstance(node.arg, nodes.Slice) else node


def _call(name: str, *args: nodes.Expr) -> nodes.Call:
    """Return the call of a function of `BoundedEnvironment`."""
    function = nodes.EnvironmentAttribute(f"bounds_{name}")
    made = nodes.Call(function, list(args), [], None, None)
    made.set_lineno(args[0].lineno)
    return made


def _unless_constant(name: str, node: nodes.Expr) -> nodes.Expr:
    """Return the call of a function, or a constant as it is: its size is that of its source."""
    items = node.items if isinstance(node, (nodes.List, nodes.Tuple)) else [node]
    return node if all(isinstance(item, nodes.Const) for item in items) else _call(name, node)


def _ticking(node: nodes.Node, cost: int) -> nodes.ExprStmt:
    constant = nodes.Const(cost)
    constant.set_lineno(node.lineno)
    made = nodes.ExprStmt(_call("tick", constant))
    made.set_lineno(node.lineno)
    return made


_BODIES = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)


def _cost(body: Iterable[nodes.Node]) -> int:
    """Return what a body costs each time: one for every eight nodes, without other bodies."""
    count, left = 0, list(body)
    while left:
        node = left.pop()
        count += 1
        if not isinstance(node, _BODIES):
            left += node.iter_child_nodes()
    return 1 + (count >> 3)
