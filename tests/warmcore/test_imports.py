"""The modules that the service loads need neither torch nor NumPy."""

import subprocess
import sys

import pytest

# Importing torch takes seconds and some 200 MB in each process of the service.
HEAVY = ("torch", "numpy", "safetensors")


@pytest.mark.parametrize("module", ["specs", "specs.sizes", "corpus.documents"])
def test_the_service_can_look_at_specs_and_corpora_without_torch(module):
    code = (
        f"import sys, warmcore.{module}, warmcore.specs, warmcore.corpus.inspection;"
        "warmcore.corpus.inspection.inspect_corpus(warmcore.specs.DataSpec(source='stdlib'));"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_preparing_a_corpus_needs_no_torch():
    code = "import sys, warmcore.corpus.prepare; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
