"""The recipe of a base model: a hash of all that it is made from, kept beside it.

So a folder need not be made twice, and a test can tell that the recipe was changed and the packaged model was not made
anew. Comments, docstrings and formatting are no part of it.
"""

import ast
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutlm.prompting.encoding import Encoder
from cutlm.world import pretraining
from cutlm.world.corpus import make_corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECIPE_FILE = "recipe.json"
_LIBRARIES = ("tokenizers", "torch", "transformers")
# All documents are hashed as text, so many also as token ids, to which the prompts and their encoding belong.
_NUM_ENCODED = 1000


def describe_recipe(tokenizer: "PreTrainedTokenizerBase", seed: int, num_steps: int) -> dict[str, Any]:
    """All that a base model is made from.

    Args:
        tokenizer: The world's tokenizer.
        seed: Of the weights and of the corpus.
        num_steps: Of the training.

    Returns:
        The settings; hashes of the corpus, the vocabulary and the code that trains; the libraries; and `hash`, of all
        of these.
    """
    documents = make_corpus(num_steps * pretraining.BATCH_SIZE, seed)
    encoder = Encoder(tokenizer, "alpaca")
    encoded = [pretraining.encode_document(encoder, document) for document in documents[:_NUM_ENCODED]]
    recipe: dict[str, Any] = {
        "seed": seed,
        "num_steps": num_steps,
        "corpus": _hash([documents, encoded]),
        "vocabulary": _hash(sorted(tokenizer.get_vocab().items())),
        "training": _hash(_read_code(Path(pretraining.__file__))),
        "libraries": {name: version(name) for name in _LIBRARIES},
    }
    return recipe | {"hash": _hash(recipe)}


def read_recipe(folder: str | Path) -> dict[str, Any] | None:
    """The recipe that a folder was made by; None where it names none."""
    try:
        recipe = json.loads((Path(folder) / RECIPE_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return recipe if isinstance(recipe, dict) else None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _read_code(path: Path) -> str:
    """The code of a module, without what does nothing."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.unparse(tree)
