"""Who else reads packed rows as they are: the rules that the bridges refuse by, and the command line beforehand."""

from embpack.layouts import RowFormat

# By what users call it, what it is.
READER_TITLES = {
    "torch": "PyTorch",  # torch.ops.quantized.embedding_bag_4bit_rowwise_offsets, _2bit_ and _byte_
    "fbgemm": "FBGEMM",  # IntNBitTableBatchedEmbeddingBagsCodegen, by embpack.fbgemm
    "torchrec": "TorchRec",  # its quantized collections, by embpack.torchrec
    "onnx": "ONNX Runtime",  # standard operators, by embpack.onnx
}
READERS: tuple[str, ...] = tuple(READER_TITLES)

# Those that embpack.onnx has a graph for.
_ONNX_LAYOUTS = ("uniform", "codebook", "clustered")


def find_readers(row_format: RowFormat) -> tuple[str, ...]:
    """Find who else reads such rows as they are; embpack reads all rows, and is not among READERS.

    Args:
        row_format: of the rows.

    Returns:
        Names in READERS, in that order.
    """
    return tuple(reader for reader in READERS if explain_unread(row_format, reader) is None)


def explain_unread(row_format: RowFormat, reader: str) -> str | None:
    """Say why a reader cannot take such rows as they are, and what to do; None if it can.

    Args:
        row_format: of the rows.
        reader: a name in READERS.

    Returns:
        What follows the name of a table: "has float32 parameters, but FBGEMM reads float16 ones at 8 bits; pack ...".

    Raises:
        ValueError: there is no such reader.
    """
    check_reader(reader)
    return _explain_onnx(row_format) if reader == "onnx" else _explain_fused(row_format, reader)


def check_reader(reader: str) -> None:
    """Raise ValueError unless there is such a reader."""
    if reader not in READER_TITLES:
        raise ValueError(f"there is no reader {reader!r}; choose one of {', '.join(READERS)}")


def _explain_onnx(row_format: RowFormat) -> str | None:
    if row_format.layout in _ONNX_LAYOUTS:
        return None
    return (
        f"has rows of the {row_format.layout} layout, which has no ONNX operators; pack its weights with a method of "
        "another layout, 'optimal' or 'kmeans'"
    )


def _explain_fused(row_format: RowFormat, reader: str) -> str | None:
    """Explain for readers of fused rows: codes, then scale and bias.

    FBGEMM's table-batched embeddings, and TorchRec by them, have float16 scales and biases; PyTorch's operators have
    float32 ones at 8 bits. All have rows of whole bytes of codes: they would take padding for values.
    """
    title, bits = READER_TITLES[reader], row_format.bits
    if row_format.rotation is not None:
        return f"has rotation {row_format.rotation!r}, which {title} would not undo; pack its weights without rotate"
    if not row_format.form.has_scale_and_bias:
        return (
            f"has rows of the {row_format.layout} layout, but {title} reads uniform ones only; pack its weights with "
            "such a method, 'greedy' or 'asym'"
        )
    param_dtype = "float32" if reader == "torch" and bits == 8 else "float16"
    if row_format.param_dtype != param_dtype:
        return (
            f"has {row_format.param_dtype} parameters, but {title} reads {param_dtype} ones at {bits} bits; pack its "
            f"weights with param_dtype={param_dtype!r}"
        )
    codes_a_byte = 8 // bits
    if row_format.embedding_dim % codes_a_byte:
        return (
            f"has embedding_dim {row_format.embedding_dim}, but {title} takes multiples of {codes_a_byte} at {bits} "
            "bits; append columns to its weights before packing them"
        )
    return None
