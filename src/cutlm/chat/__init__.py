"""Talking to a model: what was said (`conversation`), the commands (`session`), how lines are read (`lines`), and who
answers (`local`, `server`)."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from cutlm.blame.token_scores import TokenScores
from cutlm.data.records import JudgedRecord
from cutlm.prompting.templates import TemplateName


class Engine(Protocol):
    """Who answers.

    Attributes:
        template: How it is prompted; None where the server sees to that.
        max_new_tokens: Where an answer is stopped at the latest.
    """

    template: TemplateName | None
    max_new_tokens: int

    def set_template(self, name: TemplateName) -> None:
        """Prompts by another template from now on.

        Raises:
            UserError: There is none such, or nothing to prompt by.
        """

    def prepare(self, texts: Sequence[str]) -> tuple[Any, int]:
        """Makes a prompt.

        Args:
            texts: What was said, by the user and the model in turn; the last is the user's.

        Returns:
            The prompt, and the number of oldest turns that were left out for it to fit.

        Raises:
            UserError: The last message alone does not fit, or the template cannot show it.
        """

    def answer(self, prompt: Any, seed_offset: int, show: Callable[[str], None]) -> bool:
        """Has the model answer.

        Args:
            prompt: As made by `prepare`.
            seed_offset: Added to the seed, so that the same question may have another answer.
            show: Gets the answer piece by piece.

        Returns:
            Whether the answer came to an end by itself.

        Raises:
            UserError: There is no answer, or no more of it.
            KeyboardInterrupt: It was stopped.
        """

    def blame(self, record: JudgedRecord) -> tuple[TokenScores, bool]:
        """Scores a record as `cutlm blame` does.

        Returns:
            Its token scores, and whether a prompt was cut from the left to fit.

        Raises:
            UserError: It cannot be scored.
        """
