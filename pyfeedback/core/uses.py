"""Which weights a forward multiplies with its data, found by reading its source: nothing is run.

An expression depends on the arguments of the forward (it is data), on parameters only (it is a weight), or on neither.
A product of data and a weight is a layer. What the source does not show, such as a name that is computed, is not found.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from types import CodeType, FunctionType, ModuleType

RECURRENT = ("rnn_tanh", "rnn_relu", "lstm", "gru")
PRODUCTS = frozenset(
    [
        "linear", "matmul", "mm", "bmm", "mv", "addmm", "addmv", "baddbmm", "einsum", "grouped_mm", "_grouped_mm",
        *(f"conv{transpose}{n}d" for transpose in ("", "_transpose") for n in (1, 2, 3)),
        *(f"{name}{cell}" for name in RECURRENT for cell in ("", "_cell")),
    ]
)  # fmt: skip
SIZES = frozenset(["shape", "size", "dim", "ndim", "numel", "stride", "dtype", "device", "is_cuda", "requires_grad"])
VIEWS = frozenset(
    [
        "t", "transpose", "permute", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "to",
        "view_as", "reshape_as", "expand_as", "type_as", "type", "select", "narrow", "index_select", "contiguous",
        "chunk", "split", "unbind", "clone", "detach", "cat", "stack",
    ]
)  # fmt: skip

# The parameters that an expression depends on, and whether their values were changed; None if it is data.
Value = frozenset[tuple[str, bool]] | None
DATA: Value = None
NOTHING: Value = frozenset()
DEPTH = 6  # of calls that are followed


def weights_in_products(cls: type, parameters: Sequence[str]) -> dict[str, bool]:
    """Return those of ``parameters``, attributes of the class ``cls``, that its forward multiplies with data.

    For each of them, the dict has whether the forward changes the values before the product, as a standardization does.
    """
    found: set[tuple[str, bool]] = set()
    forward = getattr(cls, "forward", None)
    if forward is not None:
        _Reader(cls, frozenset(parameters), found, 0).call(forward, None)
    changed = dict(sorted(found))
    return {name: changed[name] for name in parameters if name in changed}


def reads_attribute(cls: type, names: frozenset[str]) -> bool:
    """Return whether the forward of ``cls``, or a function that it may call, has an attribute with one of ``names``."""
    seen: set[FunctionType] = set()
    waiting = list(_functions(cls, ["forward"], {}))
    while waiting:
        function = waiting.pop()
        if function not in seen and _is_foreign(function.__module__):
            seen.add(function)
            mentioned = set(_names(function.__code__))
            if mentioned & names:
                return True
            waiting += _functions(cls, mentioned, function.__globals__)
    return False


def _names(code: CodeType) -> Iterator[str]:
    """Attributes and globals in a function and the functions inside it, and strings, for getattr."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str):
            yield constant


def _functions(cls: type, names, global_names: Mapping[str, object]) -> Iterator[FunctionType]:
    """The methods of a class, and the functions of a module and of those that it imports, with these names."""
    for name in names:
        found = [inspect.getattr_static(base, name, None) for base in cls.__mro__]
        found += [global_names.get(name)]
        modules = (global_names.get(other) for other in names)
        found += [getattr(m, name, None) for m in modules if isinstance(m, ModuleType) and _is_foreign(m.__name__)]
        for function in found:
            function = _plain_function(function)
            if function is not None:
                yield function


def _plain_function(function: object) -> FunctionType | None:
    """The Python function behind a property, a static method or a decorator."""
    if isinstance(function, property):
        function = function.fget
    if isinstance(function, (staticmethod, classmethod)):
        function = function.__func__
    if callable(function):
        function = inspect.unwrap(function)
    return function if isinstance(function, FunctionType) else None


def _is_foreign(module: str | None) -> bool:
    """Whether a module is not of torch; a function that was made by exec, as that of a GraphModule, has none."""
    return (module or "").partition(".")[0] != "torch"


@cache
def _tree(function: FunctionType) -> ast.FunctionDef | None:
    """The syntax tree of a function; None without a source."""
    try:
        (tree, *_) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def _joined(values: Iterable[Value], is_changed: bool = False) -> Value:
    """What an expression of several values depends on; ``is_changed`` if its values are not those of a weight."""
    found: set[tuple[str, bool]] = set()
    for value in values:
        if value is None:
            return DATA
        found |= value
    return frozenset((name, True) for name, _ in found) if is_changed else frozenset(found)


class _Reader:
    """Evaluates functions of one class; ``found`` collects the parameters in products."""

    def __init__(self, cls: type, parameters: frozenset[str], found: set[tuple[str, bool]], depth: int):
        self.cls, self.parameters, self.found, self.depth = cls, parameters, found, depth
        self.values: dict[str, Value] = {}
        self.receiver = "self"  # the name of the module in the function that is evaluated
        self.function: FunctionType | None = None
        self.returned: list[Value] = []

    def call(self, function: object, arguments: list[Value] | None, is_method: bool = True) -> Value:
        """The value that a function returns; ``arguments`` of None are all data."""
        plain = _plain_function(function)
        tree = _tree(plain) if plain is not None and self.depth < DEPTH else None
        if plain is None or tree is None:
            return DATA if arguments is None else _joined(arguments)
        inner = _Reader(self.cls, self.parameters, self.found, self.depth + 1)
        inner.function = plain
        names = [a.arg for a in (*tree.args.posonlyargs, *tree.args.args)]
        others = [a.arg for a in tree.args.kwonlyargs] + [a.arg for a in (tree.args.vararg, tree.args.kwarg) if a]
        if names and is_method and not isinstance(function, staticmethod):
            inner.receiver, *names = names
        rest = DATA if arguments is None or DATA in arguments else NOTHING
        given = [] if arguments is None else arguments
        inner.values = dict.fromkeys([*others, *names], DATA if arguments is None else NOTHING)
        inner.values |= dict.fromkeys(others, rest) | dict(zip(names, given, strict=False))
        for _ in range(2):  # a loop may use what its body assigns later
            inner.run(tree.body)
        return _joined(inner.returned)

    def run(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self.assign(target, value)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self.assign(target, value)
            case ast.AugAssign(target=ast.Name(id=name), value=value):
                self.values[name] = _joined([self.values.get(name, NOTHING), self.value(value)])
            case ast.Return(value=ast.expr() as value):
                self.returned.append(self.value(value))
            case ast.For(target=target, iter=iterable, body=body, orelse=orelse):
                self.bind(target, self.value(iterable))
                self.run([*body, *orelse])
            case ast.With(items=items, body=body):
                for item in items:
                    self.value(item.context_expr)
                self.run(body)
            case ast.If(test=test, body=body, orelse=orelse) | ast.While(test=test, body=body, orelse=orelse):
                self.value(test)
                self.run([*body, *orelse])
            case ast.Try(body=body, orelse=orelse, finalbody=last, handlers=handlers):
                self.run([*body, *(s for handler in handlers for s in handler.body), *orelse, *last])
            case ast.Expr(value=value):
                self.value(value)
            case _:
                pass

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for each, of_each in zip(target.elts, value.elts, strict=True):
                self.assign(each, of_each)
        else:
            self.bind(target, self.value(value))

    def bind(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Name):
            self.values[target.id] = value
        elif isinstance(target, ast.Starred):
            self.bind(target.value, value)
        elif isinstance(target, (ast.Tuple, ast.List)):
            for each in target.elts:
                self.bind(each, value)

    def weights(self, names: Iterable[str]) -> Value:
        return frozenset((name, False) for name in names if name in self.parameters)

    def value(self, node: ast.expr) -> Value:
        match node:
            case ast.Name(id=name):
                return self.values.get(name, NOTHING)
            case ast.Attribute(value=ast.Name(id=base), attr=name) if base == self.receiver:
                return self.weights(self.parameters if name == "_flat_weights" else {name})
            case ast.Attribute(value=base, attr=name):
                value = self.value(base)
                return NOTHING if name in SIZES else value
            case ast.Subscript(value=base, slice=index):
                self.value(index)
                return self.value(base)
            case ast.BinOp(left=left, op=ast.MatMult(), right=right):
                return self.product([self.value(left), self.value(right)])
            case ast.BinOp(left=left, right=right):
                return _joined([self.value(left), self.value(right)], is_changed=True)
            case ast.NamedExpr(target=target, value=inner):
                self.bind(target, self.value(inner))
                return self.value(inner)
            case ast.Call():
                return self.called(node)
            case ast.Compare():
                return NOTHING
            case ast.ListComp(elt=element, generators=loops) | ast.GeneratorExp(elt=element, generators=loops):
                for loop in loops:
                    self.bind(loop.target, self.value(loop.iter))
                return self.value(element)
            case _:
                return _joined(
                    [self.value(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
                )

    def called(self, node: ast.Call) -> Value:
        arguments = [self.value(a) for a in (*node.args, *(k.value for k in node.keywords))]
        match node.func:
            case ast.Name(id="getattr") if len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                return self.weights({str(node.args[1].value)})
            case ast.Name(id=name):
                if name in PRODUCTS:
                    return self.product(arguments)
                function = self.function.__globals__.get(name) if self.function else None
                return self.follow(function, arguments)
            case ast.Attribute(value=ast.Name(id=base), attr=name) if base == self.receiver:
                method = inspect.getattr_static(self.cls, name, None)
                return DATA if _plain_function(method) is None else self.call(method, arguments)
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name):
                return self.call(self.inherited(name), arguments)
            case ast.Attribute(value=base, attr=name):
                receiver = self.value(base)
                if name in SIZES:
                    return NOTHING
                if name in VIEWS and receiver != NOTHING:
                    return receiver
                if name in PRODUCTS:
                    return self.product([receiver, *arguments])
                if isinstance(base, ast.Name) and self.function:
                    module = self.function.__globals__.get(base.id)
                    if isinstance(module, ModuleType) and _is_foreign(module.__name__):
                        return self.follow(getattr(module, name, None), arguments)
                return _joined([receiver, *arguments], name not in VIEWS)
            case _:
                self.value(node.func)
                return _joined(arguments, is_changed=True)

    def follow(self, function: object, arguments: list[Value]) -> Value:
        """The value of a call of a function of a module; those of torch are not followed."""
        plain = _plain_function(function)
        if plain is None or not _is_foreign(plain.__module__):
            return _joined(arguments, is_changed=True)
        return self.call(plain, arguments, is_method=False)

    def inherited(self, name: str) -> object:
        """The method that ``super()`` finds in the function that is evaluated."""
        bases = list(self.cls.__mro__)
        here = next((i for i, c in enumerate(bases) if self.function in map(_plain_function, vars(c).values())), 0)
        return next((vars(c)[name] for c in bases[here + 1 :] if name in vars(c)), None)

    def product(self, operands: list[Value]) -> Value:
        """The value of a product: its weights are found if another operand is data."""
        if DATA not in operands:
            return _joined(operands)
        self.found.update(*(o for o in operands if o is not None))
        return DATA
