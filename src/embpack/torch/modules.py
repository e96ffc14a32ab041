"""PackedEmbedding and PackedEmbeddingBag: nn.Embedding and nn.EmbeddingBag over packed rows."""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from embpack.bags import as_row, check_mode, check_weighted
from embpack.disk import DiskTable
from embpack.layouts import RowFormat
from embpack.lookups import Table
from embpack.table import PackedTable
from embpack.torch.arguments import call_as_leaf, check_tensors, flatten_nested, map_nested
from embpack.torch.packed_module import PackedModule
from embpack.torch.private import buffers_of, leave_out_of_ddp

# Options of a float module that a packed one cannot have, and why.
UNSUPPORTED = {
    "max_norm": "it rewrites rows while they are looked up; renormalize the weight before packing",
    "sparse": "a packed table has no gradients, sparse or dense; after training, set it to False and pack",
    "scale_grad_by_freq": "a packed table has no gradients to scale; after training, set it to False and pack",
}

_POOL: Any = torch.ops.embpack.embedding_bag.default


class _PackedLookup(PackedModule):
    """Rows of a table that are looked up."""

    kinds: ClassVar[tuple[type, ...]] = (PackedTable, DiskTable)
    # What the float module has and this one does not do, for those who read it: LoRA in PEFT passes them on.
    max_norm: ClassVar[None] = None
    norm_type: ClassVar[float] = 2.0
    scale_grad_by_freq: ClassVar[bool] = False
    sparse: ClassVar[bool] = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "padding_idx" and value is not None:
            value = as_row(value, self.num_embeddings)
        super().__setattr__(name, value)

    @classmethod
    def like(cls, module: nn.Embedding | nn.EmbeddingBag, table: Table) -> Self:
        """Make a module of a table, with the options of a float module."""
        check_supported(module, "the module")
        return super().like(module, table)

    def _look_up(self, operator: Any, *lookup: Any, **options: Any) -> Tensor:
        if self.dtype != torch.float32:
            options["dtype"] = self.dtype
        return self._call(operator, *lookup, **options)

    def _describe(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._describe_rows()}"


class PackedEmbedding(_PackedLookup):
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
        cls, table: PackedTable | DiskTable, *, padding_idx: int | None = None, rotate_back: bool = True
    ) -> "PackedEmbedding":
        """Make a module of a table, sharing its memory; it returns values of table.dtype.

        The rows of a file (embpack.load) stay mapped, or on the disk. What is written to mapped ones, as by
        load_state_dict, stays in this process and does not reach the file.

        Raises:
            TypeError: table is neither a PackedTable nor a DiskTable.
        """
        return cls._make(table, padding_idx=padding_idx, rotate_back=rotate_back)

    def to_float(self) -> nn.Embedding:
        """Return nn.Embedding with the rows as values of dtype."""
        make: Any = nn.Embedding.from_pretrained  # which has no types
        module: nn.Embedding = make(self.unpack(), padding_idx=self.padding_idx)
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


class PackedEmbeddingBag(_PackedLookup):
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
        table: PackedTable | DiskTable,
        *,
        mode: str = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        rotate_back: bool = True,
    ) -> "PackedEmbeddingBag":
        """Make a module of a table, sharing its memory; it returns values of table.dtype.

        The rows of a file (embpack.load) stay mapped, or on the disk. What is written to mapped ones, as by
        load_state_dict, stays in this process and does not reach the file.

        Raises:
            TypeError: table is neither a PackedTable nor a DiskTable.
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
            self.unpack(),
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
        include_last_offset = self.include_last_offset
        # What most calls are, for which isinstance would take a fifth of the time: PyTorch has one of its own.
        if type(input) is Tensor and (offsets is None or type(offsets) is Tensor) and per_sample_weights is None:
            if not input.is_nested:
                return self._pool(_POOL, input, offsets, self.mode, include_last_offset)
        proxy = check_tensors(input=input, offsets=offsets, per_sample_weights=per_sample_weights)
        if proxy is not None and proxy.tracer.root is not self:
            return call_as_leaf(proxy, self, input, offsets, per_sample_weights)
        if proxy is None and input.is_nested:
            input, offsets, per_sample_weights = flatten_nested(input, offsets, per_sample_weights)
            include_last_offset = True
        pool = _POOL
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
        return self._pool(pool, input, offsets, how, include_last_offset)

    def pool_as_float32(self, input: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
        """Do what forward does with plain tensors, offsets with the last and float32 weights, and round nothing."""
        how: str | Tensor = self.mode if weights is None else weights
        operator = _POOL if weights is None else torch.ops.embpack.embedding_bag.weighted
        padding = {} if self.padding_idx is None else {"padding_idx": self.padding_idx}
        return self._call(operator, input, offsets, how, include_last_offset=offsets is not None, **padding)

    def _pool(
        self, operator: Any, input: Tensor, offsets: Tensor | None, how: str | Tensor, include_last_offset: bool
    ) -> Tensor:
        options: dict[str, Any] = {}  # those that are not the defaults: each takes a third of a microsecond to pass
        if include_last_offset:
            options["include_last_offset"] = True
        if self.padding_idx is not None:
            options["padding_idx"] = self.padding_idx
        return self._look_up(operator, input, offsets, how, **options)

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
    leave_out_of_ddp(model, tables_of(model))


def tables_of(model: nn.Module) -> set[str]:
    """Names of the buffers of a model that are packed tables, and say how they are read."""
    return {
        f"{name}.{buffer}" if name else buffer
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PackedModule)
        for buffer in buffers_of(module)
    }


def check_supported(module: nn.Embedding | nn.EmbeddingBag, name: str) -> None:
    """Raise ValueError if a module does what a packed one cannot."""
    for option, reason in UNSUPPORTED.items():
        if getattr(module, option):
            raise ValueError(f"{name} has {option}={getattr(module, option)}: {reason}")
