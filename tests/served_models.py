"""A model of this process behind vLLM's completion API, for tests of what speaks it: it writes what it is
told to write, with the log-probs that it gives it."""

import json
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from opd_agents.policies.models import load_model, load_tokenizer


class ServedModel(ThreadingHTTPServer):
    """The checkpoint ``path``; ``writes`` gives the ids that follow a prompt's. While entered."""

    daemon_threads = True

    def __init__(
        self, path: str, dtype: str, writes: Callable[[Sequence[int]], list[int]] = lambda ids: [0]
    ) -> None:
        self.model, self.tokenizer, self.writes = load_model(path, dtype), load_tokenizer(path), writes
        self.lock, self.reloads = threading.Lock(), 0
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "ServedModel":
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """One choice. All log-probs are of temperature 1, of the prompt those of its own tokens alone."""
        prompt = list(body["prompt"])
        written = self.writes(prompt)[: body["max_tokens"]]
        ids = torch.tensor([prompt + written])
        with self.lock:
            log_p = self.model(ids).logits[0, :-1].float().log_softmax(-1)
        own = log_p.gather(1, ids[0, 1:, None])
        ranks, values = (log_p > own).sum(-1).tolist(), own[:, 0].tolist()
        first = len(prompt) - 1
        told = [
            {str(i): {"logprob": value, "rank": rank + 1}}
            for i, value, rank in zip(prompt[1:], values, ranks, strict=False)
        ]
        best = log_p[first:].topk(5)
        top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return {
            "prompt_token_ids": prompt, "token_ids": written, "finish_reason": "stop",
            "prompt_logprobs": [None, *told] if "prompt_logprobs" in body else None,
            "logprobs": {
                "token_logprobs": values[first:],
                "top_logprobs": [{f"token_id:{i}": v for i, v in zip(*row, strict=True)} for row in top],
            },
        }  # fmt: skip

    def reload(self, folder: str) -> None:
        with self.lock:
            self.model.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=False)
        self.reloads += 1


class Handler(BaseHTTPRequestHandler):
    server: ServedModel
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self.send({"data": [{"id": "tiny", "max_model_len": 8193}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        match self.path:
            case "/tokenize":
                self.send({"tokens": self.server.tokenizer.encode(body["prompt"], add_special_tokens=False)})
            case "/collective_rpc":
                if body:  # none: asked whether it is there
                    self.server.reload(body["kwargs"]["weights_path"])
                self.send({})
            case "/reset_prefix_cache":
                self.send({"success": True})
            case _:
                self.send({"choices": [self.server.complete(body)]})

    def send(self, answer: Any) -> None:
        raw = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        pass
