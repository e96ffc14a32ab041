"""PackedEmbedding and PackedEmbeddingBag: nn.Embedding and nn.EmbeddingBag over packed rows."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from embpack.bags import as_row, check_mode, check_weighted
from embpack.errors import kind_of
from embpack.formats.mapped import is_mapped
from embpack.layouts import RowFormat
from embpack.methods import DEFAULT_METHOD, Method
from embpack.packing import quantize
from embpack.rows import ROW_DTYPES
from embpack.table import PackedTable
from embpack.torch.arguments import call_as_leaf, check_tensors, flatten_nested, map_nested
from embpack.torch.ops import as_table, check_dtype, dequantize
from embpack.torch.private import CastModule, GuardedModule, buffers_of, leave_out_of_ddp
from embpack.torch.state import FORMAT, check_format, receive_state, write_format

# Options of a float module that a packed one cannot have, and why.
UNSUPPORTED = {
    "max_norm": "it rewrites rows while they are looked up; renormalize the weight before packing",
    "sparse": "a packed table has no gradients, sparse or dense; after training, set it to False and pack",
    "scale_grad_by_freq": "a packed table has no gradients to scale; after training, set it to False and pack",
}


class _PackedModule(CastModule, GuardedModule):
    """A packed table as buffers, all uint8, so that .half() and .to(dtype) leave the rows alone.

    load_state_dict raises RuntimeError, also with strict=False, if the rows that it brings are of another format than
    this module's or of other sizes, and leaves the module as it was.

    Attributes:
        dtype: of the values that it returns, as nn.Embedding returns its weight's; .half() and .to(dtype) change it.
        packed: uint8 [num_embeddings, row_bytes].
        clusters: uint8 [num_embeddings, bytes of an entry], the array by row that lies beside the rows, little-endian;
            None if the layout has none.
        codebooks: uint8 [num_codebooks, bytes of a codebook], the array that rows share; None if the layout has none.
        row_format_ascii: uint8 [64], str(row_format) and zeros, which says in a state dict what its bytes mean.
    """

    # The options that it shares with the float module, and that module.
    options: ClassVar[tuple[str, ...]]
    float_class: ClassVar[type[nn.Module]]
    # What the float module has and this one does not do, for those who read it: LoRA in PEFT passes them on.
    max_norm: ClassVar[None] = None
    norm_type: ClassVar[float] = 2.0
    scale_grad_by_freq: ClassVar[bool] = False
    sparse: ClassVar[bool] = False

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
        self.register_buffer("packed", torch.zeros((num_embeddings, row_format.row_bytes), dtype=torch.uint8))
        # Before those that may be None: torch.export counts None as a buffer where it looks for a later one.
        self.register_buffer(FORMAT, write_format(row_format))
        beside = {spec.name: spec for spec in row_format.form.beside(num_embeddings, num_codebooks)}
        for name in ("clusters", "codebooks"):
            spec = beside.get(name)
            zeros = None if spec is None else torch.zeros((spec.known_shape[0], spec.entry_bytes), dtype=torch.uint8)
            self.register_buffer(name, zeros)

    def _receive(self, state: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        return receive_state(state, buffers_of(self), self.row_format, prefix, prefix[:-1] or type(self).__name__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read a pickle; an older one has no row_format_ascii."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if FORMAT not in buffers_of(self):
            self.register_buffer(FORMAT, write_format(self.row_format))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "padding_idx" and value is not None:
            value = as_row(value, self.num_embeddings)
        super().__setattr__(name, value)

    @classmethod
    def from_float(
        cls, module: nn.Embedding | nn.EmbeddingBag, method: str | Method = DEFAULT_METHOD, **options: Any
    ) -> Self:
        """Pack a float module, nn.Embedding or nn.EmbeddingBag as this class is.

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
        check_supported(module, "the module")
        return cls.like(module, quantize(module.weight.detach(), method, **options))

    @classmethod
    def like(cls, module: nn.Embedding | nn.EmbeddingBag, table: PackedTable) -> Self:
        """Make a module of a table, with the options of a float module."""
        return cls._make(table, **{name: getattr(module, name) for name in cls.options})

    @classmethod
    def _make(cls, table: PackedTable, **options: Any) -> Self:
        if not isinstance(table, PackedTable):
            raise TypeError(f"{cls.__name__}.from_table takes an embpack.PackedTable, not {kind_of(table)}")
        make: Any = cls
        with torch.device("meta"):  # no memory for rows that are there already
            module: Self = make(*table.shape, **_format(table), dtype=getattr(torch, table.dtype), **options)
        return module._adopt(table)

    def _adopt(self, table: PackedTable) -> Self:
        for name in ("packed", "clusters", "codebooks"):
            array = getattr(table, name)
            if array is not None:
                setattr(self, name, _as_tensor(array))
        return self

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
    def table(self) -> PackedTable:
        """The rows as a PackedTable, which shares their memory.

        Raises:
            ValueError: rows of another format have been written to the buffers, as torch.distributed.checkpoint does.
        """
        check_format(self.row_format_ascii, self.row_format, type(self).__name__)
        name = str(self.dtype).removeprefix("torch.")
        table = as_table(self.packed, str(self.row_format), self.clusters, self.codebooks)
        return replace(table, dtype=name if name in ROW_DTYPES else "float32")

    def _float_weight(self) -> Tensor:
        table = self.table if self.rotate_back else self.table.as_packed
        return dequantize(table, self.dtype)

    def _look_up(self, operator: Any, *lookup: Any, **options: Any) -> Tensor:
        """Call an operator with the table's tensors and what is looked up in it."""
        buffers = buffers_of(self)
        clusters, codebooks = buffers["clusters"], buffers["codebooks"]
        if clusters is not None or codebooks is not None:
            lookup = (*lookup, clusters, codebooks)
        if self.dtype != torch.float32:
            options["dtype"] = self.dtype
        found: Tensor = operator(buffers["packed"], self._row_format_text, *lookup, **options)
        return found

    def _describe(self) -> str:
        row_format = self.row_format
        return (
            f"{self.num_embeddings}, {row_format.embedding_dim}, {row_format.layout}, {row_format.bits} bits, "
            f"{row_format.param_dtype} parameters"
            + (f", rotation={row_format.rotation!r}" if row_format.rotation else "")
            + ("" if self.rotate_back else ", rotate_back=False")
            + ("" if self.dtype == torch.float32 else f", {self.dtype}")
        )


class PackedEmbedding(_PackedModule):
    """nn.Embedding over packed rows.

    Args:
        num_embeddings: rows.
        embedding_dim: values a row.
        bits: of each code, 2, 4 or 8; for the trellis layout any number from 2 to 7, float where it has a fraction.
        param_dtype: "float16" or "float32", of scale and bias or of codebooks; "float32" for the trellis layout.
        layout: "uniform", "codebook", "clustered" or "trellis".
        rotation: what the rows were multiplied by, None or "hadamard".
        rotate_back: whether lookups undo the rotation; also an attribute, which may be set.
        num_codebooks: how many the table has; only for the clustered layout.
        padding_idx: kept as an attribute; its row is looked up like any other, as nn.Embedding does.
        dtype: of the values that it returns; None is torch.get_default_dtype().

    The rows are zeros, to be loaded by load_state_dict; from_float and from_table make modules with rows.

    Source: torch.nn.Embedding.
    """

    options, float_class = ("padding_idx",), nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        bits: float = 4,
        param_dtype: str = "float16",
        layout: str = "uniform",
        rotation: str | None = None,
        rotate_back: bool = True,
        num_codebooks: int = 0,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        row_format = RowFormat(embedding_dim, bits, param_dtype, layout, rotation)
        super().__init__(num_embeddings, row_format, num_codebooks, dtype, rotate_back=rotate_back)
        self.padding_idx = padding_idx

    @classmethod
    def from_table(
        cls, table: PackedTable, *, padding_idx: int | None = None, rotate_back: bool = True
    ) -> "PackedEmbedding":
        """Make a module of a table, sharing its memory; it returns values of table.dtype.

        The rows of a file (embpack.load) stay mapped. What is written to them, as by load_state_dict, stays in this
        process and does not reach the file.

        Raises:
            TypeError: table is no PackedTable.
        """
        return cls._make(table, padding_idx=padding_idx, rotate_back=rotate_back)

    def to_float(self) -> nn.Embedding:
        """Return nn.Embedding with the rows as values of dtype."""
        make: Any = nn.Embedding.from_pretrained  # which has no types
        module: nn.Embedding = make(self._float_weight(), padding_idx=self.padding_idx)
        return module

    def forward(self, input: Tensor) -> Tensor:
        """Look rows up.

        Args:
            input: int32 or int64 of any shape [...], each in [0, num_embeddings); it may be a nested tensor.

        Returns:
            Values of dtype [..., embedding_dim]; nested as input is.

        Raises:
            IndexError: an index is out of range; names its position and value.
            TypeError: input is of another type.
        """
        proxy = check_tensors(input=input)
        if proxy is not None and proxy.tracer.root is not self:
            return call_as_leaf(proxy, self, input)
        if proxy is None and input.is_nested:
            return map_nested(self, input)
        return self._look_up(torch.ops.embpack.embedding.default, input)

    def extra_repr(self) -> str:
        """What print shows."""
        return self._describe() + ("" if self.padding_idx is None else f", padding_idx={self.padding_idx}")


class PackedEmbeddingBag(_PackedModule):
    """nn.EmbeddingBag over packed rows.

    Args:
        num_embeddings: rows.
        embedding_dim: values a row.
        mode: "mean", the default as in nn.EmbeddingBag, "sum" or "max".
        bits: of each code, 2, 4 or 8; for the trellis layout any number from 2 to 7, float where it has a fraction.
        param_dtype: "float16" or "float32", of scale and bias or of codebooks; "float32" for the trellis layout.
        layout: "uniform", "codebook", "clustered" or "trellis".
        rotation: what the rows were multiplied by, None or "hadamard".
        rotate_back: whether lookups undo the rotation; also an attribute, which may be set.
        num_codebooks: how many the table has; only for the clustered layout.
        include_last_offset: whether offsets end with where the last bag ends.
        padding_idx: rows of this index are left out, of a mean's count too.
        dtype: of the values that it returns; None is torch.get_default_dtype().

    The rows are zeros, to be loaded by load_state_dict; from_float and from_table make modules with rows. Mode "mean"
    returns means, where PyTorch's own quantized module returns sums.

    Source: torch.nn.EmbeddingBag.
    """

    options, float_class = ("mode", "include_last_offset", "padding_idx"), nn.EmbeddingBag

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        mode: str = "mean",
        bits: float = 4,
        param_dtype: str = "float16",
        layout: str = "uniform",
        rotation: str | None = None,
        rotate_back: bool = True,
        num_codebooks: int = 0,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        row_format = RowFormat(embedding_dim, bits, param_dtype, layout, rotation)
        super().__init__(num_embeddings, row_format, num_codebooks, dtype, rotate_back=rotate_back)
        check_mode(mode)
        self.mode = mode
        self.include_last_offset = include_last_offset
        self.padding_idx = padding_idx

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("mode", "padding_idx", "_row_format_text"):
            known = self.__dict__
            # So that a collection of many modules compares one attribute of each to see whether any has changed.
            self._use = (self._row_format_text, known.get("mode"), known.get("padding_idx"))

    @classmethod
    def from_table(
        cls,
        table: PackedTable,
        *,
        mode: str = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        rotate_back: bool = True,
    ) -> "PackedEmbeddingBag":
        """Make a module of a table, sharing its memory; it returns values of table.dtype.

        The rows of a file (embpack.load) stay mapped. What is written to them, as by load_state_dict, stays in this
        process and does not reach the file.

        Raises:
            TypeError: table is no PackedTable.
        """
        return cls._make(
            table,
            mode=mode,
            include_last_offset=include_last_offset,
            padding_idx=padding_idx,
            rotate_back=rotate_back,
        )

    def to_float(self) -> nn.EmbeddingBag:
        """Return nn.EmbeddingBag with the rows as values of dtype."""
        return nn.EmbeddingBag.from_pretrained(
            self._float_weight(),
            mode=self.mode,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Pool bags of rows.

        Args:
            input: int32 or int64, each in [0, num_embeddings): 1-D [L] with offsets, or 2-D [B, n] for B bags of n, or
                for bags of several sizes a nested tensor of layout torch.jagged.
            offsets: int32 or int64 [B], non-decreasing from 0: where each bag starts in 1-D input; with
                include_last_offset [B + 1].
            per_sample_weights: float32 or of dtype, shaped like input; only in mode "sum". They get gradients by
                backward() if they require them.

        Returns:
            Values of dtype [B, embedding_dim], rounded from float32 sums; an empty bag is zeros.

        Raises:
            IndexError: an index is out of range; names its position and value.
            NotImplementedError: per_sample_weights in forward mode (torch.func.jvp, jacfwd).
            TypeError: an argument is of another type.
            ValueError: the arguments do not go together.
        """
        proxy = check_tensors(input=input, offsets=offsets, per_sample_weights=per_sample_weights)
        if proxy is not None and proxy.tracer.root is not self:
            return call_as_leaf(proxy, self, input, offsets, per_sample_weights)
        include_last_offset = self.include_last_offset
        if proxy is None and input.is_nested:
            input, offsets, per_sample_weights = flatten_nested(input, offsets, per_sample_weights)
            include_last_offset = True
        pool: Any = torch.ops.embpack.embedding_bag.default
        how: str | Tensor = self.mode
        if per_sample_weights is not None:
            if proxy is not None:  # whether there are weights, which have an operator of their own, is not known yet
                raise ValueError(
                    "torch.fx traces a PackedEmbeddingBag by itself only without weights: "
                    "concrete_args={'per_sample_weights': None}; or put it into a model: torch.nn.Sequential(module)"
                )
            check_weighted(self.mode)
            if per_sample_weights.dtype == self.dtype:
                per_sample_weights = per_sample_weights.float()
            pool, how = torch.ops.embpack.embedding_bag.weighted, per_sample_weights
        options: dict[str, Any] = {}  # those that are not the defaults: each takes a third of a microsecond to pass
        if include_last_offset:
            options["include_last_offset"] = True
        if self.padding_idx is not None:
            options["padding_idx"] = self.padding_idx
        return self._look_up(pool, input, offsets, how, **options)

    def extra_repr(self) -> str:
        """What print shows."""
        last = ", include_last_offset=True" if self.include_last_offset else ""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self._describe()}, mode={self.mode!r}{last}{padding}"


def leave_tables_out_of_ddp(model: nn.Module) -> None:
    """Let DistributedDataParallel leave the packed tables of a model as each process has them.

    Otherwise it sends all buffers to the other processes when it is made and at every step, which takes time, and
    unmaps there what was mapped from a file. quantize_ and load_checkpoint do this to the model that they are given.

    Args:
        model: what DistributedDataParallel is to get, itself and not a part of it, with its tables in it. Each process
            must have the same tables.
    """
    modules = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _PackedModule)
    ]
    leave_out_of_ddp(model, [f"{name}.{buffer}" for name, module in modules for buffer in buffers_of(module)])


def _as_tensor(array: NDArray[Any]) -> Tensor:
    """Make rows, or what lies beside them, a tensor of the same memory: uint8 [entries, bytes of one]."""
    entries = np.ascontiguousarray(array).reshape(len(array), math.prod(array.shape[1:])).view(np.uint8)
    if is_mapped(entries):
        # PyTorch warns of arrays that are read-only. Writing to this one's memory does no harm.
        entries = entries.view()
        entries.flags.writeable = True
    elif not entries.flags.writeable:
        entries = entries.copy()  # PyTorch has no tensors that cannot be written to
    return torch.from_numpy(entries)


def _format(table: PackedTable) -> dict[str, Any]:
    codebooks = 0 if table.codebooks is None else len(table.codebooks)
    row_format = table.row_format
    return {
        "bits": row_format.bits,
        "param_dtype": row_format.param_dtype,
        "layout": row_format.layout,
        "rotation": row_format.rotation,
        "num_codebooks": codebooks,
    }


def check_supported(module: nn.Embedding | nn.EmbeddingBag, name: str) -> None:
    """Raise ValueError if a module does what a packed one cannot."""
    for option, reason in UNSUPPORTED.items():
        if getattr(module, option):
            raise ValueError(f"{name} has {option}={getattr(module, option)}: {reason}")
