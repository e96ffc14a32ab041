"""The methods, which choose what the codes of a row stand for. METHODS is the list of them."""

from dataclasses import fields
from difflib import get_close_matches
from functools import lru_cache

from embpack.methods.aciq import Aciq
from embpack.methods.asym import Asym
from embpack.methods.base import Method, Packer, measure_loss
from embpack.methods.codebook import CodebookMethod
from embpack.methods.greedy import Greedy, GreedyOpt, GreedyPaper
from embpack.methods.gss import Gss
from embpack.methods.hist_apprx import HistApprx
from embpack.methods.hist_brute import HistBrute
from embpack.methods.kmeans import KMeans, KMeansLloyd
from embpack.methods.kmeans_cls import KMeansCls
from embpack.methods.optimal import Optimal
from embpack.methods.sym import Sym
from embpack.methods.table_range import TableRange
from embpack.methods.trellis import Trellis
from embpack.methods.uniform import UniformMethod

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(Asym, Sym, TableRange, Greedy, GreedyPaper, GreedyOpt, Optimal, Gss, Aciq, HistApprx, HistBrute),
        *(KMeans, KMeansLloyd, KMeansCls, Trellis),
    )
}


# The method if nobody names one.
DEFAULT_METHOD = Optimal.name


def parse_method(spec: str | Method) -> Method:
    """Make a method from its name and parameters, as in ``"greedy"`` or ``"greedy:b=1000,r=0.5"``.

    Args:
        spec: a name in METHODS, then optionally a colon and parameters; a Method comes back as it is.

    Raises:
        TypeError: spec is neither.
        ValueError: no such method or parameter, or a value out of its range.
    """
    if isinstance(spec, Method):
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"method is {spec!r}; give a name, such as {DEFAULT_METHOD!r}, or a Method")
    return _parse_method(spec)


@lru_cache
def _parse_method(spec: str) -> Method:
    name, _, settings = spec.partition(":")
    if name not in METHODS:
        like = get_close_matches(name.lower(), METHODS, 1)
        choose = f"did you mean {like[0]!r}? Choose" if like else "choose"
        raise ValueError(f"there is no method {name!r}; {choose} one of {', '.join(METHODS)}")
    method = METHODS[name]
    types = {field.name: field.type for field in fields(method)}
    values: dict[str, int | float | str] = {}
    for setting in filter(None, settings.split(",")):
        key, _, text = setting.partition("=")
        if key not in types:
            known = ", ".join(types) or "none"
            raise ValueError(f"method {name!r} has no parameter {key!r}; it has: {known}")
        if types[key] is str:
            values[key] = text
            continue
        try:
            values[key] = int(text) if types[key] is int else float(text)
        except ValueError:
            wanted = "whole number" if types[key] is int else "number"
            raise ValueError(f"method {name!r}: {key} is {text!r}, which is not a {wanted}") from None
    return method(**values)


__all__ = [
    "DEFAULT_METHOD",
    "METHODS",
    "Aciq",
    "Asym",
    "CodebookMethod",
    "Greedy",
    "GreedyOpt",
    "GreedyPaper",
    "Gss",
    "HistApprx",
    "HistBrute",
    "KMeans",
    "KMeansCls",
    "KMeansLloyd",
    "Method",
    "Optimal",
    "Packer",
    "Sym",
    "TableRange",
    "Trellis",
    "UniformMethod",
    "measure_loss",
    "parse_method",
]
