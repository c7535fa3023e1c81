"""Responses to judge by a server, and the expected records, for the tests of that judge."""

import json
import re
from pathlib import Path
from typing import Any

from chat_server import ChatServer

NUM_RESPONSES = 12


def make_rows(num_rows: int = NUM_RESPONSES) -> list[dict[str, Any]]:
    return [
        {"instruction": f"Name {index}.", "output": f"Answer <{index}>", "generator": "m", "dataset": "d"}
        for index in range(num_rows)
    ]


def reply(prompt: str) -> str:
    judgment = expect(read_number({"messages": [{"content": prompt}]}))
    return write_verdict(judgment)


def write_verdict(judgment: str | None, *quotes: str) -> str:
    """Write the JSON that the default prompt asks for."""
    verdict = {"judgment": judgment or "Perfect.", "quotes": quotes, "satisfactory": judgment is None}
    return json.dumps(verdict, ensure_ascii=False)


def read_number(request: dict[str, Any]) -> int:
    return int(re.findall(r"Answer <(\d+)>", request["messages"][-1]["content"])[0])


def expect(index: int) -> str | None:
    return None if index % 3 == 0 else f"The number {index} is wrong."


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def list_options(server: ChatServer, responses: Path, out: Path, *options: str) -> list[str]:
    return [
        *("judge", "--responses", str(responses), "--judge", "http", "--base_url", server.url),
        *("--judge_model", "the-judge", "--out", str(out), *options),
    ]


def find_failures(out: Path) -> list[dict[str, Any]]:
    return read_lines(Path(f"{out}.failures.jsonl"))
