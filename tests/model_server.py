"""An endpoint on loopback that speaks as ours does, with the tiny model behind it and answers as a test says."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from sampo_ray.data.chat import ChatFormat

Body = dict[str, Any]
Said = tuple[int, Body, dict[str, str]]
HEADERS = {"x-policy-version": "3", "x-policy-run": "r1"}


@dataclass
class ModelServer:
    """`say`: what it answers to a conversation; `first`: what it does with its first requests instead."""

    url: str
    chat: ChatFormat
    model: Any
    say: Callable[[list[Any]], str] = lambda messages: "an answer"
    first: list[Said] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=lambda: dict(HEADERS))
    asked: list[Body] = field(default_factory=list)
    shift: int = 0
    """Added to the first token id that it says a prompt has."""
    lost: int = 0
    """So many of the likeliest tokens it gives no log-prob of, the last ones."""
    finish: str = "stop"
    lock: Any = field(default_factory=threading.Lock)

    def answer(self, route: str, body: Body) -> Said:
        with self.lock:
            self.asked.append(body)
            if self.first:
                return self.first.pop(0)
            return 200, self.completion(body) if route.endswith("/v1/completions") else self.message(body), self.headers

    def message(self, body: Body) -> Body:
        text = self.say(body["messages"])
        prompt = self.chat.prompt_ids(body["messages"])
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": self.finish}
        tokens = self.chat.response_ids(text)
        shown = [prompt[0] + self.shift, *prompt[1:]]
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens), "total_tokens": 0}
        return {"choices": [{**choice, "token_ids": tokens}], "prompt_token_ids": shown, "usage": usage}

    def completion(self, body: Body) -> Body:
        ids = torch.tensor([body["prompt"]])
        with torch.no_grad():
            *_, last = logprobs = self.model(ids).logits[0].float().log_softmax(-1)
        if "logprobs" in body:
            top = last.topk(body["logprobs"])
            kept = [*top.values.tolist()[: len(top.values) - self.lost], *[-9999.0] * self.lost]
            named = {f"token_id:{token}": p for token, p in zip(top.indices.tolist(), kept, strict=True)}
            return {"choices": [{"index": 0, "logprobs": {"top_logprobs": [named]}}]}
        logprobs = logprobs[:-1]
        ranks = (logprobs > logprobs.gather(1, ids[0, 1:, None])).sum(1) + 1
        given = [
            {str(token): {"logprob": float(logprobs[at, token]), "rank": int(ranks[at]), "decoded_token": ""}}
            for at, token in enumerate(body["prompt"][1:])
        ]
        return {"choices": [{"index": 0, "prompt_token_ids": body["prompt"], "prompt_logprobs": [None, *given]}]}


@contextmanager
def serving(folder: Path, chat: ChatFormat) -> Iterator[ModelServer]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            status, said, headers = server.answer(self.path, body)
            content = json.dumps(said).encode()
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None: ...

    class Server(ThreadingHTTPServer):
        def handle_error(self, *arguments: object) -> None:
            """A client that has given up is no matter."""

    with Server(("127.0.0.1", 0), Handler) as http:
        server = ModelServer(f"http://127.0.0.1:{http.server_address[1]}", chat, model)
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield server
        http.shutdown()
