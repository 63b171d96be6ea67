"""Scores labels with an export as anyone would load it: a separate process, without medlit and without Unsloth.

One JSON object is read from standard input and one is written to standard output. Prompts arrive as token ids through
the pipe, so no note is ever in a file. N prompts, K answers, V vocabulary.

    in    loader          "transformers" | "peft" | "llama.cpp" | "transformers-gguf" | "quantise"
          path            the export: a folder, or a GGUF file
          base            peft: the base model, a folder or a Hub id, with its revision; load_in_4bit: hold it in NF4
          dtype           "float32", "bfloat16" or "float16"; device: as PyTorch names it
          prompts         token ids, N of them; answers: token ids with their EOS, K of them; texts: to tokenize
          full            quantise: a 16-bit GGUF file, which is written to path as Q4_K_M; the result is empty
    out   log_likelihood  of each answer after each prompt, in nats, (N, K)
          tokens          token ids of each text; null where the loader's tokenizer is not the export's own
          reader          what loaded it, with its version
"""

import copy
import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

_ANSWER_BATCH = 16  # answers that are scored together


def main() -> None:
    """Answer the request on standard input."""
    out = os.dup(1)
    os.dup2(2, 1)  # libraries print greetings to standard output
    result = answer(json.load(sys.stdin))
    with os.fdopen(out, "w", encoding="utf-8") as file:
        json.dump(result, file)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Answer one request."""
    return {"quantise": _quantise, "llama.cpp": _llama_cpp}.get(request["loader"], _transformers)(request)


def _transformers(request: dict[str, Any]) -> dict[str, Any]:
    """Load with transformers or PEFT and score."""
    import torch
    import transformers

    dtype = getattr(torch, request["dtype"])
    arguments: dict[str, Any] = {"dtype": dtype, "device_map": {"": request["device"]}}
    loader, path = request["loader"], Path(request["path"])
    model: Any
    reader = f"transformers {transformers.__version__}"

    def load(model: str | Path, revision: str | None = None) -> Any:  # noqa: ANN401
        config = transformers.AutoConfig.from_pretrained(model, revision=revision)
        is_text = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        kind: Any = transformers.AutoModelForCausalLM if is_text else transformers.AutoModelForMultimodalLM
        return kind.from_pretrained(model, revision=revision, config=config, **arguments)

    if loader == "transformers-gguf":
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **arguments)
        reader += " (weights dequantised)"
    elif loader == "transformers":
        model = load(path)
    else:
        import peft

        if request["load_in_4bit"]:
            nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
            arguments["quantization_config"] = transformers.BitsAndBytesConfig(load_in_4bit=True, **nf4)
        model = peft.PeftModel.from_pretrained(load(request["base"], request["revision"]), path)
        reader = f"peft {peft.__version__}, {reader}"
    log_likelihood = score(model.eval(), request["prompts"], request["answers"])
    tokens = None
    if loader != "transformers-gguf":  # transformers converts a GGUF file's tokenizer in its own way
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in request["texts"]]
    reader = f"{reader}, torch {torch.__version__} on {request['device']}"
    return {"log_likelihood": log_likelihood, "tokens": tokens, "reader": reader}


def score(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> list[list[float]]:  # noqa: ANN401
    """Log-likelihood of each answer after each prompt, in nats, (N, K)."""
    import torch
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    # The output embedding computes in float32: logits of two digits are multiples of 1/16 in bfloat16.
    head = model.get_output_embeddings()
    weight, bias = head.weight.float(), None if head.bias is None else head.bias.float()
    head.register_forward_hook(lambda _, args, __: torch.nn.functional.linear(args[0].float(), weight, bias))
    scores = []
    with torch.inference_mode():
        for prompt in prompts:
            row: list[float] = []
            ids = torch.tensor([prompt], device=model.device)
            first = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            cache: Any = getattr(first, "past_key_values", None)
            layers = {type(layer) for layer in getattr(cache, "layers", [None])}
            for start in range(0, len(answers), _ANSWER_BATCH):
                batch = answers[start : start + _ANSWER_BATCH]
                width = max(map(len, batch))
                # The padding is behind every real token and is not counted.
                padded = torch.tensor([ids + [ids[-1]] * (width - len(ids)) for ids in batch], device=model.device)
                if layers and layers <= {DynamicLayer, DynamicSlidingWindowLayer}:
                    copied = copy.deepcopy(cache)
                    copied.batch_repeat_interleave(len(batch))
                    rest = model(input_ids=padded[:, :-1], past_key_values=copied, use_cache=True)
                    logits = torch.cat([first.logits[:, -1:].expand(len(batch), -1, -1), rest.logits], dim=1)
                else:  # answers cannot share a running state, so each has the prompt computed again
                    whole = torch.cat([ids.expand(len(batch), -1), padded[:, :-1]], dim=1)
                    logits = model(input_ids=whole, use_cache=False, logits_to_keep=width).logits
                tokens = logits.float().log_softmax(-1).gather(2, padded[..., None])[..., 0]  # (answers, width)
                row += [float(nats[: len(ids)].sum()) for nats, ids in zip(tokens, batch, strict=True)]
            scores.append(row)
    return scores


def _llama_cpp(request: dict[str, Any]) -> dict[str, Any]:
    """Load with llama.cpp through llama-cpp-python, on the CPU, and score."""
    import llama_cpp

    prompts, answers = request["prompts"], request["answers"]
    threads = len(os.sched_getaffinity(0))  # llama.cpp would take the whole machine's
    model = llama_cpp.Llama(
        request["path"],
        n_ctx=max(map(len, prompts)) + max(map(len, answers)),
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=0,
        logits_all=True,
        verbose=False,
    )
    scores = []
    for prompt in prompts:
        model.reset()
        model.eval(prompt)
        row = []
        for ids in answers:
            model.n_tokens = len(prompt)  # forget the previous answer
            model.eval(ids[:-1])
            logits = np.asarray(model.scores[len(prompt) - 1 : len(prompt) + len(ids) - 1], dtype=np.float64)
            row.append(float((logits[np.arange(len(ids)), ids] - np.logaddexp.reduce(logits, axis=1)).sum()))
        scores.append(row)
    tokens = [model.tokenize(text.encode(), add_bos=False, special=False) for text in request["texts"]]
    return {"log_likelihood": scores, "tokens": tokens, "reader": f"llama-cpp-python {llama_cpp.__version__}"}


def _quantise(request: dict[str, Any]) -> dict[str, Any]:
    """Quantise with llama.cpp, which reports the cause of a failure on standard error or aborts the process."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    full, path = (os.fsencode(request[name]) for name in ("full", "path"))
    if code := llama_cpp.llama_model_quantize(full, path, ctypes.byref(parameters)):
        sys.exit(code)
    return {}


if __name__ == "__main__":
    main()
