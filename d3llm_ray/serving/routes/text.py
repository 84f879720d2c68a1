"""`POST /tokenize` and `POST /detokenize`, as in vLLM."""

from __future__ import annotations

from fastapi import APIRouter

from d3llm_ray.serving.replies import DetokenizedText, TokenizedText
from d3llm_ray.serving.schemas import DetokenizeRequest, TokenizeRequest
from d3llm_ray.serving.service import ChatService


def router(service: ChatService) -> APIRouter:
    routes = APIRouter()

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> TokenizedText:
        if body.model is not None:
            service.check_model(body.model)
        if body.prompt is not None:
            tokens = await service.texts.of_text(body.prompt)
        else:
            tokens = await service.texts.of_messages(body.messages or [])
        return TokenizedText(count=len(tokens), max_model_len=service.llm.engine.context, tokens=tokens)

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> DetokenizedText:
        if body.model is not None:
            service.check_model(body.model)
        return DetokenizedText(prompt=await service.texts.decoded(body.tokens, "tokens"))

    return routes
