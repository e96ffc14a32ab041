"""Folders of static sentence encoders: the packed table in them, and the class that opens it.

sentence-transformers opens each module of a folder by the class that modules.json names. A packed folder names
embpack's, and its table lies in a file that neither sentence-transformers nor model2vec looks for: neither takes packed
bytes for vectors.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from embpack.errors import FormatError
from embpack.packed_files import open_packed
from embpack.table import PackedTable

MODULES_NAME, TOKENIZER_NAME = "modules.json", "tokenizer.json"
PACKED_NAME = "model.embpack.safetensors"
TABLE_NAME, MODEL2VEC_TABLE_NAME = "embedding.weight", "embeddings"
# Where in a folder the file may be: older releases of sentence-transformers keep the module in a folder of its own.
PLACES = ("", "0_StaticEmbedding")
_FLOAT_CLASS = "sentence_transformers.models.StaticEmbedding"
_PACKED_CLASS = "embpack.sentence_transformers.PackedStaticEmbedding"


def point_to_packed(modules: bytes, place: str) -> bytes:
    """Make the modules.json of a packed folder.

    Args:
        modules: that of the folder which is packed.
        place: the folder in it that has the checkpoint, "." for itself.
    """
    return _point(modules, place, "StaticEmbedding", _PACKED_CLASS)


def point_to_float(modules: bytes, place: str) -> bytes:
    """Undo point_to_packed."""
    return _point(modules, place, "PackedStaticEmbedding", _FLOAT_CLASS)


def _point(content: bytes, place: str, kind: str, new: str) -> bytes:
    try:
        modules = json.loads(content)
        own = [
            module
            for module in modules
            if (module["path"] or ".") == place and module["type"].rpartition(".")[2] == kind
        ]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return content  # what cannot be read is copied as it is
    for module in own:
        module["type"] = new
    return json.dumps(modules, indent=2).encode() if own else content


def list_modules(*, normalize: bool) -> list[dict[str, Any]]:
    """Make the modules of a folder with a packed table in it, for modules.json."""
    types = [("", _PACKED_CLASS)]
    if normalize:
        types.append(("1_Normalize", "sentence_transformers.models.Normalize"))
    return [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(types)]


class Encoder(NamedTuple):
    """A packed static encoder's table, and what model2vec has beside it if the vocabulary is quantized, or None.

    Attributes:
        table: the vectors, mapped.
        weights: floats [tokens], what each token's row is multiplied by.
        mapping: integers [tokens], the row of each token.
    """

    table: PackedTable
    weights: NDArray[Any] | None
    mapping: NDArray[Any] | None


def find_packed(folder: Path) -> Path:
    """Find the packed file of a static encoder's folder.

    Raises:
        FileNotFoundError: there is none.
    """
    for place in PLACES:
        if (folder / place / PACKED_NAME).is_file():
            return folder / place / PACKED_NAME
    raise FileNotFoundError(
        f"{folder}: there is no {PACKED_NAME}, so this is no packed static encoder; pack a model's folder: "
        "embpack quantize FOLDER PACKED_FOLDER"
    )


def read_encoder(path: Path) -> Encoder:
    """Open a static encoder's packed file.

    Raises:
        FormatError: it is damaged, or of another model.
    """
    with open_packed(path) as packed:
        names = [name for name in packed.tables if name in (TABLE_NAME, MODEL2VEC_TABLE_NAME)]
        if len(names) != 1:
            raise FormatError(
                f"{path}: the packed tables are {', '.join(packed.tables)}; a static encoder has one, {TABLE_NAME} or "
                f"{MODEL2VEC_TABLE_NAME}"
            )
        weights, mapping = (
            packed.others[name].whole(mapped=False) if name in packed.others else None
            for name in ("weights", "mapping")
        )
        return Encoder(packed.tables[names[0]].open(), weights, mapping)
