"""Small real tokenizers of three kinds, trained on a few lines, and what their tokens say in bytes."""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

LINES = [
    "The café was open, and the naïve résumé lay there. 🎉🎉 日本語",
    "Once upon a time there was a cat; the cat sat on the mat.",
    "hello world, hello there 世界 مرحبا 🎈\nand the other line",
] * 5
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


def byte_level(*, size: int = 380, **options: Any) -> PreTrainedTokenizerFast:
    """As GPT-2's, without an opening token; ``use_regex=False`` lets tokens run over words and parts of characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **options)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def sentence_piece(
    *, model: type[models.Model] = models.BPE, max_length: int = 512, padding_side: str = "right"
) -> PreTrainedTokenizerFast:
    """As Llama 2's: opens with <s>, "▁" stands for a blank, what is not ASCII falls back to bytes. ``models.Unigram``
    gives the bytes of a whole run of such characters the same offsets."""
    trained = Tokenizer(model())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = {models.BPE: trainers.BpeTrainer, models.Unigram: trainers.UnigramTrainer}[model]
    lines = ["".join(filter(str.isascii, line)) for line in LINES]
    trained.train_from_iterator(lines, trainer(vocab_size=90, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    if model is models.BPE:
        pieces = sorted(state["vocab"], key=state["vocab"].get)
        vocabulary = {piece: index for index, piece in enumerate(first + pieces)}
        merges = [tuple(merge) for merge in state["merges"]]
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    else:
        scored = [*((piece, -30.0) for piece in first), *map(tuple, state["vocab"])]
        tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
        padding_side=padding_side,
    )


def word_piece() -> PreTrainedTokenizerFast:
    """As uncased BERT's: drops blanks and accents, marks both ends."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[SEP]")


def positions_by_text(tokenizer: PreTrainedTokenizerFast, text: str) -> dict[bytes, int]:
    """What has been read, in whole characters -> the first position that has read it, told from the tokens alone."""
    bytes_of = _sentence_piece_bytes if "<0x00>" in tokenizer.get_vocab() else _byte_level_bytes
    said = [bytes_of(token) for token in tokenizer.convert_ids_to_tokens(tokenizer(text, verbose=False)["input_ids"])]
    invented = len(b"".join(said)) - len(text.encode())  # the blank that SentencePiece puts before the text
    positions: dict[bytes, int] = {}
    read = b""
    for position, piece in enumerate(said):
        read += piece
        try:
            read.decode()
        except UnicodeDecodeError:
            continue
        positions.setdefault(read[invented:], position)
    return positions


def pairs_by_text(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, text: str):
    """The oracle of `aligned_positions`."""
    ours, theirs = positions_by_text(student, text), positions_by_text(teacher, text)
    return [(position, theirs[read]) for read, position in ours.items() if read in theirs]


def _byte_level_bytes(token: str) -> bytes:
    return bytes(BYTES[character] for character in token)


def _sentence_piece_bytes(token: str) -> bytes:
    if token == "<s>":
        return b""
    fallback = re.fullmatch("<0x(..)>", token)
    return bytes.fromhex(fallback[1]) if fallback else token.replace("▁", " ").encode()
