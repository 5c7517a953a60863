"""MiniWoB++ in real Chromium: every id is there, experts succeed, replay is exact, and no clock is read."""

import json
import re
import shutil
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import opd_agents as opd
from opd_agents.envs.web.miniwob_experts import EXPERTS, elements
from opd_agents.envs.web.miniwob_tasks import MOUSE, TASKS, TIMED
from opd_agents.errors import UnknownName, UserError

IN_THE_GATE = [
    "click-button", "click-checkboxes", "click-dialog", "click-tab", "enter-text", "focus-text-2",
    "grid-coordinate", "login-user",
]  # fmt: skip
browser = pytest.mark.real("miniwob", "playwright", "chromium")


def made(task, **options):
    return opd.make(f"opd_agents/MiniWoB.{task}-v0", **options)


def at(env, task_id="0", split="train"):
    return env.reset(seed=0, options={"split": split, "task_id": task_id})[0]


def action(name, **arguments):
    return json.dumps({"name": name, "arguments": arguments})


def click(name, page):
    return action("click", id=next(part.id for part in elements(page) if part.name == name))


@pytest.fixture(scope="module")
def env():
    """For tests of one task after the other, in one tab."""
    env = made("click-checkboxes")
    yield env
    env.close()


@pytest.mark.real("miniwob")
def test_the_ids_are_those_of_the_package():
    import gymnasium
    import miniwob  # noqa: F401  # registers

    theirs = {spec.name for spec in gymnasium.registry.values() if spec.namespace == "miniwob"}
    assert sorted(theirs) == sorted(TASKS) and len(TASKS) == 128
    assert {f"opd_agents/MiniWoB.{task}-v0" for task in TASKS} <= set(opd.envs.list_envs())
    assert set(EXPERTS) | MOUSE | TIMED <= set(TASKS)


@pytest.mark.real("miniwob", "playwright")
def test_options_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="threshold must lie"):
        made("click-test", threshold=1.0)
    with pytest.raises(UserError, match="max_turns"):
        made("click-test", max_turns=0)
    with pytest.raises(UnknownName, match="click-test"):
        opd.envs.web.miniwob.MiniWob("click-tset")


@browser
@pytest.mark.parametrize("task", IN_THE_GATE)
def test_experts_succeed_and_forks_agree(task):
    env = made(task)
    starts = set()
    for split in env.split_sizes:
        starts.add((at(env, split=split), env.state_digest()))
        info = {}
        while not env.over:
            info = env.step(env.expert_action())[4]
        assert info["success"] and info["raw_reward"] == 1
    assert len(starts) == 3  # the splits differ
    at(env, "1")
    twin = env.fork()
    while not env.over:
        action = env.expert_action()
        assert env.step(action)[:2] == twin.step(action)[:2]
        assert env.state_digest() == twin.state_digest()
    twin.close()
    env.close()


@browser
def test_contract():
    assert_contract("click-test")


@browser
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("task", TASKS)
def test_contract_of_every_task(task):
    assert_contract(task)


def assert_contract(task):
    env = made(task, max_turns=16)  # of fewer random actions often none changes a page
    env.split_sizes = {"train": 2, "validation": 2, "test": 2}  # each reset loads a page
    opd.testing.check_agent_env(env, n_tasks=1)
    env.close()


@browser
def test_a_partial_success_counts_unless_all_is_asked_for(env):
    strict = made("click-checkboxes", threshold=0.99)
    task_id = next(str(i) for i in range(50) if 0 < raw_reward_of_nothing(at(env, str(i))) < 1)
    for subject, succeeds in ((env, True), (strict, False)):
        page = at(subject, task_id)
        _, reward, _, _, info = subject.step(click("Submit", page))
        assert info["raw_reward"] == raw_reward_of_nothing(page)
        assert (reward, info["success"]) == (float(succeeds), succeeds)
    strict.close()


def raw_reward_of_nothing(page):
    """Of submitting no box: the share of boxes that are rightly left alone, less that of the others."""
    names = [part.name for part in elements(page) if part.role == "checkbox"]
    wanted = re.findall(r"\w+", page.splitlines()[0])
    return sum(-1 if name in wanted else 1 for name in names) / len(names)


@browser
def test_only_actions_pass_time():
    env = made("stock-market")
    first = at(env)
    digest = env.state_digest()
    time.sleep(0.3)
    assert env.state_digest() == digest
    waited = [env.step(action("wait"))[0] for _ in range(3)]
    assert len({first.split("\n", 1)[1], *waited}) == 4  # the price moves
    assert at(env) == first and [env.step(action("wait"))[0] for _ in range(3)] == waited
    env.close()


@browser
def test_what_is_pointed_at_has_places():
    env = made("circle-center")
    x, y = re.search(r"circle \d+ wide at (\d+),(\d+)", at(env)).groups()
    page = env.step(action("click_at", x=int(x), y=int(y)))[0]
    info = env.step(click("Submit", page))[4]
    assert info["raw_reward"] > 0.9
    env.close()


@browser
def test_a_screenshot_is_a_picture():
    env = made("click-test", screenshot=True)
    _, info = env.reset(seed=0)
    assert info["screenshot"].startswith(b"\x89PNG") and info["raw_reward"] == 0
    assert "screenshot" not in env.step(action("click", id=1))[0]
    env.close()


@browser
def test_a_tab_that_is_gone_is_an_observation(env):
    at(env)
    env.page.close()
    observation, _, terminated, _, info = env.step(action("click", id=1))
    assert "closed" in info["tool_error"] and observation and not terminated
    assert at(env).startswith("Select")  # in a new tab


@browser
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.one_of(
        st.none(),  # begin again
        st.text(max_size=200),
        st.builds(lambda id: action("click", id=id), st.one_of(st.integers(), st.text(max_size=3))),
        st.builds(lambda text: action("fill", id=1, text=text), st.text(max_size=300)),
        st.builds(lambda key: action("press", key=key), st.text(max_size=12)),
        st.builds(lambda option: action("select", id=1, option=option), st.text(max_size=30)),
    )
)
def test_any_action_is_answered(env, wild):
    if wild is None or env.over:
        at(env)
    assert isinstance(env.step(wild or "x")[0], str)


@pytest.mark.real("miniwob", "playwright", "chromium", "chromedriver")
def test_raw_rewards_agree_with_the_package(monkeypatch):
    """The same seeds and clicks in the package's own environment, through Selenium."""
    for variable, program in (("CHROME_BINARY", "chromium"), ("CHROMEDRIVER", "chromedriver")):
        monkeypatch.setenv(f"MINIWOB_{variable}", shutil.which(program))
    for task, name in (("click-checkboxes", "Submit"), ("click-test-2", "ONE"), ("click-test-2", "TWO")):
        env = made(task)
        ours = []
        for task_id in "012":
            page = at(env, task_id)
            info = env.step(click(name, page))[4]
            ours.append((page.splitlines()[0], info["raw_reward"]))
        env.close()
        assert ours == theirs(task, name)


def theirs(task, name):
    """Utterance and raw reward of three tasks after a click on what is called ``name``."""
    import gymnasium
    import miniwob
    from miniwob.action import ActionTypes

    gymnasium.register_envs(miniwob)
    env = gymnasium.make(f"miniwob/{task}-v1").unwrapped
    outcomes = []
    for task_id in "012":
        seen, infos = [{}], [{}]
        seed = f"train/{task_id}"  # a text, which the reset() of gymnasium does not take
        env.instance.call(env.instance.reset, seen, infos, seed)
        env.instance.wait()
        ref = next(part["ref"] for part in seen[0]["dom_elements"] if part["text"] == name)
        info = env.step(env.create_action(ActionTypes.CLICK_ELEMENT, ref=ref))[4]
        outcomes.append((seen[0]["utterance"], info["raw_reward"]))
    env.close()
    return outcomes
