"""What the site does beyond mkdocs: the benchmark's pictures, and drawings that need no network.

The pages keep what GitHub shows too: links to `../bench/results`, and mermaid's text. Material
would load mermaid (3 MB) from a CDN when a page is read; here each text has an SVG made of it.
"""

import re
from hashlib import sha256
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

DRAWING = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DRAWINGS = Path(__file__).with_name("drawings")
RESULTS = Path(__file__).parent.parent / "bench" / "results"


def on_files(files: Files, config: Any, **_: Any) -> None:  # noqa: ANN401
    """Take the benchmark's pictures into the site."""
    for path in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))


def on_page_markdown(markdown: str, **_: Any) -> str:  # noqa: ANN401
    """Link to those pictures where they are now; put the drawings in the place of their texts."""
    return DRAWING.sub(_drawn, markdown.replace("](../bench/results/", "](results/"))


def drawing_of(text: str) -> Path:
    """The SVG of a mermaid text: a changed text has none."""
    return DRAWINGS / f"{sha256(text.encode()).hexdigest()[:12]}.svg"


def _drawn(found: re.Match[str]) -> str:
    path = drawing_of(found[1])
    if not path.exists():
        raise PluginError(f"{path} is missing. Draw the mermaid text anew: docs/drawings/draw.py.")
    return f'<div class="drawing" role="img">{path.read_text()}</div>'
