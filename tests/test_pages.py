"""Where packed bytes lie: in huge pages, however a table comes to be, and what is left where it lies."""

import copy
import ctypes
import io
import mmap
import multiprocessing
import os
import pickle
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import embpack
from embpack import PackedTable, pages
from embpack.layouts import RowFormat
from embpack.torch import PackedEmbedding, PackedEmbeddingBag, PackedLinear

PR_SET_THP_DISABLE = 41
SYSTEM = Path("/sys/kernel/mm/transparent_hugepage")
N, D, ROW_BYTES = 250_000, 64, 36  # 9 MB
FORMAT = RowFormat(D)


def explain_skip() -> str | None:
    if sys.platform != "linux" or not (SYSTEM / "enabled").exists():
        return "there are no transparent huge pages here"
    if "[never]" in (SYSTEM / "enabled").read_text():
        return "transparent huge pages are switched off here"
    if not Path("/proc/self/pagemap").exists():
        return "this system does not tell which pages are shared"
    if tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) < (6, 1):
        return "this kernel puts nothing in huge pages at once (Linux 6.1)"
    if int((SYSTEM / "hpage_pmd_size").read_text()) > 2 << 20:
        return "huge pages are larger than the tables here"
    return None


needs_huge_pages = pytest.mark.skipif(explain_skip() is not None, reason=str(explain_skip()))


def count_huge(array) -> int:
    """Bytes in huge pages, of the mappings that the array's whole huge pages are in."""
    huge = int((SYSTEM / "hpage_pmd_size").read_text())
    start = -(-array.ctypes.data // huge) * huge
    stop = (array.ctypes.data + array.nbytes) // huge * huge
    found, is_inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            low, high = (int(bound, 16) for bound in name.split("-"))
            is_inside = low < stop and high > start
        elif is_inside and name == "AnonHugePages:":
            found += int(rest[0]) << 10
    return found


def lies_in_huge_pages(array) -> bool:
    array = array if isinstance(array, np.ndarray) else array.numpy()
    return count_huge(array) >= array.nbytes - 3 * int((SYSTEM / "hpage_pmd_size").read_text())


def map_small(shape, *, fill=True):
    """Make memory in small pages, in a mapping of its own."""
    room = mmap.mmap(-1, int(np.prod(shape)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.ndarray(shape, np.uint8, room)
    if fill:
        with without_huge_pages():
            array[...] = np.resize(np.arange(251, dtype=np.uint8), shape)
    return array


@contextmanager
def without_huge_pages():
    """Let this process have none, where they come unasked, too."""
    set_disabled = ctypes.CDLL(None).prctl
    assert set_disabled(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
    yield
    assert set_disabled(PR_SET_THP_DISABLE, 0, 0, 0, 0) == 0


def make_small_rows():
    """Rows as PyTorch lays them: it asks for no huge pages."""
    with without_huge_pages():
        return torch.arange(ROW_BYTES, dtype=torch.uint8).repeat(N, 1)


def make_module(**options):
    return PackedEmbeddingBag(N, D, mode="sum", **options)


def load_state(*, assign=False, meta=False):
    with torch.device("meta" if meta else "cpu"):
        module = make_module()
    if meta and not assign:
        module.to_empty(device="cpu")
    state = {"packed": make_small_rows(), "row_format_ascii": make_module().row_format_ascii}
    module.load_state_dict(state, assign=assign)
    return module


def load_pickle():
    file = io.BytesIO()
    torch.save(make_module(), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def load_in_memory(folder):
    path = folder / "tables.safetensors"
    embpack.save(path, {"a": PackedTable(make_small_rows().numpy(), FORMAT)})
    return embpack.load(path, access="memory")["a"]


def copy_mapped(folder):
    load_in_memory(folder)
    return copy.deepcopy(PackedEmbedding.from_table(embpack.load(folder / "tables.safetensors")["a"]))


def read_tbe():
    fbgemm = pytest.importorskip("embpack.fbgemm", exc_type=ImportError)
    [table] = fbgemm.from_tbe(fbgemm.to_tbe([PackedTable(make_small_rows().numpy(), FORMAT)]))
    return table


def reuse_memory():
    """Pack where malloc has memory that was filled before, in small pages."""
    for _ in range(3):
        torch.zeros(30 << 20, dtype=torch.uint8)
    return embpack.quantize(np.ones((N, D), np.float32), "asym")


WAYS = {
    "quantize": lambda _: reuse_memory(),
    "from_packed, PyTorch": lambda _: PackedTable.from_packed(make_small_rows(), D),
    "from_packed, NumPy": lambda _: PackedTable.from_packed(make_small_rows().numpy(), D),
    "load, in memory": load_in_memory,
    "pickle of a table": lambda _: pickle.loads(pickle.dumps(PackedTable(make_small_rows().numpy(), FORMAT))),
    "deep copy of a table": lambda _: copy.deepcopy(PackedTable(make_small_rows().numpy(), FORMAT)),
    "copy of a table": lambda _: PackedTable(make_small_rows().numpy(), FORMAT).copy(),
    "from_table": lambda _: PackedEmbedding.from_table(PackedTable(make_small_rows().numpy(), FORMAT)),
    "from_table, read-only": lambda _: PackedEmbedding.from_table(
        PackedTable(np.frombuffer(bytes(N * ROW_BYTES), np.uint8).reshape(N, ROW_BYTES), FORMAT)
    ),
    "from_float": lambda _: PackedEmbeddingBag.from_float(torch.nn.EmbeddingBag(N, D), "asym"),
    "a module by its sizes": lambda _: make_module(),
    "an output layer by its sizes": lambda _: PackedLinear(D, N, bias=False),
    "load_state_dict": lambda _: load_state(),
    "load_state_dict, assigned": lambda _: load_state(assign=True),
    "load_state_dict, assigned to the meta device": lambda _: load_state(assign=True, meta=True),
    "load_state_dict after to_empty": lambda _: load_state(meta=True),
    "pickle of a module": lambda _: load_pickle(),
    "deep copy of a module": lambda _: copy.deepcopy(load_state()),
    "deep copy of a mapped module": copy_mapped,
    "from_tbe": lambda _: read_tbe(),
}


@needs_huge_pages
@pytest.mark.parametrize("way", WAYS)
def test_large_tables_lie_in_huge_pages_however_they_come_to_be(tmp_path, way):
    assert lies_in_huge_pages(WAYS[way](tmp_path).packed)


@needs_huge_pages
def test_what_lies_beside_the_rows_does_too():
    module = PackedEmbedding(5_000_000, 1, layout="clustered", num_codebooks=2)
    assert lies_in_huge_pages(module.clusters)


@needs_huge_pages
def test_memory_that_is_filled_moves_at_once_and_keeps_address_and_values():
    array = map_small((N, ROW_BYTES))
    before, address = array.copy(), array.ctypes.data
    assert count_huge(array) == 0
    table = PackedTable.from_packed(array, D)
    assert lies_in_huge_pages(array)
    assert table.packed is array
    assert array.ctypes.data == address
    assert np.array_equal(array, before)


@needs_huge_pages
def test_memory_that_is_not_filled_takes_no_room():
    array = map_small((1, 32 << 20), fill=False)[0]
    with without_huge_pages():
        array[: 9 << 20] = 1
        array[24 << 20] = 1
    pages.use_huge_pages(array)
    assert 6 << 20 <= count_huge(array) <= 9 << 20


@needs_huge_pages
def test_what_is_filled_later_gets_huge_pages_as_it_is():
    array = map_small((1, 32 << 20), fill=False)[0]
    pages.ask_for_huge_pages(array)
    assert count_huge(array) == 0
    array[...] = 1
    assert lies_in_huge_pages(array)


@needs_huge_pages
def test_tables_that_are_smaller_than_a_huge_page_share_one():
    rows = map_small((16 * 30_000, ROW_BYTES))
    tables = [PackedTable.from_packed(part, D) for part in np.split(rows, 16)]
    assert max(table.nbytes for table in tables) < 2 << 20
    assert lies_in_huge_pages(rows)


@pytest.fixture
def asked(monkeypatch):
    """What the system is asked for."""
    found = []
    monkeypatch.setattr(pages, "_advise", lambda *call: found.append(call) or 0)
    return found


@needs_huge_pages
def test_tensors_in_shared_memory_are_left_alone(asked):
    module = make_module().share_memory()
    pages.use_huge_pages(make_small_rows().numpy())
    assert len(asked) > 0
    asked.clear()
    module.load_state_dict(make_module().state_dict())
    PackedTable.from_packed(module.packed, D)
    assert module.packed.is_shared()
    assert [call for call in asked if is_in(call, module.packed)] == []


def is_in(call, tensor) -> bool:
    start, stop, _ = call
    return start < tensor.data_ptr() + tensor.nbytes and stop > tensor.data_ptr()


@needs_huge_pages
def test_mapped_files_are_left_alone(tmp_path, asked):
    path = tmp_path / "tables.safetensors"
    embpack.save(path, {"a": PackedTable(np.zeros((N, ROW_BYTES), np.uint8), FORMAT)})
    table = embpack.load(path)["a"]
    module = PackedEmbedding.from_table(table)
    # Which writes to all pages of the map, so that they are this process's own.
    module.load_state_dict({**module.state_dict(), "packed": torch.ones((N, ROW_BYTES), dtype=torch.uint8)})
    copy.copy(table)
    PackedTable.from_packed(table.packed, D)
    with path.open("rb") as file:
        pages.use_huge_pages(np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8))
    assert asked == []


@needs_huge_pages
def test_what_a_fork_shares_stays_shared():
    array = map_small((N, ROW_BYTES))
    assert in_a_fork(array) == 0
    in_parent = count_huge(array)
    assert in_parent == 0
    PackedTable.from_packed(array, D)
    assert lies_in_huge_pages(array)


def in_a_fork(array) -> int:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def adopt() -> None:
        PackedTable.from_packed(array, D)
        there.send(count_huge(array))

    child = context.Process(target=adopt)
    child.start()
    found = here.recv()
    child.join()
    return found


@needs_huge_pages
def test_small_tables_are_left_alone(monkeypatch):
    moved = []
    monkeypatch.setattr(pages, "_move", lambda start, stop, huge: moved.append(stop - start))
    PackedTable.from_packed(np.zeros((100, ROW_BYTES), np.uint8), D)
    pages.use_huge_pages(np.zeros(pages.MIN_BYTES - 1, np.uint8))
    assert moved == []
    pages.use_huge_pages(np.zeros(pages.MIN_BYTES, np.uint8))
    assert moved == [pages.MIN_BYTES]


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux alone")
@pytest.mark.parametrize("system", ["switched off", "without them"])
def test_a_system_without_huge_pages_is_left_as_it_is(tmp_path, monkeypatch, system):
    if system == "switched off":
        (tmp_path / "enabled").write_text("always madvise [never]\n")
    monkeypatch.setattr(pages, "_SYSTEM", tmp_path)
    monkeypatch.setattr(pages, "_advise", lambda *_: pytest.fail("asked for huge pages"))
    table = PackedTable.from_packed(make_small_rows(), D)
    assert table[0].shape == (D,)


@needs_huge_pages
def test_a_kernel_that_cannot_move_them_now_may_later(monkeypatch):
    asked, advise = [], pages._advise
    monkeypatch.setattr(pages, "_COLLAPSE", 999)
    monkeypatch.setattr(pages, "_advise", lambda *call: asked.append(call[-1]) or advise(*call))
    array = map_small((N, ROW_BYTES))
    PackedTable.from_packed(array, D)
    assert count_huge(array) == 0
    assert set(asked) == {999, pages._ADVISE}


@needs_huge_pages
def test_memory_whose_owner_wants_no_huge_pages_keeps_small_ones():
    array = map_small((N, ROW_BYTES))
    begin = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (array.ctypes.data + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    assert pages._advise(begin, end, 15) == 0  # MADV_NOHUGEPAGE
    asked, advise = [], pages._advise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "_advise", lambda *call: asked.append(call[-1]) or advise(*call))
        pages.use_huge_pages(array)
    assert asked
    assert pages._ADVISE not in asked
    assert count_huge(array) == 0


@needs_huge_pages
def test_when_no_huge_page_is_left_it_stops(monkeypatch):
    asked = []
    monkeypatch.setattr(pages, "_PIECE_BYTES", 2 << 20)
    monkeypatch.setattr(pages, "_advise", lambda *call: asked.append(call) or 12)  # ENOMEM
    pages.use_huge_pages(map_small((N, ROW_BYTES)).reshape(-1))
    assert [advice for *_, advice in asked] == [pages._COLLAPSE]
