"""OpenAI's client and `vllm serve`: `openai_client.py MODEL BASE_URL`, where MODEL is the folder that the server serves.

Asks for completions and a chat answer as one does, and compares the logprobs of the sampled tokens with the distribution
that they were sampled from, computed with transformers: after the temperature, and, for top-p, renormalized over what it
keeps. Prints RESULT.
"""

import json
import sys

import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

SETTINGS = {"T=1": (1.0, 1.0), "T=0.7": (0.7, 1.0), "T=0.7, top-p 0.9": (0.7, 0.9)}


def processed(logits, temperature, top_p):
    """Rows of logits -> logprobs of the distribution that is sampled from."""
    logprobs = (logits / temperature).log_softmax(-1)
    ordered, index = logprobs.sort(descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()  # the mass of the tokens that are more probable
    kept = torch.empty_like(logprobs).scatter(-1, index, ordered.masked_fill(before >= top_p, -torch.inf))
    return kept.log_softmax(-1)


if __name__ == "__main__":
    folder, base_url = sys.argv[1:3]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    client = OpenAI(base_url=base_url, api_key="none")
    name = client.models.list().data[0].id

    def gaps(prompt, tokens, logprobs, temperature, top_p):
        """|server - transformers| for every sampled token."""
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = processed(logits, temperature, top_p)[torch.arange(len(tokens)), torch.tensor(tokens)]
        return (expected - torch.tensor(logprobs)).abs().tolist()

    found = {}
    for setting, (temperature, top_p) in SETTINGS.items():
        sampling = {"temperature": temperature, "top_p": top_p, "max_tokens": 32}
        prompt = tokenizer.encode("One two three, ")
        done = client.completions.create(
            model=name, prompt=prompt, n=4, logprobs=0, extra_body={"return_token_ids": True}, **sampling
        )
        rows = [gap for c in done.choices for gap in gaps(prompt, c.token_ids, c.logprobs.token_logprobs, temperature, top_p)]
        chat = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "Say something."}], logprobs=True,
            extra_body={"return_token_ids": True}, **sampling,
        )  # fmt: skip
        said = [token.logprob for token in chat.choices[0].logprobs.content]
        rows += gaps(chat.prompt_token_ids, chat.choices[0].token_ids, said, temperature, top_p)
        found[f"{setting}: max |difference|"] = [max(rows)]
        found[f"{setting}: mean |difference|"] = [sum(rows) / len(rows)]
    print("RESULT " + json.dumps(found))
