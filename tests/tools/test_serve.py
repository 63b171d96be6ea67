"""`medlit serve` answers batches of requests, refuses what is wrong in one sentence, and keeps notes to itself."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any, get_args, get_origin, get_type_hints

import httpx
import pytest
from fake_service import FAILS, KILLS, SLOW, FakeClassifier, FakePredictor, fake_server
from fakes import notes as tiny_notes
from fastapi import HTTPException
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from litserve.utils import wrap_litserve_start

from medlit import __version__
from medlit.data.splits import DataFingerprint
from medlit.errors import UserError
from medlit.model.adapter_metadata import AdapterMetadata
from medlit.predictions.table import SetPrediction
from medlit.tools import license_of
from medlit.tools.serve import run, service
from medlit.tools.serve.service import MAX_CHARACTERS, MAX_MIB, MAX_NOTES, Classifier, Notes, SleepingLoop

TESTS = Path(__file__).parents[1]
SECRET = "a-secret-of-16-signs"


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """A client of the fake service; the fake predictor has a process of its own, as a model has."""
    with wrap_litserve_start(fake_server()) as server, TestClient(server.app, "http://127.0.0.1") as found:
        while found.get("/health").status_code != 200:
            time.sleep(0.05)
        yield found


@pytest.fixture(scope="module")
def guarded() -> TestClient:
    """A client of a service with a token, for requests that need no model: no other process is started."""
    return TestClient(fake_server("a secret").app, "http://another")


def detail(response: httpx.Response) -> str:
    """The one sentence of a refusal."""
    (sentence,) = response.json().values()
    assert re.fullmatch(r"[^\n]+", sentence)
    return str(sentence)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_each_note_has_a_prediction_in_the_order_of_the_notes(client: TestClient) -> None:
    given = ["Heart", "Bone", "Heart races", " Bone\r\n"]
    response = client.post("/v1/classify", json={"notes": given})
    assert response.status_code == 200
    assert response.json() == {
        "predictions": [asdict(one) for one in FakePredictor().predict([note.strip() for note in given])]
    }
    single, several = response.json()["predictions"][0], response.json()["predictions"][2]
    assert single["runner_up"] == "Bone"
    assert single["cut_tokens"] == 3
    assert "set" not in single
    assert several["set"] == ["Heart", "Bone"]
    assert several["abstained"]


def test_clients_at_the_same_time_get_their_own_answers(client: TestClient) -> None:
    def ask(i: int) -> list[str]:
        found = client.post("/v1/classify", json={"notes": [f"n{i}"] * (i % 3 + 1)}).json()
        return [one["answer"] for one in found["predictions"]]

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(100))) == [[f"n{i}"] * (i % 3 + 1) for i in range(100)]


def test_waiting_requests_are_one_batch() -> None:
    queue: Queue[Any] = Queue()
    for i in range(40):
        queue.put((0, f"id{i}", 0.0, Notes(notes=[f"note {i}"])))
    api = FakeClassifier(Path(), {})
    api.request_timeout = False
    taken = [len(SleepingLoop().get_batch_requests(api, queue, None)[0]) for _ in range(2)]
    assert sum(taken) == 40
    assert taken[0] >= 32


def test_the_model_is_described_and_requests_are_measured(client: TestClient) -> None:
    client.post("/v1/classify", json={"notes": []})
    assert client.get("/v1/model").json()["model"]["labels"] == ["Heart", "Bone"]
    assert 'medlit_request_seconds_count{code="422"}' in client.get("/metrics").text


def test_what_is_answered_and_refused_is_described_for_programs(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    assert described["info"] == {"title": "medlit", "version": __version__}
    schemas, operation = described["components"]["schemas"], described["paths"]["/v1/classify"]["post"]
    assert (operation["summary"], operation["operationId"]) == ("Classify notes by specialty", "classify")
    answers = operation["responses"].pop("200")["content"]["application/json"]["schema"]
    item = answers["properties"]["predictions"]["items"]
    found = client.post("/v1/classify", json={"notes": ["Heart", "Heart races"]}).json()["predictions"]
    assert [set(item["required"]), set(item["properties"])] == [set(prediction) for prediction in found]
    for name, kind in get_type_hints(SetPrediction).items():
        python = {"string": str, "number": float, "integer": int, "boolean": bool, "array": list, "null": type(None)}
        declared = item["properties"][name]["type"]
        types = {python[each] for each in ([declared] if isinstance(declared, str) else declared)}
        assert types == {get_origin(each) or each for each in get_args(kind) or [kind]} or types == {get_origin(kind)}
    assert {"400", "401", "413", "422"} <= operation["responses"].keys()
    for refusal in operation["responses"].values():
        schema = refusal["content"]["application/json"]["schema"]
        assert schema["properties"] == {"detail": {"type": "string"}}
    assert not [name for name in schemas if "Validation" in name]


def test_the_page_needs_no_other_host(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "connect-src 'self'" in page.text
    assert not re.search(r"https?:|src=|@import|url\(", page.text)
    assert client.get("/docs").status_code == 404, "its scripts come from another host"


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code", "expected"),
    [
        ({"notes": []}, 422, f"body.notes: List should have at least 1 item .*; send .*1 to {MAX_NOTES} notes"),
        ({"notes": ["x"] * (MAX_NOTES + 1)}, 422, f"body.notes: List should have at most {MAX_NOTES} items"),
        ({"notes": ["x", "x" * (MAX_CHARACTERS + 1)]}, 422, f"body.notes.1: .* at most {MAX_CHARACTERS} characters"),
        ({"notes": ["x", " \n\x1c"]}, 422, "body.notes.1: Value should have at least 1 item"),
        ({"notes": "x"}, 422, "body.notes: Input should be a valid list"),
        ({"notes": [None]}, 422, "body.notes.0: Input should be a valid string"),
        ({"note": "x"}, 422, 'body.notes: Field required; send {"notes": '),
        ({"notes": ["x"], "coverage": 0.9}, 422, "body.coverage: Extra inputs are not permitted"),
        (["x"], 422, "body: Input should be"),
        ({"notes": ["x" * MAX_CHARACTERS] * (MAX_MIB * 11)}, 413, f"larger than {MAX_MIB} MiB; send"),
        (b"x", 400, 'not JSON in UTF-8; send {"notes": '),
        (b'{"notes": ["\xe4"]}', 400, 'not JSON in UTF-8; send {"notes": '),
        (b'{"notes": ["x"], "\\ud800": 1}', 422, "body.*: .*; send"),
    ],
)
def test_a_wrong_request_is_refused_in_one_sentence(client: TestClient, body: object, code: int, expected: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post("/v1/classify", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == code
    assert re.search(expected, detail(response))


def test_a_body_sent_as_a_form_is_refused_with_the_type_to_send(client: TestClient) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}  # what `curl -d` sends
    response = client.post("/v1/classify", content=b'{"notes": ["x"]}', headers=headers)
    assert response.status_code == 422
    assert "application/json" in detail(response)


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["notes", "note", "x"]), inner),
    max_leaves=8,
)
VALID = json.dumps({"notes": ["Heart \u00e4", "Bone"]}).encode()
MALFORMED = st.one_of(
    st.binary(max_size=200),
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.integers(0, len(VALID) - 1).map(lambda end: VALID[:end]),
    st.tuples(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=3)).map(
        lambda at: VALID[: at[0]] + at[1] + VALID[at[0] :]
    ),
    st.sampled_from([b"[" * 100_000, b'{"notes":' * 50_000, b'{"notes": ["\\ud800"]}', b'{"notes": ["\xff"]}']),
)


def is_valid(body: bytes) -> bool:
    try:
        Notes.model_validate(json.loads(body))
    except (ValueError, RecursionError):
        return False
    return True


@settings(max_examples=250, deadline=None, database=None)
@given(body=MALFORMED, kind=st.sampled_from(["application/json", "text/plain", "application/x-www-form-urlencoded"]))
def test_a_malformed_body_is_the_clients_mistake(client: TestClient, body: bytes, kind: str) -> None:
    response = client.post("/v1/classify", content=body, headers={"Content-Type": kind})
    if kind == "application/json" and is_valid(body):
        assert response.status_code == 200
    else:
        assert 400 <= response.status_code < 500
        assert detail(response)


def test_wrong_paths_and_methods_are_the_clients_mistake(client: TestClient) -> None:
    codes = {client.request(method, "/v1/classify").status_code for method in ("GET", "PUT", "PATCH", "DELETE", "HEAD")}
    assert codes == {405}
    assert client.post("/v2/classify", json={"notes": ["x"]}).status_code == 404


def test_the_page_of_another_site_cannot_use_the_service(client: TestClient) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example:80", "[::1", ""):
        assert client.get("/v1/model", headers={"Host": host}).status_code == 403
    assert client.get("/v1/model", headers={"Host": "localhost:8000"}).status_code == 200
    body = json.dumps({"notes": ["x"]})  # as a form of another site sends it without a preflight
    assert client.post("/v1/classify", content=body, headers={"Content-Type": "text/plain"}).status_code == 422
    assert client.post("/v1/classify", content=body).status_code == 422


@pytest.mark.parametrize("given", [None, "a secret", "Bearer", "Bearer wrong", "bearer a secret", "Bearer a secret "])
def test_without_its_token_only_the_page_and_the_health_are_open(guarded: TestClient, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    paths = ["/v1/model", "/metrics", "/openapi.json", "/none"]
    refused = [guarded.get(path, headers=headers) for path in paths]
    refused.append(guarded.post("/v1/classify", content=b"{", headers=headers))
    if given != "Bearer a secret ":  # HTTP removes outer white space
        assert {response.status_code for response in refused} == {401}
        assert "Authorization: Bearer TOKEN" in detail(refused[0])
    assert guarded.get("/").status_code == 200


def test_with_its_token_a_request_is_let_through(guarded: TestClient) -> None:
    headers = {"Authorization": "Bearer a secret"}
    assert guarded.get("/v1/model", headers=headers).status_code == 200
    assert guarded.post("/v1/classify", json={"notes": []}, headers=headers).status_code == 422


def test_a_failing_model_leaves_its_place_but_no_note_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    api = FakeClassifier(Path(), {})
    api.predictor = FakePredictor()
    with pytest.raises(HTTPException) as failed:
        api.predict([["Heart"], [FAILS]])
    assert failed.value.status_code == 500
    logged = capsys.readouterr().err
    assert logged.endswith("ValueError\n")
    assert "fake_service.py" in logged
    assert FAILS not in logged + failed.value.detail


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A run folder whose adapter has thresholds, and no weights."""
    notes = DataFingerprint(str(tmp_path / "notes.csv"), None, {})
    metadata = AdapterMetadata(str(tmp_path / "llama"), None, {}, "alpaca-1", ["Bone", "Heart"], data=notes)
    values = metadata.to_dict() | {"thresholds": {"mode=likelihood": {"0.9": 0.2, "0.95": 0.1}}}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "medlit.json").write_text(json.dumps(values))
    return tmp_path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--host", "0.0.0.0"], "host: 0.0.0.0 is open to other machines; set MEDLIT_SERVE_TOKEN"),
        (["--host", "::"], "host: :: is open to other machines"),
        (["--port", "80"], "port: must be from 1024 to 65535, not 80"),
        (["--port", "70000"], "port: must be from 1024 to 65535"),
        (["--coverage", "0.4"], "coverage: must be over 0.5"),
        (["--abstain_below", "2"], "abstain_below: must be a probability"),
        (["--mode", "generate", "--abstain_below", "0.5"], "'generate' gives no probabilities"),
        (["--run_dir", "nowhere"], "run_dir: there is no folder nowhere; give the run folder of a fit."),
    ],
)
def test_a_wrong_flag_is_refused_before_the_model_is_loaded(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], expected: str
) -> None:
    monkeypatch.setattr(service, "make_server", lambda *_: pytest.fail("it was started"))
    with pytest.raises(UserError, match=re.escape(expected)):
        run(["--run_dir", str(adapter), "--port", str(free_port()), *flags])


@pytest.mark.parametrize(
    "token", ["short", "with spaces, and long enough", "letters-w\u00eeth-accents", "a-line\nand-another-one"]
)
def test_a_token_that_no_header_can_carry_is_refused(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("MEDLIT_SERVE_TOKEN", token)
    with pytest.raises(UserError, match=r"^MEDLIT_SERVE_TOKEN: must be at least 16 ASCII ") as refused:
        run(["--run_dir", str(adapter), "--host", "0.0.0.0"])
    assert token not in str(refused.value)


def test_a_port_that_is_taken_is_refused(adapter: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port: {port}: Address already in use"):
            run(["--run_dir", str(adapter), "--port", str(port)])


def test_what_is_not_installed_is_named_with_its_command(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medlit.tools.serve.find_spec", lambda name: None)
    extra = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]["serve"]
    command = "pip install " + " ".join(f'"{need}"' for need in extra)
    with pytest.raises(UserError, match=re.escape(f"is not installed; run '{command}'.")):
        run(["--run_dir", str(adapter)])
    assert command in (TESTS.parent / "src/medlit/tools/help/serve.txt").read_text()


@pytest.mark.parametrize(
    ("flags", "coverage"),
    [([], 0.9), (["--coverage", "0.95"], 0.95), (["--mode", "constrained"], None), (["--mode", "generate"], None)],
)
def test_sets_are_made_where_the_adapter_has_thresholds(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], coverage: float | None
) -> None:
    made = []

    def make(api: object, about: dict[str, Any], token: str) -> SimpleNamespace:
        made.append((about["coverage"], about["labels"], token))
        assert str(adapter) not in json.dumps(about), "another program needs no paths of this machine"
        return SimpleNamespace(serve=lambda host, port: None)

    monkeypatch.setattr(service, "make_server", make)
    monkeypatch.setenv("MEDLIT_SERVE_TOKEN", SECRET)
    port = ["--port", str(free_port())]
    assert run(["--run_dir", str(adapter), "--host", "0.0.0.0", *port, *flags]) == 0
    assert made == [(coverage, ["Bone", "Heart"], SECRET)]


@pytest.mark.parametrize("tested", [True, False])
def test_the_description_has_scores_intended_use_and_license(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, tested: bool
) -> None:
    described: dict[str, Any] = {}
    monkeypatch.setattr(
        service, "make_server", lambda api, about, token: described.update(about) or SimpleNamespace(serve=print)
    )
    scores = {"n": 130, "accuracy": 0.85, "accuracy_ci": [0.78, 0.9], "f1_macro": 0.8, "f1_macro_ci": [0.77, 0.9]}
    if tested:
        (adapter / "test_metrics.json").write_text(json.dumps(scores | {"confusion": [[1]]}))
        run_facts = {"weights": str(adapter / "checkpoints/best.ckpt"), "decoder": "generate", "revision": None}
        (adapter / "test_facts.json").write_text(json.dumps({"run": run_facts}))
    known = scores | {"weights": "best.ckpt", "decoder": "generate"} if tested else None
    run(["--run_dir", str(adapter), "--port", str(free_port())])
    assert described.get("test") == known
    assert described["license"] == {"license": "unknown"}
    assert "not a medical device" in described["intended_use"]


def test_a_license_is_not_looked_for_in_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(*_: object, local_files_only: bool, **__: object) -> str:
        asked.append(local_files_only)
        raise FileNotFoundError

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert license_of("owner/new", cached=True) == {"license": "unknown"}
    assert asked == [True]


def test_the_first_request_finds_a_warm_model(monkeypatch: pytest.MonkeyPatch) -> None:
    answered: list[str] = []
    model = SimpleNamespace(predict=answered.extend)
    monkeypatch.setattr("medlit.SpecialtyPredictor", SimpleNamespace(load=lambda *_, **__: model))
    Classifier(Path(), {}).setup("cpu")
    assert len(answered) == 1


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from medlit.__main__ import main\ntry: main(['serve', '--help'])\n"
        "except SystemExit: assert not {'torch', 'litserve', 'fastapi', 'pandas', 'transformers'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "medlit serve --run_dir logs/quickstart/version_0" in done.stdout


# --- as a process -----------------------------------------------------------------------------------------------------


class Process:
    """A service as its own process group, as a terminal starts it."""

    def __init__(self, command: list[str], port: int) -> None:
        self.port, self.address = port, f"http://127.0.0.1:{port}"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
        self._process = subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_until_ready(self) -> None:
        for _ in range(1200):
            try:
                if httpx.get(f"{self.address}/health").status_code == 200:
                    return
            except httpx.TransportError:
                assert self._process.poll() is None, self._process.communicate()[0]
            time.sleep(0.1)
        raise TimeoutError

    def wait_for(self, printed: str) -> None:
        assert self._process.stdout is not None
        assert printed in self._process.stdout.readline()

    def classify(self, *notes: str) -> httpx.Response:
        return httpx.post(f"{self.address}/v1/classify", json={"notes": notes}, timeout=60)

    def begin(self, note: str, sent: float = 1.0) -> socket.socket:
        """Send this share of a request, and do not wait."""
        body = json.dumps({"notes": [note]}).encode()
        head = "POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client = socket.create_connection(("127.0.0.1", self.port))
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[: int(sent * len(body))])
        return client

    def send(self, number: int, to_all: bool) -> None:
        (os.killpg if to_all else os.kill)(self._process.pid, number)

    def end(self) -> tuple[int, str]:
        """Exit code, and everything that was printed."""
        printed = self._process.communicate(timeout=60)[0]
        return self._process.returncode, printed

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """Start a service; it is ended with the test."""
    found: list[Process] = []

    def of(*command: str) -> Process:
        port = free_port()
        found.append(Process([word.format(port=port) for word in command], port))
        found[-1].wait_until_ready()
        return found[-1]

    yield of
    for process in found:
        process.kill()


@pytest.mark.parametrize(
    ("number", "to_all"), [(signal.SIGTERM, False), pytest.param(signal.SIGINT, True, marks=pytest.mark.slow)]
)
def test_a_signal_waits_for_requests_in_flight_without_those_who_left_and_no_note_is_printed(
    start: Callable[..., Process], number: int, to_all: bool
) -> None:
    process = start(str(TESTS / "fake_service.py"), "{port}")
    assert process.classify("Heart races").status_code == 200
    assert process.classify(FAILS).status_code == 500
    assert process.classify("").status_code == 422
    with ThreadPoolExecutor(8) as pool:
        leaving = [process.begin(SLOW), process.begin(SLOW, sent=0.5)]
        waiting = [pool.submit(process.classify, SLOW, f"note{i}") for i in range(8)]
        time.sleep(0.7)
        for client in leaving:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # as if it had crashed
            client.close()
        process.send(number, to_all)
        answers = [request.result().json()["predictions"][1]["answer"] for request in waiting]
    assert answers == [f"note{i}" for i in range(8)]
    code, printed = process.end()
    assert code == 0
    assert printed.startswith("medlit: loading the model for http://127.0.0.1:")
    assert printed.count(f"medlit: stopped by {signal.Signals(number).name}; requests are answered first.\n") == 1
    assert not [note for note in (FAILS, SLOW, "Heart", "races", "note3") if note in printed]
    assert "Traceback" not in printed


def test_a_request_is_answered_once_the_model_is_said_to_be_loaded() -> None:
    process = Process([str(TESTS / "fake_service.py"), str(port := free_port())], port)
    try:
        process.wait_for("loading the model")
        process.wait_for("the model is loaded")
        assert process.classify("Heart").status_code == 200
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.1, 0.5, 1.0])
def test_control_c_ends_a_service_that_loads_with_one_line(seconds: float) -> None:
    process = Process([str(TESTS / "fake_service.py"), str(free_port()), SLOW], 0)
    process.wait_for("loading the model")
    time.sleep(seconds)
    process.send(signal.SIGINT, to_all=True)
    assert process.end() == (128 + signal.SIGINT, "medlit: stopped by SIGINT.\n")


@pytest.mark.slow
def test_a_second_signal_does_not_wait(start: Callable[..., Process]) -> None:
    process = start(str(TESTS / "fake_service.py"), "{port}")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(process.classify, SLOW)
        time.sleep(0.3)
        process.send(signal.SIGTERM, to_all=False)
        time.sleep(0.3)
        begin = time.monotonic()
        process.send(signal.SIGTERM, to_all=False)
        code, printed = process.end()
        assert time.monotonic() - begin < 1.2
        assert isinstance(waiting.exception(), httpx.TransportError)
    assert code == 128 + signal.SIGTERM
    assert "Traceback" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("when", ["while it loads", "while it answers"])
def test_the_service_ends_when_the_process_of_a_model_is_killed(start: Callable[..., Process], when: str) -> None:
    if when == "while it loads":
        process = Process([str(TESTS / "fake_service.py"), str(free_port()), KILLS], 0)
    else:
        process = start(str(TESTS / "fake_service.py"), "{port}")
        with pytest.raises(httpx.TransportError):
            process.classify(KILLS)
    code, printed = process.end()
    assert code == 1
    assert "Traceback" not in printed
    assert printed.count("medlit: the process of a model was killed") == 1, printed


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_the_page_classifies_a_note_and_a_table_in_a_browser(start: Callable[..., Process], tmp_path: Path) -> None:
    process = start(str(TESTS / "fake_service.py"), "{port}")
    arguments = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=420,900"]
    arguments += [f"--user-data-dir={tmp_path / 'profile'}", "--no-first-run", "--disable-background-networking"]
    arguments += ["--virtual-time-budget=20000", "--dump-dom", f"{process.address}/probe"]
    dom = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=120).stdout
    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1]))  # type: ignore[index]
    assert seen["bars"] == ["Heart 50.0 %", "Bone 25.0 %"]
    assert seen["widths"] == ["50%", "25%"]
    assert seen["pixels"] > 50, "on a phone the bar has room too"
    assert "No specialty: too uncertain" in seen["answer"]
    assert seen["table"].splitlines() == [
        '"id","transcription","specialty","answer","probability","margin","runner_up","abstained","cut_tokens",'
        '"set","set_size","set_probabilities"',
        '"1","Heart, it',
        'races","","Heart,","0.5","0.25","Bone","true","0","Heart,; Bone","2","0.5; 0.25"',
        '"2","Bone","Bone","Bone","0.75","0.5","Bone","false","3","","",""',
        '"3","","","","","","","","","","",""',
    ]
    assert seen["rows"] == ["specialty", "(abstained)", "Bone", "(not classified)"]
    assert seen["overflow"] <= 0
    assert all(address.startswith(process.address) for address in seen["requests"])


@pytest.mark.slow
def test_it_answers_as_the_predictor_does(start: Callable[..., Process], fitted: Path) -> None:
    from medlit import SpecialtyPredictor

    texts = [row["transcription"] for row in tiny_notes()["test"]]
    process = start("-m", "medlit", "serve", "--run_dir", str(fitted), "--port", "{port}")
    expected = [asdict(one) for one in SpecialtyPredictor.load(fitted, device="cpu").predict(texts)]
    assert process.classify(*texts).json() == {"predictions": expected}
    process.send(signal.SIGTERM, to_all=False)
    lines = [f"loading the model for {process.address}; Ctrl-C ends the service", "the model is loaded"]
    lines.append("stopped by SIGTERM; requests are answered first.")
    assert process.end() == (0, "".join(f"medlit: {line}\n" for line in lines)), "neither bars nor warnings"


@pytest.mark.slow
def test_an_adapter_that_cannot_be_loaded_ends_the_command_with_one_sentence(adapter: Path) -> None:
    process = Process(["-m", "medlit", "serve", "--run_dir", str(adapter), "--port", str(free_port())], 0)
    code, printed = process.end()
    assert code == 2
    assert "Traceback" not in printed
    assert len(re.findall("^medlit: (?!loading)", printed, re.MULTILINE)) == 1, printed
