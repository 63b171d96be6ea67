"""The HTTP service: LitServe's processes and batches around `SpecialtyPredictor`, with limits, a token and a page.

One process answers HTTP and holds no model; one on each device computes. Requests are checked in the former, so none
spoils the batch that it shares with others. No log and no error holds a note.
"""

import hmac
import os
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from multiprocessing import active_children
from pathlib import Path
from queue import Queue
from threading import Thread
from types import FrameType
from typing import Annotated, Any

import litserve as ls
import torch
import yaml
from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from litserve.loops import BatchedLoop
from prometheus_client import CONTENT_TYPE_LATEST, Histogram, generate_latest
from pydantic import AfterValidator, BaseModel, Field

from medlit.data.notes import clean_note
from medlit.errors import UserError
from medlit.paths import __version__

MAX_NOTES, MAX_CHARACTERS, MAX_MIB = 256, 100_000, 8  # notes of a request, characters of a note, size of a request
_FORM = f'send {{"notes": [...]}} as application/json: 1 to {MAX_NOTES} notes of 1 to {MAX_CHARACTERS:,} characters'
_OPEN = ("/", "/health")  # without a token: the page has a field for it
_REPLACED = ("/", "/docs", "/docs/oauth2-redirect", "/redoc")  # FastAPI's pages load scripts from another host
_SECONDS = Histogram("medlit_request_seconds", "Time to answer a request.", ["code"])


class Notes(BaseModel, extra="forbid"):
    """A request: one note or several."""

    notes: list[Annotated[str, Field(max_length=MAX_CHARACTERS), AfterValidator(clean_note), Field(min_length=1)]] = (
        Field(min_length=1, max_length=MAX_NOTES)
    )


class SleepingLoop(BatchedLoop):
    """Sleeps until a request comes and then collects a batch; LitServe's own polls, which keeps an idle core busy."""

    def get_batch_requests(self, lit_api: ls.LitAPI, request_queue: Queue[Any], transport: Any) -> Any:  # noqa: ANN401
        """Requests with their ids, and those that timed out."""
        consumer, uid, _, request = request_queue.get()
        others, timed_out = super().get_batch_requests(lit_api, request_queue, transport)
        return [(consumer, uid, request), *others], timed_out


class Classifier(ls.LitAPI):
    """Runs the model in a worker process; `settings` are those of `SpecialtyPredictor.load`."""

    def __init__(self, adapter: Path, settings: dict[str, Any]) -> None:
        # Clients that were answered together send their next requests within milliseconds.
        super().__init__(max_batch_size=32, batch_timeout=0.005, api_path="/v1/classify", loop=SleepingLoop())  # type: ignore[no-untyped-call]
        self._adapter, self.settings = adapter, settings

    def setup(self, device: str) -> None:
        """Load the model and answer a note, which takes longest once; a user's mistake ends it with its sentence."""
        from medlit import SpecialtyPredictor
        from medlit.cli.environment import silence_warnings

        silence_warnings()
        try:
            self.predictor: Any = SpecialtyPredictor.load(self._adapter, device=device, **self.settings)
            self.predictor.predict(["Patient 30 years old, since Monday: the heart races."])  # an invented note
        except UserError as error:
            print(f"medlit: {error}", file=sys.stderr)
            raise SystemExit(2) from error

    def decode_request(self, request: Notes) -> list[str]:  # type: ignore[override]
        """The notes of a request, which FastAPI has checked by this annotation."""
        return request.notes

    def predict(self, requests: list[list[str]]) -> list[dict[str, Any]]:  # type: ignore[override]
        """Answer the requests of a batch."""
        try:
            found = iter(self.predictor.predict([note for notes in requests for note in notes]))
        except UserError as error:  # it names no note's text
            print(f"medlit: {error}", file=sys.stderr, flush=True)
            raise HTTPException(500, "the model failed on these notes; the service's log says why.") from None
        except Exception as error:  # where it happened, without its message, which may hold a note
            print(*traceback.format_tb(error.__traceback__), type(error).__name__, sep="", file=sys.stderr, flush=True)
            raise HTTPException(500, "the model failed on these notes; the service's log says where.") from None
        return [{"predictions": [next(found) for _ in notes]} for notes in requests]


class Server(ls.LitServer):
    """A LitServer that finishes the requests in flight before a signal ends it."""

    def serve(self, host: str, port: int) -> None:
        """Serve until a signal, or until the process of a model ends: then with its exit code, or 1."""
        print(f"medlit: loading the model for http://{host}:{port}; Ctrl-C ends the service", file=sys.stderr)
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # of the lock of a killed model's tqdm
        self.run(host, port, num_api_servers=1, log_level="error", generate_client_file=False, access_log=False)

    def launch_inference_worker(self, lit_api: ls.LitAPI) -> list[Any]:
        """Start the models' processes without SIGINT: Ctrl-C reaches every process, and the first one ends these."""
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        processes: list[Any] = super().launch_inference_worker(lit_api)
        signal.signal(signal.SIGINT, before)
        return processes

    def verify_worker_status(self) -> None:
        """Wait for the models; from then on a signal waits for requests in flight, and a second one does not."""
        while not all(status == "ready" for status in self.workers_setup_status.values()):
            self._check_models()
            time.sleep(0.05)
        first, before = os.getpid(), {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def stop(number: int, frame: FrameType | None) -> None:
            if os.getpid() != first:  # the HTTP process, before its first request or after its last
                os._exit(0)
            signal.signal(number, before[signal.Signals(number)])
            os.write(2, f"medlit: stopped by {signal.Signals(number).name}; requests are answered first.\n".encode())
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # Not by an exception, which some code ignores; in a thread, since this one may wait for the event.
            Thread(target=self._shutdown_event.set).start()  # type: ignore[union-attr]

        for number in before:
            signal.signal(number, stop)
        signal.signal(signal.SIGCHLD, self._check_models)

    def _start_server(self, *given: Any, **settings: Any) -> Any:  # noqa: ANN401 - LitServe's has no types
        for bound in given[3]:  # its sockets; requests wait there until the HTTP process takes them
            bound.listen()
        print("medlit: the model is loaded", file=sys.stderr, flush=True)
        return super()._start_server(*given, **settings)  # type: ignore[no-untyped-call]

    def _check_models(self, *_: object) -> None:
        """End at once if a model's process has ended; LitServe would wait for answers that cannot come."""
        if codes := [process.exitcode for process in self.inference_workers if process.exitcode is not None]:
            if codes[0] < 0:
                print("medlit: the process of a model was killed, perhaps because memory ran out.", file=sys.stderr)
            for process in active_children():
                process.kill()
            os._exit(max(codes[0], 1))


def make_server(api: Classifier, about: dict[str, Any], token: str) -> Server:
    """The server of a classifier; `about` describes the model in plain types, and `token` may be empty."""
    settings: dict[str, Any] = {"info_path": "/v1/model", "timeout": False, "max_payload_size": MAX_MIB * 2**20}
    server = Server(api, "cuda" if torch.cuda.is_available() else "cpu", model_metadata=about, **settings)
    server.uvicorn_graceful_timeout = 600  # seconds for requests in flight after a signal
    app, expected = server.app, f"Bearer {token}".encode()
    app.title, app.version = "medlit", __version__

    async def gate(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        begin, given = time.perf_counter(), request.headers.get("authorization", "").encode()
        if token and request.scope["path"] not in _OPEN and not hmac.compare_digest(given, expected):
            response: Response = JSONResponse({"detail": "send the header 'Authorization: Bearer TOKEN'."}, 401)
        elif not token and request.headers.get("host", "").split(":")[0] not in ("127.0.0.1", "localhost"):
            # The page of another site, under its own name (DNS rebinding).
            response = JSONResponse({"detail": "this service is for http://127.0.0.1 and http://localhost."}, 403)
        else:
            response = await answer(request)
        _SECONDS.labels(response.status_code).observe(time.perf_counter() - begin)
        return response

    def refuse(request: Request, error: Any) -> Response:  # noqa: ANN401 - FastAPI's type is too wide
        found = error.errors()[0] if isinstance(error, RequestValidationError) else {"code": error.status_code}
        code = 400 if found.get("type") == "json_invalid" else found.get("code", 422)
        faults = {400: "the body is not JSON in UTF-8", 413: f"the request is larger than {MAX_MIB} MiB"}
        place = ".".join(map(str, found.get("loc", ())))  # FastAPI's own answer repeats the notes
        fault = faults.get(code) or f"{place:.50}: {found['msg']}"
        return JSONResponse({"detail": f"{fault}; {_FORM}."}, code)

    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") not in _REPLACED]
    (route,) = (each for each in app.router.routes if getattr(each, "path", "") == api.api_path)
    vars(route).update(yaml.safe_load(Path(__file__).with_name("openapi.yaml").read_text(encoding="utf-8")))
    app.add_route("/", lambda request: FileResponse(Path(__file__).with_name("page.html")))
    app.add_route("/metrics", lambda request: Response(generate_latest(), media_type=CONTENT_TYPE_LATEST))
    app.middleware("http")(gate)
    for fault in (400, 413, RequestValidationError):
        app.add_exception_handler(fault, refuse)
    return server
