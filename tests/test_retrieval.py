import itertools
import json
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_agents.envs import make
from opd_agents.envs.retrieval import Retrieval
from opd_agents.envs.retrieval.world import RELATIONS, WORLDS, make_world, questions, search_index
from opd_agents.errors import UserError
from opd_agents.testing import check_agent_env

ID = "opd_agents/Retrieval-v0"


def call(name: str, /, **arguments: str) -> str:
    return json.dumps({"name": name, "arguments": arguments})


def started(task_id: int = 0, split: str = "train", hops: int = 2) -> Retrieval:
    env = Retrieval(hops)
    env.reset(seed=0, options={"split": split, "task_id": str(task_id)})
    return env


@pytest.mark.parametrize("hops", [1, 2, 4])
def test_keeps_the_environment_contract(hops: int) -> None:
    check_agent_env(ID, hops=hops)


@pytest.mark.parametrize("hops", [1, 2, 3, 4])
def test_the_expert_answers_in_at_most_two_turns_a_hop(hops: int) -> None:
    for split, size in Retrieval.split_sizes.items():
        for task_id in range(0, size, 25):
            env = started(task_id, split, hops)
            rewards = []
            while not env.over:
                rewards.append(env.step(env.expert_action())[1])
            assert set(rewards[:-1]) == {0.0} and rewards[-1] == 1.0, env.task
            assert hops + 2 <= env.turn <= 2 * hops + 1 == env.max_turns // 2


def test_texts_are_these() -> None:
    env = started(5, "test")
    start, middle, end = env.question.path
    assert re.fullmatch(r"Who or what is the \w+ of the \w+ of [A-Z]\w+ [A-Z]\w+\?", env.question.text)
    found = env.step(call("search", query=start))[0]
    assert json.loads(found)[0] == start
    text = env.step(call("open", title=start))[0]
    assert middle in text and end not in text
    assert env.step("It is " + end)[0] == "Please give the answer with the tool answer."
    assert env.step(call("answer", name=end.upper() + "."))[0:2] == ("Thank you.", 1.0)


def test_a_wrong_answer_fails_and_bad_calls_are_answered() -> None:
    env = started()
    assert (
        env.step(call("open", title="Nobody"))[0] == '{"error":"no document \'Nobody\'; search for it first"}'
    )
    assert env.step(call("search", query="?"))[0] == '{"error":"the query holds no word"}'
    _, reward, terminated, _, info = env.step(call("answer", name=env.question.path[1]))
    assert (reward, terminated, info["success"]) == (0.0, True, False)


def test_everything_is_found_by_its_name() -> None:
    for index in itertools.chain.from_iterable(WORLDS.values()):
        for name in make_world(index).kinds:
            assert search_index(index).best(name)[0] == name


def test_questions_follow_the_facts_and_documents_tell_them() -> None:
    world = make_world(3)
    texts = {document.name: document.text for document in world.documents}
    for question in questions(3, 3):
        names = question.path
        relations = re.findall(r"the (\w+) of", question.text)[::-1]
        assert len(relations) == 3 and len(set(names)) == 4 and question.text.endswith(f" of {names[0]}?")
        for one, relation, other in zip(names, relations, names[1:], strict=False):
            assert world.facts[one, relation] == other
            forms = RELATIONS[world.kinds[one]][relation][1:]
            assert any(form.format(a=one, b=other) in texts[one] for form in forms)
    assert len({question.text for question in questions(3, 3)}) == 250


def test_splits_share_no_entity_but_all_words() -> None:
    names = {split: set() for split in WORLDS}
    for split, indices in WORLDS.items():
        for index in indices:
            world = make_world(index)
            assert not names[split] & set(world.kinds)  # worlds of one split share none either
            names[split] |= set(world.kinds)
    for one, other in itertools.combinations(names.values(), 2):
        assert not one & other
    words = {split: {word for name in found for word in name.split()} for split, found in names.items()}
    assert words["test"] <= words["train"] and words["validation"] <= words["train"]


def test_another_process_draws_the_same() -> None:
    imports = "from opd_agents.envs.retrieval.world import make_world, questions"
    code = f"{imports}; print(questions(9, 2), make_world(9), sep='')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{questions(9, 2)}{make_world(9)}"


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UserError, match="hops must lie in 1 to 4, got 5"):
        make(ID, hops=5)
    with pytest.raises(UserError, match="max_turns must be at least 1, got 0"):
        make(ID, max_turns=0)


@given(st.text(max_size=700), st.sampled_from(["search", "open", "answer"]))
@settings(max_examples=100, deadline=None)
def test_any_text_is_answered(text: str, tool: str) -> None:
    argument = {"search": "query", "open": "title", "answer": "name"}[tool]
    for action in (text, call(tool, **{argument: text})):
        env = started()
        observation, reward, *_ = env.step(action)
        assert observation and reward == 0
