"""Runs llama.cpp's converter. Started by the peer tests with an interpreter that has torch and llama.cpp's converter.

    python llama_convert.py CHECKPOINT FOLDER TYPE...    writes FOLDER/theirs-TYPE.gguf

A TYPE like bf16 converts the model without its multi-token-prediction block; bf16+embed with it, bf16+sidecar the
block alone.

The converter recognises a pre-tokenizer by the hash of one sample's token ids, which no small test tokenizer has, so
this answers "qwen35" in its place; the rest is the converter as it is.
"""

import sys

from llama_source import use_converter

checkpoint, folder, *kinds = sys.argv[1:]
use_converter()

import conversion.base  # noqa: E402

conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen35"
import convert_hf_to_gguf  # noqa: E402


def forget_modes(of: type) -> None:
    """The converter keeps --mtp and --no-mtp on its classes; a second conversion would inherit them."""
    for model in of.__subclasses__():
        for name in {"no_mtp", "mtp_only"} & vars(model).keys():
            delattr(model, name)
        forget_modes(model)


for kind in kinds:
    forget_modes(conversion.base.ModelBase)
    number_type, _, part = kind.partition("+")
    sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--outfile", f"{folder}/theirs-{kind}.gguf"]
    sys.argv += ["--outtype", number_type, *{"": ["--no-mtp"], "embed": [], "sidecar": ["--mtp"]}[part]]
    convert_hf_to_gguf.main()
