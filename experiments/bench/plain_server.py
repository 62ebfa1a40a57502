"""What a server is measured against: one request after the other, answered with transformers' `generate`.

Speaks as much of /v1/completions as `experiments.bench serving` asks: ids in, ids out, in one piece.
"""

import json
import socket
import sys
import threading

import torch
import transformers
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


def main(arguments: list[str]) -> None:
    options = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    config = transformers.AutoConfig.from_pretrained(options["source"])
    kind = (
        transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    )
    model, one = kind.from_pretrained(options["source"]).eval(), threading.Lock()
    model.generation_config.eos_token_id = None

    def answer(asked: dict) -> list[int]:
        ids, count = torch.tensor([asked["prompt"]]), asked["max_tokens"]
        with one, torch.no_grad():
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
            )
        return found[0, -count:].tolist()

    async def completions(request: Request) -> Response:
        ids = await run_in_threadpool(answer, await request.json())
        return Response(
            "data: " + json.dumps({"choices": [{"token_ids": ids}]}) + "\n\n", media_type="text/event-stream"
        )

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    app = Starlette(
        routes=[Route("/health", health), Route("/v1/completions", completions, methods=["POST"])]
    )
    listener = socket.create_server(("127.0.0.1", int(options["port"])))
    print(f"serving at http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
    uvicorn.Server(uvicorn.Config(app, log_config=None)).run(sockets=[listener])


if __name__ == "__main__":
    main(sys.argv[1:])
