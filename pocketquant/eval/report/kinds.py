"""The kinds of a report's values: what `eval`, `make`, `sweep` and `tasks` write and `gate` and `report` read.

Whether a number is possible, and whether two reports belong together, is checked by the code that reads the report.
"""

from __future__ import annotations

from pocketquant.files.json_kinds import COUNT, FLAG, NUMBER, TEXT, WHOLE, Each, Fields, Values

_FILE = Fields({"name": TEXT, "size": COUNT, "sha256": TEXT})
_METRICS = Values(Values(NUMBER))
_BUCKETS = Each(Fields({"tokens": COUNT, **dict.fromkeys(("low", "high", "kld", "kld_se", "top1", "top1_se"), NUMBER)}))
_TENSORS = Each(
    Fields(
        {
            **dict.fromkeys(("name", "role", "format", "sha256"), TEXT),
            **dict.fromkeys(("relative_rmse", "max_abs_error", "cosine", "snr_db"), NUMBER),
            "layer": WHOLE,
            "weights": COUNT,
        }
    )
)
_PACK = Fields(
    {
        "kind": TEXT,
        "top": COUNT,
        "is_lower_bound": FLAG,
        "floor": Values(NUMBER),
        "model": _FILE,
        "versions": Values(TEXT),
        "quantized": TEXT,
    }
)
_PROVENANCE = Fields(
    {
        **dict.fromkeys(("model", "reference", "corpus"), _FILE),
        **dict.fromkeys(("vocabulary", "like", "reference_quantized"), TEXT),
        **dict.fromkeys(("context", "chunks", "threads"), COUNT),
        **dict.fromkeys(("seed", "gpu_layers"), WHOLE),
        **dict.fromkeys(("versions", "model_metadata", "chat_templates"), Values(TEXT)),
        "reference_pack": _PACK,
    }
)

REPORT = Fields(
    {
        "provenance": _PROVENANCE,
        "metrics": _METRICS,
        **dict.fromkeys(("tokens", "windows", "non_finite", "non_finite_model"), COUNT),
        "clusters": NUMBER,
        "by_domain": Each(
            Fields({"domain": TEXT, "file": _FILE, "tokens": COUNT, "non_finite": COUNT, "metrics": _METRICS})
        ),
        "by_position": _BUCKETS,
        "by_confidence": _BUCKETS,
        "noise_floor": Fields({"metrics": _METRICS}),
        "tensors": _TENSORS,
        "sums": Each(Fields({"domain": TEXT, "stream": TEXT})),
    }
)
"""What `eval --json` prints, but for the sums' columns, each of which is checked where it is read."""

RELEASE = Fields(
    {
        "source": Fields({"name": TEXT, "given": TEXT, "n_weights": COUNT, "notes": Each(TEXT)}),
        "importance": Fields({"file": TEXT, "datasets": Each(TEXT)}),
        "sidecars": Each(Fields({"file": TEXT, "file_bytes": COUNT})),
        "command": Each(TEXT),
        "reference": TEXT,
        "variants": Each(
            Fields(
                {
                    **dict.fromkeys(("recipe", "file"), TEXT),
                    "file_bytes": COUNT,
                    "bits_per_weight": NUMBER,
                    "is_kept": FLAG,
                    "weights": _TENSORS,
                    "evaluation": REPORT,
                }
            )
        ),
    }
)
"""What `make` and `sweep` write."""

TASKS = Fields(
    {
        **dict.fromkeys(("model", "reference"), Fields({"name": TEXT})),
        "reference_quantized": TEXT,
        "results": Each(
            Fields(
                {
                    **dict.fromkeys(("task", "metric"), TEXT),
                    "mean_difference": Each(NUMBER),
                    "answers": Fields(
                        {
                            **dict.fromkeys(("items", "lost", "gained"), COUNT),
                            **dict.fromkeys(("reference", "model", "difference", "standard_error"), NUMBER),
                            **dict.fromkeys(("p_value", "smallest_effect"), NUMBER),
                        }
                    ),
                }
            )
        ),
    }
)
"""What `tasks --json` prints."""
