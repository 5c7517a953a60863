"""Made-up worlds of people, companies and cities: documents about them, and questions that chain relations.

Pure functions. No name occurs in two worlds, while the words that names are made of occur in all of them.
"""
# ruff: noqa: SIM905  # words are easier to read in a text

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from opd_agents.tools.search import Document, SearchIndex

WORLDS = {"train": range(8), "validation": range(8, 9), "test": range(9, 11)}
QUESTIONS = 250  # a world and number of hops
SPLIT_SIZES = {split: len(worlds) * QUESTIONS for split, worlds in WORLDS.items()}
MAX_HOPS = 4

FIRST = (
    "Ada Ben Cora Dan Eva Finn Greta Hugo Ines Jan Kira Leo Mina Nils Olga Paul Rosa Sven Tara Ugo Vera "
    "Will Xenia Yann Zoe Amos Bela Carl Dora Emil"
).split()
LAST = (
    "Adler Baker Clark Dorn Evans Falk Gray Hall Ibsen Jansen Keller Lang Meyer Novak Olsen Perez Quinn "
    "Rossi Stone Thorn Ulrich Vogel Weber Young Ziegler Arnold Bell Cook Drake Engel"
).split()
SECTORS = "Foods Steel Books Motors Glass Paper Shoes Tools Toys Wines Clocks Paints".split()
OLD = (
    "North South East West New Old High Low Great Little Upper Lower Fair Long Black White Green Red"
).split()
PLACES = (
    "Harbor Bridge Field Hill Lake Ford Castle Mill Gate Valley Abbey Cliff Grove Haven Marsh Port "
    "Spring Wood"
).split()
SIZES = {"person": 60, "company": 24, "city": 24}

# kind -> relation -> kind of what it leads to, and two ways to write it
RELATIONS: Mapping[str, Mapping[str, tuple[str, str, str]]] = {
    "person": {
        "employer": ("company", "{a} works for {b}.", "The employer of {a} is {b}."),
        "birthplace": ("city", "{a} was born in {b}.", "The birthplace of {a} is {b}."),
        "teacher": ("person", "{a} learned from {b}.", "The teacher of {a} is {b}."),
    },
    "company": {
        "founder": ("person", "{a} was founded by {b}.", "The founder of {a} is {b}."),
        "seat": ("city", "{a} has its seat in {b}.", "The seat of {a} is {b}."),
    },
    "city": {
        "mayor": ("person", "{a} is led by {b}.", "The mayor of {a} is {b}."),
        "twin": ("city", "{a} is twinned with {b}.", "The twin of {a} is {b}."),
    },
}


@dataclass(frozen=True, slots=True)
class Question:
    """``path`` begins with the entity that the text names and ends with the answer."""

    text: str
    path: tuple[str, ...]

    @property
    def answer(self) -> str:
        return self.path[-1]


@dataclass(frozen=True, slots=True)
class World:
    kinds: Mapping[str, str]  # of entities, by name
    facts: Mapping[tuple[str, str], str]  # (entity, relation) -> entity
    documents: tuple[Document, ...]


def find_question(split: str, number: int, hops: int) -> tuple[int, Question]:
    """A task: the world that it is asked in, and the question."""
    index = WORLDS[split][number // QUESTIONS]
    return index, questions(index, hops)[number % QUESTIONS]


@functools.cache
def search_index(index: int) -> SearchIndex:
    return SearchIndex(make_world(index).documents)


@functools.cache
def questions(index: int, hops: int) -> tuple[Question, ...]:
    """The questions of a world, a sample of all that there are, in a random order."""
    world = make_world(index)
    found = [question for name in world.kinds for question in _questions(world, (name,), name, hops)]
    return tuple(random.Random(f"questions/{index}/{hops}").sample(found, QUESTIONS))


def _questions(world: World, path: tuple[str, ...], text: str, hops: int) -> Iterator[Question]:
    """All questions ``hops`` relations on from the end of ``path`` that meet no entity twice."""
    if hops == 0:
        yield Question(f"Who or what is {text}?", path)
        return
    for relation in RELATIONS[world.kinds[path[-1]]]:
        target = world.facts[path[-1], relation]
        if target not in path:
            yield from _questions(world, (*path, target), f"the {relation} of {text}", hops - 1)


@functools.cache
def make_world(index: int) -> World:
    rng = random.Random(f"world/{index}")
    names = {kind: _names(kind)[index * size : (index + 1) * size] for kind, size in SIZES.items()}
    kinds = {name: kind for kind, members in names.items() for name in members}
    facts: dict[tuple[str, str], str] = {}
    documents = []
    for name, kind in kinds.items():
        sentences = []
        for relation, (target_kind, *forms) in RELATIONS[kind].items():
            target = rng.choice([other for other in names[target_kind] if other != name])
            facts[name, relation] = target
            sentences.append(rng.choice(forms).format(a=name, b=target))
        rng.shuffle(sentences)
        documents.append(Document(name, " ".join(sentences)))
    return World(kinds, facts, tuple(documents))


@functools.cache
def _names(kind: str) -> list[str]:
    """All names of a kind, in a random order; a world takes the next of them."""
    words = {"person": (FIRST, LAST), "company": (LAST, SECTORS), "city": (OLD, PLACES)}[kind]
    names = [f"{first} {second}" for first, second in itertools.product(*words)]
    random.Random(f"names/{kind}").shuffle(names)
    return names
