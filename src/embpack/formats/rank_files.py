"""Names of the files that processes save together: of torch.distributed.checkpoint, and of its Hugging Face writer."""

import re
from pathlib import Path

METADATA_NAME = ".metadata"
_RANK_METADATA = re.compile(r"__(\d+)\.metadata")
_PIECES = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")


def is_metadata(path: Path) -> bool:
    """Whether a file has the name of what says what lies in a folder of torch.distributed.checkpoint."""
    return path.name == METADATA_NAME or _RANK_METADATA.fullmatch(path.name) is not None


def list_metadata(folder: Path) -> list[Path]:
    """List a checkpoint's metadata: one file, or one for each process that saved without asking the others."""
    if (folder / METADATA_NAME).is_file():
        return [folder / METADATA_NAME]
    ranks = ((match, path) for path in folder.iterdir() if (match := _RANK_METADATA.fullmatch(path.name)))
    return [path for _, path in sorted((int(match[1]), path) for match, path in ranks if path.is_file())]


def has_pieces(path: Path) -> bool:
    """Whether a file has the name of a safetensors file with one process's pieces of tensors."""
    return _PIECES.fullmatch(path.name) is not None


def list_pieces(folder: Path) -> list[Path]:
    """List the files of a folder that has_pieces is true of, in the order of processes."""
    return sorted(path for path in folder.iterdir() if has_pieces(path) and path.is_file())
