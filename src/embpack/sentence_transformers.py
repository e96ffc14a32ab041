"""Static encoders of sentence-transformers over packed rows.

quantize_ makes a StaticEmbedding a PackedStaticEmbedding, which saves and opens itself:

    from embpack.torch import quantize_

    quantize_(model)
    model.save_pretrained("my-model-4bit")
    model = SentenceTransformer("my-model-4bit", trust_remote_code=True)  # the remote code is embpack's, installed here
"""

from pathlib import Path
from typing import Any, Self

from embpack.errors import FormatError, MissingExtraError
from embpack.files import save
from embpack.static_encoders import PACKED_NAME, TABLE_NAME, TOKENIZER_NAME, read_encoder

try:
    import torch
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
except ImportError as error:
    raise MissingExtraError(
        "embpack.sentence_transformers", "sentence-transformers", "sentence-transformers"
    ) from error

from embpack.torch.modules import PackedEmbeddingBag

__all__ = ["PackedStaticEmbedding"]


class PackedStaticEmbedding(StaticEmbedding):
    """StaticEmbedding whose embedding is a PackedEmbeddingBag; quantize_ and SentenceTransformer make it.

    Its vectors are means of packed rows. A saved one cannot be taken for floats: modules.json names this class, and the
    table is in model.embpack.safetensors.

    Source: sentence_transformers.sentence_transformer.modules.StaticEmbedding.
    """

    embedding: PackedEmbeddingBag  # type: ignore[assignment]  # it is called as nn.EmbeddingBag is

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write table and tokenizer into a folder, as SentenceTransformer.save_pretrained asks for it."""
        folder = Path(output_path)
        table: Any = self.embedding.table
        save(folder / PACKED_NAME, {TABLE_NAME: table})
        self.tokenizer.save(str(folder / TOKENIZER_NAME))

    @classmethod
    def load(  # type: ignore[override]  # StaticEmbedding has this signature, its own base class another
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Open what save, or embpack quantize, wrote. The table stays mapped.

        Args:
            model_name_or_path: a folder, or a model's name on the hub.
            subfolder: folder in it that has the files.
            token: as StaticEmbedding.load takes it.
            cache_folder: the same.
            revision: the same.
            local_files_only: the same.
            **kwargs: the same; none of it counts here.

        Raises:
            FileNotFoundError: there is no packed table, or no tokenizer.
            FormatError: the table's file is damaged, or is of a vocabulary quantized by model2vec, which
                embpack.model2vec.PackedStaticModel opens.
        """
        where = (subfolder, token, cache_folder, revision, local_files_only)
        files = []
        for name in (PACKED_NAME, TOKENIZER_NAME):
            path = cls.load_file_path(model_name_or_path, name, *where)
            if path is None:
                raise FileNotFoundError(f"{Path(model_name_or_path, subfolder)}: there is no {name}")
            files.append(path)
        packed, tokenizer = files
        table, *beside = read_encoder(Path(packed))
        if any(array is not None for array in beside):
            raise FormatError(
                f"{packed}: its tokens have weights or share rows, which StaticEmbedding cannot do; open it by "
                "embpack.model2vec.PackedStaticModel.from_pretrained"
            )
        with torch.device("meta"):  # no memory for floats
            module = cls(Tokenizer.from_file(tokenizer), embedding_dim=table.embedding_dim)
        module.embedding = PackedEmbeddingBag.from_table(table)
        module.num_embeddings = table.num_embeddings
        return module
