import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_agents.errors import UserError
from opd_agents.tools import Tool, ToolError
from opd_agents.tools.search import Document, SearchIndex

DOCUMENTS = [
    Document("Lisbon", "A city on a river, with hills."),
    Document("Tram", "A tram runs on rails, in Lisbon and elsewhere."),
    Document("Hill", "Higher than a plain. Ein Hügel ist höher."),
    Document("Twin one", "same words here"),
    Document("Twin two", "same words here"),
]
INDEX = SearchIndex(DOCUMENTS, limit=3, snippet=20)


def test_the_best_comes_first() -> None:
    assert INDEX.best("tram") == ["Tram"]
    assert INDEX.best("Lisbon?") == ["Lisbon", "Tram"]  # what is called so before what mentions it
    assert INDEX.best("HÜGEL") == ["Hill"]
    assert INDEX.best("same words") == ["Twin one", "Twin two"]  # equal scores: in the given order
    assert INDEX.best("zebra") == []
    assert INDEX.best("zebra tram") == ["Tram"]
    assert len(INDEX.best("a same in")) == 3  # no more than the limit


def test_results_are_names_and_beginnings() -> None:
    assert INDEX.search("hill") == [{"name": "Hill", "text": "Higher than a plain...."}]
    assert INDEX.search("here")[0] == {"name": "Twin one", "text": "same words here"}
    assert INDEX.open("Tram") == DOCUMENTS[1].text


def test_what_is_wrong_is_said() -> None:
    for call, problem in [
        (lambda: INDEX.open("tram"), "no document 'tram'; search for it first"),
        (lambda: INDEX.search("  ?! "), "the query holds no word"),
        (lambda: INDEX.search("a" * 501), "longer than 500"),
    ]:
        with pytest.raises(ToolError, match=problem):
            call()
    with pytest.raises(UserError, match="two documents have one name"):
        SearchIndex([Document("a", "b"), Document("a", "c")])
    for empty in ([], [Document("?", "!")]):
        with pytest.raises(UserError, match="no word"):
            SearchIndex(empty)


def test_threads_may_share_an_index() -> None:
    found: list[list[str]] = []
    threads = [
        threading.Thread(target=lambda: found.extend(INDEX.best("lisbon tram") for _ in range(100)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 400 and all(names == found[0] for names in found)


@given(st.text(max_size=600))
@settings(max_examples=100, deadline=None)
def test_any_text_is_answered(text: str) -> None:
    for tool, name in ((INDEX.search, "query"), (INDEX.open, "name")):
        try:
            assert Tool.from_function(tool)({name: text})
        except ToolError as error:
            assert str(error)
