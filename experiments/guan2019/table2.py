"""Table 2: normalized l2 loss of a trained table, by method and embedding_dim."""

from collections.abc import Iterator

from experiments.guan2019.report import Entry, Result
from experiments.guan2019.training import (
    FP32,
    SHOWN_TABLE,
    Setting,
    find_paper,
    list_numbers,
)

PAPER: dict[str, tuple[float | None, ...]] = {
    "ASYM-8BITS": (0.00260, 0.00329, 0.00376, 0.00387, 0.00400),
    "SYM": (0.05564, 0.06296, 0.06785, 0.06836, 0.06928),
    "GSS": (0.05269, 0.05965, 0.06328, 0.06400, 0.06423),
    "ASYM": (0.04451, 0.05479, 0.06387, 0.06608, 0.06781),
    "HIST-APPRX": (0.04452, 0.05512, 0.06409, 0.06589, 0.06768),
    "HIST-BRUTE": (0.04156, 0.05082, 0.05881, 0.06083, 0.06272),
    "ACIQ": (0.04451, 0.05479, 0.06387, 0.06742, 0.07665),
    "GREEDY": (0.03889, 0.04878, 0.05744, 0.05991, 0.06221),
    "GREEDY (FP16)": (0.03889, 0.04879, 0.05744, 0.05991, 0.06221),
    "KMEANS-CLS (FP16)": (0.03948, 0.05349, 0.06826, 0.07369, 0.07287),
    "KMEANS (FP16)": (0.0, 0.0, 0.03670, 0.05160, 0.05781),
}


def run(setting: Setting) -> list[Result]:
    """Train and pack; see measure for what it raises."""
    title = f"Table 2: normalized l2 loss of table {SHOWN_TABLE + 1} of 26, by embedding_dim"
    return [Result("table2", title, setting.as_json(), list(_make_entries(setting)), [setting.describe()], digits=5)]


def _make_entries(setting: Setting) -> Iterator[Entry]:
    for name, d, measured in list_numbers(setting):
        if name != FP32:
            details = {"loss_of_all_tables": measured.loss_of_all}
            yield Entry(name, d, find_paper(PAPER, name, d), measured.loss, details=details)
