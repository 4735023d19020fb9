"""Draw the mermaid texts of the pages anew: an SVG each, named by its text, styled by extra.css.

    npm install --prefix /tmp/mermaid mermaid
    python docs/drawings/draw.py /tmp/mermaid/node_modules/mermaid/dist/mermaid.min.js

It needs a Chromium on the PATH. Commit what it writes.
"""

import json
import re
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

HERE = Path(__file__).parent
PAGE = """<body><script src="{library}"></script><script>
mermaid.initialize({{
  startOnLoad: false, htmlLabels: false, fontFamily: "sans-serif",
  flowchart: {{ htmlLabels: false, nodeSpacing: 30, rankSpacing: 30 }},
}});
mermaid.render("drawing", {text}).then(({{ svg }}) => {{ document.body.innerHTML = svg; }});
</script></body>"""
CHROMIUM = "chromium --headless --no-sandbox --disable-gpu --allow-file-access-from-files"


def draw(text: str, library: Path) -> None:
    """Write the SVG of one text."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(PAGE.format(library=library.resolve().as_uri(), text=json.dumps(text)))
        options = ["--dump-dom", "--virtual-time-budget=10000", f"--user-data-dir={folder}"]
        command = [*CHROMIUM.split(), *options, page.as_uri()]
        made = subprocess.run(command, capture_output=True, text=True, check=True)
    (svg,) = re.findall(r"<svg id.*</svg>", made.stdout, re.DOTALL)
    svg = re.sub(r"<style>.*?</style>", "", svg, flags=re.DOTALL)
    (HERE / f"{sha256(text.encode()).hexdigest()[:12]}.svg").write_text(svg + "\n")


if __name__ == "__main__":
    for old in HERE.glob("*.svg"):
        old.unlink()
    for path in HERE.parent.glob("*.md"):
        for found in re.findall(r"^```mermaid\n(.*?)^```$", path.read_text(), re.M | re.S):
            draw(found, Path(sys.argv[1]))
