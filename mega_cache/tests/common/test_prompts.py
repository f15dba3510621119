"""Prompts: the tokens that transformers would make, and text that is streamed as it comes."""

import io
import os
import sys
from pathlib import Path

import pytest

from common.cli import Console, Flags, PromptFlags, SharedFlags
from common.errors import UsageError
from common.measure.measures import Stages, process_start
from common.measure.requests import serve_requests
from common.model.checkpoint import resolve_checkpoint
from common.model.conversation import converse, wants_conversation
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


def test_newlines_alone_part_prompts_and_a_byte_order_mark_is_none(codec, tmp_path):
    file = tmp_path / "prompts.txt"
    lines = ["one\u2028still", "two\x85still", "three\fstill\x1c", "  four  "]
    file.write_bytes(("\ufeff" + "\r\n".join(lines) + "\n\n").encode())
    prompts = prompts_of(PromptFlags(prompts_file=file), codec, 0)
    assert [codec.decode(ids) for ids in prompts] == lines


def test_bytes_that_are_no_text_are_a_usage_error(codec, tmp_path, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"caf\xe9\n")
    with pytest.raises(UsageError, match=r"prompts\.txt.*utf-8"):
        prompts_of(PromptFlags(prompts_file=file), codec, 0)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    with pytest.raises(UsageError, match="stdin.*utf-8"):
        prompts_of(PromptFlags(prompt="-"), codec, 0)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="closed"):
        prompts_of(PromptFlags(prompt="-"), codec, 0)
    with pytest.raises(UsageError, match="UTF-8"):  # as Python hands such an argument over
        codec.encode("caf\udce9")


def test_a_conversation_keeps_its_turns_until_the_end_of_input(codec, monkeypatch, capsys):
    answers, prompts = ["Hi there", "Two"], []

    def generate(prompt, on_token):
        prompts.append(codec.tokenizer.decode(prompt, skip_special_tokens=False))
        ids = [*codec.encode(answers[len(prompts) - 1]), 259]
        for one in ids:
            on_token(one)
        return ids

    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\nAnd?\n"))
    converse(codec, generate)
    assert capsys.readouterr().out == "Hi there\nTwo\n"
    first = codec.render([{"role": "user", "content": "Hello"}])
    turns = [("user", "Hello"), ("assistant", "Hi there"), ("user", "And?")]
    second = codec.render([{"role": role, "content": text} for role, text in turns])
    assert prompts == [first, second]


def test_a_conversation_is_a_chat_on_a_terminal_without_a_prompt(monkeypatch):
    leader, follower = os.openpty()
    terminal = os.fdopen(follower, closefd=False)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert wants_conversation(PromptFlags(chat=True))
    with pytest.raises(UsageError, match="a conversation has none"):
        wants_conversation(PromptFlags(chat=True), Path("result.json"))
    assert not wants_conversation(PromptFlags())
    assert not wants_conversation(PromptFlags(chat=True, prompt="Hello"))
    assert not wants_conversation(PromptFlags(chat=True, prompt_length=3))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert not wants_conversation(PromptFlags(chat=True))
    os.close(leader), os.close(follower)


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
    class Settings(Flags):
        prompt: PromptFlags
        shared: SharedFlags

    def generate(prompt, on_token):
        for token_id in prompt:
            on_token(token_id)
        return prompt

    settings = Settings(PromptFlags(show_completions=show_completions))
    target = Target(tiny, "cpu", "float32")
    prompts = [codec.encode("ab")] * 3
    stages, quiet = Stages(process_start()), Console(quiet=True)
    document = serve_requests(
        "any", "eager", settings, target, codec, prompts, generate, stages, None, quiet
    )
    assert capsys.readouterr().out == "ab\n" * times
    assert document["completions"] == ["ab"] * 3
    assert document["output"]["requests_identical"] is True
    assert list(document["stages"]) == ["prefill", "decode"]
