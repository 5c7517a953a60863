import importlib.metadata
import pickle
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest
from toy_envs import Counter

from opd_agents.envs import AgentEnv, describe, import_plugins, list_envs, make, register, registry
from opd_agents.errors import EnvironmentContractError, UnknownName, UserError

PLUGIN = """
from opd_agents.envs import AgentEnv, register

class Echo(AgentEnv):
    def __init__(self):
        super().__init__([])
    def begin(self, task):
        return "Say something."
    def success(self):
        return True
    def get_state(self):
        return 0
    def set_state(self, state):
        pass

register("{id}", f"{{__name__}}:Echo")
"""


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what a test registers and imports."""
    monkeypatch.setattr(registry, "_entry_points", dict(registry._entry_points))
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_made_environments_are_bare(clean: None) -> None:
    register("toys/Counter-v0", "toy_envs:Counter", offset=7)
    env = make("toys/Counter-v0")
    assert type(env) is Counter and env.offset == 7 and env.spec is not None
    env.reset(options={"split": "train", "task_id": "0"})
    env.restore(env.snapshot())
    assert env.fork().spec is env.spec
    assert make("toys/Counter-v0", offset=1).spawn().offset == 1
    assert "toys/Counter-v0" in list_envs()


def test_gymnasium_makes_them_bare_too() -> None:
    assert isinstance(gymnasium.make("opd_agents/OrderDesk-v0", level="hard"), AgentEnv)


def test_unknown_ids_get_the_nearest_name() -> None:
    with pytest.raises(
        UnknownName, match=r"Did you mean 'opd_agents/OrderDesk-v0'.*opd-agents envs"
    ) as caught:
        make("opd_agents/OrderDsk-v0")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    ("id", "entry_point", "kwargs", "message"),
    [
        (
            "toys/A-v0",
            "toy_envs:Counter",
            {"max_episode_steps": 5},
            "max_episode_steps is refused.*max_turns",
        ),
        ("toys/A-v0", Counter, {}, "must be a string 'module:Class'"),
        ("toys/A-v0", "toy_envs.Counter", {}, "must be a string 'module:Class'"),
        ("not an id", "toy_envs:Counter", {}, "cannot be registered"),
    ],
)
def test_registrations_that_cannot_work_are_refused(
    clean: None, id: str, entry_point: str, kwargs: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        register(id, entry_point, **kwargs)
    assert id not in list_envs()


def test_entry_points_that_lead_nowhere_are_explained(clean: None) -> None:
    register("toys/NoModule-v0", "no_such_module:X")
    register("toys/NoClass-v0", "toy_envs:NoSuchClass")
    register("toys/NoEnv-v0", "pathlib:Path")
    with pytest.raises(UserError, match="no_such_module cannot be imported"):
        make("toys/NoModule-v0")
    with pytest.raises(UserError, match="module toy_envs has no class NoSuchClass"):
        make("toys/NoClass-v0")
    with pytest.raises(EnvironmentContractError, match=r"Path is no opd_agents\.envs\.AgentEnv"):
        make("toys/NoEnv-v0")
    with pytest.raises(UserError, match="takes no argument 'levle'; it takes level, timeout_rate, max_turns"):
        make("opd_agents/OrderDesk-v0", levle="easy")


def test_describe_is_plain_data() -> None:
    about = describe("opd_agents/OrderDesk-v0")
    keys = {"id", "family", "fork_mode", "tools", "splits", "extra", "licence", "max_turns", "missing"}
    assert set(about) == keys and about["missing"] is None
    assert about["splits"] == {"train": 1_000_000, "validation": 10_000, "test": 10_000}
    assert about["fork_mode"] == "snapshot" and "refund_order" in about["tools"] and about["extra"] is None


def test_plugin_files_and_modules_are_imported(clean: None, tmp_path: Path) -> None:
    path = tmp_path / "echo_plugin_a.py"
    path.write_text(PLUGIN.format(id="toys/EchoA-v0"))
    import_plugins([str(path), str(path)])
    env = make("toys/EchoA-v0")
    assert env.reset(seed=0)[0] == "Say something." and env.step("hi")[1:3] == (1.0, True)
    pickle.loads(pickle.dumps(type(env)))
    (tmp_path / "echo_plugin_b.py").write_text(PLUGIN.format(id="toys/EchoB-v0"))
    import_plugins(["echo_plugin_b"])
    assert make("toys/EchoB-v0").has_expert is False


def test_plugins_work_in_a_fresh_process(tmp_path: Path) -> None:
    path = tmp_path / "echo_plugin_c.py"
    path.write_text(PLUGIN.format(id="toys/EchoC-v0"))
    code = (
        "import sys; from opd_agents.envs import import_plugins, make; "
        f"import_plugins([{str(path)!r}]); print(make('toys/EchoC-v0').reset(seed=0)[0]); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "Say something.\n", done.stderr


def test_plugins_that_cannot_be_imported_are_explained(clean: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Plug-in file .*missing\.py does not exist"):
        import_plugins([str(tmp_path / "missing.py")])
    with pytest.raises(UserError, match="'no_such_plugin' was not found"):
        import_plugins(["no_such_plugin"])
    (tmp_path / "broken_plugin.py").write_text("1 / 0")
    with pytest.raises(UserError, match=r"broken_plugin\.py failed to import: ZeroDivisionError"):
        import_plugins([str(tmp_path / "broken_plugin.py")])
    (tmp_path / "calendar.py").write_text("")
    with pytest.raises(UserError, match=r"has the name of another module.*rename the file"):
        import_plugins([str(tmp_path / "calendar.py")])


def test_installed_plugins_are_found_and_a_broken_one_only_warns(
    clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "echo_plugin_d.py").write_text(PLUGIN.format(id="toys/EchoD-v0"))
    information = tmp_path / "echo_d-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: echo-d\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[opd_agents.envs]\nbad = no_such_plugin_module\nechoes = echo_plugin_d\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(registry, "_loaded_groups", set())
    importlib.invalidate_caches()
    with pytest.warns(UserWarning, match="plug-in bad"):
        assert make("toys/EchoD-v0").reset(seed=0)[0] == "Say something."
    assert "toys/EchoD-v0" in list_envs()
