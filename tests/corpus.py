"""Bad inputs from small tables of mutations: settings for the command line, tables for the readers."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

_INTEGERS = (
    "model.language_model.max_length",
    "model.lora.r",
    "model.lora.alpha",
    "model.decoding.max_new_tokens",
    "data.batching.global_batch_size",
    "data.batching.micro_batch_size",
    "data.batching.eval_batch_size",
    "data.max_response_tokens",
)
_BAD_INTEGERS = ("-1", "0", "1.5", "many", "null", "[1]", "{a: 1}", "1e400")
_CHOICES = (
    "model.language_model.dtype",
    "model.language_model.gradient_checkpointing",
    "model.lora.bias",
    "model.decoding.mode",
    "model.optimizer.on_nonfinite",
    "model.optimizer.schedule",
    "data.split",
    "data.split.kind",
    "data.batching.class_balance",
    "data.label_conflicts",
    "data.mask_prompt",
)
_BAD_CHOICES = ("", "Auto", "[]", "3")
_NUMBERS = {
    "val_every_steps": tuple(value for value in _BAD_INTEGERS if value != "null"),  # null: once a pass over the notes
    "model.optimizer.learning_rate": ("0", "-1e-4", "nan", "inf", "fast", "null"),
    "model.optimizer.weight_decay": ("-0.1", "nan", "inf", "some"),
    "model.optimizer.warmup_steps": ("-1", "0.5", "none"),
    "model.lora.dropout": ("-0.1", "1.0", "2", "nan", "half"),
    "data.batching.token_budget": ("0", "-5", "1.5", "large"),
    "data.batching.num_workers": ("-1", "0.5", "all"),
    "data.split.near_threshold": ("0", "-0.5", "1.5", "nan", "near"),
    "data.split.folds": ("1", "0", "-3"),
    "data.split.fold": ("5", "-1", "1.5"),
    "data.batching.seed": ("-1", "x"),
    "data.split.seed": ("-1", "x"),
    "data.split.shares": ("[0.5, 0.5]", "[0.5, 0.5, 0.5]", "[-1, 1, 1]", "[nan, 0.5, 0.5]", "all"),
}
_TRAINER = {
    "accelerator": ("abacus", "[]"),
    "devices": ("0", "-3", "0.5", "[]", "several"),
    "num_nodes": ("0", "-1", "x"),
    "precision": ("8", "float", "bf17-mixed"),
    "strategy": ("dpp", "3", "[]"),
    "max_steps": ("0", "-2", "1.5", "null"),
    "max_epochs": ("0", "-2", "1.5"),
    "gradient_clip_val": ("0", "-1", "nan", "inf", "tight"),
    "limit_train_batches": ("0", "-1", "0.0", "1.5", "0.5", "7"),
    "val_check_interval": ("0", "0.5", "10", "00:01:00:00"),
    "check_val_every_n_epoch": ("0", "2", "-1"),
    "limit_val_batches": ("0", "-1", "0.0", "1.5"),
    "limit_test_batches": ("0", "-1", "1.5"),
    "limit_predict_batches": ("0", "-1", "1.5"),
    "accumulate_grad_batches": ("4", "0", "-1"),
    "overfit_batches": ("1", "0.5"),
    "enable_checkpointing": ("false", "perhaps"),
    "logger": ("no.such.Logger", "os.system"),
    "profiler": ("no-such-profiler",),
}
_OTHERS = (
    ("checkpoint.monitor", "val/f1"),
    ("checkpoint.monitor", "train/loss"),
    ("checkpoint.mode", "most"),
    ("checkpoint.save_top_k", "few"),
    ("checkpoint.save_top_k", "0"),
    ("checkpoint.save_top_k", "3"),
    ("checkpoint.save_top_k", "-1"),
    ("checkpoint.filename", "{epoch}"),
    ("checkpoint.filename", "null"),
    ("checkpoint.dirpath", "elsewhere"),
    ("checkpoint.save_weights_only", "true"),
    ("checkpoint.enable_version_counter", "true"),
    ("checkpoint.every_n_train_steps", "1"),
    ("checkpoint.every_n_epochs", "1"),
    ("checkpoint.train_time_interval", "00:01:00:00"),
    ("early_stopping.monitor", "loss"),
    ("early_stopping.mode", "most"),
    ("early_stopping.patience", "little"),
    ("ckpt_path", "nowhere.ckpt"),
    ("ckpt_path", "best"),
    ("ckpt_path", "."),
    ("config", "nowhere.yaml"),
    ("config", "."),
    ("no_such_setting", "1"),
    ("model.no_such", "1"),
    ("model.lora.no_such", "1"),
    ("data.no_such", "1"),
    ("data.textcolumn", "note"),
    ("model", "3"),
    ("model.lora", "[16, 16]"),
    ("data.labels", "[a, b]"),
    ("data.labels.separator", "' '"),
    ("model.language_model.trust_remote_code", "true"),
)


def settings() -> list[tuple[str, str]]:
    """(key, value) of settings that `fit` refuses."""
    cases = [(key, value) for key in _INTEGERS for value in _BAD_INTEGERS]
    cases += [(key, value) for key in _CHOICES for value in _BAD_CHOICES]
    cases += [(key, value) for key, values in _NUMBERS.items() for value in values]
    cases += [(f"trainer.{key}", value) for key, values in _TRAINER.items() for value in values]
    return [*cases, *_OTHERS]


def _parquet(names: list[str], values: list[object]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table([pa.array([value] * 2) for value in values], names), sink)
    return sink.getvalue()


# Without a time, so that every process collects the same tests.
_gzip = partial(gzip.compress, mtime=0)


def _zip(files: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return sink.getvalue()


_HEADER = "id,transcription,medical_specialty\n"
_GOOD = "a,a heart murmur,Cardiology\nb,a nerve tremor,Neurology\n"
_LINES = [{"transcription": "a heart murmur", "medical_specialty": "Cardiology"}]
_CSV = {
    "nothing": b"",
    "blank lines": b"\n\n\n",
    "header only": _HEADER.encode(),
    "no header": _GOOD.encode(),
    "another header": b"note,label\nx,y\n",
    "duplicate column": b"transcription,transcription,medical_specialty\na,b,c\n",
    "no text column": b"id,medical_specialty\na,Cardiology\n",
    "no label column": b"id,transcription\na,x\n",
    "an empty note": (_HEADER + "a,,Cardiology\n").encode(),
    "a blank note": (_HEADER + "a,  ,Cardiology\n").encode(),
    "an empty label": (_HEADER + _GOOD + "c,text,\n").encode(),
    "one label": (_HEADER + "a,x,Cardiology\nb,y,Cardiology\n").encode(),
    "labels that look alike": (_HEADER + "a,x,Pe\u0301diatrie\nb,y,P\u00e9diatrie\n").encode(),
    "an invisible label": (_HEADER + _GOOD + "c,text,\u200b\n").encode(),
    "one field too many": (_HEADER + _GOOD + "c,text,Neurology,more\n").encode(),
    "one field too few": (_HEADER + _GOOD + "c,text\n").encode(),
    "unclosed quote": (_HEADER + _GOOD + 'c,"text,Neurology\n').encode(),
    "an empty id": (_HEADER + "a,x,Cardiology\n,y,Neurology\n").encode(),
    "random bytes": bytes(range(256)) * 4,
    "zeros": bytes(100),
    "UTF-16 without a byte-order mark": (_HEADER + _GOOD).encode("utf-16-le"),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(64),
    "a zip": b"PK\x03\x04" + bytes(64),
    "a web page": b"<!doctype html><html><body>Sign in</body></html>",
    "an Alpaca table": b"instruction,input,output\nSort it.,x,Cardiology\nSort it.,y,Neurology\n",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}
_JSON = {
    "nothing": b"",
    "an open brace": b"{",
    "a number": b"3",
    "a string": b'"text"',
    "null": b"null",
    "an empty list": b"[]",
    "an empty object": b"{}",
    "a list of numbers": b"[1, 2]",
    "a list of lists": b"[[1], [2]]",
    "no text": json.dumps([{"medical_specialty": "Cardiology"}]).encode(),
    "no label": json.dumps([{"transcription": "x"}]).encode(),
    "a text that is a number": json.dumps([{**_LINES[0], "transcription": 3}] * 2).encode(),
    "a text that is a list": json.dumps([{**_LINES[0], "transcription": ["x"]}] * 2).encode(),
    "a label that is an object": json.dumps([{**_LINES[0], "medical_specialty": {}}] * 2).encode(),
    "a text that is null": json.dumps([{**_LINES[0], "transcription": None}] * 2).encode(),
    "truncated": json.dumps(_LINES * 3).encode()[:-20],
    "text after the list": json.dumps(_LINES * 3).encode() + b" and more",
    "a text that is true": json.dumps([{**_LINES[0], "transcription": True}] * 2).encode(),
    "a key twice": b'{"transcription": "x", "medical_specialty": "a", "transcription": "y"}',
    "a chat table": b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a"}]}',
    "not a number": b'[{"transcription": NaN, "medical_specialty": "x"}]',
    "a label that is not a number": json.dumps([*_LINES, {**_LINES[0], "medical_specialty": float("nan")}]).encode(),
    "a label that is infinite": json.dumps([*_LINES, {**_LINES[0], "medical_specialty": float("inf")}]).encode(),
    "an id that is not a number": json.dumps([{"id": float("nan"), **_LINES[0]}] * 2).encode(),
    "one label": json.dumps(_LINES).encode(),
    "random bytes": bytes(range(128, 256)),
}
_PARQUET = {
    "nothing": b"",
    "magic bytes only": b"PAR1",
    "magic bytes twice": b"PAR1PAR1",
    "damaged footer": b"PAR1" + bytes(40) + b"\xff\xff\xff\x7fPAR1",
    "text": (_HEADER + _GOOD).encode(),
    "a column twice": _parquet(["transcription", "medical_specialty", "medical_specialty"], ["x", "a", "b"]),
    "text that is binary": _parquet(["transcription", "medical_specialty"], [pa.scalar(b"xy", pa.binary(2)), "a"]),
}
_EXCEL = {
    "nothing": b"",
    "text": (_HEADER + _GOOD).encode(),
    "another archive": _zip({"notes.csv": (_HEADER + _GOOD).encode()}),
    "an archive cut short": _zip({"notes.csv": (_HEADER + _GOOD).encode()})[:-9],
}
_PACKED = {
    (".csv.gz", "text"): (_HEADER + _GOOD).encode(),
    (".csv.gz", "cut short"): _gzip((_HEADER + _GOOD).encode())[:-9],
    (".csv.gz", "Latin-1"): _gzip((_HEADER + "a,38.5\xb0,Cardiology\n").encode("latin-1")),
    (".csv.gz", "another archive"): _gzip(b"PK\x03\x04" + bytes(64), mtime=0),
    (".tsv.gz", "commas"): _gzip((_HEADER + _GOOD).encode()),
    (".jsonl.gz", "a line cut short"): _gzip(json.dumps(_LINES[0]).encode()[:-9]),
    (".csv.bz2", "text"): (_HEADER + _GOOD).encode(),
    (".csv.xz", "text"): (_HEADER + _GOOD).encode(),
    (".csv.zst", "text"): (_HEADER + _GOOD).encode(),
    (".csv.zip", "text"): (_HEADER + _GOOD).encode(),
    (".csv.zip", "no file"): _zip({}),
    (".csv.zip", "two files"): _zip({"a.csv": (_HEADER + _GOOD).encode(), "b.csv": (_HEADER + _GOOD).encode()}),
    (".parquet.gz", "a kind that is not packed"): _gzip(b"PAR1", mtime=0),
    (".xls", "an old workbook"): b"\xd0\xcf\x11\xe0" + bytes(64),
}


def tables() -> list[tuple[str, str, bytes]]:
    """(what is wrong, suffix, content) of tables that cannot be used for training."""
    cases = [(name, ".csv", content) for name, content in _CSV.items()]
    for suffix in (".json", ".jsonl"):
        cases += [(name, suffix, content) for name, content in _JSON.items()]
    cases += [(name, ".parquet", content) for name, content in _PARQUET.items()]
    cases += [(name, ".xlsx", content) for name, content in _EXCEL.items()]
    return cases + [(name, suffix, content) for (suffix, name), content in _PACKED.items()]
