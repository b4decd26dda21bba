"""The rules: what a node of a source's syntax tree becomes in a mutant, each a few lines over Python's `ast`.

A rule gets a `Site` and yields the nodes that may stand there instead, none of them changed in place. What stays as it is:
docstrings, annotations, decorators, defaults, what is raised and said, and the hints that only a GPU's compiler reads.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

HINTS = ("num_warps", "num_stages", "input_precision", "allow_tf32")  # keywords that the interpreter does not look at
COMMUTATIVE = ("min", "max", "maximum", "minimum", "isinstance", "hasattr", "getattr", "arange", "promote_types", "zip")
DIMENSION_KEYWORDS = ("dim", "axis", "dims", "axes")
DIMENSION_CALLS = (
    "sum", "mean", "softmax", "log_softmax", "logsumexp", "flatten", "unsqueeze", "squeeze", "transpose", "swapaxes", "movedim",
    "gather", "take_along_axis", "unbind", "cumsum", "argmax", "amax", "amin", "any", "all", "stack", "cat", "concatenate",
    "expand_dims", "size", "stride", "program_id", "num_programs",
)  # fmt: skip
LIBRARIES = ("torch", "jnp", "jax", "np", "tl", "triton", "math", "lax")
COPIES = ("contiguous", "detach", "clone")
CASTS = ("float", "double", "half", "long", "int", "to", "astype", *COPIES)
CAST_FUNCTIONS = ("at_least_float32", "cast", "float", "int", "asarray", "as_tensor")
LOADS_AND_STORES = ("load", "store", "atomic_add")
REDUCTIONS = ("sum", "mean")
FILLED = ("zeros", "full")  # to which a kernel adds, in the dtype of what is added
LOW = "bfloat16"

OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mod, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
}  # fmt: skip
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
FUNCTIONS = {
    "sum": "mean", "mean": "sum", "amax": "amin", "amin": "amax", "max": "min", "min": "max", "maximum": "minimum",
    "minimum": "maximum", "argmax": "argmin", "argmin": "argmax", "all": "any", "any": "all", "exp": "expm1", "expm1": "exp",
    "log": "log1p", "log1p": "log", "sin": "cos", "cos": "sin", "silu": "gelu", "gelu": "silu", "sigmoid": "tanh",
    "tanh": "sigmoid", "softmax": "log_softmax", "log_softmax": "softmax", "rsqrt": "sqrt", "sqrt": "rsqrt", "square": "abs",
    "round": "floor", "floor": "ceil", "ceil": "floor", "ones": "zeros", "zeros": "ones", "ones_like": "zeros_like",
    "zeros_like": "ones_like", "new_zeros": "new_ones", "new_ones": "new_zeros", "cumsum": "cumprod", "isqrt": "sqrt",
}  # fmt: skip
TRITON_FUNCTIONS = FUNCTIONS | {
    "sum": "max", "max": "sum", "exp": "exp2", "exp2": "exp", "log": "log2", "log2": "log", "sigmoid": "exp",
}  # fmt: skip
OTHERS_OF_LIBRARIES = {("math", "sqrt"): "cbrt", ("jnp", "sqrt"): "cbrt", ("jnp", "tanh"): "arctan"}  # which lack the above
GELUS = {
    "torch": ("torch.nn.functional.gelu(x)", "torch.nn.functional.silu(x)"),
    "jax": ("jax.nn.gelu(x, approximate=False)", "jax.nn.silu(x)"),
}
Replacement = ast.AST


@dataclass(frozen=True)
class Site:
    """A node and all that it stands in, the outermost first."""

    node: ast.AST
    parents: tuple[ast.AST, ...]
    framework: str = "torch"

    @property
    def parent(self) -> ast.AST:
        """What it is a part of."""
        return self.parents[-1]

    @cached_property
    def functions(self) -> list[ast.FunctionDef]:
        """The functions and methods that it stands in."""
        return [each for each in self.parents if isinstance(each, ast.FunctionDef)]

    @cached_property
    def is_in_kernel(self) -> bool:
        """Whether a GPU runs it."""
        return any("jit" in ast.unparse(each) and "jax" not in ast.unparse(each) for each in self._decorators)

    @property
    def _decorators(self) -> list[ast.expr]:
        return [each for function in self.functions for each in function.decorator_list if "triton" in ast.unparse(each)]

    @property
    def is_in_loop(self) -> bool:
        """Whether it may be run several times in one call of its function."""
        inner = self.parents[self.parents.index(self.functions[-1]) :] if self.functions else ()
        return any(isinstance(each, ast.For | ast.While) for each in inner)


Rule = Callable[[Site], Iterator[Replacement]]
RULES: dict[str, Rule] = {}


def rule(function: Rule) -> Rule:
    """Takes a rule into the table, under its name."""
    RULES[function.__name__.replace("_", " ")] = function
    return function


def name_of(call: ast.AST) -> str:
    """The last name of what is called: `sum` of `torch.sum(x)`; empty where it has none."""
    function = getattr(call, "func", None)
    return str(getattr(function, "attr", None) or getattr(function, "id", ""))


def library_of(call: ast.AST) -> str:
    """The library whose function is called, by the name that it was imported under; empty for methods and own functions."""
    inner = getattr(call, "func", None)
    while isinstance(inner, ast.Attribute):
        inner = inner.value
    name = getattr(inner, "id", "")
    return name if name in LIBRARIES else ""


def expression(text: str) -> ast.expr:
    """The node of an expression."""
    return ast.parse(text, mode="eval").body


@rule
def operator(site: Site) -> Iterator[Replacement]:
    """Another binary operator."""
    match site.node:
        case ast.BinOp(left, op, right) if type(op) in OPERATORS and not (_is_text(left) or _is_text(right)):
            yield ast.BinOp(left, OPERATORS[type(op)](), right)
        case ast.AugAssign(target, op, value) if type(op) in OPERATORS:
            yield ast.AugAssign(target, OPERATORS[type(op)](), value)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)


@rule
def side(site: Site) -> Iterator[Replacement]:
    """One side of a binary operator alone."""
    match site.node:
        case ast.BinOp(left, _, right) if not (_is_text(left) or _is_text(right)):
            yield left
            yield right
        case ast.AugAssign(target, _, value):
            yield ast.Assign([target], value, lineno=0)
        case ast.BoolOp(op, values):
            for place in range(len(values)):
                others = [*values[:place], *values[place + 1 :]]
                yield ast.BoolOp(op, others) if len(others) > 1 else others[0]


@rule
def comparison(site: Site) -> Iterator[Replacement]:
    """The other side of a boundary, or the opposite."""
    match site.node:
        case ast.Compare(left, ops, comparators):
            for place, op in enumerate(ops):
                yield ast.Compare(left, [*ops[:place], COMPARISONS[type(op)](), *ops[place + 1 :]], comparators)
        case ast.UnaryOp(ast.Not() | ast.Invert(), operand):
            yield operand


@rule
def constant(site: Site) -> Iterator[Replacement]:
    """A number plus 1, times 10, times 1.01, or 0; the other truth value. Of what is an index, the next or the first."""
    node = site.node
    if not isinstance(node, ast.Constant) or _is_dimension(site) or (name_of(site.parent) == "arange" and node.value == 0):
        return
    match node.value:
        case bool(value):
            yield ast.Constant(not value)
        case int(value):
            yield ast.Constant(value + 1)
            if value:
                yield ast.Constant(0)
            if value and not any(isinstance(each, ast.Subscript) for each in site.parents[-3:]):
                yield ast.Constant(10 * value)
        case float(value) if value:
            for other in (value + 1, 10 * value, 1.01 * value, 0.0):
                yield ast.Constant(other)
        case float():
            yield ast.Constant(1.0)


@rule
def dimension(site: Site) -> Iterator[Replacement]:
    """A neighbouring dimension, or a new one at another place, or what is transposed as it was."""
    if _is_dimension(site) and not isinstance(site.parent, ast.UnaryOp):
        yield ast.Constant({0: 1, -2: -1}.get(_number(site.node), _number(site.node) - 1))
    match site.node:
        case ast.Subscript(value, ast.Tuple(elts)) if any(_is_none(each) for each in elts):
            place = next(place for place, each in enumerate(elts) if _is_none(each))
            other = place - 1 if place else 1
            moved = list(elts)
            moved[place], moved[other] = moved[other], moved[place]
            yield ast.Subscript(value, ast.Tuple(moved, ast.Load()), ast.Load())
        case ast.Attribute(value, "mT" | "T"):
            yield value


@rule
def sign(site: Site) -> Iterator[Replacement]:
    """The opposite sign."""
    match site.node:
        case ast.UnaryOp(ast.USub(), operand) if not _is_dimension(site):
            yield operand
        case ast.Constant("-inf"):
            yield ast.Constant("inf")


@rule
def cast(site: Site) -> Iterator[Replacement]:
    """A cast, a copy or a demanded dtype that is left out."""
    match site.node:
        case ast.Call(ast.Attribute(value, name)) if name in CASTS and not library_of(site.node):
            yield value
        case ast.Call(_, [first, *_]) if name_of(site.node) in CAST_FUNCTIONS and not isinstance(first, ast.Constant):
            yield first
        case ast.Call(function, arguments, keywords):
            kept = [each for each in keywords if each.arg != "dtype"]
            if len(kept) < len(keywords):
                yield ast.Call(function, arguments, kept)


@rule
def function(site: Site) -> Iterator[Replacement]:
    """Another function of the same signature."""
    node = site.node
    others = TRITON_FUNCTIONS if site.is_in_kernel else FUNCTIONS
    match node:
        case ast.Call(_, [left, right]) if name_of(node) == "cdiv":
            yield ast.BinOp(left, ast.FloorDiv(), right)
        case ast.Call(ast.Name("gelu"), [given]):
            for other in GELUS[site.framework]:
                yield expression(other.replace("(x", f"({ast.unparse(given)}"))
        case ast.Call(ast.Attribute(value, name), arguments, keywords) if name in others:
            other = OTHERS_OF_LIBRARIES.get((library_of(node), name), others[name])
            yield ast.Call(ast.Attribute(value, other, ast.Load()), arguments, keywords)
        case ast.Call(ast.Name(("min" | "max" | "any" | "all") as name), arguments, keywords):
            yield ast.Call(ast.Name(FUNCTIONS[name]), arguments, keywords)


@rule
def arguments(site: Site) -> Iterator[Replacement]:
    """Two neighbouring arguments, or results, in each other's place."""
    match site.node:
        case ast.Call(function, given, keywords) if name_of(site.node) not in COMMUTATIVE:
            for swapped in _swapped(given):
                yield ast.Call(function, swapped, keywords)
        case ast.Tuple(elements, ast.Load()) if isinstance(site.parent, ast.Return | ast.Assign):
            if not any(_is_text(each) for each in elements):
                for swapped in _swapped(elements):
                    yield ast.Tuple(swapped, ast.Load())


@rule
def mask(site: Site) -> Iterator[Replacement]:
    """No mask, no `other`, or one of the values that a mask decides between."""
    match site.node:
        case ast.Call(function, given, keywords) if name_of(site.node) in LOADS_AND_STORES:
            for dropped in (("mask", "other"), ("other",)):
                kept = [each for each in keywords if each.arg not in dropped]
                if len(kept) < len(keywords):
                    yield ast.Call(function, given, kept)
        case ast.Call(_, [_, left, right]) if name_of(site.node) == "where":
            yield left
            yield right
        case ast.Call(ast.Attribute(value, "masked_fill")):
            yield value
        case ast.IfExp(_, body, orelse):
            yield body
            yield orelse


@rule
def statement(site: Site) -> Iterator[Replacement]:
    """A statement that is left out: a call, a change of what has a value, a check; or a condition that always holds."""
    match site.node:
        case ast.Expr(value) if not isinstance(value, ast.Constant):
            yield ast.Pass()
        case ast.AugAssign():
            yield ast.Pass()
        case ast.Assign(targets) if any(_has_value(site, target) for target in targets):
            yield ast.Pass()
        case ast.If(_, body, orelse):
            if not orelse:
                yield ast.Pass()
            if not isinstance(body[-1], ast.Raise):
                yield ast.If(ast.Constant(True), body, orelse)
            if orelse:
                yield ast.If(ast.Constant(False), body, orelse)


@rule
def rounding(site: Site) -> Iterator[Replacement]:
    """What is stored is cut off instead of rounded."""
    match site.node:
        case ast.Call(function, [pointers, value, *others], keywords) if name_of(site.node) == "store" and site.is_in_kernel:
            if "tl.int" not in ast.unparse(value) and not isinstance(pointers, ast.Name):
                names = (each for each in ast.walk(pointers) if isinstance(each, ast.Name))
                base = min(names, key=lambda name: (name.lineno, name.col_offset))  # a pointer stands first
                low = ast.Attribute(ast.Attribute(base, "dtype"), "element_ty")
                cut = ast.Call(ast.Attribute(value, "to"), [low], [ast.keyword("fp_downcast_rounding", ast.Constant("rtz"))])
                yield ast.Call(function, [pointers, cut, *others], keywords)


@rule
def accumulator(site: Site) -> Iterator[Replacement]:
    """Sums and products in a dtype of few digits."""
    node = site.node
    match node:
        case ast.AugAssign(target, ast.Add(), value) if site.is_in_kernel and site.is_in_loop:
            if _starts_as_float32(site, target):
                yield ast.Assign([target], _narrowed(ast.BinOp(target, ast.Add(), value), "tl"), lineno=0)
        case ast.Call() if name_of(node) == "dot" and site.is_in_kernel:
            yield _narrowed(node, "tl")
        case ast.Call(ast.Attribute(value, name), given, keywords) if name in REDUCTIONS and not site.is_in_kernel:
            if not library_of(node):
                low = _low(site, value)
                yield _as_before(site, ast.Call(ast.Attribute(low, name, ast.Load()), given, keywords), value)
        case ast.BinOp(left, ast.MatMult(), right):
            yield _as_before(site, ast.BinOp(_low(site, left), ast.MatMult(), _low(site, right)), left)
        case ast.Attribute(ast.Name(("torch" | "tl" | "jnp") as library), "float32") if name_of(site.parent) not in FILLED:
            yield ast.Attribute(ast.Name(library), LOW)


def _swapped(elements: list[ast.expr]) -> Iterator[list[ast.expr]]:
    for place, (left, right) in enumerate(pairwise(elements)):
        if ast.unparse(left) != ast.unparse(right):
            yield [*elements[:place], right, left, *elements[place + 2 :]]


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _number(node: ast.AST) -> int:
    return int(ast.literal_eval(node))


def _is_dimension(site: Site) -> bool:
    """Whether a number says which dimension is meant."""
    node, (*_, outer, parent) = site.node, (None, *site.parents)
    if isinstance(parent, ast.UnaryOp):
        return _is_dimension(Site(parent, site.parents[:-1]))
    number = node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else node
    if not (isinstance(number, ast.Constant) and type(number.value) is int):
        return False
    keyword = outer if isinstance(parent, ast.Tuple) else parent
    if isinstance(keyword, ast.keyword):
        return keyword.arg in DIMENSION_KEYWORDS
    if not (isinstance(parent, ast.Call) and isinstance(parent.func, ast.Attribute)):
        return False
    of_method = not library_of(parent) or name_of(parent) in ("program_id", "num_programs")
    return name_of(parent) in DIMENSION_CALLS and (of_method or node not in parent.args[:1])


def _has_value(site: Site, target: ast.expr) -> bool:
    """Whether what is assigned to has a value already: an argument, an earlier assignment, an attribute, an element."""
    if isinstance(target, ast.Tuple):
        return all(_has_value(site, each) for each in target.elts)
    if not isinstance(target, ast.Name):
        return not isinstance(target, ast.Starred)
    if not site.functions:
        return False
    function, line = site.functions[-1], getattr(site.node, "lineno", 0)
    given = [each.arg for each in ast.walk(function.args) if isinstance(each, ast.arg)]
    stored = [each for each in ast.walk(function) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)]
    return target.id in given or any(each.id == target.id and each.lineno < line for each in stored)


def _starts_as_float32(site: Site, target: ast.expr) -> bool:
    """Whether what is added to was made in a kernel as zeros in float32, or in the dtype that it computes in."""
    name, made = ast.unparse(target), [each for each in ast.walk(site.functions[-1]) if isinstance(each, ast.Assign)]
    values = [ast.unparse(each.value) for each in made if ast.unparse(each.targets[0]) == name and name_of(each.value) in FILLED]
    return any("int" not in each for each in values)


def _narrowed(value: ast.expr, library: str) -> ast.expr:
    """In a kernel: rounded to few digits, and widened again."""
    low = ast.Call(ast.Attribute(value, "to"), [expression(f"{library}.{LOW}")], [])
    return ast.Call(ast.Attribute(low, "to"), [expression(f"{library}.float32")], [])


def _low(site: Site, value: ast.expr) -> ast.expr:
    """In few digits."""
    return _converted(site, value, expression("jax.numpy.bfloat16" if site.framework == "jax" else "torch.bfloat16"))


def _as_before(site: Site, value: ast.expr, like: ast.expr) -> ast.expr:
    return _converted(site, value, ast.Attribute(like, "dtype"))


def _converted(site: Site, value: ast.expr, dtype: ast.expr) -> ast.expr:
    return ast.Call(ast.Attribute(value, "astype" if site.framework == "jax" else "to"), [dtype], [])
