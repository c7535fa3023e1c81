"""OpenAI's critiques of summaries (Saunders et al. 2022).

A line is a passage with questions. A question has several answers, their rankings (larger is better), and for each
answer people's critiques, each with an answer refined accordingly.
"""

from collections.abc import Iterable
from typing import Any

from cutlm.data.convert import Conversion, Source, validate_rows
from cutlm.data.files import SourceRow
from cutlm.errors import DataError

BEST_RATING = 7


class Critique(Source):
    text: str
    refinement: str | None = None


class Feedback(Source):
    skip: bool | None = None
    rating: float | None = None
    critiques: list[Critique] | None = None


class Answer(Source):
    answer: str
    feedback: Feedback | None = None


class Question(Source):
    question: str
    rankings: list[float | None] | None = None
    answers: list[Answer]

    def find_best_answer(self) -> Answer | None:
        """Return the first answer with the highest ranking, or None if the rankings are incomplete."""
        if len(self.answers) == 1:
            return self.answers[0]
        rankings = [ranking for ranking in self.rankings or [] if ranking is not None]
        if not len(self.answers) == len(rankings) == len(self.rankings or []):
            return None
        return self.answers[rankings.index(max(rankings))]


class Passage(Source):
    text: str


class Data(Source):
    passage: Passage
    questions: list[Question]


class Line(Source):
    id: Any = None
    data: Data


def convert(rows: Iterable[SourceRow]) -> Conversion:
    """Turn each question into a record of its best answer, with all critiques as the judgment.

    A question whose best answer cannot be used is left out; no worse answer is taken instead.
    """
    conversion = Conversion("questions")
    problems: list[str] = []
    for location, line in validate_rows(rows, Line):
        for index, question in enumerate(line.data.questions):
            answer = question.find_best_answer() if question.answers else None
            if question.answers and answer is None:
                problems.append(f"{location}: field 'data.questions[{index}].rankings': {_describe_rankings(question)}")
            elif answer is None:
                conversion.add(location, "no answer")
            else:
                conversion.add(location, _find_fault(answer) or _make_record(line, question, answer))
    if problems:
        raise DataError(problems)
    return conversion


def _find_fault(answer: Answer) -> str | None:
    """Return why an answer cannot be used, or None."""
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


def _make_record(line: Line, question: Question, answer: Answer) -> dict[str, Any]:
    instruction = f"{line.data.passage.text}\n{question.question}"
    record: dict[str, Any] = {"instruction": instruction, "output": answer.answer, "judgment": None}
    if critiques := answer.feedback and answer.feedback.critiques:
        judgment = " ".join(critique.text for critique in critiques).strip()
        record |= {"judgment": judgment, "i_ans": critiques[-1].refinement}
    return record if line.id is None else record | {"id": line.id}


def _describe_rankings(question: Question) -> str:
    rankings = question.rankings
    got = "none" if rankings is None else "a null among them" if None in rankings else f"{len(rankings)} of them"
    expected = f"expected a number for each of the {len(question.answers)} answers"
    return f"{expected}, got {got}; without them the best answer is unknown"
