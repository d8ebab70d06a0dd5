"""What the parts of a job depend on, as digests: equal keys mean equal bytes, so what is finished can be taken up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketquant import __version__
from pocketquant.calibration.imatrix import SELF, digest_file
from pocketquant.extras import list_versions
from pocketquant.gguf_file.identity import identify
from pocketquant.llama.library import require_runtime
from pocketquant.llama.runtime import library_versions
from pocketquant.model import Plan
from pocketquant.release.planning import Release


@dataclass(frozen=True)
class Keys:
    """Of a release.

    Attributes:
        variants: for each, the digest of all that its file and its measurement depend on.
        sidecars: for each, the digest of all that its file depends on.
        reference: what a reference pack depends on.
        importance: what the importance matrix depends on; "" where none is made.
    """

    variants: tuple[str, ...]
    sidecars: tuple[str, ...]
    reference: str
    importance: str


def keys_of(release: Release, pack: Path | None = None, statistics: Path | None = None) -> Keys:
    """Works the keys out; reads parts of the source, the statistics and the texts.

    Args:
        release: from `plan_release`, before an importance matrix is made.
        pack: a reference pack that takes the reference's place.
        statistics: what the release is rounded by.

    Raises:
        EvalError: a text cannot be read.
    """
    software = list_versions() | {"pocketquant": __version__} | library_versions(require_runtime())
    reference: dict[str, Any] = {
        "plan": _describe(release, release.reference.plan),
        "texts": [[each.domain, identify(each.path).sha256] for each in release.texts],
        "settings": [release.context, release.chunks, release.positions],
        "software": software,
    }
    importance: dict[str, Any] = {}
    made = release.calibrating
    if made is not None:
        text = SELF if made.text == SELF else identify(made.text).sha256
        importance = {"reference": reference["plan"], "text": text, "chunks": made.chunks}
        importance |= {"context": release.context, "software": software}
        if release.reference_block is not None:
            importance["block"] = _describe(release, release.reference_block.plan)
    elif release.importance is not None:
        weights = sorted(release.importance.weights.items())
        importance = {"given": {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in weights}}
    judged_by: dict[str, Any] = {"pack": identify(pack).sha256} if pack else {"reference": reference}
    if statistics is not None:
        judged_by["statistics"] = identify(statistics).sha256

    def keys(plans: Sequence[Plan], more: dict[str, Any]) -> tuple[str, ...]:
        return tuple(_digest({"plan": _describe(release, one), "importance": importance, **more}) for one in plans)

    return Keys(
        keys([variant.plan for variant in release.variants], judged_by),
        keys([sidecar.plan for sidecar in release.sidecars], {"software": software}),
        _digest(reference),
        _digest(importance) if made else "",
    )


def _describe(release: Release, plan: Plan) -> list[Any]:
    """A plan's header, and what tells the files that it reads from others: pieces of each, or a repository's name."""
    files = [digest_file(state.path) for state in plan.files]
    return [hashlib.sha256(plan.header).hexdigest(), files or release.source]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
