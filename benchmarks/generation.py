"""Measure greedy generation: by `cutlm generate`, by transformers, and from a server.

  python benchmarks/generation.py
  python benchmarks/generation.py --model MODEL --records records.jsonl --num_prompts 128 --max_new_tokens 256 \\
      --engines cutlm padded

    one by one   `cutlm generate` with one prompt at a time
    cutlm        `cutlm generate`: finished rows leave the batch and new prompts enter
    padded       transformers' `generate`: batches of prompts of similar length, each until its longest response ends
    continuous   transformers' `generate_batch`, including its start
    server       `transformers serve` with a loaded model, called by `cutlm generate --base_url`

Without --model, every response has `--max_new_tokens` tokens, because the random model never ends one."""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import add_shape_arguments, make_model, make_parser, make_tokenizer, read_peak_bytes, run_benchmark

ENGINES = ("one by one", "cutlm", "padded", "continuous", "server")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--model", metavar="DIR", help="a model with a chat template (default: one with random weights)"
    )
    parser.add_argument("--records", metavar="FILE", help="records with instructions (default: synthetic)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--num_prompts", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--bf16", action="store_true")
    add_shape_arguments(parser)
    args = parser.parse_args()
    run_benchmark(args, args.engines, _run, summarize, prepare=_prepare)


def summarize(results: dict[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = []
    for engine, result in results.items():
        row = {"engine": engine, "seconds": result.get("failed")}
        if "failed" not in result:
            seconds, num_tokens = result["seconds"], result["num_tokens"]
            row |= {"seconds": seconds, "tokens": num_tokens, "tokens a second": num_tokens / seconds}
            row |= {"peak MB": result["peak"] / 1e6}
        rows.append(row)
    return rows, compare(results)


def compare(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ratios of `cutlm generate` to padded batches of transformers."""
    ours, padded = (results.get(name, {"failed": ""}) for name in ("cutlm", "padded"))
    if "failed" in ours or "failed" in padded:
        return {}
    speeds = [result["num_tokens"] / result["seconds"] for result in (ours, padded)]
    return {
        "speedup_over_padded": speeds[0] / speeds[1],
        "memory_over_padded": ours["peak"] / padded["peak"],
        "share_of_equal_responses": ours["num_equal"] / ours["num_responses"],
    }


def _run(args: argparse.Namespace) -> dict[str, Any]:
    return _ask_server(args) if args.variant == "server" else _generate(args)


def _prepare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    texts = _read_instructions(args)
    rows = [{"instruction": text} for text in texts[: args.num_prompts]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if args.model:
        return {}
    tokenizer = make_tokenizer(texts, args.vocab_size)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    model = make_model(args)
    # A logit of 0 is never the largest, so no response ends early.
    model.lm_head.weight.data[tokenizer.eos_token_id] = 0
    model.save_pretrained(folder)
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
    import torch

    from cutlm.model.loading import load_model, load_tokenizer
    from cutlm.prompting.encoding import Encoder

    model_folder, folder = args.model or args.folder, Path(args.folder)
    tokenizer = load_tokenizer(model_folder)
    model: Any = load_model(model_folder, dtype=torch.float32).eval()
    encoder = Encoder(tokenizer, "chat")
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    prompts = [encoder.encode_generation_prompt(row["instruction"]) for row in rows]
    began = time.perf_counter()
    responses = _ENGINES.get(args.variant, _generate_by_cutlm)(model, tokenizer, encoder, prompts, args)
    seconds = time.perf_counter() - began
    result = {"seconds": seconds, "peak": read_peak_bytes(), "num_responses": len(prompts)}
    # Responses of one engine are compared with those of the one that ran before.
    result["num_tokens"] = _count_tokens(args, tokenizer, responses)
    (folder / f"{args.variant}.json").write_text(json.dumps(responses))
    other = folder / ("padded.json" if args.variant == "cutlm" else "cutlm.json")
    known = json.loads(other.read_text()) if other.exists() else responses
    return result | {"num_equal": sum(one == own for one, own in zip(known, responses, strict=True))}


def _count_tokens(args: argparse.Namespace, tokenizer: Any, responses: Sequence[str]) -> int:
    if not args.model:
        return args.num_prompts * args.max_new_tokens
    return sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in responses)


def _generate_by_cutlm(
    model: Any, tokenizer: Any, encoder: Any, prompts: Sequence[list[int]], args: argparse.Namespace
) -> list[str]:
    from cutlm.generation.local import Sampling, generate_responses

    size = 1 if args.variant == "one by one" else args.batch_size
    return generate_responses(model, tokenizer, encoder, prompts, Sampling(args.max_new_tokens, batch_size=size))


def _generate_padded(
    model: Any, tokenizer: Any, encoder: Any, prompts: Sequence[list[int]], args: argparse.Namespace
) -> list[str]:
    import torch

    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    responses = [""] * len(prompts)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for start in range(0, len(order), args.batch_size):
        chosen = order[start : start + args.batch_size]
        longest = max(len(prompts[index]) for index in chosen)
        ids = torch.tensor([[pad_id] * (longest - len(prompts[index])) + prompts[index] for index in chosen])
        mask = torch.tensor([[0] * (longest - len(prompts[index])) + [1] * len(prompts[index]) for index in chosen])
        options = {"do_sample": False, "eos_token_id": encoder.end_of_turn_id, "pad_token_id": pad_id}
        with torch.inference_mode():
            output = model.generate(ids, attention_mask=mask, max_new_tokens=args.max_new_tokens, **options)
        for index, row in zip(chosen, output[:, longest:].tolist(), strict=True):
            responses[index] = tokenizer.decode(row, skip_special_tokens=True)
    return responses


def _generate_continuous(
    model: Any, tokenizer: Any, encoder: Any, prompts: Sequence[list[int]], args: argparse.Namespace
) -> list[str]:
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        do_sample=False,
        eos_token_id=encoder.end_of_turn_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    outputs = model.generate_batch(list(prompts), generation_config=config)
    return [tokenizer.decode(output.generated_tokens, skip_special_tokens=True) for output in outputs.values()]


_ENGINES = {"padded": _generate_padded, "continuous": _generate_continuous}


def _ask_server(args: argparse.Namespace) -> dict[str, Any]:
    """Measure a server that has loaded its model; the peak is the server's."""
    from cutlm.cli import main as run_cutlm
    from cutlm.model.loading import load_tokenizer

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
    generate = ["generate", "--base_url", f"{url}/v1", "--model", args.model or str(folder)]
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
        responses = [row["output"] for row in json.loads(Path(out).read_text())]
        num_tokens = _count_tokens(args, load_tokenizer(args.model or folder), responses)
        return {"seconds": seconds, "peak": _read_peak_of(server.pid), "num_tokens": num_tokens}
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
