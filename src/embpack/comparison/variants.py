"""What is compared."""

from collections.abc import Sequence
from itertools import product

from embpack.layouts import RowFormat
from embpack.methods import DEFAULT_METHOD, METHODS, Method, parse_method
from embpack.selection import as_list
from embpack.variant import Variant

# What is compared by default, beside every method at 4 bits.
_OTHERS = (
    *(Variant(method, bits) for method in ("asym", DEFAULT_METHOD) for bits in (2, 8)),
    *(Variant("trellis", bits) for bits in (2, 3, 6)),
    *(Variant(method, 4, rotate="hadamard") for method in (DEFAULT_METHOD, "trellis")),
)


def make_variants(
    methods: str | Method | Sequence[str | Method] | None = None,
    bits: float | Sequence[float] | None = None,
    param_dtype: str | Sequence[str] | None = None,
    rotate: str | Sequence[str | None] | None = None,
) -> list[Variant]:
    """List what is compared: every method at every number of bits, with every type of parameters and rotation.

    Args:
        methods: one or more, as for quantize; None is all of embpack.METHODS, each at the bits that it has.
        bits: one or more numbers that quantize takes; None is 4. If methods and rotate are not given either, asym and
            optimal are also compared at 2 and 8 bits, trellis at 2, 3 and 6, and optimal and trellis with rotated rows.
        param_dtype: one or more of "float16" and "float32"; None is quantize's default for the method and bits.
        rotate: one or more of None and "hadamard".

    Raises:
        ValueError: no such method, param_dtype or rotation, bits that no method has, or an empty list of them.
    """
    names = [_name(method) for method in (METHODS if methods is None else as_list(methods))]
    dtypes, rotations = as_list(param_dtype), as_list(rotate)
    variants = []
    for number in (4,) if bits is None else bits if isinstance(bits, Sequence) else (bits,):
        refused = [Variant(name, number, dtype).find_refusal() for name in names for dtype in dtypes]
        if refused and all(refused):
            raise ValueError(refused[0])
        own = product(names, [number], dtypes, rotations)
        variants += [Variant(*way) for way in own if methods is not None or not Variant(*way[:3]).find_refusal()]
    variants.sort(key=lambda variant: names.index(variant.spec))
    if methods is None and bits is None and rotate is None:
        variants += [Variant(each.method, each.bits, dtype, each.rotate) for each in _OTHERS for dtype in dtypes]
        variants = [each for each in variants if not each.find_refusal()]
    if not variants:
        raise ValueError("there is nothing to compare; give at least one method, number of bits and param_dtype")
    for rotation in rotations:
        RowFormat(1, rotation=rotation)  # refuses what there is not
    return list(dict.fromkeys(variants))


def _name(method: str | Method) -> str:
    """Name a method as its user would, after a check that there is such a one."""
    parsed = parse_method(method)
    if isinstance(method, str):
        return method
    return parsed.name if parsed == METHODS[parsed.name]() else parsed.spec
