"""Every block of code in the documentation is valid: commands are parsed by the real parsers, settings are checked as
those of a run, Python is compiled, its names resolved and its arguments compared with the functions, JSON is parsed."""

import ast
import contextlib
import importlib
import inspect
import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from markdown_it import MarkdownIt

from cutlm.cli import align, build_parser, train_judge
from cutlm.data.files import SourceRow
from cutlm.data.records import check_rows
from cutlm.errors import UserError
from cutlm.loop.settings import AlignArguments, _read_plan
from cutlm.training.config import (
    OBJECTIVES,
    CUTConfig,
    DataArguments,
    DetectorConfig,
    JudgeConfig,
    ModelArguments,
    read_settings,
)

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path for pattern in ("*.md", "docs/*.md", "experiments/**/*.md", "recipes/**/*.md") for path in ROOT.glob(pattern)
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# Pages about options that cutlm does not have, or has no more.
OF_OTHERS = ("CHANGELOG.md", "docs/from-the-paper-code.md")
CONFIGS = {
    "train": CUTConfig,
    "preview": CUTConfig,
    "train-judge": JudgeConfig,
    "train-detector": DetectorConfig,
}
SETTINGS = {
    name for kind in (DataArguments, ModelArguments, CUTConfig, AlignArguments) for name in kind.__dataclass_fields__
}
# Options of programs that the pages mention.
OTHER_OPTIONS = {"--generation-config", "--data-parallel-size", "--num_processes", "--nproc_per_node"}
_OPTION = re.compile(r"(?<![\w-])--[A-Za-z][\w-]*")


class Block(NamedTuple):
    """A block of code, or code in a line."""

    place: str
    text: str
    is_inline: bool


def list_blocks(page: Path) -> Iterator[Block]:
    name = page.relative_to(ROOT)
    for token in MarkdownIt().enable("table").parse(page.read_text("utf-8")):
        if token.type in ("code_block", "fence"):
            yield Block(f"{name}:{token.map[0] + 1}", token.content, False)
        for child in token.children or ():
            if child.type == "code_inline":
                yield Block(f"{name}:{token.map[0] + 1 if token.map else '?'}", child.content, True)


BLOCKS = {name: list(list_blocks(page)) for name, page in zip(NAMES, PAGES, strict=True)}


def find_kind(block: Block) -> str:
    text = block.text.strip()
    if block.is_inline:
        return "inline"
    if text.startswith(("{", "[")):
        return "json"
    if re.match(r"(from|import|def|class|@|>>>) ?\w", text):
        return "python"
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if lines and all(re.match(r"[a-z]\w*: |  ", line) for line in lines) and lines[0].partition(":")[0] in SETTINGS:
        return "yaml"
    return "shell"


def list_of_kind(page: str, kind: str) -> list[Block]:
    return [block for block in BLOCKS[page] if find_kind(block) == kind]


# ---- Commands ----


def list_commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell, without their environment; in a transcript, those after the prompt `$`."""
    text = text.replace("\\\n", " ")
    for line in text.splitlines():
        line = re.sub(r"\[(--[^\]]+)\]", r"\1", line.strip().removeprefix("$ "))  # [--option VALUE] may be left out
        if not re.match(r"(\w+=\S+ |.* \| )*(cutlm|torchrun|accelerate|python|make|pip) ", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words = [word for word in lexer if word != "..."]
        command: list[str] = []
        for word in [*words, ";"]:
            if re.fullmatch(r"[|&;<>]+", word):
                if command:
                    yield command
                command = []
            elif command or not re.fullmatch(r"\w+=.*", word):
                command.append(word)


def check_command(words: list[str]) -> None:
    """Raise ValueError or UserError if a command is not valid."""
    if "cutlm" in words and (words[0] == "cutlm" or words[words.index("cutlm") - 1] == "-m"):
        check_cutlm_command(words[words.index("cutlm") + 1 :])
    elif words[0] == "python" and words[1].endswith(".py"):
        check_script(words[1], words[2:])
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        if unknown := [
            word for word in words[1:] if not word.startswith("-") and "=" not in word and word not in targets
        ]:
            raise ValueError(f"no target {unknown}")
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = {
            name for word in words for name in re.sub(r"^(?:\.|cutlm)\[(.*)\]$|.*", r"\1", word).split(",") if name
        }
        if unknown := named - set(extras):
            raise ValueError(f"no extra {unknown}")


def check_script(path: str, words: list[str]) -> None:
    if not (ROOT / path).is_file():
        return  # of the reader
    # Some options are added by a module that scripts share.
    sources = [other.read_text("utf-8") for other in (ROOT / path).parent.glob("*.py")]
    if unknown := [
        word for word in words if _OPTION.fullmatch(word) and not any(f'"{word}"' in source for source in sources)
    ]:
        raise ValueError(f"{path} has no {unknown}")


def parse(parser: Any, words: list[str]) -> tuple[Any, list[str]]:
    message = io.StringIO()
    with contextlib.redirect_stderr(message), contextlib.redirect_stdout(message):
        try:
            return parser.parse_known_args(words)
        except SystemExit as error:
            if error.code:
                raise ValueError(message.getvalue().splitlines()[-1]) from None
            return None, []


def check_cutlm_command(words: list[str]) -> None:
    words = ["1" if word in ("N", "SECONDS", "KAPPA", "SHARE") else word for word in words]
    args, rest = parse(build_parser(), words)
    if args is None:  # --help, --version
        return
    if args.command == "train-judge" and args.evaluate:
        _, rest = parse(train_judge.make_evaluation_parser(), rest)
    elif args.command == "align" or args.command in CONFIGS:
        config = str(ROOT / args.config) if args.config and (ROOT / args.config).is_file() else None
        check_settings(args.command, config, rest)
        rest = []
    if rest:
        raise ValueError(f"{args.command}: unknown arguments {rest}")


def check_settings(command: str, config: str | None, options: list[str]) -> None:
    """Check settings, with those filled in that a run needs and a reader has in a file."""
    filled = {"model_name_or_path": "m", "output_dir": "o", "report_to": "none"}
    filled |= {"instructions": "i", "judge": "rules --rules a:b"} if command == "align" else {"data": "d"}
    given = {option.removeprefix("--").partition("=")[0] for option in options if option.startswith("--")}
    known = set(yaml.safe_load(Path(config).read_text("utf-8"))) if config else set()
    options = [*options, *(f"--{name}={value}" for name, value in filled.items() if name not in given | known)]
    options += [] if "use_cpu" in given | known else ["--use_cpu"]
    options = [option for option in options if option not in ("--resume_from_checkpoint", "last")]
    if command == "align":
        _read_plan(config, options, align.parse_stage_options)
    else:
        read_settings((DataArguments, ModelArguments, CONFIGS[command]), config, options, command)


@pytest.mark.parametrize("page", NAMES)
def test_commands_are_valid(page: str) -> None:
    problems = []
    for block in list_of_kind(page, "shell"):
        for words in list_commands(block.text):
            try:
                check_command(words)
            except (ValueError, UserError) as error:
                problems.append(f"{block.place}: {shlex.join(words)}: {error}")
    assert not problems, "\n".join(problems)


# ---- Code in a line ----


def list_options() -> dict[str, set[str]]:
    """The options of each command, also of those that take settings."""
    found: dict[str, set[str]] = {}

    def visit(parser: Any, name: str) -> None:
        options = {option for action in parser._actions for option in action.option_strings}
        for action in parser._actions:
            for key, command in (action.choices or {}).items() if action.nargs == "A..." else ():
                visit(command, f"{name} {key}".strip())
                options |= found[f"{name} {key}".strip()] if name else set()
        if name in (*CONFIGS, "align"):
            options |= {f"--{setting}" for setting in SETTINGS}
        if name == "train-judge":
            options |= {
                option for action in train_judge.make_evaluation_parser()._actions for option in action.option_strings
            }
        found[name] = options

    visit(build_parser(), "")
    return found


OPTIONS = list_options()


@pytest.mark.parametrize("page", [name for name in NAMES if name not in OF_OTHERS])
def test_options_in_the_text_exist(page: str) -> None:
    scripts = [
        path.read_text("utf-8")
        for folder in ("benchmarks", "experiments", "docs")
        for path in (ROOT / folder).rglob("*.py")
    ]
    known = {option for options in OPTIONS.values() for option in options} | OTHER_OPTIONS
    problems = []
    for block in list_of_kind(page, "inline"):
        options = set(_OPTION.findall(re.sub(r"'[^']*'", "", block.text)))
        command = re.match(r"cutlm ((?:eval |world )?[a-z][a-z-]*)", block.text)
        if re.match(r"cutlm --\w+$", block.text):
            options -= OPTIONS[""]
        elif command and command[1] not in OPTIONS:
            problems.append(f"{block.place}: no command: {block.text}")
        elif command:
            options -= OPTIONS[command[1]]
        elif block.text.startswith("--"):
            options -= known | {option for option in options for text in scripts if f'"{option}"' in text}
        else:
            continue
        problems += [f"{block.place}: {option} in {block.text}" for option in options]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("page", [name for name in NAMES if name not in OF_OTHERS])
def test_settings_in_the_text_are_valid(page: str, tmp_path: Path) -> None:
    problems = []
    for block in list_of_kind(page, "inline"):
        found = re.fullmatch(r"([a-z]\w+): ([^,.\s].*)", block.text)
        if found and found[1] in SETTINGS - {"data", "eval_data"}:
            problems += [f"{block.place}: {problem}" for problem in find_problems(block.text, tmp_path)]
    assert not problems, "\n".join(problems)


def find_problems(text: str, folder: Path) -> list[str]:
    """The problems of settings in YAML, with those other settings for which they make sense."""
    path = folder / "settings.yaml"
    path.write_text(re.sub(r"\bN\b", "1", text), "utf-8")
    values = yaml.safe_load(text)
    command = "align" if set(values) & set(AlignArguments.__dataclass_fields__) else "train"
    objectives = [] if "objective" in values else OBJECTIVES
    contexts = [
        [],
        ["--template=chat"] * ("template" not in values),
        *([f"--objective={name}", *others] for name in objectives for others in ([], ["--teacher_context=advice"])),
    ]
    fewest: list[str] | None = None
    for context in contexts:
        try:
            check_settings(command, str(path), context)
            return []
        except UserError as error:
            problems = str(error).splitlines()
            fewest = problems if fewest is None or len(problems) < len(fewest) else fewest
    return fewest or []


@pytest.mark.parametrize("page", NAMES)
def test_settings_files_are_valid(page: str, tmp_path: Path) -> None:
    problems = []
    for block in list_of_kind(page, "yaml"):
        problems += [f"{block.place}: {problem}" for problem in find_problems(block.text, tmp_path)]
    assert not problems, "\n".join(problems)


# ---- JSON and Python ----


@pytest.mark.parametrize("page", NAMES)
def test_json_parses_and_records_are_valid(page: str) -> None:
    for block in list_of_kind(page, "json"):
        decoder, rest, values = json.JSONDecoder(), block.text.strip(), []
        while rest:
            value, end = decoder.raw_decode(rest)
            values += value if isinstance(value, list) else [value]
            rest = rest[end:].strip()
        rows = [SourceRow(block.place, value) for value in values if "judgment" in value]
        assert not check_rows(rows).problems


@pytest.mark.parametrize("page", NAMES)
def test_python_is_valid(page: str, tmp_path: Path) -> None:
    blocks = list_of_kind(page, "python")
    for index, block in enumerate(blocks):
        (tmp_path / f"block_{index}.py").write_text(block.text, "utf-8")
        names = check_imports(block)
        for call in [node for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.Call)]:
            if isinstance(call.func, ast.Name) and call.func.id in names:
                keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
                inspect.signature(names[call.func.id]).bind_partial(*call.args, **keywords)
    if blocks:
        command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,F811,E9", str(tmp_path)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, "\n".join([*(block.place for block in blocks), result.stdout])


def check_imports(block: Block) -> dict[str, Any]:
    """Import what a block imports, and return it by name."""
    names: dict[str, Any] = {}
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            names |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
    return names


def test_blocks_of_each_kind_were_found() -> None:
    counts: dict[str, int] = {}
    for page in NAMES:
        for block in BLOCKS[page]:
            kind = find_kind(block)
            counts[kind] = counts.get(kind, 0) + (len(list(list_commands(block.text))) if kind == "shell" else 1)
    assert counts["shell"] > 150
    assert counts["python"] >= 4
    assert counts["json"] >= 3
    assert counts["inline"] > 1000


@pytest.mark.parametrize(
    "command",
    [
        "cutlm generate --model M --prompts F --out F --no_such_option 1",
        "cutlm generate --model M --out F",
        "cutlm train --config recipes/small-instruct.yaml --lora_rank 8",
        "cutlm train --objective no_such_objective",
        "cutlm train --threshold 1.2 --objective likelihood",
        'cutlm align --judge "rules --no_such_option"',
        "cutlm train-judge --evaluate M --data F --out D --objective cut",
        "torchrun --nproc_per_node 8 -m cutlm train --max_lenght 4",
        "python benchmarks/train_step.py --no_such_option",
        "make no-such-target",
        "pip install '.[no-such-extra]'",
        "cat a.jsonl | cutlm no-such-command",
        "FOO=1 cutlm eval alpaca --outt D",
    ],
)
def test_a_wrong_command_is_found(command: str) -> None:
    (words, *_) = [words for words in list_commands(command) if words[0] != "cat"]
    with pytest.raises((ValueError, UserError)):
        check_command(words)


@pytest.mark.parametrize(
    "text", ["threshold: high", "no_such_setting: 1", "objective: cut\nguidance: 2", "judge: http"]
)
def test_wrong_settings_are_found(text: str, tmp_path: Path) -> None:
    assert find_problems(text, tmp_path)
