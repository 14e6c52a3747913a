"""Checkpoints load complete or not at all; text becomes sequences that lose no token."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from placement.errors import InputError
from placement.runtime.checkpoint import load_checkpoint, read_config, read_sequences
from placement.runtime.tiny import tiny_model

WORDS = ("[UNK]", "red", "green", "blue", "far")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A saved tiny model with a byte vocabulary and a context of 16."""
    folder = tmp_path / "tiny"
    tiny_model("olmoe", vocab_size=256, context=16).save_pretrained(folder)
    return folder


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _save_tokenizer(folder: Path, words: tuple[str, ...] = WORDS, *, truncate_at: int | None = None) -> None:
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    if truncate_at is not None:
        tokenizer.enable_truncation(truncate_at)
        tokenizer.enable_padding(length=truncate_at)
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_saved_model_loads_as_it_was(checkpoint: Path) -> None:
    """All weights come back bit for bit, in evaluation mode."""
    model = load_checkpoint(checkpoint)
    expected = tiny_model("olmoe", vocab_size=256, context=16).state_dict()
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert not model.training


def test_the_stored_type_is_kept_unless_asked_otherwise(checkpoint: Path) -> None:
    """bfloat16 stays bfloat16, or becomes the type given."""
    model: Any = tiny_model("olmoe", vocab_size=256, context=16)
    model.to(torch.bfloat16).save_pretrained(checkpoint)
    assert load_checkpoint(checkpoint).dtype == torch.bfloat16
    assert load_checkpoint(checkpoint, dtype=torch.float32).dtype == torch.float32


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    """The message names the folder."""
    with pytest.raises(InputError, match=r"no checkpoint folder .*nowhere"):
        load_checkpoint(tmp_path / "nowhere")


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    """An empty folder is no checkpoint."""
    with pytest.raises(InputError, match=r"is not a checkpoint: it has no config\.json"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b"{}", b'{"model_type": 3}'])
def test_a_broken_configuration_is_refused(tmp_path: Path, content: bytes) -> None:
    """Whatever is wrong with config.json, the message names the file."""
    _write(tmp_path / "config.json", content)
    with pytest.raises(InputError, match=r"config\.json"):
        load_checkpoint(tmp_path)


def test_a_configuration_of_wrong_types_is_refused(checkpoint: Path) -> None:
    """A number given as text is the library's complaint in our words."""
    _edit_config(checkpoint, hidden_size="wide")
    with pytest.raises(InputError, match=r"config\.json does not describe a model"):
        read_config(checkpoint)


def test_an_unsupported_model_is_refused(checkpoint: Path) -> None:
    """A dense model's type is not among the families."""
    _edit_config(checkpoint, model_type="llama")
    with pytest.raises(
        InputError, match=r"unsupported model type 'llama'; .*supported, such as .*mixtral, olmoe"
    ):
        load_checkpoint(checkpoint)


def test_truncated_weights_are_refused(checkpoint: Path) -> None:
    """A file cut short is not loaded in part."""
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"cannot load the weights in .*tiny"):
        load_checkpoint(checkpoint)


def test_missing_weights_are_refused(checkpoint: Path) -> None:
    """A folder with a configuration alone says so."""
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"cannot load the weights in .*tiny"):
        load_checkpoint(checkpoint)


def test_a_missing_tensor_is_refused(checkpoint: Path) -> None:
    """No tensor is made up: a further layer without weights is an error."""
    _edit_config(checkpoint, num_hidden_layers=4)
    with pytest.raises(InputError, match=r"lacks \d+ of the model's tensors, model\.layers\.3"):
        load_checkpoint(checkpoint)


def test_weights_of_another_shape_are_refused(checkpoint: Path) -> None:
    """Configuration and weights must agree."""
    _edit_config(checkpoint, vocab_size=300)
    with pytest.raises(InputError, match="cannot load the weights"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(checkpoint: Path, device: str) -> None:
    """Unknown and absent devices are input errors."""
    with pytest.raises(InputError, match=f"device '{device}' cannot be used"):
        load_checkpoint(checkpoint, device=device)


def test_bytes_are_cut_by_the_context(checkpoint: Path, tmp_path: Path) -> None:
    """40 bytes at a context of 16 are 16 + 16 + 8 tokens, each byte its own id."""
    text = bytes(range(65, 105))
    file = _write(tmp_path / "a.txt", text)
    sequences = read_sequences(checkpoint, [file])
    assert [(one.start, len(one.tokens_T)) for one in sequences] == [(0, 16), (16, 16), (32, 8)]
    assert bytes(np.concatenate([one.tokens_T for one in sequences]).tolist()) == text
    assert {one.file for one in sequences} == {file}
    assert {one.tokens_T.dtype for one in sequences} == {np.dtype(np.int64)}


def test_bytes_need_not_be_text_in_any_encoding(checkpoint: Path, tmp_path: Path) -> None:
    """A byte model reads what is not UTF-8."""
    file = _write(tmp_path / "a.bin", b"\xff\x00\xfe")
    assert read_sequences(checkpoint, [file])[0].tokens_T.tolist() == [255, 0, 254]


def test_a_shorter_context_can_be_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    """Files keep their order, and no sequence spans two."""
    files = [_write(tmp_path / "b.txt", b"12345"), _write(tmp_path / "a.txt", b"678")]
    sequences = read_sequences(checkpoint, files, max_length=4)
    assert [(one.file.name, one.start, bytes(one.tokens_T.tolist())) for one in sequences] == [
        ("b.txt", 0, b"1234"),
        ("b.txt", 4, b"5"),
        ("a.txt", 0, b"678"),
    ]


@pytest.mark.parametrize(("length", "message"), [(0, "at least 1"), (17, "17 tokens exceeds the model's 16")])
def test_a_context_that_does_not_fit_is_refused(
    checkpoint: Path, tmp_path: Path, length: int, message: str
) -> None:
    """Neither nothing nor more than the model takes."""
    with pytest.raises(InputError, match=message):
        read_sequences(checkpoint, [_write(tmp_path / "a.txt", b"abc")], max_length=length)


def test_a_lone_tokenizer_file_is_enough(checkpoint: Path, tmp_path: Path) -> None:
    """tokenizer.json wins over bytes, and what it says of truncation and padding is ignored."""
    _save_tokenizer(checkpoint, truncate_at=3)
    file = _write(tmp_path / "a.txt", b"red green blue blue unknown far")
    assert [one.tokens_T.tolist() for one in read_sequences(checkpoint, [file])] == [[1, 2, 3, 3, 0, 4]]
    short = _write(tmp_path / "b.txt", b"blue")
    assert [one.tokens_T.tolist() for one in read_sequences(checkpoint, [short])] == [[3]]


def test_no_tokenizer_and_no_byte_vocabulary_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """The message gives the vocabulary and what to add."""
    _edit_config(checkpoint, vocab_size=300)
    with pytest.raises(
        InputError, match=r"no tokenizer\.json, and only a vocabulary of 256 .* not one of 300"
    ):
        read_sequences(checkpoint, [_write(tmp_path / "a.txt", b"abc")])


def test_a_malformed_tokenizer_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """A tokenizer.json that is none is named."""
    _write(checkpoint / "tokenizer.json", b"{}")
    with pytest.raises(InputError, match=r"tokenizer\.json is not a tokenizer"):
        read_sequences(checkpoint, [_write(tmp_path / "a.txt", b"abc")])


def test_a_tokenizer_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """A token outside the vocabulary would crash the embedding; it is named before."""
    _save_tokenizer(checkpoint, ("[UNK]", *(f"w{index}" for index in range(300))))
    with pytest.raises(InputError, match=r"becomes token 290, but the model's vocabulary is 256"):
        read_sequences(checkpoint, [_write(tmp_path / "a.txt", b"w289")])


@pytest.mark.parametrize("content", [b"", b" \n\t"])
def test_an_empty_text_is_refused(checkpoint: Path, tmp_path: Path, content: bytes) -> None:
    """No text, or blanks alone, gives nothing to route."""
    with pytest.raises(InputError, match=r"a\.txt holds no text"):
        read_sequences(checkpoint, [_write(tmp_path / "a.txt", content)])


def test_an_unreadable_text_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """A missing file and a folder are named."""
    with pytest.raises(InputError, match=r"gone\.txt cannot be read: No such file"):
        read_sequences(checkpoint, [tmp_path / "gone.txt"])
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_sequences(checkpoint, [tmp_path])


def test_text_that_a_tokenizer_cannot_read_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """A tokenizer takes UTF-8 only; the message gives the byte."""
    _save_tokenizer(checkpoint)
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8 text: byte 4"):
        read_sequences(checkpoint, [_write(tmp_path / "a.txt", b"red \xff")])


def test_no_file_is_refused(checkpoint: Path) -> None:
    """An empty list of files is a mistake, not an empty trace."""
    with pytest.raises(InputError, match="no text file given"):
        read_sequences(checkpoint, [])
