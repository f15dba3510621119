"""READMEs show what is in results/, and say where it was measured."""

import json

import pytest
import synthetic

from common import readme_tables
from common.errors import ScriptError

NO_GPU = "No GPU measurement of ours is recorded yet"
README = f"# Title\n\nbefore\n\n{readme_tables.BEGIN}\n{readme_tables.END}\n\nafter\n"


def test_the_readmes_show_the_committed_results():
    readme_tables.main(["--check"])


@pytest.fixture
def repository(tmp_path):
    """A repository of one folder with empty tables."""
    folder = tmp_path / "mega_cache"
    (folder / "common").mkdir(parents=True)
    (folder / "results").mkdir()
    (folder / "common/readme_tables.py").touch()
    for place in (tmp_path, folder):
        (place / "README.md").write_text(README)
    return tmp_path


def write_result(repository, name, document):
    (repository / "mega_cache/results" / f"{name}.json").write_text(json.dumps(document))


def texts(repository):
    found = readme_tables.expected(repository / "mega_cache")
    return found[repository / "README.md"], found[repository / "mega_cache/README.md"]


def test_without_a_gpu_result_one_line_says_so(repository):
    for text in texts(repository):
        assert text.count(NO_GPU) == 1
        assert text.startswith("# Title\n\nbefore") and text.endswith("after\n")


def test_a_cpu_result_is_labelled_as_what_it_is(repository, monkeypatch):
    write_result(repository, "cpu", synthetic.measurement(monkeypatch))
    for text in texts(repository):
        assert NO_GPU in text
        assert "random:tiny on a 2-core CPU: shows the mechanism, not the size of the gain" in text
        assert "published" not in text  # figures of a GPU do not stand beside those of a CPU
        assert "Not the reference stack" not in text


def test_a_gpu_result_stands_beside_the_published_one(repository, monkeypatch):
    write_result(repository, "gpu", synthetic.measurement(monkeypatch, **synthetic.GPU))
    whole, own = texts(repository)
    assert NO_GPU not in whole
    total = next(line for line in own.splitlines() if line.startswith("| total (s)"))
    cells = [cell.strip() for cell in total.strip("|").split("|")]
    assert cells == ["total (s)", "7.00", "45.00", "6.43x", "25.08", "47.96", "1.91x"]
    for words in ("random:3b on one NVIDIA H200", "driver 570.1", "2026-01-02", "ttft_cold / floor",
                  "decode / copy bandwidth", "Not measured: equivalence"):  # fmt: skip
        assert words in own
    assert "(results/gpu.json)" in own
    assert "(mega_cache/results/gpu.json)" in whole


def test_another_stack_than_the_reference_one_says_so(repository, monkeypatch):
    document = synthetic.measurement(monkeypatch, **synthetic.GPU, torch="2.13.0+cu130")
    write_result(repository, "gpu", document)
    assert "**Not the reference stack**, which has torch 2.9.1." in texts(repository)[1]


def test_the_newest_result_of_a_kind_is_shown(repository, monkeypatch):
    document = synthetic.measurement(monkeypatch)
    write_result(repository, "z_old", document)
    write_result(repository, "a_new", document | {"finished": "2027-01-01T00:00:00+00:00"})
    text = texts(repository)[1]
    assert "results/a_new.json" in text and "z_old" not in text


def test_each_labelled_variant_has_its_newest_result(repository, monkeypatch):
    document = synthetic.measurement(monkeypatch, **synthetic.GPU)
    write_result(repository, "base", document)
    write_result(repository, "variant", document | {"label": "kv-cache"})
    text = texts(repository)[1]
    assert "**random:3b on one NVIDIA H200**" in text
    assert "**random:3b (kv-cache) on one NVIDIA H200**" in text


def test_pictures_that_are_there_are_shown(repository, monkeypatch):
    write_result(repository, "cpu", synthetic.measurement(monkeypatch))
    (repository / "mega_cache/results/cpu.png").touch()
    whole, own = texts(repository)
    assert "](results/cpu.png)" in own and "](mega_cache/results/cpu.png)" in whole
    assert "_sweep.png" not in own


def test_check_finds_a_stale_readme_and_filling_mends_it(repository, monkeypatch):
    monkeypatch.setattr(readme_tables, "FOLDER", repository / "mega_cache")
    with pytest.raises(ScriptError, match="differ from results"):
        readme_tables.main(["--check"])
    readme_tables.main([])
    readme_tables.main(["--check"])
    write_result(repository, "cpu", synthetic.measurement(monkeypatch))
    with pytest.raises(ScriptError, match="mend it with"):
        readme_tables.main(["--check"])


def test_a_readme_with_half_its_markers_is_an_error():
    with pytest.raises(ScriptError, match="without"):
        readme_tables.filled(f"text {readme_tables.BEGIN} text", "tables")
