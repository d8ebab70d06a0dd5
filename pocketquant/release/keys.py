"""What the parts of a job depend on, as digests: equal keys mean equal bytes, so what is finished can be taken up."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketquant import __version__
from pocketquant.extras import list_versions
from pocketquant.gguf_file.identity import identify
from pocketquant.llama.library import require_runtime
from pocketquant.llama.runtime import library_versions
from pocketquant.release.planning import Release
from pocketquant.texts.calibration import SELF


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


def keys_of(release: Release, pack: Path | None = None) -> Keys:
    """Works the keys out, from the plans' digests and what measuring depends on; reads parts of the files behind them.

    Args:
        release: from `plan_release`, before an importance matrix is made.
        pack: a reference pack that takes the reference's place.

    Raises:
        EvalError: a text cannot be read.
    """
    software = list_versions() | {"pocketquant": __version__} | library_versions(require_runtime())
    settings, made = release.settings, release.calibrating
    texts = [[each.domain, identify(each.path).sha256] for each in settings.texts]
    how = [settings.context, settings.chunks, settings.positions]
    reference, importance = _key(release.reference.plan.digest, texts, how, software), ""
    if made is not None:
        text = SELF if made.text == SELF else identify(made.text).sha256
        block = release.reference_block.plan.digest if release.reference_block else ""
        importance = _key(release.reference.plan.digest, block, text, made.chunks, settings.context, software)
    judged_by = identify(pack).sha256 if pack else reference
    return Keys(
        tuple(_key(variant.plan.digest, importance, judged_by, texts, how, software) for variant in release.variants),
        tuple(_key(sidecar.plan.digest, importance, software) for sidecar in release.sidecars),
        reference,
        importance,
    )


def _key(*depends_on: Any) -> str:
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]
