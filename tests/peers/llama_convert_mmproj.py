"""Runs llama.cpp's converter on a vision tower. Started by the peer tests with an interpreter that has torch.

python llama_convert_mmproj.py CHECKPOINT FOLDER TYPE...    writes FOLDER/mmproj-theirs-TYPE.gguf
"""

import sys

from llama_source import use_converter

checkpoint, folder, *kinds = sys.argv[1:]
use_converter()

import convert_hf_to_gguf  # noqa: E402

for kind in kinds:
    target = f"{folder}/mmproj-theirs-{kind}.gguf"
    sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--mmproj", "--outfile", target, "--outtype", kind]
    convert_hf_to_gguf.main()
