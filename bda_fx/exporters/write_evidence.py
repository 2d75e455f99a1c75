"""Write the evidence beside an artefact: ``<name>.bda.json`` and ``<name>.bda.md``."""

from __future__ import annotations

from dataclasses import replace

from bda_fx.exporters.exported import Exported
from bda_fx.exporters.place_output import Staging


def write_evidence(result: Exported, staging: Staging) -> Exported:
    """``result`` with both files in its list; they are staged with the artefact."""
    name = staging.destination.name
    evidence = [f"{name}.bda.json", f"{name}.bda.md"]
    whole = replace(
        result, files=(*result.files, *(staging.destination.parent / n for n in evidence))
    )
    (staging.directory / evidence[0]).write_text(whole.to_json())
    (staging.directory / evidence[1]).write_text(whole.to_markdown())
    return whole
