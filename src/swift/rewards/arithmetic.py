"""The value of an expression that a model wrote, without running it as a program."""

import ast
import operator
import re
import warnings
from collections.abc import Callable
from fractions import Fraction

_ALLOWED = re.compile(r"[0-9+\-*/() ]*")
_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_UNARY: dict[type[ast.unaryop], Callable[[Fraction], Fraction]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def evaluate_arithmetic(expression: str, *, max_length: int = 200) -> Fraction:
    """The exact value of whole numbers, `+ - * /` and parentheses.

    Raises ValueError for everything else: other characters and operators, more than `max_length` characters,
    a division by 0. Nothing is executed, so the text may come from a model.
    """
    text = " ".join(expression.split())
    if len(text) > max_length:
        raise ValueError(f"an expression of {len(text)} characters, more than {max_length}")
    if not _ALLOWED.fullmatch(text):
        raise ValueError(f"not arithmetic: {text}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # "2(3)": a number that is called
            return _evaluate(ast.parse(text, mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not an expression: {text}") from error
    except ZeroDivisionError as error:
        raise ValueError(f"a division by 0: {text}") from error


def _evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_evaluate(node.operand))
    raise ValueError(f"not arithmetic: {ast.unparse(node)}")
