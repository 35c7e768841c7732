"""Chat templates are programs of strangers: jinja2's immutable sandbox, with bounded work.

The sandbox keeps a template from Python's internals, but not from burning time or memory. Here
every turn of a loop, every call and every filter is charged to a budget, the deadline is looked at
with each charge, and what operators, filters and methods would make is bounded before it is made.

The environment otherwise equals the one of transformers, so that templates mean the same here:
trim_blocks, lstrip_blocks, break and continue, tojson without HTML escapes, `raise_exception`,
`strftime_now`, and `{% generation %}` around what the model writes. Left out is what no chat
template needs and what could be made to work without end: filters for HTML, `str.translate`.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sized
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

from lorica.data.budget import MAX_BITS, Budget, TooMuchWork

MAX_TEMPLATE_BYTES = 64 * 1024
MAX_WIDTH = jinja2.sandbox.MAX_RANGE  # of a number handed to a function
MAX_FORM = 1_000  # characters of a date's format
MAX_INDENT = 8

# noncharacters, which Unicode reserves for use inside a program: no text may hold them
LITERAL, LITERAL_END, TRAINED, TRAINED_END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
MARKS = LITERAL + LITERAL_END + TRAINED + TRAINED_END

_NO_FILTERS = ("pprint", "random", "striptags", "urlize", "xmlattr")
_NO_METHODS = ("encode", "expandtabs", "maketrans", "translate")
_BY_LETTER = (  # filters that look at every letter of a text by itself
    *("batch", "groupby", "list", "map", "max", "min", "reject", "rejectattr", "reverse", "select"),
    *("selectattr", "slice", "sort", "sum", "title", "unique", "wordcount", "wordwrap"),
)


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
    """Sends what a loop goes through, and what an expression makes, past the budget."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_charged")
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _filtered(jinja2.nodes.List(node.nodes, lineno=node.lineno), "_joined")

    def visit_List(self, node: jinja2.nodes.List) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_made")

    visit_Dict = visit_List

    def visit_Tuple(self, node: jinja2.nodes.Tuple) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_made") if node.ctx == "load" else node

    def visit_Getitem(self, node: jinja2.nodes.Getitem) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_made") if isinstance(node.arg, jinja2.nodes.Slice) else node


def _filtered(node: Any, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment of one chat template; not for several threads at once."""

    intercepted_binops = frozenset(["*", "**", "%", "+"])

    def __init__(self) -> None:
        self._budget = Budget()
        self._num_literal = 0  # characters that stand in the template itself
        extensions = [_Generation, jinja2.ext.loopcontrols]
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self._budget.made
        )
        self.filters["tojson"] = _tojson
        for name in _NO_FILTERS:
            del self.filters[name]
        for name, function in self.filters.items():
            self.filters[name] = self._guarded(name, function)
        self.filters |= {"_charged": self._charged, "_joined": self._joined, "_made": self._made}
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        self.globals |= {"raise_exception": _raise, "strftime_now": _now, "namespace": _Namespace}
        self.globals["dict"] = _plain_dict

    def compiled(self, source: str) -> jinja2.Template:
        """Compile with everything charged.

        Raises:
            jinja2.TemplateSyntaxError: `source` is no template.
        """
        tree = self.parse(source)
        self._num_literal = sum(len(node.data) for node in tree.find_all(jinja2.nodes.TemplateData))
        code = self.compile(_Charged().visit(tree))
        return jinja2.Template.from_code(self, code, self.make_globals(None))

    @contextmanager
    def budget(self) -> Iterator[None]:
        """Each rendering has its own budget."""
        self._budget.begin()
        yield

    def charge(self, steps: int) -> None:
        """Take steps from the budget, or raise `TooMuchWork`."""
        self._budget.charge(steps)

    def _charged(self, items: Any) -> Any:
        """What a loop goes through; each turn may write all that stands in the template."""
        if isinstance(items, jinja2.Undefined):
            return items
        if not isinstance(items, Sized):
            items = self._listed(items)  # a generator of filters such as selectattr
        self.charge(len(items) + 1)
        for _ in range(len(items) * self._num_literal >> 20):
            self._budget.bound(2**20)
        return items

    def _listed(self, items: Any) -> list[Any]:
        kept = []
        for item in items:
            self.charge(1)
            kept.append(item)
        return kept

    def _joined(self, parts: list[Any]) -> str:
        texts = [str(part) for part in parts]
        self._budget.bound(sum(map(len, texts)))
        return "".join(texts)

    def _made(self, value: Any) -> Any:
        self.charge(1)  # also keeps jinja2 from working it out while it compiles
        return self._budget.made(value)

    def _guarded(self, name: str, function: Callable) -> Callable:
        """A filter whose work and result are bounded."""
        # some are handed the context or the environment before the value
        first = int(getattr(function, "jinja_pass_arg", None) is not None)

        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            before, (value, *rest) = args[:first], args[first:]
            _refuse_widths((*rest, *kwargs.values()))
            if name == "join" and not isinstance(value, Sized | jinja2.Undefined):
                value = self._listed(value)
            if isinstance(value, Sized):
                letters = isinstance(value, str) and name not in _BY_LETTER
                self.charge(1 + len(value) // (1024 if letters else 4))
            else:
                self.charge(1)
            if bound := _FILTER_BOUNDS.get(name):
                self._budget.bound(bound(self._budget, value, *rest, **kwargs))
            return self._budget.made(function(*before, value, *rest, **kwargs))

        return guarded

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore
        self.charge(1)
        _refuse_widths((*args, *kwargs.values()))
        self._budget.bound(self._num_literal)  # a macro may write all that stands in the template
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str):
            if name in _NO_METHODS:
                raise SecurityError(f"the method {name} of texts is not allowed in templates")
            if name == "join" and args and not isinstance(args[0], Sized | jinja2.Undefined):
                args = (self._listed(args[0]), *args[1:])
            if bound := _METHOD_BOUNDS.get(name):  # jinja2 adds names of its own, which begin so
                named = {key: value for key, value in kwargs.items() if key[:1] != "_"}
                self._budget.bound(bound(self._budget, owner, *args, **named))
        return self._budget.made(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        owner = getattr(value, "__self__", None)
        wrapped = super().wrap_str_format(value)
        if wrapped is None or not isinstance(owner, str):
            return wrapped
        _refuse_wide_fields(owner)

        def bounded(*args: Any, **kwargs: Any) -> str:
            self._budget.bound(_formatted(self._budget, owner, *args, **kwargs))
            return wrapped(*args, **kwargs)

        return bounded

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.charge(1)
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int):
                    size = len(value) if isinstance(value, str) else self._budget.weight(value)
                    self._budget.bound(size * max(times, 0))
        elif operator == "%" and isinstance(left, str):  # "%999999999d" % 1
            raise SecurityError("the % operator on text is not allowed in templates")
        elif operator == "**" and not (abs(left) <= 2**32 and abs(right) <= 64):
            raise TooMuchWork("a power of large numbers")
        elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, Sized):
            self._budget.bound(self._budget.weight(left) + self._budget.weight(right))
        if any(isinstance(n, int) and n.bit_length() > MAX_BITS for n in (left, right)):
            raise TooMuchWork(f"a number of more than {MAX_BITS:,} bits")
        return self._budget.made(super().call_binop(context, operator, left, right))


def _refuse_widths(values: tuple) -> None:
    """Refuse what would fill the memory: `"x".center(1000000000)`."""
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_WIDTH:
            raise TooMuchWork("a number of more than 100,000 handed to a function")


def _refuse_wide_fields(form: str) -> None:
    """The same inside a format: `"{:999999999}"`, `"%999999999d"`."""
    if re.search(r"\d{5}", form):
        raise TooMuchWork(f"a wide field in the format {form[:40]!r}")


# How long a text a filter or a method of texts may make, at most.


def _joined_length(budget: Budget, value: Any, d: Any = "", attribute: Any = None) -> int:
    return budget.weight(value) + (len(value) * len(str(d)) if isinstance(value, Sized) else 0)


def _split_weight(budget: Budget, text: str, sep: str | None = None, maxsplit: int = -1) -> int:
    parts = text.count(sep) + 1 if sep else len(text) // 2 + 1
    return len(text) + 64 * (parts if maxsplit < 0 else min(parts, maxsplit + 1))


def _replaced(budget: Budget, text: Any, old: Any, new: Any, count: Any = None) -> int:
    return len(str(text)) + str(text).count(str(old)) * len(str(new))


def _formatted(budget: Budget, form: Any, *args: Any, **kwargs: Any) -> int:
    fields = str(form).count("%") + str(form).count("{")
    return len(str(form)) + fields * (budget.weight([*args, *kwargs.values()]) + 20_000)


def _format_filter(budget: Budget, form: Any, *args: Any, **kwargs: Any) -> int:
    _refuse_wide_fields(str(form))
    return _formatted(budget, form, *args, **kwargs)


def _indented(budget: Budget, text: Any, width: Any = 4, first: bool = False, blank: bool = False):
    own = len(width) if isinstance(width, str) else abs(int(width))
    return len(str(text)) + (str(text).count("\n") + 1) * own


def _wrapped(
    budget: Budget,
    text: Any,
    width: int = 79,
    break_long_words: bool = True,
    wrapstring: str | None = None,
    break_on_hyphens: bool = True,
) -> int:
    return len(str(text)) * (1 + len(wrapstring or ""))


def _json_length(budget: Budget, value: Any, ensure_ascii: bool = False, indent: Any = 0, **_: Any):
    if isinstance(indent, str) or (indent or 0) > MAX_INDENT:
        raise TooMuchWork(f"JSON indented by more than {MAX_INDENT}")
    return budget.weight(value) * (1 + (indent or 0))


def _digits(budget: Budget, value: Any, *_: Any, **__: Any) -> int:
    if isinstance(value, str) and len(value) > MAX_BITS // 4:
        raise TooMuchWork("a number of too many digits")
    return 0


def _sum_of_numbers(budget: Budget, items: Any, attribute: Any = None, start: Any = 0) -> int:
    if not isinstance(start, int | float):
        raise SecurityError("only numbers can be summed in templates")
    return 0


_FILTER_BOUNDS: Mapping[str, Callable[..., int]] = {
    "format": _format_filter,
    "indent": _indented,
    "int": _digits,
    "join": _joined_length,
    "replace": _replaced,
    "sum": _sum_of_numbers,
    "tojson": _json_length,
    "wordwrap": _wrapped,
}
_METHOD_BOUNDS: Mapping[str, Callable[..., int]] = {
    "join": lambda budget, glue, items: _joined_length(budget, items, glue),
    "replace": _replaced,
    "rsplit": _split_weight,
    "split": _split_weight,
    "splitlines": lambda budget, text, *_, **__: 2 * len(text),
}


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
    if len(form) > MAX_FORM:
        raise TooMuchWork(f"a date's format of more than {MAX_FORM:,} characters")
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

    def __repr__(self) -> str:  # what it holds, each time that it is held, would never end
        return "<Namespace>"


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")
