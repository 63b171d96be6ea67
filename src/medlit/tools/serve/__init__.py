"""`medlit serve`: a fine-tuned model behind HTTP. Here is what is refused before the model is loaded."""

import os
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from medlit.atomic_io import read_json
from medlit.cli import tool_parser
from medlit.errors import UserError
from medlit.run_folder import check_run
from medlit.tools import license_of


def run(args: Sequence[str]) -> int:
    """Serve until a signal; a UserError if the address is not safe or free, or there is no LitServe or no adapter."""
    options = tool_parser("serve").parse_args(args)
    host, port, token = options.host, options.port, os.environ.get("MEDLIT_SERVE_TOKEN", "")
    if host != "127.0.0.1" and not token:
        raise UserError(f"host: {host} is open to other machines; set MEDLIT_SERVE_TOKEN to a secret, or drop --host.")
    if token and not re.fullmatch("[!-~]{16,}", token):  # what a header can carry
        raise UserError("MEDLIT_SERVE_TOKEN: must be at least 16 ASCII letters, digits or signs, without spaces.")
    if not (find_spec("litserve") and find_spec("prometheus_client")):
        needs = '"litserve>=0.2.19,<0.3" "prometheus-client>=0.20,<1"'
        raise UserError(f"medlit serve: LitServe or Prometheus' client is not installed; run 'pip install {needs}'.")
    if not 1024 <= port <= 65535:
        raise UserError(f"port: must be from 1024 to 65535, not {port}.")
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise UserError(f"port: {port}: {os.strerror(error.errno or 0)}; choose another --port.") from error

    from medlit.model.adapter_metadata import METADATA_FILE, AdapterMetadata, decoding_key
    from medlit.model.prior import PRIOR_FILE
    from medlit.model.settings import Decoding, check_decoding
    from medlit.tools.serve.service import Classifier, make_server

    places = (options.run_dir / "adapter" / METADATA_FILE, options.run_dir / METADATA_FILE)
    if (file := next(filter(Path.is_file, places), None)) is None:
        check_run(options.run_dir)
        raise UserError(f"run_dir: {options.run_dir} holds no adapter of medlit; give the run folder of a fit.")
    metadata, decoding = AdapterMetadata.read(file), Decoding(options.mode, abstain_below=options.abstain_below)
    decoding.prior = "tfidf" if file.with_name(PRIOR_FILE).is_file() else None  # as SpecialtyPredictor has it
    fitted = metadata.thresholds.get(decoding_key(decoding), {})
    decoding.coverage = 0.9 if options.coverage is None and "0.9" in fitted else options.coverage
    check_decoding(decoding)
    answers = {name: getattr(decoding, name) for name in ("mode", "coverage", "abstain_below")}
    about = answers | metadata.public().to_dict()
    about["intended_use"] = "research and teaching; not a medical device, not for decisions about patients"
    about["license"] = license_of(metadata.base_model, metadata.revision, cached=True)
    with suppress(OSError, ValueError, KeyError, TypeError):  # not tested, or by another version
        metrics, facts = (read_json(file.parent.with_name(f"test_{name}.json")) for name in ("metrics", "facts"))
        scores = {name: metrics[name] for name in ("n", "accuracy", "accuracy_ci", "f1_macro", "f1_macro_ci")}
        about["test"] = scores | {"weights": Path(facts["run"]["weights"]).name, "decoder": facts["run"]["decoder"]}
        about["test"] |= {"warning": facts["data"]["mismatch"]} if "mismatch" in facts["data"] else {}
    make_server(Classifier(file.parent, answers), about, token).serve(host, port)
    return 0
