"""Search in a fixed set of documents, as tools: BM25 over an index made once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import pydantic

from opd_agents.errors import UserError
from opd_agents.tools.base import ToolError

MAX_QUERY = 500  # characters

Query: TypeAlias = Annotated[str, pydantic.Field(description="words to look for")]
Name: TypeAlias = Annotated[str, pydantic.Field(description="of a search result")]


@dataclass(frozen=True, slots=True)
class Document:
    """``name`` is what ``open`` takes: a title, a path; searched like the text."""

    name: str
    text: str


class SearchIndex:
    """Documents with the tools ``search`` and ``open``; safe to share between environments and threads.

    ``limit`` is how many results a search gives, ``snippet`` how many characters of each it shows. Raises
    UserError for documents without a word, and for two of one name.
    """

    def __init__(self, documents: Sequence[Document], *, limit: int = 5, snippet: int = 120) -> None:
        import bm25s  # half a second, with scipy

        self._documents = {document.name: document for document in documents}
        if len(self._documents) < len(documents):
            raise UserError("SearchIndex: two documents have one name.")
        self._names = list(self._documents)
        self._limit, self._snippet = limit, snippet
        # The name counts twice, so that what is called so comes before what mentions it.
        tokens = [words(document.name) * 2 + words(document.text) for document in documents]
        self._vocabulary = {word for row in tokens for word in row}
        if not self._vocabulary:
            raise UserError("SearchIndex: there is no word in the documents.")
        self._bm25 = bm25s.BM25()
        self._bm25.index(tokens, show_progress=False)

    def search(self, query: Query) -> list[dict[str, str]]:
        """Search the documents; the best come first."""
        return [{"name": name, "text": self._shortened(name)} for name in self.best(query)]

    def open(self, name: Name) -> str:
        """Read a document."""
        if name not in self._documents:
            raise ToolError(f"no document {name[:80]!r}; search for it first")
        return self._documents[name].text

    def best(self, query: str) -> list[str]:
        """The names of the documents that hold a word of ``query``, best first, at most ``limit``. Raises
        ToolError for a query without words, or longer than 500 characters."""
        if len(query) > MAX_QUERY:
            raise ToolError(f"the query is longer than {MAX_QUERY} characters")
        asked = words(query)
        if not asked:
            raise ToolError("the query holds no word")
        known = [word for word in asked if word in self._vocabulary]
        if not known:
            return []
        scores = self._bm25.get_scores(known)
        order = (-scores).argsort(kind="stable")[: self._limit]  # equal scores: in the documents' order
        return [self._names[i] for i in order if scores[i] > 0]

    def _shortened(self, name: str) -> str:
        text = self._documents[name].text
        return text if len(text) <= self._snippet else f"{text[: self._snippet]}..."


def words(text: str) -> list[str]:
    """The words of a text as they are indexed: letters and digits, in lower case."""
    return re.findall(r"\w+", text.lower())
