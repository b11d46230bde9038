"""Files of a model's folder."""

import pytest

from sd_numba.errors import ModelError
from sd_numba.files.folders import read_json


def test_read_json(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ModelError, match="cannot be read"):
        read_json(tmp_path)
