"""Small models behind vLLM's and OpenAI's completions, in this process."""

from contextlib import contextmanager

import torch
from judging.chat_server import chat_server

MOST = 20
"""vLLM's own default of --max-logprobs."""


@torch.no_grad()
def log_rows(model, ids):
    return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


def entries(row, token, count):
    """The likeliest tokens and the one that is there, best first, as vLLM orders them."""
    top = row.topk(len(row) if count == -1 else count).indices.tolist()
    return {index: float(row[index]) for index in dict.fromkeys([*top, token])}


class ServedModels:
    """Replies of a server of several models; what a test changes is a field."""

    def __init__(self, models, tokenizer):
        self.models, self.tokenizer = models, tokenizer
        self.forms = {"prompt_logprobs", "echo"}
        self.ids_as_text = False
        self.most = MOST
        self.parents = {}
        self.read = list  # what the server makes of the tokens that it is sent
        self.text = lambda token: tokenizer.decode([token])

    def __call__(self, request, number):
        if request is None:
            listed = [{"id": n, "parent": self.parents.get(n)} for n in self.models]
            return 200, {}, {"object": "list", "data": listed}
        count = request.get("prompt_logprobs", request.get("logprobs", 0))
        if self.most != -1 and not 0 <= count <= self.most:
            error = f"Requested prompt logprobs of {count}, which is greater than max {self.most}"
            return 400, {}, {"error": {"message": error}}
        ids = self.read(request["prompt"])
        rows = log_rows(self.models[request["model"]], ids)
        told = [entries(row, token, count) for row, token in zip(rows, ids[1:], strict=False)]
        form = "echo" if request.get("echo") else "prompt_logprobs"
        choice = {"index": 0, "text": "x"}
        if form in self.forms:
            choice |= (self.echo if form == "echo" else self.prompt)(ids, told, request)
        return 200, {}, {"choices": [choice]}

    def prompt(self, ids, told, request):
        shown = [
            {
                str(i): {"logprob": max(v, -9999.0), "rank": 1, "decoded_token": self.text(i)}
                for i, v in row.items()
            }
            for row in told
        ]
        return {"prompt_logprobs": [None, *shown], "prompt_token_ids": ids}

    def echo(self, ids, told, request):
        def name(token):
            return self.text(token) if self.ids_as_text else f"token_id:{token}"

        top = [{name(i): v for i, v in row.items()} for row in told]
        own = [row[token] for row, token in zip(told, ids[1:], strict=True)]
        generated = 1 if request["max_tokens"] else 0
        return {
            "logprobs": {
                "tokens": [name(i) for i in ids] + ["!"] * generated,
                "token_logprobs": [None, *own] + [-1.0] * generated,
                "top_logprobs": [None, *top] + [{"!": -1.0}] * generated,
            }
        }


@contextmanager
def serving(models, tokenizer):
    """The server and its replies."""
    with chat_server() as server:
        server.script = served = ServedModels(models, tokenizer)
        yield server, served
