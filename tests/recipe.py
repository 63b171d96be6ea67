"""The recipe's prompt, letter by letter."""

RECIPE = """Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Classify the following medical transcription into the correct medical specialty.

### Input:
{transcription}

### Response:
{label}{eos}"""
