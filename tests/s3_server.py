"""moto's S3 server on a free port, which it says. One request at a time: of two that have a condition, one is first."""

import threading
from collections.abc import Iterable

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

application, one_at_a_time = DomainDispatcherApplication(create_backend_app), threading.Lock()


def answer(environ: dict[str, object], start: object) -> Iterable[bytes]:
    with one_at_a_time:
        return list(application(environ, start))


if __name__ == "__main__":
    run_simple("127.0.0.1", 0, answer, threaded=True)
