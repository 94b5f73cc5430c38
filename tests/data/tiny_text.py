"""A tokenizer, an encoder and texts that are small enough for tests."""

from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

WORDS = {
    "fruit": ["apple", "pear", "plum", "grape", "cherry"],
    "tool": ["hammer", "saw", "drill", "plane", "file"],
    "beast": ["cat", "dog", "emu", "bat", "ox"],
}
FILLERS = ["the", "a", "is", "was", "near", "under", "old", "new", "big", "small"]


def save_tokenizer(path: Path) -> str:
    from transformers import BertTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [word for kind in WORDS.values() for word in kind] + FILLERS
    path.mkdir(parents=True, exist_ok=True)
    (path / "vocab.txt").write_text("\n".join(special + words))
    BertTokenizerFast.from_pretrained(path).save_pretrained(path)
    return str(path)


def save_encoder(path: Path) -> str:
    """A random BERT with its tokenizer, as save_pretrained writes them."""
    from transformers import BertConfig, BertModel

    save_tokenizer(path)
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        initializer_range=0.3,  # as large as a trained encoder, beside what a fit moves
    )
    BertModel(config).save_pretrained(path)
    return str(path)


def sentences(count: int, kinds: list[str], shares: list[float], seed: int) -> DatasetDict:
    """Sentences that name one thing; its kind is the class, and classes are unequal."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(len(kinds), count, p=shares)
    texts = []
    for label in labels:
        words = list(rng.choice(FILLERS, rng.integers(1, 6)))
        words.insert(int(rng.integers(len(words) + 1)), str(rng.choice(WORDS[kinds[label]])))
        texts.append(" ".join(words))
    features = Features({"text": Value("string"), "label": ClassLabel(names=kinds)})
    columns = {"text": texts, "label": [int(label) for label in labels]}
    data = Dataset.from_dict(columns, features=features)
    cut = count * 3 // 4
    return DatasetDict(train=data.select(range(cut)), test=data.select(range(cut, count)))
