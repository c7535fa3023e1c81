"""The judgment as a system message: where templates render it, and runs that keep to one role."""

from pathlib import Path
from typing import Any

import pytest
from commands import ON_CPU, list_options, write_lines
from tiny import CHATML, make_tokenizer, save_tiny_model

from cutlm.cli import main
from cutlm.data.conversations import Conversation
from cutlm.errors import ConfigError, DataError
from cutlm.flagging.token_scores import read_token_scores
from cutlm.prompting.encoding import Encoder
from cutlm.prompting.templates import fingerprint_template
from cutlm.training.checkpoints import SETTINGS_FILE

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Name a colour."},
]
JUDGMENT = "It is no colour."
REQUEST = f"Write a response that this judgment fits:\n{JUDGMENT}"
LOOP = "{% for message in messages %}"
# Templates that render system messages only at the start: the others are dropped, refused, moved or renamed.
DROPPED = CHATML.replace(LOOP, LOOP + "{% if message['role'] != 'system' or loop.first %}").replace(
    "{% endfor %}", "{% endif %}{% endfor %}"
)
REFUSED = CHATML.replace(
    LOOP, LOOP + "{% if message['role'] == 'system' and not loop.first %}{{ raise_exception('no') }}{% endif %}"
)
MOVED = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\n' }}{% endif %}"
    "{% endfor %}" + DROPPED.replace(" or loop.first", "")
)
RENAMED = CHATML.replace(
    "{{ message['role'] }}", "{{ 'user' if message['role'] == 'system' and not loop.first else message['role'] }}"
)
NONE = DROPPED.replace(" or loop.first", "")


def make_encoder(template: str = CHATML, kind: str = "bpe") -> Encoder:
    tokenizer = make_tokenizer(kind, chat=True)
    tokenizer.chat_template = ("{{ bos_token }}" if tokenizer.chat_template.startswith("{{ bos") else "") + template
    return Encoder(tokenizer, "chat", judgment_role="system")


@pytest.mark.parametrize("kind", ["bpe", "bpe_bos", "llama", "unigram"])
def test_both_contexts_share_the_whole_conversation(kind: str) -> None:
    encoder = make_encoder(kind=kind)
    conversation = Conversation(tuple(TURNS))
    plain, judged = (encoder.render(conversation, judgment).text for judgment in (None, JUDGMENT))
    tail = "<|im_start|>assistant\n"
    assert judged == f"{plain.removesuffix(tail)}<|im_start|>system\n{REQUEST}<|im_end|>\n{tail}"
    ids, judged_ids = (encoder.encode_prompt(conversation, judgment) for judgment in (None, JUDGMENT))
    num_tail = len(encoder._tokenize(tail))
    assert judged_ids[: len(ids) - num_tail] == ids[:-num_tail]


@pytest.mark.parametrize("template", [DROPPED, REFUSED, MOVED, RENAMED])
def test_the_judgment_continues_the_system_prompt_where_no_later_message_is_rendered(template: str) -> None:
    encoder = make_encoder(template)
    text = encoder.render(Conversation(tuple(TURNS)), JUDGMENT).text
    changed = [{"role": "system", "content": f"Be brief.\n\n{REQUEST}"}, *TURNS[1:]]
    assert text == encoder.render(Conversation(tuple(changed))).text
    text = encoder.render("Name a colour.", JUDGMENT).text
    assert text.index(REQUEST) < text.index("Name a colour.")
    assert text.endswith(encoder.render("Name a colour.").text[-40:])


def test_a_developer_message_is_a_system_prompt() -> None:
    turns = [{"role": "developer", "content": "Be brief."}, *TURNS[1:]]
    text = make_encoder(DROPPED).render(Conversation(tuple(turns)), JUDGMENT).text
    assert text.startswith(f"<|im_start|>developer\nBe brief.\n\n{REQUEST}<|im_end|>\n")


@pytest.mark.parametrize(
    "template", [NONE, CHATML.replace("{{ message['role'] }}", "{{ 'assistant' if loop.index0 % 2 else 'user' }}")]
)
def test_a_template_without_system_messages_is_refused_in_one_sentence(template: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_encoder(template)
    (problem,) = error.value.problems
    assert problem.startswith("judgment_role: system:")


def test_a_conversation_from_which_the_judgment_is_left_out_is_named() -> None:
    only_short = CHATML.replace(LOOP, LOOP + "{% if message['role'] != 'system' or messages|length < 4 %}").replace(
        "{% endfor %}", "{% endif %}{% endfor %}"
    )
    encoder = make_encoder(only_short)
    assert REQUEST in encoder.render("Name a colour.", JUDGMENT).text
    with pytest.raises(ConfigError):
        encoder.render(Conversation(tuple(TURNS)), JUDGMENT)


def test_control_tokens_in_the_judgment_stay_text() -> None:
    encoder = make_encoder()
    plain = encoder.encode_prompt("Name a colour.", "It is no colour.")
    spelled = encoder.encode_prompt("Name a colour.", "It is <|im_end|> no colour.")
    assert spelled.count(encoder.end_of_turn_id) == plain.count(encoder.end_of_turn_id)


def test_the_role_is_part_of_the_fingerprint() -> None:
    tokenizer = make_tokenizer("bpe", chat=True)
    user, system = Encoder(tokenizer, "chat"), Encoder(tokenizer, "chat", judgment_role="system")
    assert user.fingerprint != system.fingerprint
    assert user.fingerprint == fingerprint_template("chat", [CHATML], "user")
    with pytest.raises(ConfigError):
        Encoder(tokenizer, "alpaca", judgment_role="system")


# ---- Commands ----

RECORDS: list[dict[str, Any]] = [
    {
        "messages": [
            *TURNS[:-1],
            {"role": "user", "content": f"Name {number}."},
            {"role": "assistant", "content": "No."},
        ],
        "judgment": f"It is not {number}." if number % 2 else None,
    }
    for number in range(4)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), chat=True)


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("scores")
    data, out = write_lines(folder / "records.jsonl", RECORDS), folder / "scores.jsonl"
    options = list_options(model=model, data=data, out=out, template="chat", judgment_role="system", device="cpu")
    assert main(["blame", *options]) == 0
    return out


def train(model: Path, data: Path, out: Path, **options: Any) -> int:
    settings = ON_CPU | {"model_name_or_path": model, "data": data, "output_dir": out, "template": "chat"}
    return main(["train", *list_options(**settings | {"max_steps": 1} | options)])


def test_scores_of_another_role_are_refused(
    model: Path, scores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {row.template.split()[-1] for row in read_token_scores(scores)} == {"system"}
    assert train(model, scores, tmp_path / "user") == 2
    assert "--judgment_role system" in capsys.readouterr().err
    assert train(model, scores, tmp_path / "system", judgment_role="system") == 0
    assert "judgment_role: system" in (tmp_path / "system" / SETTINGS_FILE).read_text()


def test_a_run_of_another_role_is_not_resumed(model: Path, scores: Path, tmp_path: Path) -> None:
    data = scores.with_name("records.jsonl")
    settings: dict[str, Any] = {"judgment_role": "system", "max_steps": 2, "save_steps": 1}
    assert train(model, data, tmp_path, **settings) == 0
    resumed = settings | {"max_steps": 3, "resume_from_checkpoint": "true"}
    assert train(model, data, tmp_path, **resumed | {"judgment_role": "user"}) == 2
    assert train(model, data, tmp_path, **resumed) == 0


def test_the_role_needs_the_chat_template(model: Path, scores: Path, tmp_path: Path) -> None:
    data = scores.with_name("records.jsonl")
    assert train(model, data, tmp_path / "out", template="alpaca", judgment_role="system") == 2
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"instruction": "Name a colour."}])
    options = list_options(model=model, prompts=prompts, out=tmp_path / "out.jsonl", judgment_role="system")
    assert main(["generate", *options]) == 2  # without --judgment
    assert main(["generate", *options, "--judgment", "Perfect.", "--max_new_tokens", "3", "--device", "cpu"]) == 0


def test_records_are_named_that_the_template_refuses(model: Path, tmp_path: Path) -> None:
    from cutlm.data.records import JudgedRecord
    from cutlm.prompting.rows import encode_records

    encoder = make_encoder()
    record = JudgedRecord.model_validate(RECORDS[1])
    encoder._chat._dated_sources = [NONE]  # type: ignore[union-attr]
    with pytest.raises(DataError) as error:
        encode_records([record], ["a:1"], encoder, 1000)
    assert error.value.problems[0].startswith("a:1: ")
