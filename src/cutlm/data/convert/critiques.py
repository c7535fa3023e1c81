"""The critiques of summaries that OpenAI published with Saunders et al. 2022.

A line is a passage with questions; a question has several answers, their rankings (larger is better), and per
answer people's critiques of it, each with an answer refined accordingly.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from cutlm.data.convert import Conversion, Source, parse_row
from cutlm.data.files import SourceRow
from cutlm.errors import DataError

BEST_RATING = 7


class Critique(Source):
    """One thing that is wrong with an answer, and the answer with it put right."""

    text: str
    refinement: str | None = None


class Feedback(Source):
    """What a person said about an answer."""

    skip: bool | None = None
    rating: float | None = None
    critiques: list[Critique] | None = None


class Answer(Source):
    """An answer to a question."""

    answer: str
    feedback: Feedback | None = None


class Question(Source):
    """A question on a passage."""

    question: str
    rankings: list[float | None] | None = None
    answers: list[Answer]

    def best_answer(self) -> Answer | None:
        """Returns the answer ranked highest, the first of equals; None where the rankings do not say."""
        if len(self.answers) == 1:
            return self.answers[0]
        rankings = [ranking for ranking in self.rankings or [] if ranking is not None]
        if len(rankings) != len(self.answers) or len(rankings) != len(self.rankings or []):
            return None
        return self.answers[rankings.index(max(rankings))]


class Passage(Source):
    """What the questions are on."""

    text: str


class Data(Source):
    """A passage and its questions."""

    passage: Passage
    questions: list[Question]


class Line(Source):
    """A line of the file."""

    id: Any = None
    data: Data


def convert(rows: Iterable[SourceRow]) -> Conversion:
    """Turns each question into a record of its best answer, the critiques joined as the judgment.

    Args:
        rows: The lines of the files.

    Returns:
        A record per question that is kept. The best answer is chosen first; where it cannot be used, the question
        is left out rather than a worse answer taken.

    Raises:
        DataError: Lines that are bad, all of them named.
    """
    problems: list[str] = []
    kept: list[SourceRow] = []
    left_out: Counter[str] = Counter()
    num_read = 0
    for row in rows:
        line = parse_row(Line, row, problems)
        if line is None:
            continue
        for index, question in enumerate(line.data.questions):
            num_read += 1
            if not question.answers:
                left_out["no answer"] += 1
                continue
            answer = question.best_answer()
            if answer is None:
                problems.append(_describe_rankings(row, index, question))
                continue
            reason = _find_fault(answer)
            if reason:
                left_out[reason] += 1
                continue
            record: dict[str, Any] = {"instruction": f"{line.data.passage.text}\n{question.question}"}
            record |= _judge(answer)
            if line.id is not None:
                record["id"] = line.id
            kept.append(SourceRow(row.location, record))
    if problems:
        raise DataError(problems)
    return Conversion(kept, num_read, left_out, unit="questions")


def _find_fault(answer: Answer) -> str | None:
    """Says why an answer cannot be used, or None when it can."""
    feedback = answer.feedback
    if feedback is not None and feedback.skip:
        return "feedback was skipped"
    if not answer.answer.strip():
        return "empty answer"
    if feedback is None:
        return "no feedback"
    if not feedback.critiques:
        return None if feedback.rating == BEST_RATING else f"no critiques, but not rated {BEST_RATING}"
    if not any(critique.text.strip() for critique in feedback.critiques):
        return "critiques without text"
    if not (feedback.critiques[-1].refinement or "").strip():
        return "empty refinement"
    return None


def _judge(answer: Answer) -> dict[str, Any]:
    critiques = (answer.feedback and answer.feedback.critiques) or []
    if not critiques:
        return {"output": answer.answer, "judgment": None}
    judgment = " ".join(critique.text for critique in critiques).strip()
    return {"output": answer.answer, "judgment": judgment, "i_ans": critiques[-1].refinement}


def _describe_rankings(row: SourceRow, index: int, question: Question) -> str:
    if question.rankings is None:
        got = "none"
    elif None in question.rankings:
        got = "a null among them"
    else:
        got = f"{len(question.rankings)} of them"
    return (
        f"{row.location}: field 'data.questions[{index}].rankings': expected a number for each of the"
        f" {len(question.answers)} answers, got {got}; without them the best answer is unknown"
    )
