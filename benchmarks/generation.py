"""Measure greedy generation: one prompt at a time, in batches, with continuous batching, and from a server.

  python benchmarks/generation.py

Continuous batching is that of transformers (`generate_batch`, including its start). The server is `transformers serve`
with continuous batching and a loaded model, called by `cutlm generate --base_url`. Every response has
`--max_new_tokens` tokens, because the random model never ends one."""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from common import add_shape_arguments, make_model, make_parser, make_tokenizer, read_peak_bytes, run_benchmark

ENGINES = ("one by one", "batched", "continuous", "server")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--records", metavar="FILE", help="records with instructions (default: synthetic)")
    parser.add_argument("--num_prompts", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--bf16", action="store_true")
    add_shape_arguments(parser)
    args = parser.parse_args()
    num_tokens = args.num_prompts * args.max_new_tokens

    def summarize(results: dict[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        rows = []
        for engine, result in results.items():
            row = {"engine": engine, "seconds": result.get("failed")}
            if "failed" not in result:
                seconds = result["seconds"]
                row |= {"seconds": seconds, "tokens a second": num_tokens / seconds, "peak MB": result["peak"] / 1e6}
            rows.append(row)
        return rows, {}

    run_benchmark(args, ENGINES, _run, summarize, prepare=_prepare)


def _run(args: argparse.Namespace) -> dict[str, Any]:
    return _ask_server(args) if args.variant == "server" else _generate(args)


def _prepare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    texts = _read_instructions(args)
    tokenizer = make_tokenizer(texts, args.vocab_size)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    model = make_model(args)
    # A logit of 0 is never the largest, so no response ends early.
    model.lm_head.weight.data[tokenizer.eos_token_id] = 0
    model.save_pretrained(folder)
    rows = [{"instruction": text} for text in texts[: args.num_prompts]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {}


def _read_instructions(args: argparse.Namespace) -> list[str]:
    if not args.records:
        return [f"Name the {index} largest cities of a country." * (1 + index % 4) for index in range(args.num_prompts)]
    from cutlm import load_records

    texts = [f"{record.instruction}\n{record.input}" for record in load_records(args.records)]
    if len(texts) < args.num_prompts:
        sys.exit(f"{args.records}: expected {args.num_prompts} records, got {len(texts)}; set --num_prompts")
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
    """Measure a server that has loaded its model; the peak is the server's."""
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
    generate = ["generate", "--base_url", f"{url}/v1", "--model", str(folder)]
    generate += ["--max_new_tokens", str(args.max_new_tokens)]
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
                sys.exit("transformers serve does not respond; run: pip install 'cutlm[serve]'")
            time.sleep(0.3)


def _read_peak_of(pid: int) -> int | None:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


if __name__ == "__main__":
    main()
