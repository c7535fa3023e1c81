"""What the models say while a judgment is written: the same as `cutlm blame`, and only for the last wording."""

import signal
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from chat_server import ChatServer
from commands import list_options, write_lines
from judged_rows import write_verdict
from studio_server import (
    browse,
    make_rows,
    press,
    read_lines,
    running,
    send,
    wait_for_response,
    wait_until,
    wait_until_saved,
)
from tiny import make_model, make_tokenizer, save_tiny_model

from cutlm.data.records import JudgedRecord
from cutlm.errors import UserError
from cutlm.flagging.detector import FlagSettings, blame_record
from cutlm.flagging.live import LiveScorer
from cutlm.flagging.scoring import load_scorer, score_rows
from cutlm.flagging.token_scores import read_token_scores
from cutlm.model.forward import SequenceScorer
from cutlm.prompting.encoding import Encoder
from cutlm.servers.client import Server
from cutlm.studio.drafts import DraftJudge
from cutlm.studio.scoring import Models, ModelSettings, choose_foreign
from cutlm.studio.session import Change
from cutlm.studio.training import Plan, Training, plan_training
from cutlm.studio.worker import BACKGROUND, URGENT, Worker
from cutlm.training.config import CUTConfig, DataArguments, ModelArguments, read_settings

FLAGGED = "[...document.querySelectorAll('.response .flagged')].map(e => e.textContent)"


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), chat=True)


def load(path, *more):
    return Models([str(path), *map(str, more)], ModelSettings(template="chat", device="cpu"))


def blame(path, record, threshold=1.1):
    tokenizer, score, fingerprint, _ = load_scorer(path, device="cpu")
    return blame_record(record, Encoder(tokenizer, "chat"), score, FlagSettings(threshold), fingerprint)[0]


def list_flagged(scores):
    output = scores.record.output
    pairs = zip(scores.spans, scores.is_flagged, strict=True)
    return [output[start:end] for (start, end), flag in pairs if flag]


# ---- Scoring one sequence after the other ----


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_shared_prefix_does_not_change_the_numbers(attention):
    model = make_model(50, attn_implementation=attention)
    scorer = SequenceScorer(model)
    prompts = [[1, 2, 3, 4], [1, 2, 3, 9, 8, 7], [1, 2, 3, 9, 8, 6], [5], [1, 2], [1, 2, 3, 9, 8, 7]]
    for prompt in prompts:
        for response in ([10, 11, 12], [10]):
            rows = [{"prompt_ids": prompt, "judged_prompt_ids": None, "response_ids": response}]
            ((scored,),) = score_rows(model, rows, show_progress=False)
            assert torch.allclose(scorer.score(prompt, response), scored[1], atol=1e-5)


def test_a_stopped_pass_leaves_a_cache_that_is_right():
    model = make_model(50)
    scorer, fresh = SequenceScorer(model), SequenceScorer(model)
    response = [10, 11, 12]
    scorer.score([1, 2, 3, 4], response)
    for num_layers in (0, 1):
        calls = iter([False] * num_layers + [True] * 9)
        with pytest.raises(CancelledError):
            scorer.score([1, 2, 3, 7, 7], response, lambda calls=calls: next(calls))
        for prompt in ([1, 2, 3, 7, 8], [1, 2, 3, 4]):
            assert torch.allclose(scorer.score(prompt, response), fresh.score(prompt, response), atol=1e-5)
    assert not [module for module in model.modules() if module._forward_pre_hooks]


def test_only_what_follows_the_common_prefix_is_run():
    model = make_model(50)
    scorer, num_run = SequenceScorer(model), []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, inputs, output: num_run.append(output.shape[1]))
    scorer.score([1, 2, 3, 4], [10, 11, 12])
    scorer.score([1, 2, 3, 9], [10, 11, 12])
    scorer.score([1, 2, 3, 9], [10, 11, 12])  # the states of the whole response are needed
    hook.remove()
    assert num_run == [6, 3, 3]


def test_live_scores_are_those_of_blame(model_path):
    tokenizer = make_tokenizer("bpe", chat=True)
    torch.manual_seed(0)
    models = load(model_path)
    scorer = models._sides[0].scorer
    record = JudgedRecord(instruction="Name a city.", output="Sydney is the \U0001f600 capital.")
    for judgment in ("S", "Sydney", "Sydney is wrong.", None, "Other."):
        judged = record.model_copy(update={"judgment": judgment})
        live, expected = scorer.score(judged), blame(model_path, judged)
        assert live.logps_without == pytest.approx(expected.logps_without, abs=2e-5)
        assert (live.logps_with is None) == (expected.logps_with is None)
        assert live.is_flagged == expected.is_flagged
        assert live.spans == expected.spans
    assert isinstance(scorer, LiveScorer)
    assert len(tokenizer)


# ---- The thread ----


def test_requests_that_were_overtaken_are_cancelled():
    started, go = threading.Event(), threading.Event()

    def run_long(is_stopped):
        started.set()
        assert go.wait(10)
        if is_stopped():
            raise CancelledError
        return "long"

    with Worker() as worker:
        running_job = worker.submit(run_long, "tab score")
        assert started.wait(10)
        waiting = worker.submit(lambda _: "waiting", "tab score")
        last = worker.submit(lambda _: "last", "tab score")
        other = worker.submit(lambda _: "other", "another tab")
        go.set()
        assert (last.future.result(10), other.future.result(10)) == ("last", "other")
        for job in (running_job, waiting):
            with pytest.raises(CancelledError):
                job.future.result(10)


def test_urgent_work_interrupts_other_work_that_then_goes_on():
    order, started = [], threading.Event()

    def run_in_background(is_stopped):
        order.append("background")
        started.set()
        if len(order) == 1:
            while not is_stopped():
                pass
            raise CancelledError
        return "done"

    def fail(is_stopped):
        raise ValueError("of the job")

    with Worker() as worker:
        background = worker.submit(run_in_background, priority=BACKGROUND)
        assert started.wait(10)
        with pytest.raises(ValueError, match="of the job"):  # the thread goes on
            worker.submit(fail, priority=URGENT).future.result(10)
        assert background.future.result(10) == "done"
    assert order == ["background"] * 2


def test_foreign_judgments_differ_from_the_own_one():
    judgments = {0: "Wrong.", 1: "wrong. ", 2: "Too long.", 3: "Rude.", 4: "too long.", 5: "Off topic.", 6: "Slow."}
    chosen = choose_foreign(judgments, 0, "key")
    assert len(chosen) == len({text.casefold() for text in chosen}) == 3
    assert not {text.strip().casefold() for text in chosen} & {"wrong."}
    assert chosen == choose_foreign(judgments, 0, "key")
    assert choose_foreign({0: "Wrong."}, 0, "key") == []


# ---- In the browser ----


def test_flags_follow_the_wording_and_the_threshold_and_can_be_removed(browser, tmp_path, model_path):
    rows = make_rows(2)
    with running(tmp_path, rows, models=load(model_path)) as server, browse(browser, server.access.url) as page:
        page.fill("#judgment", "Too short.")
        press(page, "w", "Control+Enter")
        wait_for_response(page, 2)
        record = JudgedRecord(**rows[1])
        for judgment in ("It is wrong.", "It is wrong. The capital is Canberra."):
            page.fill("#judgment", judgment)
            expected = list_flagged(blame(model_path, record.model_copy(update={"judgment": judgment})))
            assert len(expected) > 2
            wait_until(page, FLAGGED, expected)
        page.wait_for_selector("#reaction .gauge")
        assert "1 judgment of other responses" in page.inner_text("#reaction")
        judged = record.model_copy(update={"judgment": judgment})
        for _ in range(6):
            press(page, "Escape", "]")
        threshold = float(page.inner_text("#threshold"))
        assert page.evaluate(FLAGGED) == list_flagged(blame(model_path, judged, threshold))
        for _ in range(6):
            press(page, "[")
        assert page.evaluate(FLAGGED) == expected
        page.locator(".response .flagged").nth(1).click()  # removes the flag
        assert page.evaluate(FLAGGED) == [expected[0], *expected[2:]]
        first = page.locator(".response .flagged").first
        press(page, "r", "Home", *["ArrowRight"] * int(first.get_attribute("data-piece")))
        press(page, "Enter")
        assert page.evaluate(FLAGGED) == expected[2:]
        press(page, "Enter")  # puts it back
        assert page.evaluate(FLAGGED) == [expected[0], *expected[2:]]
        wait_until_saved(page)
        ((start, end),) = server.studio.session.get_verdict(1).unflagged_spans
        assert rows[1]["output"][start:end] == expected[1].strip()


def test_the_flag_of_one_part_of_a_word_can_be_put_back(browser, tmp_path, model_path):
    with running(tmp_path, make_rows(1), models=load(model_path)) as server, browse(browser, server.access.url) as page:
        page.fill("#judgment", "It is wrong.")
        page.wait_for_selector(".response .flagged")
        # Two flagged tokens without a space between them.
        first = page.evaluate(
            "[...document.querySelectorAll('.response .t')].findIndex(e => e.classList.contains('flagged')"
            " && e.nextSibling?.classList?.contains('flagged'))"
        )
        tokens = page.locator(".response .t")
        for place in (first, first + 1, first + 1):
            tokens.nth(place).click()
        kinds = [tokens.nth(place).get_attribute("class").split() for place in (first, first + 1)]
        assert ["unflagged" in kind for kind in kinds] == [True, False]
        wait_until_saved(page)
        ((start, end),) = server.studio.session.get_verdict(0).unflagged_spans
        assert make_rows(1)[0]["output"][start:end] == tokens.nth(first).inner_text()


def test_a_response_that_is_too_long_says_so(browser, tmp_path, model_path):
    rows = [{"instruction": "Hi.", "output": "word " * 3000}]
    with running(tmp_path, rows, models=load(model_path)) as server, browse(browser, server.access.url) as page:
        wait_until(page, "document.getElementById('scoring').textContent.startsWith('not scored')")
        press(page, "s")
        wait_until_saved(page)


def test_before_and_after_training_both_are_shaded(browser, tmp_path, model_path, tmp_path_factory):
    after = save_tiny_model(tmp_path_factory.mktemp("after"), chat=True, seed=1)
    rows = make_rows(1)
    with running(tmp_path, rows, models=load(model_path, after)) as server, browse(browser, server.access.url) as page:
        page.fill("#judgment", "It is wrong.")
        wait_until(page, "document.querySelectorAll('.response').length === 2")
        page.wait_for_selector(".response .flagged")
        record = JudgedRecord(**rows[0], judgment="It is wrong.")
        for place, path in enumerate((model_path, after)):
            flagged = page.locator(".response").nth(place).locator(".flagged").all_text_contents()
            assert flagged == list_flagged(blame(path, record))
        press(page, "Escape", "r", "Shift+ArrowRight", "m")
        assert page.locator(".response").nth(1).locator(".wrong").count() > 0


def test_the_model_of_a_further_run_is_shaded(browser, tmp_path, model_path, tmp_path_factory):
    first, second = (save_tiny_model(tmp_path_factory.mktemp("after"), chat=True, seed=seed) for seed in (1, 2))
    rows, models = make_rows(1), load(model_path, first)
    with running(tmp_path, rows, models=models) as server, browse(browser, server.access.url) as page:
        studio, shown = server.studio, FLAGGED.replace(".response .flagged", ".response:last-child .flagged")
        page.fill("#judgment", "It is wrong.")
        wait_until(page, "document.querySelectorAll('.response').length === 2")
        record = JudgedRecord(**rows[0], judgment="It is wrong.")
        earlier, later = (list_flagged(blame(path, record)) for path in (first, second))
        assert earlier != later
        wait_until(page, shown, earlier)
        models.add_trained(second)
        run = {"command": "", "losses": [], "lines": [], "exit_code": 0, "folder": "trained-1"}
        studio.training = SimpleNamespace(describe=lambda: run, is_running=False, close=lambda: None)
        studio._comparison = []
        studio.broadcast.send("training")
        wait_until(page, shown, later)


def test_train_on_this(browser, tmp_path, model_path):
    rows = make_rows(4)
    with running(tmp_path, rows, models=load(model_path)) as server, browse(browser, server.access.url) as page:
        page.fill("#judgment", "It is wrong.")
        page.wait_for_selector(".response .flagged")
        num_flagged = len(page.evaluate(FLAGGED))
        page.locator(".response .flagged").first.click()
        press(page, "w", "Control+Enter")
        wait_for_response(page, 2)
        press(page, "Escape", "s")
        wait_for_response(page, 3)
        press(page, "[")  # the flags are those that the page shows at this threshold
        threshold = float(page.inner_text("#threshold"))
        press(page, "3")
        page.select_option("#detector", "frozen")
        wait_until(page, "document.querySelector('#command code').textContent.includes('scores.jsonl')")
        assert f"--model_name_or_path {model_path} --template chat" in page.inner_text("#command")
        page.click("#start")
        wait_until(page, "document.querySelector('#losses path') !== null", timeout=100)
        page.wait_for_selector("#comparison table", timeout=100_000)
        cells = page.locator("#comparison tbody tr").first.locator("th, td").all_inner_texts()
        assert cells[0] == "tokens of satisfactory responses"
        assert cells[2] != cells[3]
        scores = read_token_scores(tmp_path / "records.jsonl.scores.jsonl")
        flags = blame(model_path, JudgedRecord(**rows[0], judgment="It is wrong."), threshold).is_flagged
        assert (scores[0].threshold, sum(flags) > num_flagged) == (threshold, True)
        assert [sum(one.is_flagged) for one in scores] == [sum(flags) - 1, 0]
        assert server.studio.training.exit_code == 0
        assert (tmp_path / "records.jsonl.trained-1" / "adapter_config.json").exists()
        press(page, "1")
        wait_until(page, "document.querySelectorAll('.response').length === 2")
        assert server.studio.plan("spans", 1.5).arguments[-1].endswith("trained-2")


def test_training_has_the_prompts_of_the_page(tmp_path, model_path):
    options = {"chat_template_kwargs": {"enable_thinking": False}, "template_date": "2026-11-26", "max_length": 300}
    models = load(model_path)
    models._settings = ModelSettings(template="chat", **options)
    plan = plan_training(tmp_path / "out.jsonl", models, "current", 1.1, None)
    config = read_settings((DataArguments, ModelArguments, CUTConfig), None, plan.arguments[1:]).parts[2]
    assert {name: getattr(config, name) for name in options} == options
    assert config.template == "chat"


def test_a_double_click_starts_one_run(tmp_path, model_path):
    with running(tmp_path, make_rows(1), models=load(model_path)) as server:
        studio, both, plans = server.studio, threading.Barrier(2), []
        studio.session.save(0, Change(state="satisfactory", revision=0, tab="test"))

        def wait_for_other():
            with suppress(threading.BrokenBarrierError):
                both.wait(1)

        def start(plan):
            plans.append(plan)
            studio.training = SimpleNamespace(is_running=True, close=lambda: None)

        studio.session.write, write, studio._start = wait_for_other, studio.session.write, start
        with ThreadPoolExecutor(2) as pool:
            clicks = [pool.submit(studio.start_training, "current", 1.1) for _ in range(2)]
            problems = [click.exception() for click in clicks]
        studio.session.write = write
        assert len(plans) == 1
        assert sorted(type(problem) for problem in problems if problem) == [UserError]


def test_the_page_hears_of_a_gpu_without_memory(tmp_path, model_path):
    with running(tmp_path, make_rows(1), models=load(model_path)) as server:
        studio, ended = server.studio, threading.Event()
        studio.session.save(0, Change(state="satisfactory", revision=0, tab="test"))

        def fail(*_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        studio.models.write_scores = fail
        studio.broadcast.send = lambda kind: ended.set() if studio._preparing is None else None
        studio.start_training("frozen", 1.1)
        assert ended.wait(20)
        assert "CUDA out of memory" in studio.describe_training()["problem"]


def test_a_run_that_fails_says_so(tmp_path, model_path):
    with running(tmp_path, make_rows(1), models=load(model_path)) as server:
        studio, access = server.studio, server.access
        assert send(access, "POST", "/api/training", {"detector": "current", "threshold": 1.1})[0] == 422  # no record
        change = {"state": "satisfactory", "revision": 0, "tab": "test"}
        assert send(access, "PUT", "/api/items/0", change)[0] == 200
        studio.config = str(tmp_path / "missing.yaml")
        assert send(access, "POST", "/api/training", {"detector": "current", "threshold": 1.1})[0] == 200
        studio.training._thread.join(60)
        status, content, _ = send(access, "GET", "/api/training")
        assert (status, content["run"]["exit_code"], content["comparison"]) == (200, 2, None)
        assert content["run"]["lines"]


def test_a_run_saves_when_the_studio_ends(tmp_path, model_path):
    data = write_lines(tmp_path / "records.jsonl", [row | {"judgment": "It is wrong."} for row in make_rows(4)])
    folder = tmp_path / "trained"
    settings = {"model_name_or_path": model_path, "data": data, "output_dir": folder, "max_steps": 100_000}
    settings |= {"logging_steps": 1, "save_steps": 100_000, "report_to": "none", "use_cpu": "true", "template": "chat"}
    training = Training(Plan(["train", *list_options(**settings)], folder, None), lambda: None)
    while not training.losses and training.is_running:
        time.sleep(0.1)
    assert training.is_running, training.lines
    training.close()
    assert training.exit_code not in (0, -signal.SIGKILL, -signal.SIGTERM)
    assert len(list(folder.glob("checkpoint-*"))) == 1


# ---- Drafts by a judge ----


def test_drafts_are_corrected_by_a_person(browser, tmp_path, server: ChatServer):
    rows = make_rows(3)
    answers = {
        "City 0": write_verdict("City 0 is wrong.", "City 0"),
        "City 1": write_verdict(None),
        "City 2": "nonsense",
    }
    server.reply = lambda prompt: next(answer for name, answer in answers.items() if name in prompt)
    judge = DraftJudge(Server(server.url, "judge-9", max_retries=0), tmp_path / "cache.sqlite")
    with running(tmp_path, rows, judge=judge) as studio, browse(browser, studio.access.url) as page:
        page.wait_for_selector("#draft:not([hidden])")
        assert page.inner_text("#draft-text") == "City 0 is wrong."
        assert page.inner_text("#draft-source") == "judge-9"
        assert studio.read_records() == []
        press(page, "e")
        page.keyboard.type(" It is City 9.")
        press(page, "Control+Enter")
        wait_for_response(page, 2)
        page.wait_for_selector("#draft:not([hidden])")
        press(page, "Escape", "a")
        wait_for_response(page, 3)
        assert page.is_hidden("#draft")
        wait_until_saved(page)
        records = studio.read_records()
        assert [row["judgment"] for row in records] == ["City 0 is wrong. It is City 9.", None]
        assert records[0]["wrong_spans"] == [[0, 6]]
    assert len(read_lines(studio.out)) == 2
