"""The README's program of twenty lines does what it says."""

import re
import sys

from helpers import FOLDER, run_command

PROGRAM = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_the_program_of_the_readme_compiles_once_and_then_hits(tmp_path):
    (program,) = PROGRAM.findall((FOLDER / "README.md").read_text())
    program = program.replace('"mega_cache"', repr(str(FOLDER)))
    program += "\nprint(torch._dynamo.utils.counters['inductor']['fxgraph_cache_hit'])\n"
    hits = []
    for turn in ("first", "second"):
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / turn), "TMPDIR": str(tmp_path)}
        inside = f'cd {tmp_path} && exec "$0" -c "$1"'
        done = run_command(["bash", "-c", inside, sys.executable, program], **caches)
        assert done.status == 0, done.stderr
        hits.append(int(done.stdout))
    assert hits == [0, 1]
