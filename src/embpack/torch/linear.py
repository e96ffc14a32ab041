"""PackedLinear: nn.Linear over packed rows."""

import torch
from torch import Tensor, nn

from embpack.formats.mapped import expect_all_reads
from embpack.layouts import RowFormat
from embpack.lookups import Table
from embpack.torch.arguments import call_as_leaf, check_tensors, map_nested
from embpack.torch.packed_module import PackedModule


class PackedLinear(PackedModule):
    """nn.Linear over packed rows, such as a language model's output layer over its embedding's table.

    One vector is multiplied straight from the packed bytes; for many, a few rows at a time are unpacked into the cache.
    Neither makes a float table.

    Args:
        in_features: values a row.
        out_features: rows, each of which gives one value of the output.
        bias: whether there is one, a parameter.
        bits: of each code, 2, 4 or 8; for the trellis layout any number from 2 to 7, float where it has a fraction.
        param_dtype: "float16" or "float32", of scale and bias or of codebooks; "float32" for the trellis layout.
        layout: "uniform", "codebook", "clustered" or "trellis".
        rotation: what the rows were multiplied by, None or "hadamard".
        rotate_back: whether the rotation is undone; also an attribute, which may be set. Without it, input is to be
            rotated (embpack.rotation.rotate).
        num_codebooks: how many the table has; only for the clustered layout.
        dtype: of the bias and of what weight and to_float return; None is torch.get_default_dtype().

    The rows and the bias are zeros, to be loaded by load_state_dict; from_float and from_table make modules with rows.

    Source: torch.nn.Linear.
    """

    float_class, sizes = nn.Linear, ("out_features", "in_features")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: float = 4,
        param_dtype: str = "float16",
        layout: str = "uniform",
        rotation: str | None = None,
        rotate_back: bool = True,
        num_codebooks: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        row_format = RowFormat(in_features, bits, param_dtype, layout, rotation)
        super().__init__(out_features, row_format, num_codebooks, dtype, rotate_back=rotate_back)
        self.in_features, self.out_features = in_features, out_features
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, dtype=self.dtype)) if bias else None)

    @classmethod
    def from_table(cls, table: Table, bias: Tensor | None = None, *, rotate_back: bool = True) -> "PackedLinear":
        """Make a module of a table, sharing its memory; weight and to_float have values of table.dtype.

        Args:
            table: of out_features rows. Those of a file (embpack.load) stay mapped.
            bias: [out_features], or None for none; an nn.Parameter is the module's own then, another tensor becomes
                one that shares its memory.
            rotate_back: see the class.

        Raises:
            TypeError: table is no PackedTable.
            ValueError: bias has another shape.
        """
        module = cls._make(table, bias=False, rotate_back=rotate_back)
        expect_all_reads(module.packed.numpy())
        if bias is not None:
            if bias.shape != (module.out_features,):
                raise ValueError(f"bias has shape {list(bias.shape)}; the table's rows need [{module.out_features}]")
            module.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return module

    @classmethod
    def like(cls, module: nn.Linear, table: Table) -> "PackedLinear":
        """Make a module of a table, with the bias of a float module, which it then shares."""
        return cls.from_table(table, module.bias)

    def to_float(self) -> nn.Linear:
        """Return nn.Linear with the rows as values of dtype, and the same bias."""
        module = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        module.weight = nn.Parameter(self.unpack(), requires_grad=False)
        module.register_parameter("bias", self.bias)
        return module

    def forward(self, input: Tensor) -> Tensor:
        """Multiply vectors by the rows, and add the bias.

        Args:
            input: float32, bfloat16, float16 or float64 [..., in_features]; it may be a nested tensor. It gets
                gradients by backward() if it requires them, as does the bias.

        Returns:
            input @ weight.T + bias, [..., out_features] of input's type, nested as input is. Products are added up in
            float32, or in float64 if that is input's type.

        Raises:
            NotImplementedError: derivatives in forward mode (torch.func.jvp, jacfwd).
            TypeError: input is of another type.
            ValueError: input has another number of columns.
        """
        proxy = check_tensors(input=input)
        if proxy is not None and proxy.tracer.root is not self:
            return call_as_leaf(proxy, self, input)
        if proxy is None and input.is_nested:
            return map_nested(self, input)
        return self.multiply(input, self.bias)

    def extra_repr(self) -> str:
        """What print shows."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self._describe_rows()}"
