"""internals/files.py: a file is replaced as a whole or not at all."""

import json

import pytest

from internals.files import write_json


def test_json_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "meta.json"
    write_json(path, {"a": "東京"})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "東京"}
