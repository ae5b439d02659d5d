"""Figure of docs/start.md, drawn by the code of the page:  ``python docs/figures/start.py``"""

import os
import re
import shutil
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent

page = (HERE.parent / "start.md").read_text()
scope: dict[str, object] = {}
with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    for example in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(example, scope)
    os.chdir(HERE)
    shutil.move(f"{folder}/posterior.png", HERE / "start.png")
