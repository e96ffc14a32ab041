"""Table 3: log loss of the model whose tables are packed, and their size."""

from experiments.guan2019.report import Entry, Result
from experiments.guan2019.training import FP32, Measured, Setting, find_paper, list_numbers

PAPER: dict[str, tuple[float | None, ...]] = {
    FP32: (0.12522, 0.12489, 0.12468, 0.12451, 0.12454),
    "ASYM-8BITS": (0.12522, 0.12489, 0.12469, 0.12451, 0.12454),
    "SYM": (0.12528, 0.12507, 0.13266, 0.13107, 0.12470),
    "GSS": (0.12527, 0.12504, 0.13199, 0.12843, 0.12459),
    "ASYM": (0.12526, 0.12491, 0.12496, 0.12494, 0.12455),
    "HIST-APPRX": (0.12525, 0.12492, 0.12497, 0.12498, 0.12455),
    "HIST-BRUTE": (0.12525, 0.12490, 0.12490, 0.12489, 0.12454),
    "ACIQ": (0.12526, 0.12491, 0.12804, 0.12514, 0.12455),
    "GREEDY": (0.12525, 0.12490, 0.12489, 0.12485, 0.12454),
    "GREEDY (FP16)": (0.12525, 0.12490, 0.12489, 0.12485, 0.12454),
    "KMEANS (FP16)": (None, None, 0.12469, 0.12451, 0.12454),
}

_FP32_PARAMETERS: tuple[float | None, ...] = (37.49, 24.99, 18.75, 15.62, 14.06)
PAPER_SIZES: dict[str, tuple[float | None, ...]] = {
    "ASYM-8BITS": (49.98, 37.49, 31.25, 28.12, 26.56),
    **dict.fromkeys(("SYM", "GSS", "ASYM", "HIST-APPRX", "HIST-BRUTE", "ACIQ", "GREEDY"), _FP32_PARAMETERS),
    "GREEDY (FP16)": (24.99, 18.74, 15.62, 14.06, 13.28),
    "KMEANS (FP16)": (None, None, 37.50, 25.00, 18.75),
}


def run(setting: Setting) -> list[Result]:
    """Train, pack and predict; see measure for what it raises.

    Returns:
        The log losses; what packing costs, which can be held against the paper's whatever the data; what of that
        comes from the size of the errors; the sizes.
    """
    numbers = list(list_numbers(setting))
    source = setting.describe()
    losses = [Entry(n, d, find_paper(PAPER, n, d), m.log_loss, details={"auc": m.auc}) for n, d, m in numbers]
    packed = [number for number in numbers if number[0] != FP32]
    costs = [_make_cost(name, d, measured) for name, d, measured in packed]
    quadratic_costs = [_make_quadratic_cost(name, d, measured) for name, d, measured in packed]
    sizes = [_make_size(name, d, measured, setting.rows) for name, d, measured in packed]
    on_costs = "After the difference: the standard error of ours over the held-out examples."
    on_quadratic = (
        "The mean of what the errors cost and of what they cost with their signs turned. What is left out is what this "
        "model gains or loses when its most used rows move a little either way, which says nothing about a method."
    )
    titles = (
        "Table 3: log loss on held-out examples, by embedding_dim",
        "Table 3, what packing costs: log loss less that of the fp32 model, in 1e-5, by embedding_dim",
        "Table 3, what the size of the errors costs, in 1e-5, by embedding_dim",
        "Table 3, sizes: per cent of the fp32 tables, by embedding_dim",
    )
    return [
        Result("table3", titles[0], setting.as_json(), losses, [source], digits=5),
        Result("table3-costs", titles[1], setting.as_json(), costs, [source, on_costs], digits=1),
        Result("table3-quadratic", titles[2], setting.as_json(), quadratic_costs, [source, on_quadratic], digits=2),
        Result("table3-sizes", titles[3], setting.as_json(), sizes, [source], digits=2),
    ]


def _make_cost(name: str, d: int, measured: Measured) -> Entry:
    paper, fp32 = find_paper(PAPER, name, d), find_paper(PAPER, FP32, d)
    cost = None if paper is None or fp32 is None else round(1e5 * (paper - fp32), 1)
    error = 1e5 * measured.cost_error
    return Entry(name, d, cost, 1e5 * measured.cost, f" ±{error:.1f}", {"standard_error": error})


def _make_quadratic_cost(name: str, d: int, measured: Measured) -> Entry:
    error = 1e5 * measured.quadratic_cost_error
    return Entry(name, d, None, 1e5 * measured.quadratic_cost, details={"standard_error": error})


def _make_size(name: str, d: int, measured: Measured, rows: int) -> Entry:
    share = 100 * measured.nbytes / (26 * rows * d * 4)
    return Entry(name, d, find_paper(PAPER_SIZES, name, d), share, details={"bytes": measured.nbytes})
