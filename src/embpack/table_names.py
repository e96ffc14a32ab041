"""What parameters are called that are embedding tables."""

import re

_EMBEDDING_WORDS = {"embedding", "embeddings", "embed", "embeds", "emb", "embs", "embeddingbag", "wte", "wpe"}
# After a first word such as "embed" or "embedding": what a table holds, never what a layer does.
_ITEM_WORDS = {
    *("token", "tokens", "word", "words", "position", "positions", "segment", "segments", "type", "types"),
    *(
        "user",
        "users",
        "item",
        "items",
        "id",
        "ids",
        "feature",
        "features",
        "category",
        "categories",
        "field",
    ),
    *("bag", "bags", "table", "tables", "entity", "entities", "relation", "relations", "l"),
}
# The tokens of T5 and BART: a name that says embedding nowhere.
_SHARED = (["shared"], ["model", "shared"])


def says_embedding(name: str) -> bool:
    """Whether a parameter's name says that it is an embedding table.

    The name before ``.weight``, numbers left out, must end with a word for embedding ("word_embeddings", "wte",
    "user_emb"), or begin with one and go on with what is embedded ("embed_tokens", "embedding_user", "emb_l");
    or the parameter lies in an ``embedding_bags`` module (TorchRec), or is T5's ``shared``. Layers that only work on
    embeddings ("embed_proj", "embedding_hidden_mapping_in", "time_embedding.linear_1") do not match.
    """
    parts = [part for part in name.split(".") if not part.isdigit()]
    if parts and parts[-1] == "weight":
        parts = parts[:-1]
    if parts in _SHARED or (len(parts) > 1 and parts[-2] == "embedding_bags"):
        return True
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", parts[-1]) if parts else ""
    words = [word for word in re.split(r"[^a-z]+", spaced.lower()) if word]
    if not words:
        return False
    if words[-1] in _EMBEDDING_WORDS:
        return True
    return words[0] in _EMBEDDING_WORDS and all(word in _ITEM_WORDS for word in words[1:])
