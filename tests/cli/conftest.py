"""What tests of several commands share."""

import pytest

from trl_ext.cli import new


@pytest.fixture
def package(tmp_path):
    """The folder of a package as `trl_ext new my-method` writes it."""
    return new.scaffold("my-method", tmp_path / "package")
