"""Settings shared by all tests, and the ``real`` marker."""

import datetime
import functools
import importlib.util
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported: tiny models, many processes
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a hub


def pytest_runtest_setup(item: pytest.Item) -> None:
    """``@pytest.mark.real("chromium")``: without this executable or module skip, or fail if required; without
    a GPU for "cuda" always skip, for no gate can install one."""
    names = [name for marker in item.iter_markers("real") for name in marker.args]
    missing = [name for name in names if not present(name)]
    if missing and missing != ["cuda"] and os.environ.get("OPD_REQUIRE_REAL") == "1":
        pytest.fail(f"OPD_REQUIRE_REAL=1, but missing: {', '.join(missing)}", pytrace=False)
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws without a generator of its own does not depend on the run or on the tests before."""
    import torch

    random.seed(0)
    torch.manual_seed(0)


@functools.cache
def present(name: str) -> bool:
    if name == "cuda":
        import torch

        return torch.cuda.is_available()
    if name == "docker":  # a daemon that answers, and the image
        from opd_agents.errors import MissingPart
        from opd_agents.tools.sandbox import open_sandbox

        try:
            open_sandbox("docker").close()
        except MissingPart:
            return False
        return True
    if name == "vllm":
        from vllm_servers import vllm_python

        return vllm_python() is not None
    return bool(shutil.which(name) or importlib.util.find_spec(name))


@pytest.fixture(scope="session")
def desk_chat():
    """A chat over the OrderDesk's vocabulary, its prompts without system text and tools."""
    from rolling import desk_episodes, rolled

    from opd_agents.chat import Chat, build_word_tokenizer
    from opd_agents.policies import ExpertPolicy

    experts = rolled(desk_episodes(24), ExpertPolicy())
    texts = [m.content for t in experts for m in t.messages if m.role == "user"]
    texts += [text for t in experts for turn in t.turns for text in (turn.action, turn.observation)]
    return Chat(build_word_tokenizer(texts), system="", kwargs={"include_tools": False})


@pytest.fixture(scope="session")
def tiny_llama(desk_chat):
    """Builds random Llama models over that vocabulary, with spread logits, so that temperature matters."""
    from opd_agents.policies.models import build_model

    small = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True,
        "initializer_range": 0.3,
    }  # fmt: skip
    return lambda seed=0, **fields: build_model("llama", small | fields, desk_chat.tokenizer, seed)


@pytest.fixture(scope="session")
def student(tiny_llama):
    """Shared: do not change its weights."""
    return tiny_llama(seed=1)


@pytest.fixture(scope="session")
def teacher(tiny_llama):
    return tiny_llama(seed=2, hidden_size=24, tie_word_embeddings=False)


@pytest.fixture(scope="session")
def sampled(student, desk_chat):
    """Twelve OrderDesk episodes of the student in groups of four, at temperature 1.3."""
    from rolling import desk_episodes, rolled, sampler

    policy = sampler(student, desk_chat, temperature=1.3)
    return rolled(desk_episodes(12, group_size=4, max_turns=4), policy, desk_chat, temperature=1.3)


@pytest.fixture(scope="session")
def rewarded(student, teacher, tiny_llama, sampled):
    """Episodes with rewards, and the models that see them."""
    from rewarded import Rewarded

    return Rewarded(student, teacher, tiny_llama(seed=7), sampled)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: a model of a few thousand weights, trained for moments on ``tiny``'s environment."""
    import tiny

    from opd_agents.config import load_config
    from opd_agents.trainer import train

    return train(load_config(tiny.sft(tmp_path_factory.mktemp("teacher") / "run")))


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A checkpoint with the teacher's tokenizer that is no copy of it."""
    import tiny

    from opd_agents.config import load_config
    from opd_agents.trainer import train

    raw = tiny.sft(
        tmp_path_factory.mktemp("student") / "run",
        student={"build": tiny.BUILD | {"tokenizer": str(tiny_teacher)}},
    )
    raw["trainer"] |= {"steps": 3}
    return train(load_config(raw)) / "checkpoints" / "step-3"


@pytest.fixture(scope="session")
def tiny_episodes(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path) -> Path:
    """A file of twelve episodes that the tiny student played."""
    import tiny
    from test_cli import run

    file = tmp_path_factory.mktemp("episodes") / "episodes.jsonl"
    done = run(
        "--import", str(Path(tiny.__file__)), "rollout", "tiny/Parity-v0", "--policy", str(tiny_student),
        "--episodes", "12", "--out", str(file),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return file


@pytest.fixture
def new_year(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' clock stands where Chat's does."""
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Clock":
            return cls(2025, 1, 1, tzinfo=tz)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


@pytest.fixture
def dies_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """In ``with dies_after(step):`` a training is killed in the step after this one."""
    from opd_agents import trainer

    @contextmanager
    def dying(step: int) -> Iterator[None]:
        original = trainer.train_step

        def train_step(session: Any) -> dict[str, Any]:
            if session.step == step:
                raise KeyboardInterrupt
            return original(session)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(trainer, "train_step", train_step)
            yield

    return dying
