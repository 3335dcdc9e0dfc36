"""What `import export_vq` offers: every name loads, none hides a module, and the import itself is cheap."""

import subprocess
import sys
from pathlib import Path

import pytest

import export_vq

MODULES = {path.stem for path in Path(export_vq.__file__).parent.iterdir()}


@pytest.mark.parametrize("name", export_vq.__all__)
def test_a_public_name_is_its_modules_own(name):
    found = getattr(export_vq, name)
    assert found.__name__ == name
    assert found.__module__.startswith("export_vq.")


def test_the_list_is_the_table():
    assert set(export_vq.__all__) == set(export_vq._HOME)


def test_no_public_name_is_a_modules():
    """Once the module is imported, `export_vq.NAME` would be the module."""
    assert not MODULES & set(export_vq.__all__)


def test_the_import_brings_nothing_heavy():
    heavy = "import sys, export_vq; print([m for m in ('torch', 'onnx', 'numpy', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="has no attribute 'nothing_of_the_kind'"):
        _ = export_vq.nothing_of_the_kind
