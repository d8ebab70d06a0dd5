"""Of what kind the values of a checkpoint's small files are, of the keys that are read and decide something.

What its own reader types anyway is not listed: sizes (`architectures`), sampling (`description`), quantization
(`quantized.settings`), adapters (`adapter`). transformers 5.24 refuses other kinds, too, where its configs state them
(`PreTrainedConfig`, a strict dataclass), and takes the rest as Python takes it: "false" for true.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pocketquant.errors import SourceError, TokenizerError
from pocketquant.files.json_kinds import (
    COUNT,
    FLAG,
    NUMBER,
    TEXT,
    WHOLE,
    Each,
    Either,
    Fields,
    Kind,
    Values,
    refuse_other_kinds,
)
from pocketquant.files.small import is_present, read_object

SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_ANYTHING = Fields({})
_IDS = Either((WHOLE, Each(WHOLE)))
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
_TOKEN = Fields({"content": TEXT, **dict.fromkeys(_FLAGS, FLAG)})
_NAMED = Either((TEXT, _TOKEN))
_TEMPLATES = Either((TEXT, Each(Fields({"name": TEXT, "template": TEXT}))))
_TOKENS: dict[str, Kind] = {
    **dict.fromkeys((f"{name}_token" for name in SPECIAL), _NAMED),
    "additional_special_tokens": Each(_NAMED),
    "extra_special_tokens": Either((Each(_NAMED), Values(_NAMED))),
    "model_specific_special_tokens": Values(_NAMED),
}
_OF_A_MODEL: dict[str, Kind] = {
    "tie_word_embeddings": FLAG,
    "mtp_num_hidden_layers": COUNT,
    "rope_parameters": _ANYTHING,
    "rope_scaling": _ANYTHING,
    **dict.fromkeys((f"{name}_token_id" for name in SPECIAL), WHOLE),
    "eos_token_id": _IDS,
    **dict.fromkeys(("quantization_config", "compression_config", "quantization"), _ANYTHING),
    **dict.fromkeys(("rope_theta", "partial_rotary_factor"), NUMBER),
}

KINDS: dict[str, tuple[Kind, type[SourceError | TokenizerError]]] = {
    "config.json": (
        Fields(
            {
                **_OF_A_MODEL,
                "text_config": Fields(_OF_A_MODEL),
                "vision_config": Fields({"deepstack_visual_indexes": Each(WHOLE)}),
                "architectures": Each(TEXT),
                "configuration_files": Each(TEXT),
                "transformers_weights": TEXT,
            }
        ),
        SourceError,
    ),
    "generation_config.json": (Fields({"eos_token_id": _IDS}), SourceError),
    "tokenizer_config.json": (
        Fields(
            {
                **_TOKENS,
                "add_bos_token": FLAG,
                "added_tokens_decoder": Values(_TOKEN),
                "chat_template": _TEMPLATES,
                "fast_tokenizer_files": Each(TEXT),
            }
        ),
        TokenizerError,
    ),
    "special_tokens_map.json": (Fields(_TOKENS), TokenizerError),
    "added_tokens.json": (Values(COUNT), TokenizerError),
    "chat_template.json": (Fields({"chat_template": _TEMPLATES}), TokenizerError),
    "tokenizer.json": (
        Fields(
            {
                "added_tokens": Each(Fields({"id": COUNT, "content": TEXT, **dict.fromkeys(_FLAGS, FLAG)})),
                "model": Fields(
                    {
                        **dict.fromkeys(("ignore_merges", "byte_fallback"), FLAG),
                        **dict.fromkeys(("type", "continuing_subword_prefix", "end_of_word_suffix"), TEXT),
                        "dropout": NUMBER,
                        "vocab": _ANYTHING,
                    }
                ),
                "pre_tokenizer": Fields(
                    {
                        "type": TEXT,
                        "pretokenizers": Each(
                            Fields(
                                {
                                    **dict.fromkeys(("type", "behavior"), TEXT),
                                    **dict.fromkeys(("invert", "add_prefix_space", "use_regex"), FLAG),
                                    "pattern": Fields({"Regex": TEXT}),
                                }
                            )
                        ),
                    }
                ),
            }
        ),
        TokenizerError,
    ),
}
"""File -> its keys, and the kind of error that a wrong one is."""


def read_small(folder: Path, name: str) -> dict[str, Any]:
    """One of the files of `KINDS`, its values of the kinds that they have to be; {} where there is none.

    Raises:
        SourceError, TokenizerError: it cannot be read, or a value is of another kind (all listed, each with its key).
    """
    path = folder / name
    if not is_present(path):
        return {}
    found = read_object(path)
    kind, error = KINDS[name]
    refuse_other_kinds(found, kind, path, error)
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, which has to be there; errors as `read_small`."""
    return read_small(folder, "config.json") or read_object(folder / "config.json")
