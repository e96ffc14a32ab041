"""PackedModule: what all packed modules are, rows of a table as buffers."""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from embpack.disk import DiskTable
from embpack.errors import kind_of
from embpack.formats.mapped import is_mapped
from embpack.layouts import RowFormat
from embpack.lookups import Table
from embpack.methods import DEFAULT_METHOD, Method
from embpack.packing import quantize
from embpack.pages import ask_for_huge_pages, use_huge_pages
from embpack.rows import ROW_DTYPES
from embpack.table import PackedTable
from embpack.torch.disk import look_up, refuse_state, refuse_to_save
from embpack.torch.ops import as_table, check_dtype, dequantize
from embpack.torch.private import CastModule, GuardedModule, buffers_of
from embpack.torch.state import FORMAT, check_format, receive_state, write_format
from embpack.torch.weight import PackedWeight, explain_write

# The buffers that are a table.
_ROWS = ("packed", "clusters", "codebooks")


class PackedModule(CastModule, GuardedModule):
    """A packed table as buffers, all uint8, so that .half() and .to(dtype) leave the rows alone.

    load_state_dict raises RuntimeError, also with strict=False, if the rows that it brings are of another format than
    this module's or of other sizes, and leaves the module as it was.

    Rows may stay on the disk, in modules that look rows up (load_checkpoint(access="disk"), or from_table of a
    DiskTable). Such a module has none of these buffers, so no .to() moves it; copies of it share the file; its state
    dict would lack the rows, and is refused, as is a pickle; and torch.compile runs its lookups as they are, by a graph
    break.

    Attributes:
        dtype: of the values that it returns, as nn.Embedding returns its weight's; .half() and .to(dtype) change it.
        packed: uint8 [num_embeddings, row_bytes].
        clusters: uint8 [num_embeddings, bytes of an entry], the array by row that lies beside the rows, little-endian;
            None if the layout has none.
        codebooks: uint8 [num_codebooks, bytes of a codebook], the array that rows share; None if the layout has none.
        row_format_ascii: uint8 [64], str(row_format) and zeros, which says in a state dict what its bytes mean.
    """

    # The options that it shares with the float module, that module, and what both call a table's rows and columns.
    options: ClassVar[tuple[str, ...]] = ()
    float_class: ClassVar[type[nn.Module]]
    sizes: ClassVar[tuple[str, str]] = ("num_embeddings", "embedding_dim")
    # What a table may be that it is made of.
    kinds: ClassVar[tuple[type, ...]] = (PackedTable,)
    on_disk: DiskTable | None = None

    packed: Tensor
    clusters: Tensor | None
    codebooks: Tensor | None
    row_format_ascii: Tensor

    def __init__(
        self,
        num_embeddings: int,
        row_format: RowFormat,
        num_codebooks: int = 0,
        dtype: torch.dtype | None = None,
        *,
        rotate_back: bool = True,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.dtype = dtype or torch.get_default_dtype()
        check_dtype(self.dtype)
        self.row_format = row_format
        self.rotate_back = rotate_back
        self.register_buffer("packed", _make_zeros(num_embeddings, row_format.row_bytes))
        # Before those that may be None: torch.export counts None as a buffer where it looks for a later one.
        self.register_buffer(FORMAT, write_format(row_format))
        beside = {spec.name: spec for spec in row_format.form.beside(num_embeddings, num_codebooks)}
        for name in _ROWS[1:]:
            spec = beside.get(name)
            self.register_buffer(name, None if spec is None else _make_zeros(spec.known_shape[0], spec.entry_bytes))

    def _receive(self, state: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        if self.on_disk is not None:
            refuse_state(state, prefix, buffers_of(self))
        return receive_state(state, buffers_of(self), self.row_format, prefix, prefix[:-1] or type(self).__name__)

    def _received(self, names: Collection[str]) -> None:
        for name in _ROWS:
            buffer = buffers_of(self)[name]
            if buffer is not None and name in names and _is_array(buffer):
                use_huge_pages(buffer.numpy())

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read a pickle; an older one has no row_format_ascii."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if FORMAT not in buffers_of(self):
            self.register_buffer(FORMAT, write_format(self.row_format))
        self._received(_ROWS)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise explain_write(self)
        super().__setattr__(name, value)

    @classmethod
    def from_float(
        cls, module: nn.Embedding | nn.EmbeddingBag | nn.Linear, method: str | Method = DEFAULT_METHOD, **options: Any
    ) -> Self:
        """Pack a float module, of the kind that this class is.

        Args:
            module: on the CPU, in any of PyTorch's float types that embpack.quantize takes.
            method: as embpack.quantize takes it.
            **options: others that embpack.quantize takes: bits, param_dtype, rotate.

        Raises:
            TypeError: the module is another one.
            ValueError: the module does what a packed one cannot (max_norm, sparse, scale_grad_by_freq).
        """
        if not isinstance(module, cls.float_class):
            raise TypeError(f"{cls.__name__}.from_float takes an nn.{cls.float_class.__name__}, not {kind_of(module)}")
        return cls.like(module, quantize(module.weight.detach(), method, **options))

    @classmethod
    def like(cls, module: Any, table: Table) -> Self:
        """Make a module of a table, with the options of a float module."""
        return cls._make(table, **{name: getattr(module, name) for name in cls.options})

    @classmethod
    def _make(cls, table: Table, **options: Any) -> Self:
        if not isinstance(table, cls.kinds):
            raise TypeError(f"{cls.__name__}.from_table takes an embpack.PackedTable, not {kind_of(table)}")
        make: Any = cls
        sizes = dict(zip(cls.sizes, table.shape, strict=True))
        with torch.device("meta"):  # no memory for rows that are there already
            module: Self = make(**sizes, **_format(table), dtype=getattr(torch, table.dtype), **options)
        if isinstance(table, DiskTable):
            module._leave_on_disk(table)
            return module
        for name in _ROWS:
            array = getattr(table, name)
            if array is not None:
                setattr(module, name, _as_tensor(array))
        return module

    def _leave_on_disk(self, table: DiskTable) -> None:
        """Have the rows of a table, and no buffers."""
        self.on_disk = table
        for name in (*_ROWS, FORMAT):
            setattr(self, name, None)
        self.register_state_dict_pre_hook(refuse_to_save)  # type: ignore[no-untyped-call]

    def share_rows(self, other: "PackedModule") -> None:
        """Have the tensors of another module's rows, which are the same as this one's, in place of its own.

        So they are one tensor wherever a model is copied, saved or sent.
        """
        for name in _ROWS:
            setattr(self, name, getattr(other, name))

    @property
    def embedding_dim(self) -> int:
        """Values a row."""
        return self.row_format.embedding_dim

    @property
    def rotate_back(self) -> bool:
        """Whether lookups undo a rotation; False leaves values as they were packed (see embpack.rotation.matrix)."""
        return self._rotate_back

    @rotate_back.setter
    def rotate_back(self, value: bool) -> None:
        self._rotate_back = value
        # What operators are told: without a rotation they undo none.
        self._row_format_text = str(self.row_format if value else replace(self.row_format, rotation=None))

    @property
    def table(self) -> PackedTable | DiskTable:
        """The rows as a PackedTable, which shares their memory, or as the DiskTable that the module was made of.

        So lookups of the module see what table.update changes, whatever dtype it returns. Which method packed the rows
        is not kept with them: update has to be told where several make such rows.

        Raises:
            ValueError: rows of another format have been written to the buffers, as torch.distributed.checkpoint does;
                or the module was moved off the CPU.
        """
        name = str(self.dtype).removeprefix("torch.")
        dtype = name if name in ROW_DTYPES else "float32"
        if self.on_disk is not None:
            return replace(self.on_disk, dtype=dtype)
        if self.packed.device.type != "cpu":
            raise ValueError(f"the rows are on {self.packed.device}; a table has them in memory: module.cpu().table")
        check_format(self.row_format_ascii, self.row_format, type(self).__name__)
        return replace(as_table(self.packed, str(self.row_format), self.clusters, self.codebooks), dtype=dtype)

    @property
    def device(self) -> torch.device:
        """Where the rows are looked up."""
        return torch.device("cpu") if self.on_disk is not None else self.packed.device

    @property
    def weight(self) -> Tensor:
        """The rows as the float module's weight: a tensor that unpacks them when it is used, and is not written to.

        Its shape, dtype and device cost nothing (see PackedWeight). In torch.compile and torch.export it is a tensor
        of unpacked rows, which are unpacked only if more of it is used.
        """
        if torch.compiler.is_compiling():
            rows = self._call(torch.ops.embpack.embedding.default, torch.arange(self.num_embeddings))
            return rows.to(self.dtype)
        weight: Tensor = PackedWeight(self)
        return weight

    def unpack(self) -> Tensor:
        """All rows as values of dtype [num_embeddings, embedding_dim], in memory of their own."""
        table = self.table if self.rotate_back else self.table.as_packed
        return dequantize(table, self.dtype)

    def multiply(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        """Do what torch.nn.functional.linear does with this weight.

        Raises:
            ValueError: the rows stay on the disk.
        """
        if self.on_disk is not None:
            raise ValueError(
                "the rows stay on the disk, and a product with them needs all of them: load them with access='mapped'"
            )
        return self._call(torch.ops.embpack.linear.default, input, bias)

    def _call(self, operator: Any, *arguments: Any, **options: Any) -> Tensor:
        """Call an operator with the table's tensors and what is asked of it."""
        if self.on_disk is not None:
            looked_up: Tensor = look_up(self.on_disk, operator, self._row_format_text, *arguments, **options)
            return looked_up
        buffers = buffers_of(self)
        clusters, codebooks = buffers["clusters"], buffers["codebooks"]
        if clusters is not None or codebooks is not None:
            arguments = (*arguments, clusters, codebooks)
        found: Tensor = operator(buffers["packed"], self._row_format_text, *arguments, **options)
        return found

    def _describe_rows(self) -> str:
        row_format = self.row_format
        return (
            f"{row_format.layout}, {row_format.bits} bits, {row_format.param_dtype} parameters"
            + (f", rotation={row_format.rotation!r}" if row_format.rotation else "")
            + ("" if self.rotate_back else ", rotate_back=False")
            + ("" if self.dtype == torch.float32 else f", {self.dtype}")
        )


def _make_zeros(entries: int, entry_bytes: int) -> Tensor:
    """Make rows, or what lies beside them: zeros, in huge pages."""
    room = torch.empty((entries, entry_bytes), dtype=torch.uint8)
    if not _is_array(room):
        return room.zero_()
    ask_for_huge_pages(room.numpy())
    use_huge_pages(room.zero_().numpy())
    return room


def _is_array(tensor: Tensor) -> bool:
    """Whether a tensor is what NumPy has as an array: in this machine's memory, and not one that has no values."""
    return type(tensor) is Tensor and tensor.device.type == "cpu"


def _as_tensor(array: NDArray[Any]) -> Tensor:
    """Make rows, or what lies beside them, a tensor of the same memory: uint8 [entries, bytes of one]."""
    entries = np.ascontiguousarray(array).reshape(len(array), math.prod(array.shape[1:])).view(np.uint8)
    if is_mapped(entries):
        # PyTorch warns of arrays that are read-only. Writing to this one's memory does no harm.
        entries = entries.view()
        entries.flags.writeable = True
    else:
        if not entries.flags.writeable:
            entries = entries.copy()  # PyTorch has no tensors that cannot be written to
        use_huge_pages(entries)
    return torch.from_numpy(entries)


def _format(table: Table) -> dict[str, Any]:
    codebooks = 0 if table.codebooks is None else len(table.codebooks)
    row_format = table.row_format
    return {
        "bits": row_format.bits,
        "param_dtype": row_format.param_dtype,
        "layout": row_format.layout,
        "rotation": row_format.rotation,
        "num_codebooks": codebooks,
    }
