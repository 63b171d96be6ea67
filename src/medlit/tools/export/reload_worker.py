"""Answers prompts with an export as anybody would load it: a process of its own, without medlit and without Unsloth.

One JSON object comes in by standard input and one goes out by standard output. Prompts come as token ids through the
pipe, so no note is ever in a file. N prompts, K answers, V vocabulary.

    in    bar      an open file descriptor that takes a progress bar
          loader   "transformers" | "peft" | "llama.cpp" | "transformers-gguf"
          path     the export: a folder, or a GGUF file
          base     peft: the base model, a folder or a Hub id, with its revision; four_bit: hold it in NF4
          dtype    "float32", "bfloat16" or "float16"; device: as PyTorch names it
          prompts  token ids, N of them; answers: token ids with their EOS, K of them; texts: to tokenise
    out   nats     log-likelihood of each answer after each prompt, (N, K)
          tokens   token ids of each text; null where the export has no tokenizer that can be asked
          reader   what loaded it, with its version
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

_ANSWERS = 16  # answers that are computed together


def main() -> None:
    """Answer the one request on standard input."""
    out = os.dup(1)
    os.dup2(2, 1)  # whatever a library greets with goes to standard error
    request = json.load(sys.stdin)
    answer = _llama_cpp if request["loader"] == "llama.cpp" else _transformers
    with os.fdopen(out, "w", encoding="utf-8") as file:
        json.dump(answer(request), file)


def _transformers(request: dict[str, Any]) -> dict[str, Any]:
    """Load with transformers, and with PEFT where it is an adapter."""
    import torch
    import transformers

    model, reader = _load(request)
    model.eval()
    nats = _score(model, _shown(request), request["answers"])
    path = Path(request["path"])
    if request["loader"] == "transformers-gguf":
        tokens = None  # what transformers makes of a GGUF file's tokenizer is its own conversion
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in request["texts"]]
    return {"nats": nats, "tokens": tokens, "reader": f"{reader}, torch {torch.__version__} on {request['device']}"}


def _shown(request: dict[str, Any]) -> Iterator[list[int]]:
    """Yield the prompts, and show how far it is where that is a terminal."""
    from tqdm import tqdm

    with os.fdopen(os.dup(request["bar"]), "w") as file:
        yield from tqdm(request["prompts"], "Weighing again", unit=" notes", leave=False, file=file, disable=None)


def _load(request: dict[str, Any]) -> tuple[Any, str]:
    import torch
    import transformers

    dtype, place = getattr(torch, request["dtype"]), {"": request["device"]}
    reader = f"transformers {transformers.__version__}"
    if request["loader"] == "transformers-gguf":
        path = Path(request["path"])
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, device_map=place
        )
        return model, f"{reader} (weights dequantised)"
    if request["loader"] == "transformers":
        return (
            transformers.AutoModelForCausalLM.from_pretrained(request["path"], dtype=dtype, device_map=place),
            reader,
        )
    import peft

    base = transformers.AutoModelForCausalLM.from_pretrained(
        request["base"],
        revision=request["revision"],
        dtype=dtype,
        device_map=place,
        quantization_config=_nf4(dtype) if request["four_bit"] else None,
    )
    return peft.PeftModel.from_pretrained(base, request["path"]), f"peft {peft.__version__}, {reader}"


def _nf4(dtype: Any) -> Any:  # noqa: ANN401 - torch and transformers come late
    """How 4-bit LoRA is trained (Dettmers 2023, arXiv 2305.14314)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _score(model: Any, prompts: Iterable[list[int]], answers: list[list[int]]) -> list[list[float]]:  # noqa: ANN401
    """Log-likelihood of each answer after each prompt, in nats, (N, K): the prompt is computed once."""
    import torch

    head = model.get_output_embeddings().weight.float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    nats = []
    for prompt in prompts:
        found: list[float] = []
        with torch.inference_mode():
            ids = torch.tensor([prompt], device=head.device)
            first = model(input_ids=ids, use_cache=True, output_hidden_states=True, logits_to_keep=1)
            for start in range(0, len(answers), _ANSWERS):
                part = answers[start : start + _ANSWERS]
                width = max(map(len, part))
                # Padding lies behind every real token and is not counted.
                padded = torch.tensor([row + [row[-1]] * (width - len(row)) for row in part], device=head.device)
                cache = copy.deepcopy(first.past_key_values)
                cache.batch_repeat_interleave(len(part))
                more = model(
                    input_ids=padded[:, :-1],
                    past_key_values=cache,
                    use_cache=True,
                    output_hidden_states=True,
                    logits_to_keep=1,
                )
                before = first.hidden_states[-1][:, -1:].expand(len(part), -1, -1)
                hidden = torch.cat([before, more.hidden_states[-1]], dim=1).float()  # (answers, width, D)
                # In float32 whatever the model computes in: logits of two digits in bfloat16 are multiples of 1/16.
                logits = hidden @ head.t()
                if cap:
                    logits = cap * torch.tanh(logits / cap)
                told = logits.log_softmax(-1).gather(2, padded[..., None])[..., 0]
                found += [float(row[: len(answer)].sum()) for row, answer in zip(told, part, strict=True)]
        nats.append(found)
    return nats


def _llama_cpp(request: dict[str, Any]) -> dict[str, Any]:
    """Load with llama.cpp, by way of llama-cpp-python, on the CPU."""
    import llama_cpp

    prompts, answers = request["prompts"], request["answers"]
    window = max(map(len, prompts)) + max(map(len, answers))
    threads = len(os.sched_getaffinity(0))
    model = llama_cpp.Llama(
        request["path"],
        n_ctx=window,
        n_threads=threads,
        n_threads_batch=threads,  # otherwise all of the machine's, whatever part of it this process may use
        n_gpu_layers=0,
        logits_all=True,
        verbose=False,
    )
    nats = []
    for prompt in _shown(request):
        model.reset()
        model.eval(prompt)
        found = []
        for answer in answers:
            model.n_tokens = len(prompt)  # what was read behind the prompt is forgotten
            model.eval(answer[:-1])
            # The prompt's last token and the answer's but the last, (tokens, V).
            logits = np.asarray(model.scores[len(prompt) - 1 : len(prompt) + len(answer) - 1], dtype=np.float64)
            found.append(float((logits[np.arange(len(answer)), answer] - np.logaddexp.reduce(logits, axis=1)).sum()))
        nats.append(found)
    tokens = [model.tokenize(text.encode(), add_bos=False, special=False) for text in request["texts"]]
    return {"nats": nats, "tokens": tokens, "reader": f"llama-cpp-python {llama_cpp.__version__}"}


if __name__ == "__main__":
    main()
