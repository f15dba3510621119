"""Prompts: the tokens that transformers would make, and text that is streamed as it comes."""

import io
import sys
from dataclasses import dataclass

import pytest
import torch

from common.cli import Console, PromptFlags
from common.errors import UsageError
from common.measure.measures import Stages, process_start
from common.measure.requests import serve_requests
from common.model.checkpoint import resolve_checkpoint
from common.model.target import Target
from common.model.tokenizer import load_codec, prompts_of, text_printer

PROMPT = "Write a short explanation of portable torch.compile caches."
TEXT = "Grüße, 🦙!"


@pytest.fixture(scope="module")
def tiny(shared_folders):
    return resolve_checkpoint("random:tiny", Console(quiet=True))


@pytest.fixture(scope="module")
def codec(tiny):
    return load_codec(tiny)


def test_tokens_are_those_of_transformers_bare_and_in_a_chat(tiny, codec):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.folder)
    assert codec.encode(PROMPT) == tokenizer.encode(PROMPT)
    messages = [{"role": "user", "content": PROMPT}]
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, tokenize=True
    )["input_ids"]
    assert codec.encode(PROMPT, chat=True) == list(expected)
    assert codec.decode(codec.encode(TEXT)) == TEXT


def test_each_line_of_a_file_is_a_request(codec, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    prompts = prompts_of(PromptFlags(prompts_file=file), codec, 0)
    assert [codec.decode(ids) for ids in prompts] == ["one", "two"]
    with pytest.raises(UsageError, match="nowhere"):
        prompts_of(PromptFlags(prompts_file=tmp_path / "nowhere"), codec, 0)


def test_a_dash_reads_stdin_and_requests_repeat_it(codec, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe")))
    prompts = prompts_of(PromptFlags(prompt="-", num_requests=3), codec, 0)
    assert [codec.decode(ids) for ids in prompts] == ["from a pipe"] * 3


def test_synthetic_prompts_follow_from_length_and_seed(codec):
    one, other = (prompts_of(PromptFlags(prompt_length=40), codec, seed)[0] for seed in (0, 1))
    assert len(one) == 40
    assert one == prompts_of(PromptFlags(prompt_length=40), codec, 0)[0] != other


def test_text_is_shown_as_it_comes_and_whole_characters_only(codec, capsys):
    show = text_printer(codec)
    seen = []
    for token_id in codec.encode(TEXT):
        show(token_id)
        seen.append(capsys.readouterr().out)
    show(None)
    assert len([part for part in seen if part]) == len(TEXT)  # a character at a time
    assert "".join(seen) + capsys.readouterr().out == TEXT + "\n"


def test_what_is_no_whole_text_is_shown_at_the_end(codec, capsys):
    show = text_printer(codec)
    token_ids = codec.encode("ab🦙")[:-1]
    for token_id in token_ids:
        show(token_id)
    show(None)
    assert capsys.readouterr().out == codec.decode(token_ids) + "\n"


@pytest.mark.parametrize(("show_completions", "times"), [(False, 1), (True, 3)])
def test_the_same_prompt_is_shown_once_unless_all_are_asked_for(
    tiny, codec, capsys, show_completions, times
):
    @dataclass(frozen=True)
    class Settings:
        prompt: PromptFlags

    def generate(prompt, on_token):
        for token_id in prompt:
            on_token(token_id)
        return prompt

    settings = Settings(PromptFlags(show_completions=show_completions))
    target = Target(tiny, torch.device("cpu"), torch.float32)
    prompts = [codec.encode("ab")] * 3
    stages, quiet = Stages(process_start()), Console(quiet=True)
    document = serve_requests(
        "any", "eager", settings, target, codec, prompts, generate, stages, None, quiet
    )
    assert capsys.readouterr().out == "ab\n" * times
    assert document["completions"] == ["ab"] * 3
    assert document["output"]["requests_identical"] is True
    assert list(document["stages"]) == ["prefill", "decode"]
