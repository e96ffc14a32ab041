"""Static models of model2vec over packed rows; PyTorch is not needed.

from embpack.model2vec import PackedStaticModel

model = PackedStaticModel.from_float(StaticModel.from_pretrained("my-model"))
model.save_pretrained("my-model-4bit")
model = PackedStaticModel.from_pretrained("my-model-4bit")
"""

import json
from pathlib import Path
from typing import Any

from embpack.errors import MissingExtraError, kind_of
from embpack.files import save
from embpack.formats.new_folder import new_folder
from embpack.methods import DEFAULT_METHOD, Method
from embpack.packed_folder import list_files, list_own
from embpack.packing import quantize
from embpack.static_encoders import (
    MODEL2VEC_TABLE_NAME,
    MODULES_NAME,
    PACKED_NAME,
    TOKENIZER_NAME,
    find_packed,
    list_modules,
    read_encoder,
)
from embpack.table import PackedTable

try:
    from model2vec import StaticModel
    from model2vec.modelcards import get_metadata_from_readme
    from tokenizers import Tokenizer
except ImportError as error:
    raise MissingExtraError("embpack.model2vec", "model2vec", "model2vec") from error

__all__ = ["PackedStaticModel"]

_CARD = """---
{metadata}
---
The table of this static model is packed by embpack. Neither model2vec nor sentence-transformers opens it by itself:

```python
from embpack.model2vec import PackedStaticModel
model = PackedStaticModel.from_pretrained("this folder")

from sentence_transformers import SentenceTransformer
model = SentenceTransformer("this folder", trust_remote_code=True)
```
"""


class PackedStaticModel(StaticModel):
    """model2vec.StaticModel whose embedding is an embpack.PackedTable.

    It encodes as the float model does. Weights and mapping of a quantized vocabulary stay as they are.

    Source: model2vec.StaticModel.
    """

    embedding: PackedTable  # type: ignore[assignment]  # what encoding does with an array, it does with a table

    @classmethod
    def from_float(
        cls, model: StaticModel, method: str | Method = DEFAULT_METHOD, **options: Any
    ) -> "PackedStaticModel":
        """Pack a model.

        Args:
            model: of float32 or float16; it is not changed.
            method: as embpack.quantize takes it.
            **options: others that embpack.quantize takes: bits, param_dtype, rotate.

        Raises:
            TypeError: model is no StaticModel, or its vectors are int8 or float64.
        """
        if not isinstance(model, StaticModel):
            raise TypeError(f"model is {kind_of(model)}; it must be a model2vec.StaticModel")
        table: Any = quantize(model.embedding, method, **options)
        return cls(
            table,
            model.tokenizer,
            config=model.config,
            normalize=model.normalize,
            base_model_name=model.base_model_name,
            language=model.language,
            weights=model.weights,
            token_mapping=model.token_mapping,
            max_length=model.max_length,
        )

    def save_pretrained(self, path: str | Path, model_name: str | None = None, subfolder: str | None = None) -> None:
        """Write the model's folder, whole or not at all.

        Args:
            path: of the folder; one that embpack wrote is replaced.
            model_name: for the model card, which has none here.
            subfolder: a folder in path to write into instead.

        Raises:
            FileExistsError: the folder has files that embpack did not write.
            OSError: it cannot be written.
        """
        folder = Path(path) / (subfolder or "")
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = {"weights": self.weights, "mapping": self.token_mapping}
        card = {"library_name": "embpack", "base_model": self.base_model_name, "language": self.language}
        with new_folder(folder, PACKED_NAME, list_own) as new:
            save(
                new / PACKED_NAME,
                {MODEL2VEC_TABLE_NAME: self.embedding},
                others={name: array for name, array in beside.items() if array is not None},
            )
            self.tokenizer.save(str(new / TOKENIZER_NAME), pretty=False)
            (new / "config.json").write_text(json.dumps(self.config, indent=4))
            (new / MODULES_NAME).write_text(json.dumps(list_modules(normalize=self.normalize), indent=4))
            metadata = "\n".join(f"{key}: {json.dumps(value)}" for key, value in card.items() if value is not None)
            (new / "README.md").write_text(_CARD.format(metadata=metadata))
            list_files(new)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # a packed model is not quantized again, or cut
        cls, path: str | Path, *, normalize: bool | None = None, subfolder: str | None = None
    ) -> "PackedStaticModel":
        """Open what save_pretrained, or embpack quantize with a folder, wrote. The table stays mapped.

        Args:
            path: of the folder, on this machine; what is on the hub gets there by huggingface_hub.snapshot_download.
            normalize: whether vectors have length 1; None is what the folder says.
            subfolder: a folder in path to open instead.

        Raises:
            FileNotFoundError: there is no packed model.
            FormatError: its file is damaged.
        """
        folder = Path(path) / (subfolder or "")
        packed = find_packed(folder)
        table, weights, mapping = read_encoder(packed)
        vectors: Any = table
        config = _read_config(folder)
        card = get_metadata_from_readme(folder / "README.md")
        return cls(
            vectors,
            Tokenizer.from_file(str(packed.with_name(TOKENIZER_NAME))),
            config=config,
            normalize=bool(config.get("normalize", False)) if normalize is None else normalize,
            base_model_name=card.get("base_model"),
            language=card.get("language"),
            weights=weights,
            token_mapping=mapping,
            **{"max_length": config["max_length"]} if "max_length" in config else {},
        )


def _read_config(folder: Path) -> dict[str, Any]:
    """Read model2vec's configuration; a folder of sentence-transformers has its own, with other things."""
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return config
