"""A judge on loopback that speaks OpenAI's protocol and answers as a test says."""

import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Answer = tuple[int, Body | str, dict[str, str]]


def completion(text: str, top: dict[str, float] | None = None, **message: object) -> Answer:
    """A chat completion; `top`: probabilities of first tokens."""
    content = [
        {"token": token, "logprob": math.log(p), "bytes": None}
        for token, p in sorted((top or {}).items(), key=lambda e: -e[1])
    ]
    first = [{"token": text, "logprob": -0.1, "bytes": None, "top_logprobs": content}]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, **message},
        "finish_reason": "stop",
        "logprobs": {"content": first} if top else None,
    }
    usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
    return (
        200,
        {"id": "x", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice], "usage": usage},
        {},
    )


def problem(status: int, message: str = "no", **headers: str) -> Answer:
    return status, {"error": {"message": message, "type": "error", "code": None}}, headers


def parts(body: Body) -> dict[str, str]:
    """The texts that a judge is asked about, by their names: `request`, `answer m`, and so on."""
    text = body["messages"][-1]["content"]
    mark = re.search(r"#[0-9a-f]{12}", text)
    assert mark is not None
    pieces = text.split("\n\n", 2)[-1].split(f"{mark[0]} ")
    return {name: said.rstrip("\n") for name, _, said in (piece.partition("\n") for piece in pieces) if name}


def shown(body: Body) -> tuple[str, str]:
    """The two answers of a comparison, the first one first."""
    found = [said for name, said in parts(body).items() if name.startswith("answer ")]
    return found[0], found[1]


def by_length(body: Body, sure: float | None = None) -> Answer:
    """Prefers the longer answer; with probability `sure` where log-probs are asked for."""
    a, b = shown(body)
    labels = [name.removeprefix("answer ") for name in parts(body) if name.startswith("answer ")]
    best, other = labels if len(a) >= len(b) else labels[::-1]
    return completion(best, {best: sure, other: 1 - sure} if sure and body.get("logprobs") else None)


class JudgeServer:
    """What it was asked is in `bodies`, the headers in `headers`, and how many calls were at once at most in `most`."""

    def __init__(self, answer: Callable[[Body], Answer]) -> None:
        self.answer, self.url = answer, ""
        self.bodies: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.now = self.most = 0
        self.lock = threading.Lock()


@contextmanager
def serving(answer: Callable[[Body], Answer]) -> Iterator[JudgeServer]:
    judge = JudgeServer(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with judge.lock:
                judge.bodies.append(body)
                judge.headers.append({name.lower(): value for name, value in self.headers.items()})
                judge.now += 1
                judge.most = max(judge.most, judge.now)
            try:
                status, content, headers = judge.answer(body)
            finally:
                with judge.lock:
                    judge.now -= 1
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            for name, value in {
                "content-type": "application/json",
                "content-length": str(len(data)),
                **headers,
            }.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
