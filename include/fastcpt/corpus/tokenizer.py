"""Finds a corpus's tokenizer, trains one on the corpus, or says what is missing.

A corpus's folder gets ``tokenizer.json`` and ``tokenizer_config.json``, so training needs nothing else.
Documents begin with BOS if the tokenizer has one, and end with its end-of-text token, not with an
instruct model's end-of-turn token.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from fastcpt.files import read_json, sha256_of_file, whole_file, write_json
from fastcpt.gguf import base_folder
from fastcpt.manifests import TokenizerFacts
from fastcpt.recipe import Recipe

log = logging.getLogger(__name__)

BOS = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>")
END = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|eos|>")
PAD = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|padding|>")
ENCODER = 2  # increased when ``RankedEncoder`` changes, so that tokenizers are compared again
TRAINING_CHARACTERS = 20_000_000  # characters of the corpus that a tokenizer is trained on

# Llama 3's pre-tokenizer: contractions, words with a preceding character, up to three digits, others
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TokenizerError(ValueError):
    """There is no usable tokenizer; the message says where it was searched."""


@dataclass(frozen=True)
class CorpusTokenizer:
    """``sha256`` is that of ``tokenizer.json``. ``bos_id`` is None if documents begin without BOS."""

    file: Path
    sha256: str
    vocab_size: int
    bos_id: int | None
    end_id: int
    pad_id: int
    ranked: bool = False  # whether tiktoken yields the same ids: see ``faster``

    def facts(self) -> TokenizerFacts:
        """Facts for a corpus's manifest."""
        return {
            "sha256": self.sha256,
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
            "eos_id": self.end_id,
            "pad_id": self.pad_id,
        }

    def encoder(self) -> Callable[[Sequence[str]], list[npt.NDArray[np.int32]]]:
        """A single-core function from texts to ids, without BOS and end of text."""

        ranked = RankedEncoder.of(self.file) if self.ranked else None
        tokenizer = cache(self.load)  # loading takes a second and is rarely needed beside tiktoken

        def by_library(texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
            encoded = tokenizer().encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, dtype=np.int32) for encoding in encoded]

        def encoded(text: str) -> npt.NDArray[np.int32]:
            assert ranked is not None
            try:
                return ranked.encode(text)
            except ValueError:  # tiktoken's regex engine fails at about 700,000 blanks in a row
                return by_library([text])[0]

        return (lambda texts: [encoded(text) for text in texts]) if ranked else by_library

    def load(self) -> Tokenizer:
        """The tokenizer, set to treat the text of special tokens in documents as ordinary text."""
        tokenizer = _load(self.file)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        reached = _reached_as_text(tokenizer)
        if reached:
            # the vocabulary has them as pieces: split after their first letter so that none matches
            borders = "|".join(
                f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in reached
            )
            split = pre_tokenizers.Split(Regex(borders), behavior="isolated")
            own = tokenizer.pre_tokenizer
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([own, split]) if own else split
        return tokenizer


def _reached_as_text(tokenizer: Tokenizer) -> list[str]:
    """Special tokens that ordinary text can still produce by spelling them.

    A unigram model has them among its pieces, with the best scores.
    """
    unigram = type(tokenizer.model).__name__ == "Unigram"

    def is_reached(number: int, token: str) -> bool:
        spelled = (token, f"a{token}b", f" {token} ")
        return unigram or any(
            number in tokenizer.encode(text, add_special_tokens=False).ids for text in spelled
        )

    return sorted(
        token.content
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if token.special and len(token.content) > 1 and is_reached(number, token.content)
    )


def find_tokenizer(recipe: Recipe) -> CorpusTokenizer | None:
    """The recipe's tokenizer; None if the recipe trains one. ``TokenizerError`` if it is missing.

    ``tokenizer.path`` is a folder or a ``tokenizer.json``. Without it, the folder of
    ``model.name_or_path`` or its local Hugging Face cache is used. Nothing is downloaded.
    """
    if recipe.tokenizer.train_vocab_size:
        return None
    if recipe.tokenizer.path:
        path = Path(recipe.tokenizer.path).expanduser()
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise TokenizerError(
                f"tokenizer.path: there is no '{file}'; give a folder with tokenizer.json, the "
                "file itself, or tokenizer.train_vocab_size"
            )
        return describe(file)
    name = recipe.model.name_or_path
    if name is None:
        raise TokenizerError(
            "a model initialised at random has no tokenizer of its own: give tokenizer.path or "
            "tokenizer.train_vocab_size in the recipe"
        )
    folder = Path(base_folder(name)).expanduser()
    found = folder / "tokenizer.json" if folder.is_dir() else _in_hub_cache(name)
    if found is None or not found.is_file():
        raise TokenizerError(
            f"the tokenizer of model '{name}' is not on this machine: give tokenizer.path (a "
            f"folder with tokenizer.json), or fetch it once with 'hf download {name} "
            "tokenizer.json tokenizer_config.json'"
        )
    return describe(found)


def _in_hub_cache(name: str) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError:
        return None  # a path that does not exist, not a hub name
    return Path(found) if isinstance(found, (str, os.PathLike)) else None


def _load(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises bare Exception
        raise TokenizerError(f"'{file}' is no tokenizer that can be read: {error}") from error


def describe(file: Path) -> CorpusTokenizer:
    """Read what a corpus needs from a ``tokenizer.json`` and the config beside it."""
    tokenizer = _load(file)
    config = _config(file.parent)
    adds_bos = bool(config.get("add_bos_token", True)) and not _is_named(config, "eos_token", BOS)
    bos = _first(tokenizer, (_named(config, "bos_token"), *BOS)) if adds_bos else None
    # an instruct model's eos may end a turn, so look for the base vocabulary's end of text first
    end = _first(tokenizer, (*END, _named(config, "eos_token")))
    if end is None:
        raise TokenizerError(
            f"'{file}' has no end-of-text token (looked for {', '.join(END)} and eos_token of "
            "tokenizer_config.json); add tokenizer_config.json with eos_token beside it"
        )
    pad = _first(tokenizer, (_named(config, "pad_token"), *PAD))
    return CorpusTokenizer(
        file=file,
        sha256=sha256_of_file(file),
        vocab_size=tokenizer.get_vocab_size(with_added_tokens=True),
        bos_id=None if bos == end else bos,
        end_id=end,
        pad_id=end if pad is None else pad,
    )


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"'{file}' is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _named(config: dict[str, Any], key: str) -> str | None:
    value = config.get(key)
    return value.get("content") if isinstance(value, dict) else value


def _is_named(config: dict[str, Any], key: str, names: tuple[str, ...]) -> bool:
    return _named(config, key) in names


def _first(tokenizer: Tokenizer, names: Iterable[str | None]) -> int | None:
    ids = (tokenizer.token_to_id(name) for name in names if name)
    return next((i for i in ids if i is not None), None)


# Faster


class RankedEncoder:
    """A byte-level BPE tokenizer run by tiktoken, three to five times as fast as ``tokenizers``.

    tiktoken merges the pair with the smallest resulting id; a ``tokenizer.json`` lists its merges. For
    vocabularies numbered in merge order (Llama 3, OLMo, Qwen 2, GPT-2, GPT-NeoX) the result is the same,
    but the file does not guarantee it, so ``faster`` compares. The pre-tokenizer may be one regular
    expression, with NFC before it; one of several steps (DeepSeek) is left to ``tokenizers``.
    """

    def __init__(self, pattern: str, ranks: dict[bytes, int], added: _Added, composed: bool):
        import tiktoken

        self._added, self._composed = added, composed
        self._encoding = tiktoken.Encoding(
            "corpus", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        pieces = [
            part
            for raw in _split(self._added.raw, text)
            for part in ([raw] if raw in self._added.ids else self._ordinary(raw))
        ]
        return np.concatenate([np.empty(0, dtype=np.int32), *map(self._encoded, pieces)])

    def _ordinary(self, text: str) -> list[str]:
        composed = unicodedata.normalize("NFC", text) if self._composed else text
        return _split(self._added.composed, composed)

    def _encoded(self, piece: str) -> npt.NDArray[np.int32]:
        number = self._added.ids.get(piece)
        if number is not None:
            return np.array([number], dtype=np.int32)
        return self._encoding.encode_to_numpy(piece, disallowed_special=()).astype(np.int32)

    @classmethod
    def of(cls, file: Path) -> RankedEncoder | None:
        """The encoder of a ``tokenizer.json``; None if it is not a plain byte-level BPE."""
        content = json.loads(file.read_text(encoding="utf-8"))
        model = content["model"]
        pattern = _pattern(content.get("pre_tokenizer"))
        normalizers = _steps(content.get("normalizer"), "normalizers")
        plain = (
            model.get("type") == "BPE"
            and [step["type"] for step in normalizers] in ([], ["NFC"])
            and not any(model.get(key) for key in _UNUSUAL_BPE)
        )
        added = _Added.of(content.get("added_tokens", []))
        if pattern is None or added is None or not plain:
            return None
        byte_of = {letter: number for number, letter in _byte_letters().items()}
        try:
            ranks = {
                bytes(byte_of[letter] for letter in entry): number
                for entry, number in model["vocab"].items()
                if number not in added.numbers
            }
            return cls(pattern, ranks, added, composed=bool(normalizers))
        except (KeyError, ValueError):
            return None


@dataclass(frozen=True)
class _Added:
    """Non-special added tokens, which are matched literally in a text.

    ``raw`` matches those that apply before normalization, ``composed`` those after it, longest first.
    """

    ids: dict[str, int]
    raw: re.Pattern[str] | None
    composed: re.Pattern[str] | None
    numbers: set[int]  # ids of all added tokens, special ones too

    @classmethod
    def of(cls, added: Sequence[dict[str, Any]]) -> _Added | None:
        """None if some of them strip blanks or match whole words only."""
        literal = [token for token in added if not token["special"]]
        if any(token[key] for token in literal for key in ("single_word", "lstrip", "rstrip")):
            return None
        return cls(
            {token["content"]: token["id"] for token in literal},
            _any_of(token["content"] for token in literal if not token["normalized"]),
            _any_of(token["content"] for token in literal if token["normalized"]),
            {token["id"] for token in added},
        )


def _any_of(words: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    # a capturing group: re.split keeps the separators
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


def _split(pattern: re.Pattern[str] | None, text: str) -> list[str]:
    return pattern.split(text) if pattern else [text]


_UNUSUAL_BPE = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "byte_fallback",
)


# GPT-2's pre-tokenizer, built into the package's ByteLevel step
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _steps(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, one or several."""
    if not step:
        return []
    if step.get("type") == "Sequence":
        return [inner for item in step[key] for inner in _steps(item, key)]
    return [step]


def _pattern(first_split: dict[str, Any] | None) -> str | None:
    """The regular expression of a pre-tokenizer that consists of one, followed by ByteLevel."""
    *splits, level = _steps(first_split, "pretokenizers") or [{}]
    if level.get("type") != "ByteLevel" or level.get("add_prefix_space"):
        return None
    if not splits:
        return _GPT_2 if level.get("use_regex", True) else None
    split = splits[0]
    if len(splits) > 1 or split.get("type") != "Split" or level.get("use_regex", True):
        return None
    isolated = split.get("behavior") == "Isolated" and not split.get("invert")
    matched = split.get("behavior") == "Removed" and split.get("invert")
    pattern: str | None = split["pattern"].get("Regex")
    return pattern if isolated or matched else None


def _byte_letters() -> dict[int, str]:
    """The letter for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(256 + n) for n, byte in enumerate(others)}


def faster(tokenizer: CorpusTokenizer, texts: Iterable[str], home: Path) -> CorpusTokenizer:
    """The same tokenizer, run by tiktoken if that yields the same ids.

    Both are compared on every code point of the scripts in use, on the vocabulary's entries and on
    ``texts`` of the corpus; the result is stored in ``home/tokenizers``.
    """
    outcome = home / "tokenizers" / f"{tokenizer.sha256[:16]}-{ENCODER}.json"
    if not outcome.exists():
        write_json(outcome, {"ranked": _same_ids(tokenizer, [*_PROBES, *texts])})
    ranked = bool(read_json(outcome)["ranked"])
    if not ranked:
        log.info("tiktoken cannot run this tokenizer; tokenizing takes longer")
    return replace(tokenizer, ranked=ranked)


_PROBES = [
    f"a{chr(code)}1{chr(code)}!{chr(code)} {chr(code)}\n{chr(code)}"
    for code in [*range(1, 0x3000), *range(0xFB00, 0xFFFF)]
]


def _same_ids(tokenizer: CorpusTokenizer, texts: Sequence[str]) -> bool:
    ranked = RankedEncoder.of(tokenizer.file)
    if ranked is None:
        return False
    slow = tokenizer.load()
    entries = [slow.decode([number]) for number in range(0, slow.get_vocab_size(), 4)]
    probes = [*texts, *(entry for entry in entries if "\ufffd" not in entry)]
    expected = slow.encode_batch_fast(probes, add_special_tokens=False)
    for probe, encoding in zip(probes, expected, strict=True):
        if ranked.encode(probe).tolist() != encoding.ids:
            log.info("tiktoken splits %r differently", probe[:40])
            return False
    return True


# The corpus's copy


def write_tokenizer(source: CorpusTokenizer, folder: Path) -> None:
    """Write a copy of the tokenizer that ``transformers.AutoTokenizer`` can load."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "tokenizer.json") as aside:
        shutil.copyfile(source.file, aside)
    config = _config(source.file.parent)
    if not config:
        tokenizer = _load(source.file)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None if source.bos_id is None else tokenizer.id_to_token(source.bos_id),
            "eos_token": tokenizer.id_to_token(source.end_id),
            "pad_token": tokenizer.id_to_token(source.pad_id),
            "clean_up_tokenization_spaces": False,
        }
    write_json(folder / "tokenizer_config.json", config)
    for name in ("special_tokens_map.json", "chat_template.jinja"):
        if (source.file.parent / name).is_file():
            with whole_file(folder / name) as aside:
                shutil.copyfile(source.file.parent / name, aside)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> CorpusTokenizer:
    """Train a byte-level BPE tokenizer on ``texts``; the same texts give the same file."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [BOS[0], END[0], PAD[0]]
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "tokenizer.json") as aside:
        tokenizer.save(str(aside))
    log.info("trained a tokenizer of %d entries", tokenizer.get_vocab_size())
    return describe(folder / "tokenizer.json")
