"""The paper's names of methods, and what each is here. SERIES is the list of them."""

from dataclasses import dataclass
from typing import Any

import embpack


@dataclass(frozen=True)
class Series:
    """One line of a plot, or one row of a table.

    Attributes:
        name: as the paper spells it.
        method: name and parameters, as embpack.parse_method reads them.
        bits: a code.
        param_dtype: of scale and bias, or of the codebook; the paper's "(FP16)" is float16.
        widest: embedding_dim that it is measured up to.
    """

    name: str
    method: str
    bits: int = 4
    param_dtype: str = "float32"
    widest: int = 1 << 14

    def quantize(self, weight: Any) -> embpack.PackedTable:
        """Pack a table, float32 [N, d]."""
        return embpack.quantize(weight, self.method, self.bits, self.param_dtype)


OUR_GREEDY, LLOYD = "greedy, ours", "KMEANS by Lloyd"

# GREEDY is the search behind the paper's figures, which stops at its limit r. KMEANS is the best codebook there is, by
# dynamic programming, whose time grows with the square of embedding_dim. The paper says that its centres start at the
# grid of ASYM; Lloyd's iteration from there is the series LLOYD, whose losses are above the paper's up to d = 2048, so
# theirs must have been found otherwise.
SERIES = {
    series.name: series
    for series in (
        Series("ASYM-8BITS", "asym", bits=8),
        Series("SYM", "sym"),
        Series("GSS", "gss"),
        Series("TABLE", "table"),
        Series("ASYM", "asym"),
        Series("HIST-APPRX", "hist-apprx"),
        Series("HIST-BRUTE", "hist-brute"),
        Series("ACIQ", "aciq"),
        Series("GREEDY", "greedy-paper"),
        Series("GREEDY (FP16)", "greedy-paper", param_dtype="float16"),
        Series("GREEDY (opt)", "greedy-opt"),
        Series(OUR_GREEDY, "greedy", param_dtype="float16"),
        Series("KMEANS-CLS (FP16)", "kmeans-cls", param_dtype="float16"),
        Series("KMEANS", "kmeans", widest=1 << 12),
        Series("KMEANS (FP16)", "kmeans", param_dtype="float16"),
        Series(LLOYD, "kmeans-lloyd"),
    )
}
