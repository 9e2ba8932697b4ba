"""A text classifier as a FastAPI service on transformers; runs in the environment of requirements/fastapi.txt.

    python fastapi_transformers.py --checkpoint DIR --port N [--threads N]

POST /classify {"texts": "…" or ["…", …]} gives {"labels": [...], "scores": [...]}, the best label of each
text and its probability.

How it is set up, and why (what is said of speed was measured on two CPUs):

- The torch model is called directly, in fp32, under inference_mode, with the attention of transformers' choice (SDPA).
- It is called in one thread beside the event loop, and never in two at once: PyTorch spreads a call over all CPUs, and
  calls side by side only contend for them. Start it with OMP_WAIT_POLICY=PASSIVE, so that its threads leave the CPU to
  the event loop while they wait.
- Requests that arrive while the model is busy are answered together by what it does next, up to 64 texts, and a lone
  request never waits. A service that answers one request after the other does less under load.
- The texts of a batch are sorted by length and given to the model 8 at a time, padded to the longest of the 8. One call
  for all of them, padded to the longest of all, takes twice as long.
- One uvicorn worker with uvloop and httptools and without an access log; each more would bring a model and threads.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

MAX_TEXTS = 64
TEXTS_A_CALL = 8

Best = tuple[str, float]


class Request(BaseModel):
    """What a client sends."""

    texts: str | list[str]


class Answer(BaseModel):
    """What it gets: the best label of each text and its probability."""

    labels: list[str]
    scores: list[float]


class Classifier:
    """The model, called directly."""

    def __init__(self, checkpoint: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self._model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> list[Best]:
        """The best label of each text and its probability."""
        ids = self._tokenizer(texts, truncation=True)["input_ids"]
        order = sorted(range(len(texts)), key=lambda index: len(ids[index]))
        best: dict[int, Best] = {}
        for start in range(0, len(order), TEXTS_A_CALL):
            indices = order[start : start + TEXTS_A_CALL]
            best |= zip(indices, self._call([ids[index] for index in indices]), strict=True)
        return [best[index] for index in range(len(texts))]

    def _call(self, ids: list[list[int]]) -> list[Best]:
        batch = self._tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        scores, indices = self._model(**batch).logits.softmax(dim=1).max(dim=1)
        labels = self._model.config.id2label
        return [(labels[index], score) for index, score in zip(indices.tolist(), scores.tolist(), strict=True)]


class Batcher:
    """Merges the requests that wait while the model is busy."""

    def __init__(self, classify: Callable[[list[str]], list[Best]]) -> None:
        self._classify = classify
        self._waiting: asyncio.Queue[tuple[list[str], asyncio.Future[list[Best]]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def submit(self, texts: list[str]) -> list[Best]:
        """The answer to one request, when its turn has come."""
        answer: asyncio.Future[list[Best]] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((texts, answer))
        return await answer

    async def run(self) -> None:
        """Answer forever."""
        while True:
            requests = [await self._waiting.get()]
            while sum(len(texts) for texts, _ in requests) < MAX_TEXTS and not self._waiting.empty():
                requests.append(self._waiting.get_nowait())
            await self._answer(requests)

    async def _answer(self, requests: list[tuple[list[str], asyncio.Future[list[Best]]]]) -> None:
        together = [text for texts, _ in requests for text in texts]
        try:
            best = await asyncio.get_running_loop().run_in_executor(self._thread, self._classify, together)
        except Exception as error:
            for _, answer in requests:
                if not answer.cancelled():
                    answer.set_exception(error)
            return
        start = 0
        for texts, answer in requests:
            if not answer.cancelled():  # its client has gone
                answer.set_result(best[start : start + len(texts)])
            start += len(texts)


def service(classify: Callable[[list[str]], list[Best]]) -> FastAPI:
    """The application."""
    batcher = Batcher(classify)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(batcher.run())
        yield
        running.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/classify")
    async def answer(request: Request) -> Answer:
        texts = [request.texts] if isinstance(request.texts, str) else request.texts
        best = await batcher.submit(texts)
        return Answer(labels=[label for label, _ in best], scores=[score for _, score in best])

    return app


def main() -> None:
    """Load, then serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, help="default: PyTorch's own, the number of cores")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    app = service(Classifier(args.checkpoint))
    uvicorn.run(app, host="127.0.0.1", port=args.port, access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
