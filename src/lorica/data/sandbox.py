"""Chat templates are programs of strangers: jinja2's immutable sandbox, with bounded work.

The sandbox keeps a template from Python's internals, but not from burning time or memory. Here
every turn of a loop and every call is charged to a budget, the deadline is looked at with each
charge, and texts that operators, paddings and replacements would make are bounded before they are
made. Not everything that takes memory is bounded (`join` on long texts): a server that takes
templates from strangers must render in a worker process.

The environment otherwise equals the one of transformers, so that templates mean the same here:
trim_blocks, lstrip_blocks, break and continue, tojson without HTML escapes, `raise_exception`,
`strftime_now`, and `{% generation %}` around what the model writes.
"""

import json
import re
import time
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor
from jinja2.exceptions import SecurityError

MAX_TEMPLATE_BYTES = 64 * 1024
MAX_STEPS = 2_000_000
MAX_SECONDS = 5.0
MAX_TEXT = 64 * 2**20  # characters that an operator may produce

# noncharacters, which Unicode reserves for use inside a program: no text may hold them
LITERAL, LITERAL_END, TRAINED, TRAINED_END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
MARKS = LITERAL + LITERAL_END + TRAINED + TRAINED_END


class TooMuchWork(Exception):
    """A template exceeded its budget."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: marks its output as written by the assistant."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return TRAINED + caller() + TRAINED_END


class _Charged(jinja2.visitor.NodeTransformer):
    """Sends what a loop goes through, and what `~` joins, past the budget."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_charged")
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _filtered(jinja2.nodes.List(node.nodes, lineno=node.lineno), "_joined")


def _filtered(node: Any, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment of one chat template; not for several threads at once."""

    intercepted_binops = frozenset(["*", "**", "%", "+"])

    def __init__(self) -> None:
        extensions = [_Generation, jinja2.ext.loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self._steps_left, self._deadline = 0, 0.0
        self.filters |= {"tojson": _tojson, "_charged": self._charged, "_joined": self._joined}
        for name in ("center", "indent", "wordwrap", "format"):
            self.filters[name] = _guarded(self.filters[name])
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        self.globals |= {"raise_exception": _raise, "strftime_now": _now, "namespace": _Namespace}
        self.globals["dict"] = _plain_dict

    def compiled(self, source: str) -> jinja2.Template:
        """Compile with every loop charged.

        Raises:
            jinja2.TemplateSyntaxError: `source` is no template.
        """
        tree = _Charged().visit(self.parse(source))
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    @contextmanager
    def budget(self) -> Iterator[None]:
        """Each rendering has its own budget."""
        self._steps_left, self._deadline = MAX_STEPS, time.monotonic() + MAX_SECONDS
        yield

    def charge(self, steps: int) -> None:
        """Take steps from the budget, or raise `TooMuchWork`."""
        self._steps_left -= steps
        if self._steps_left < 0:
            raise TooMuchWork(f"more than {MAX_STEPS:,} steps")
        if time.monotonic() > self._deadline:
            raise TooMuchWork(f"more than {MAX_SECONDS:g} seconds")

    def _charged(self, items: Any) -> Any:
        if isinstance(items, Sized):
            self.charge(len(items) + 1)
            return items
        if isinstance(items, jinja2.Undefined):
            return items
        kept = []  # a generator of filters such as selectattr
        for item in items:
            self.charge(1)
            kept.append(item)
        return kept

    def _joined(self, parts: list[Any]) -> str:
        texts = [str(part) for part in parts]
        self._bound(sum(map(len, texts)))
        return "".join(texts)

    def _bound(self, length: int) -> None:
        if length > MAX_TEXT:
            raise TooMuchWork(f"a text of more than {MAX_TEXT:,} characters")

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore
        self.charge(1)
        _refuse_widths(args, kwargs)
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name == "replace" and len(args) > 1:
            self._bound(len(owner) + owner.count(args[0]) * len(args[1]))
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        owner = getattr(value, "__self__", None)
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and isinstance(owner, str):
            _refuse_wide_fields(owner)
        return wrapped

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.charge(1)
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, str | list | tuple) and isinstance(times, int):
                    self._bound(len(text) * times)
        elif operator == "+":
            if isinstance(left, str | list | tuple) and isinstance(right, Sized):
                self._bound(len(left) + len(right))
        elif isinstance(left, str):  # "%999999999d" % 1
            raise SecurityError("the % operator on text is not allowed in templates")
        elif operator == "**" and not (abs(left) <= 2**32 and abs(right) <= 64):
            raise TooMuchWork("a power of large numbers")
        return super().call_binop(context, operator, left, right)


def _refuse_widths(args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuse what would fill the memory: `"x".center(1000000000)`."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and value > jinja2.sandbox.MAX_RANGE:
            raise TooMuchWork(f"the number {value:,} handed to a function")


def _refuse_wide_fields(form: str) -> None:
    """The same inside a format: `"{:999999999}"`, `"%999999999d"`."""
    if re.search(r"\d{5}", form):
        raise TooMuchWork(f"a wide field in the format {form[:40]!r}")


def _guarded(function: Any) -> Any:
    """A filter that pads, with its width bounded."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _refuse_widths(args, kwargs)
        if function.__name__ == "do_format":
            _refuse_wide_fields(str(args[0]))
        return function(*args, **kwargs)

    return guarded


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if ensure_ascii:  # our marks must survive
        for mark in MARKS:
            text = text.replace(f"\\u{ord(mark):04x}", mark)
    return text


def _raise(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _plain_dict(*args: Any, **kwargs: Any) -> dict:
    return dict(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        for name in (names := dict(*args, **kwargs)):
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")
