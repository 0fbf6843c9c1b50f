"""What a run was trained on is known by digest: a file replaced under its path is refused."""

import json
import pathlib

import pytest

from longctx_jax import run_files
from longctx_jax.training.inputs import (
    Inputs,
    find_tokenizer,
    read_inputs,
    require_same_inputs,
    write_inputs,
)


def write_tokenizer(folder, content):
    folder.mkdir(exist_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(content)
    return path


def digest_of(name):
    return "digest of " + pathlib.Path(name).read_text()


def claim(workdir, path, texts=None):
    workdir.mkdir(exist_ok=True)
    inputs = Inputs(digest_of(path), {"train": "abc"} if texts is None else texts, (path,))
    write_inputs(workdir, inputs)
    return inputs


def test_what_is_written_is_read(tmp_path):
    path = write_tokenizer(tmp_path / "given", "one")
    inputs = claim(tmp_path / "run", path)
    assert read_inputs(tmp_path / "run") == inputs._replace(files=())
    assert (tmp_path / "run/tokenizer/tokenizer.json").read_text() == "one"
    require_same_inputs(tmp_path / "run", inputs)
    require_same_inputs(tmp_path, inputs)  # a folder without such a file is of an earlier version


def test_another_tokenizer_or_text_is_refused(tmp_path):
    inputs = claim(tmp_path / "run", write_tokenizer(tmp_path / "given", "one"))
    with pytest.raises(ValueError, match="the tokenizer it began with.*run/tokenizer"):
        require_same_inputs(tmp_path / "run", inputs._replace(tokenizer="other"))
    with pytest.raises(ValueError, match="text of split 'train' must be the one of the run"):
        require_same_inputs(tmp_path / "run", inputs._replace(texts={"train": "abd"}))
    require_same_inputs(tmp_path / "run", inputs._replace(texts={"validation": "new"}))


def test_a_later_start_adds_texts_and_keeps_the_copy(tmp_path):
    path = write_tokenizer(tmp_path / "given", "one")
    inputs = claim(tmp_path / "run", path)
    path.write_text("two")
    write_inputs(tmp_path / "run", inputs._replace(texts={"test": "xyz"}))
    assert read_inputs(tmp_path / "run").texts == {"train": "abc", "test": "xyz"}
    assert (tmp_path / "run/tokenizer/tokenizer.json").read_text() == "one"


def test_the_copy_takes_the_place_of_a_file_that_changed_or_is_gone(tmp_path):
    path = write_tokenizer(tmp_path / "given", "one")
    run = tmp_path / "run"
    claim(run, path)
    assert find_tokenizer(run, str(path), digest_of) == str(path)
    path.write_text("two")
    copy = str(run / "tokenizer/tokenizer.json")
    assert find_tokenizer(run, str(path), digest_of) == copy
    path.unlink()
    assert find_tokenizer(run, str(path), digest_of) == copy
    pathlib.Path(copy).write_text("three")
    with pytest.raises(ValueError, match="the tokenizer it was trained with"):
        find_tokenizer(run, str(path), digest_of)


def test_a_damaged_file_is_an_error(tmp_path):
    (tmp_path / run_files.INPUTS).write_text(json.dumps({"tokenizer": 3}))
    with pytest.raises(ValueError, match="must hold tokenizer and texts"):
        read_inputs(tmp_path)
