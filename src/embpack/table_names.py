"""What parameters are called that are embedding tables."""

import re

_EMBEDDING_WORDS = {
    *("embedding", "embeddings", "embed", "embeds", "embd", "emb", "embs", "embeddingbag", "wte", "wpe"),
    "embedders",  # a list of them: of "embedder" alone most are layers, such as those of diffusion models
}
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
# Of layers, whatever else their names say: of pictures' patches, which are multiplied, not looked up, too.
_LAYER_WORDS = {
    *("norm", "layernorm", "rmsnorm", "proj", "projs", "projection", "linear", "dense", "fc", "mlp", "conv"),
    *("transform", "transformation", "patch", "patches"),
}
# With a number behind, the layers of a diffusion model: "time_embed.0", "label_emb.0.0".
_SEQUENCES = {"time", "timestep", "label"}
# The tokens of T5 and BART: a name that says embedding nowhere.
_SHARED = (["shared"], ["model", "shared"])
# TorchRec's modules, whose tables are called as their users like.
_COLLECTIONS = ("embedding_bags", "embeddings")
# What an optimizer keeps of parameters has their shapes, and names made of theirs: where that lies, by parts of its
# names, and what it is called where it lies by a parameter's name.
_OPTIMIZERS = {"optimizer", "optimizers", "optim", "optimizer_state_dict", "optimizer_states", "param_groups"}
_OPTIMIZER_VALUES = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "momentum", "momentum1", "momentum2"),
    *("sum", "square_avg", "grad_avg", "acc_delta", "step", "row_counter", "prev_iter", "master_param"),
}


def says_embedding(name: str) -> bool:
    """Whether a parameter's name says that it is an embedding table.

    The name before ``.weight``, numbers left out, must end with a word for embedding ("word_embeddings", "wte",
    "user_emb", "token_embd"), or begin with one and go on with what is embedded ("embed_tokens", "embedding_user",
    "emb_l"), for each layer or not ("embed_tokens_per_layer"); or the parameter is a ``.weight`` in an
    ``embedding_bags`` or ``embeddings`` module (TorchRec), or T5's ``shared``. Layers that only work on embeddings
    ("embed_proj", "embedding_hidden_mapping_in", "time_embedding.linear_1", "time_embed.0", "patch_embedding") do not
    match, nor does what an optimizer keeps ("state.emb.weight.exp_avg").
    """
    parts = [part for part in name.split(".") if not part.isdigit()]
    if is_optimizer_state(name):
        return False
    is_weight = bool(parts) and parts[-1] == "weight"
    parts = parts[:-1] if is_weight else parts
    if parts in _SHARED:
        return True
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", parts[-1]) if parts else ""
    words = [word for word in re.split(r"[^a-z]+", spaced.lower()) if word]
    is_numbered = name.removesuffix(".weight").rpartition(".")[2].isdigit()
    if not words or _LAYER_WORDS & set(words) or (is_numbered and words[0] in _SEQUENCES):
        return False
    if is_weight and len(parts) > 1 and parts[-2] in _COLLECTIONS:
        return True
    words = words[:-2] if words[-2:] == ["per", "layer"] else words
    if words[-1:] and words[-1] in _EMBEDDING_WORDS:
        return True
    return bool(words) and words[0] in _EMBEDDING_WORDS and all(word in _ITEM_WORDS for word in words[1:])


def is_optimizer_state(name: str) -> bool:
    """Whether a tensor's name says that it is of an optimizer: "state.X.weight.exp_avg", "optim.state.0.sum"."""
    parts = name.split(".")
    if not _OPTIMIZERS.isdisjoint(parts[:-1]):
        return True
    if "state" not in parts[:-2]:
        return False
    inner = parts[parts.index("state") + 1 :]
    return inner[-1] in _OPTIMIZER_VALUES or not {"weight", "bias"}.isdisjoint(inner[:-1])
