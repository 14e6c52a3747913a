"""Reads a local checkpoint folder: its model, and text turned into sequences the model can take.

Nothing is fetched from a network, no code of the checkpoint runs and nothing is unpickled.

Shape letter: T tokens of one sequence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from placement.errors import InputError
from placement.runtime.families.registry import family_named

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "TextSequence",
    "first_line",
    "load_checkpoint",
    "loader_of",
    "quiet_transformers",
    "read_config",
    "read_sequences",
]

_BYTE_VOCABULARY = 256
_OTHER_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)

Encoder = Callable[[Path], "npt.NDArray[np.int64]"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TextSequence:
    """A run of consecutive tokens of a text file, short enough for the model's context.

    Parameters
    ----------
    tokens_T
        Token ids, int64.
    file
        Text file they come from.
    start
        Index of the first token among the file's tokens.
    """

    tokens_T: npt.NDArray[np.int64]
    file: Path
    start: int


def read_config(model_dir: Path, *, known_family: bool = True) -> PretrainedConfig:
    """Read a checkpoint's configuration and check that its family is supported.

    Parameters
    ----------
    known_family
        Whether a family without an adapter is refused.

    Raises
    ------
    InputError
        If the folder is missing, is no checkpoint, or the model type has no adapter.
    """
    if not model_dir.is_dir():
        raise InputError(f"no checkpoint folder {model_dir}")
    model_type, content = _model_type(model_dir / "config.json")
    if known_family:
        family_named(model_type, content)
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, TypeError, StrictDataclassError) as exc:
        raise InputError(f"{model_dir}/config.json does not describe a model: {first_line(exc)}") from exc
    return config


def load_checkpoint(
    model_dir: Path, *, dtype: torch.dtype | None = None, device: str = "cpu", known_family: bool = True
) -> PreTrainedModel:
    """Load a checkpoint for inference, complete or not at all.

    Parameters
    ----------
    dtype
        Type of the weights; `None` keeps the stored one.
    device
        Torch device that the model runs on.
    known_family
        Whether a family without an adapter is refused.

    Raises
    ------
    InputError
        If the folder is no checkpoint of a supported family, weights are missing, truncated or of
        the wrong shape, or the device cannot be used.
    """
    from safetensors import SafetensorError

    config = read_config(model_dir, known_family=known_family)
    loader = loader_of(config)
    try:
        with quiet_transformers():
            model, info = loader.from_pretrained(
                str(model_dir),
                config=config,
                dtype="auto" if dtype is None else dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as exc:
        raise InputError(f"cannot load the weights in {model_dir}: {first_line(exc)}") from exc
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(f"{model_dir} lacks {len(missing)} of the model's tensors, {missing[0]} among them")
    return _on_device(model.eval(), device)


def loader_of(config: PretrainedConfig) -> Any:
    """Return what loads such a model: as a language model, or as one that also sees."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    causal: Any = AutoModelForCausalLM  # its type says neither what it maps nor what comes with the model
    several = type(config) not in causal._model_mapping and type(config).sub_configs
    return AutoModelForImageTextToText if several else causal


def read_sequences(
    model_dir: Path,
    text_files: Iterable[Path],
    *,
    max_length: int | None = None,
    known_family: bool = True,
) -> list[TextSequence]:
    """Tokenise text files and cut them into sequences of at most the model's context.

    Text is tokenised by the checkpoint's tokenizer files (`tokenizer.json` alone is enough); a model
    with 256 tokens and no tokenizer reads bytes.

    Parameters
    ----------
    text_files
        Files in the order in which their sequences are returned.
    max_length
        Tokens per sequence at most; `None` means the model's `max_position_embeddings`.
    known_family
        Whether a family without an adapter is refused.

    Raises
    ------
    InputError
        If there is no tokenizer, a file cannot be read or holds no text, a token is outside the
        vocabulary, or `max_length` does not fit the model.
    """
    files = list(text_files)
    if not files:
        raise InputError("no text file given; name at least one")
    config = read_config(model_dir, known_family=known_family).get_text_config()
    length = _sequence_length(config, max_length)
    encode = _encoder(model_dir, int(config.vocab_size))
    return [
        TextSequence(tokens_T=tokens_T[start : start + length], file=file, start=start)
        for file in files
        for tokens_T in [encode(file)]
        for start in range(0, len(tokens_T), length)
    ]


def _model_type(config_file: Path) -> tuple[str, dict[str, Any]]:
    """Model type that a configuration names, and its content."""
    try:
        content = json.loads(config_file.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise InputError(f"{config_file.parent} is not a checkpoint: it has no config.json") from exc
    except (OSError, ValueError) as exc:
        raise InputError(f"{config_file} cannot be read: {first_line(exc)}") from exc
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(model_type, str):
        raise InputError(f"{config_file} names no model_type")
    return model_type, content


def _sequence_length(config: PretrainedConfig, max_length: int | None) -> int:
    context = getattr(config, "max_position_embeddings", None)
    if max_length is None:
        if not context:
            raise InputError("the configuration gives no max_position_embeddings; say the context length")
        return int(context)
    if max_length < 1:
        raise InputError(f"a context of {max_length} tokens; it must be at least 1")
    if context and max_length > context:
        raise InputError(f"a context of {max_length} tokens exceeds the model's {context}")
    return max_length


def _encoder(model_dir: Path, vocab_size: int) -> Encoder:
    if (model_dir / "tokenizer.json").is_file():
        encode = _tokenizer_json(model_dir / "tokenizer.json")
    elif any((model_dir / name).is_file() for name in _OTHER_TOKENIZER_FILES):
        encode = _transformers_tokenizer(model_dir)
    elif vocab_size == _BYTE_VOCABULARY:
        return _read_bytes
    else:
        raise InputError(
            f"{model_dir} has no tokenizer.json, and only a vocabulary of {_BYTE_VOCABULARY} is read as "
            f"bytes, not one of {vocab_size}; add the model's tokenizer.json"
        )
    return lambda file: _text_tokens(file, encode, vocab_size)


def _tokenizer_json(path: Path) -> Callable[[str], Sequence[int]]:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as exc:  # the Rust binding raises bare Exception for every malformed file
        raise InputError(f"{path} is not a tokenizer: {first_line(exc)}") from exc
    # A stored tokenizer may cut or pad for training batches; here every token of the text counts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: tokenizer.encode(text).ids


def _transformers_tokenizer(model_dir: Path) -> Callable[[str], Sequence[int]]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError) as exc:
        raise InputError(f"cannot load the tokenizer in {model_dir}: {first_line(exc)}") from exc
    return lambda text: tokenizer(text, truncation=False, padding=False)["input_ids"]


def _text_tokens(
    file: Path, encode: Callable[[str], Sequence[int]], vocab_size: int
) -> npt.NDArray[np.int64]:
    try:
        text = _content(file).decode("utf-8")
    except UnicodeDecodeError as exc:
        raise InputError(f"{file} is not UTF-8 text: byte {exc.start} cannot be decoded") from exc
    tokens_T = np.asarray(encode(text), dtype=np.int64)
    if tokens_T.size == 0:
        raise InputError(f"{file} holds no text: the tokenizer made no token of it")
    if tokens_T.max() >= vocab_size:
        raise InputError(
            f"{file} becomes token {int(tokens_T.max())}, but the model's vocabulary is {vocab_size}; "
            "the tokenizer belongs to another model"
        )
    return tokens_T


def _read_bytes(file: Path) -> npt.NDArray[np.int64]:
    return np.frombuffer(_content(file), dtype=np.uint8).astype(np.int64)


def _content(file: Path) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as exc:
        raise InputError(f"text file {file} cannot be read: {exc.strerror}") from exc
    if not content.strip():
        raise InputError(f"text file {file} holds no text")
    return content


def _on_device(model: Any, device: str) -> PreTrainedModel:
    try:
        moved: PreTrainedModel = model.to(torch.device(device))
    except (RuntimeError, AssertionError) as exc:  # AssertionError: a torch built without that device
        raise InputError(f"device {device!r} cannot be used: {first_line(exc)}") from exc
    return moved


def first_line(exc: BaseException) -> str:
    """First line of what an exception says, or its kind where it says nothing."""
    return next(iter(str(exc).strip().splitlines()), "") or type(exc).__name__


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the library's bars and notices off stderr: what matters of them becomes an error."""
    logging: Any = import_module("transformers.utils.logging")
    verbosity = logging.get_verbosity()
    bar_was_on = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar_was_on:
            logging.enable_progress_bar()
