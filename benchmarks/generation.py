"""Time of greedy generation: one prompt at a time, in batches, by continuous batching, by a server.

  python benchmarks/generation.py

Continuous batching is transformers' own (`generate_batch`, its start included); the server is `transformers serve` with
continuous batching and its model at hand, asked by `cutlm generate --base_url`. Every response has `--max_new_tokens`
tokens: weights are random and nothing ends one."""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from measuring import (
    add_run_arguments,
    add_shape_arguments,
    describe_machine,
    describe_options,
    make_model,
    make_tokenizer,
    read_peak_bytes,
    take_turns,
    write_results,
)

ENGINES = ("one by one", "batched", "continuous", "server")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", metavar="FILE", help="whose instructions are the prompts (default: made up)")
    parser.add_argument("--num_prompts", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--bf16", action="store_true")
    add_shape_arguments(parser)
    add_run_arguments(parser, num_repeats=3)
    args = parser.parse_args()
    if args.variant:
        result = _generate(args) if args.variant != "server" else _ask_server(args)
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as folder:
        _prepare(args, Path(folder))
        results = take_turns(ENGINES, args.repeats, folder)
    num_tokens = args.num_prompts * args.max_new_tokens
    rows = []
    for engine, result in results.items():
        row = {"engine": engine}
        if "failed" in result:
            rows.append(row | {"seconds": result["failed"]})
            continue
        seconds = result["seconds"]
        rows.append(
            row | {"seconds": seconds, "tokens a second": num_tokens / seconds, "peak MB": result["peak"] / 1e6}
        )
    known = {"machine": describe_machine(), "options": describe_options(args), "results": results}
    write_results(rows, known, args.json)


def _prepare(args: argparse.Namespace, folder: Path) -> None:
    texts = _read_instructions(args)
    tokenizer = make_tokenizer(texts, args.vocab_size)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    model = make_model(args)
    # A logit of 0 is never the largest: no response ends before its time.
    model.lm_head.weight.data[tokenizer.eos_token_id] = 0
    model.save_pretrained(folder)
    rows = [{"instruction": text} for text in texts[: args.num_prompts]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read_instructions(args: argparse.Namespace) -> list[str]:
    if not args.records:
        return [f"Name the {index} largest cities of a country." * (1 + index % 4) for index in range(args.num_prompts)]
    from cutlm import load_records

    texts = [f"{record.instruction}\n{record.input}" for record in load_records(args.records)]
    if len(texts) < args.num_prompts:
        sys.exit(f"{args.records}: expected {args.num_prompts} records, got {len(texts)}; give --num_prompts")
    return texts


def _generate(args: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from cutlm.generation.local import Generated, Sampling, generate_batches
    from cutlm.prompting.encoding import Encoder

    folder = Path(args.folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    encoder = Encoder(tokenizer, "chat")
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    encoded = [encoder.encode_prompt(row["instruction"]) for row in rows]
    began = time.perf_counter()
    if args.variant == "continuous":
        config = GenerationConfig(
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        outputs = model.generate_batch(encoded, generation_config=config)
        num_tokens = sum(len(output.generated_tokens) for output in outputs.values())
        assert num_tokens == len(encoded) * args.max_new_tokens
    else:
        size = 1 if args.variant == "one by one" else args.batch_size
        generated = Generated()
        for _ in generate_batches(
            model, tokenizer, encoder, encoded, Sampling(args.max_new_tokens, 0.0, 1.0, 0, size), generated
        ):
            pass
        assert len(generated.unfinished) == len(encoded)
    return {"seconds": time.perf_counter() - began, "peak": read_peak_bytes()}


def _ask_server(args: argparse.Namespace) -> dict[str, Any]:
    """Time to ask a server that has its model at hand; the peak is the server's."""
    from cutlm.cli import main as run_cutlm

    folder = Path(args.folder)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    code = "from transformers.cli.transformers import main; main()"
    options = ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--continuous-batching"]
    server = subprocess.Popen(
        [sys.executable, "-c", code, *options],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    generate = ["generate", "--base_url", url, "--model", str(folder), "--max_new_tokens", str(args.max_new_tokens)]
    generate += ["--concurrency", str(args.batch_size), "--overwrite"]
    try:
        _wait_for(url, server)
        first = folder / "first.jsonl"
        first.write_text((folder / "prompts.jsonl").read_text().splitlines()[0] + "\n")
        out = str(folder / "out.json")
        assert run_cutlm([*generate, "--prompts", str(first), "--out", out]) == 0
        began = time.perf_counter()
        assert run_cutlm([*generate, "--prompts", str(folder / "prompts.jsonl"), "--out", out]) == 0
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "peak": _read_peak_of(server.pid)}
    finally:
        server.kill()
        server.wait()


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 180
    while True:
        try:
            with opener.open(f"{url}/health", timeout=5):
                return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit("transformers serve does not answer; pip install 'cutlm[serve]'")
            time.sleep(0.3)


def _read_peak_of(pid: int) -> int | None:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


if __name__ == "__main__":
    main()
