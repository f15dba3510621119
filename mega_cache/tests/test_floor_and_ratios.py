"""The floor of a start, and the ratios that stand on it."""

import json
import sys

import pytest
import synthetic
from helpers import FOLDER, run_command, succeeded

from common.presets import CONFIGS, folder_name, parameter_count
from common.ratios import seconds_per_token
from common.tables import benchmark_table


@pytest.fixture(scope="module")
def floor_result(presets_folder, tmp_path_factory):
    """The result of one real floor process, which also says what it had imported."""
    from common.console import Console
    from common.presets import materialize

    preset = "random:tiny"
    materialize(CONFIGS[preset], presets_folder / folder_name(preset), Console(quiet=True))
    path = tmp_path_factory.mktemp("floor") / "floor.json"
    flags = ["--model-id=random:tiny", "--device=cpu", "--quiet", f"--json={path}"]
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['floor.py', *{flags!r}]\n"
        f"runpy.run_path({str(FOLDER / 'common/floor.py')!r}, run_name='__main__')\n"
        "assert 'torch' in sys.modules\n"
        "late = {'transformers', 'torch._dynamo', 'tokenizers'} & set(sys.modules)\n"
        "assert not late, late\n"
    )
    succeeded(run_command([sys.executable, "-c", program]))
    return json.loads(path.read_text())


def test_the_floor_is_the_moment_when_the_bytes_are_there(floor_result):
    stages, metrics = floor_result["stages"], floor_result["metrics"]
    assert list(stages) == ["interpreter and imports", "device", "weights"]
    assert sum(stages.values()) == pytest.approx(metrics["ttft_cold_start_seconds"], abs=0.01)
    assert metrics["tokens_per_second_all"] is None  # there are no tokens: unknown, not 0
    assert floor_result["output"] is None


def test_the_floor_knows_bytes_and_bandwidth(floor_result):
    config, found = CONFIGS["random:tiny"], floor_result["bandwidth"]
    assert found["checkpoint_bytes"] == found["weight_bytes_per_token"]
    assert found["weight_bytes_per_token"] == 4 * parameter_count(config)
    assert found["kv_bytes_per_slot"] == 2 * 4 * 2 * 32 * 4  # K, V; layers; heads; dim; bytes
    assert 1e8 < found["copy_bytes_per_second"] < 1e13


def test_an_untied_embedding_table_is_not_read_whole(tmp_path):
    import torch
    from safetensors.torch import save_file

    from common.floor import bytes_per_token

    names = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
    save_file({name: torch.zeros(10, 4) for name in names}, tmp_path / "model.safetensors")
    config = {"num_attention_heads": 4, "hidden_size": 64, "num_hidden_layers": 3}
    for tied in (True, False):  # a tied checkpoint may hold the table under both names
        found = bytes_per_token(tmp_path, config | {"tie_word_embeddings": tied}, 2)
        assert found["weight_bytes_per_token"] == 2 * 40 * 2
    assert found["kv_bytes_per_slot"] == 2 * 3 * 4 * 16 * 2


def test_start_is_a_multiple_of_the_floor_and_decode_a_share_of_bandwidth(monkeypatch):
    runs = {"eager": synthetic.run(rest=0.74, ttft=0.1), "floor": synthetic.floor_run(seconds=1.8)}
    summary = synthetic.benchmark(monkeypatch, runs)["summary"]
    assert summary["floor"]["ttft_cold_over_floor"]["mean"] == pytest.approx(1.0)
    assert summary["eager"]["ttft_cold_over_floor"]["mean"] == pytest.approx(3.6 / 1.8)
    assert summary["eager"]["ttft_cold_over_floor"]["n"] == 2
    assert summary["eager"]["decode_seconds_per_token"]["mean"] == pytest.approx(0.64 / 64)
    needed = synthetic.WEIGHT_BYTES + (100 + 65 / 2) * synthetic.SLOT_BYTES
    share = needed / 0.01 / synthetic.COPY_RATE
    assert summary["eager"]["decode_bandwidth_share"]["mean"] == pytest.approx(share)
    assert summary["floor"]["decode_bandwidth_share"] is None


def test_without_the_floor_the_ratios_are_unknown(monkeypatch):
    document = synthetic.benchmark(monkeypatch, {"eager": synthetic.run()})
    assert document["summary"]["eager"]["ttft_cold_over_floor"] is None
    assert document["summary"]["eager"]["decode_bandwidth_share"] is None
    assert "floor" not in benchmark_table(document)


def test_one_request_has_no_steady_state():
    assert seconds_per_token(synthetic.run(count=1)["requests"]) is None
    assert seconds_per_token([]) is None


def test_the_sweep_measures_the_second_request(monkeypatch):
    runs = {"eager": synthetic.run(first=9.0, rest=0.74, ttft=0.1), "floor": synthetic.floor_run()}
    document = synthetic.benchmark(monkeypatch, runs, lengths=(8, 512))
    lengths = [(entry["mode"], entry["prompt_length"]) for entry in document["sweep"]]
    assert lengths == [("eager", 8), ("eager", 512)]
    for entry in document["sweep"]:
        assert entry["seconds_per_token"] == pytest.approx(0.01)
        assert entry["ttft_seconds"] == 0.1
    assert "| 512 " in benchmark_table(document)


def test_a_sweep_repeats_the_run_at_every_length_but_not_the_floor():
    import benchmark_llama_modes as script

    from common.cli import parse_flags
    from common.sweep import sweep_commands

    (settings,) = parse_flags("", (script.RunSettings,), [])
    commands = sweep_commands(script.command, settings, ("eager", "floor"), (8, 128))
    assert list(commands) == [("eager", 8), ("eager", 128)]
    assert "--prompt-length=128" in commands["eager", 128]
    assert "--num-requests=2" in commands["eager", 128]
