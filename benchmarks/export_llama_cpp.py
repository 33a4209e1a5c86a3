"""Greedy responses of an exported GGUF file in llama.cpp, beside rlchat's.

    pip install -e '.[export]' xllamacpp
    python benchmarks/export_llama_cpp.py MODEL.pt PROMPTS.txt

PROMPTS has one prompt per line. A response of llama.cpp cannot be limited to the ids that rlchat allows by the file
itself, so the script passes these as logit_bias.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import xllamacpp

from rlchat import ChatInterface
from rlchat.export import write_gguf

NEW_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare greedy responses of rlchat and llama.cpp.")
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", type=Path)
    options = parser.parse_args()
    chat = ChatInterface(options.model)
    bundle = chat.bundle
    prompts = [line for line in options.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        write_gguf(bundle, file, "model")
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = bundle.max_length, 1, 0
        params.warmup, params.cpuparams.n_threads, params.use_jinja = False, 1, True
        server = xllamacpp.Server(params)
        theirs = [ask(server, prompt, bundle.tokenizer.unsayable_ids) for prompt in prompts]
    ours = chat.batch(prompts, max_new_tokens=NEW_TOKENS, temperature=0)
    equal = sum(one == other for one, other in zip(ours, theirs, strict=True))
    for prompt, one, other in zip(prompts, ours, theirs, strict=True):
        if one != other:
            print(f"{prompt!r}\n  rlchat     {one!r}\n  llama.cpp  {other!r}")
    print(f"{equal} of {len(prompts)} greedy responses are equal; the first: {ours[0]!r}")


def ask(server: xllamacpp.Server, prompt: str, excluded: list[int]) -> str:
    request = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "logit_bias": [[token, False] for token in excluded],
    }
    answer = server.handle_chat_completions(request)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    return str(answer["choices"][0]["message"]["content"])


if __name__ == "__main__":
    main()
