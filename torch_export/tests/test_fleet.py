"""One builds and publishes, another user starts from it: the real scripts, on random:tiny."""

import hashlib
import shutil
import sys

from faults import FOLDER
from helpers import run_command, run_script, succeeded

from common.artifact.disk import ArtifactPair


def test_another_user_starts_from_a_published_build(subject, tmp_path):
    store, built, home = (tmp_path / name for name in ("store", "built", "home"))
    result = tmp_path / "run.json"
    pair = ArtifactPair(built / subject.pair.path.name, built / subject.pair.metadata_path.name)
    place = (f"{subject.path_flag}={pair.path}", f"--publish={store}")
    succeeded(run_script(subject.build, *subject.build_flags, *subject.verify_flags, *place))
    own = succeeded(run_script(subject.run, *subject.run_flags(pair), result=result)).result
    pin = hashlib.sha256(pair.metadata_path.read_bytes()).hexdigest()
    shutil.rmtree(built)
    home.mkdir()

    def start_elsewhere():
        script = [sys.executable, FOLDER / subject.run, *subject.flags, f"--json={result}"]
        command = ["env", "-C", home, *script, f"--fetch={store}", f"--expect-sha256={pin}"]
        return succeeded(run_command(command, result, HOME=str(home), XDG_CACHE_HOME="")).result

    other = start_elsewhere()
    assert other["output"]["token_ids"] == own["output"]["token_ids"]
    assert other["artifact"]["sha256"] == own["artifact"]["sha256"]
    assert other["compile"]["kernels_compiled"] == 0
    assert not other.get("misses")
    shutil.rmtree(store)
    assert start_elsewhere()["output"] == other["output"]  # pinned, and here already
