"""`POST /tokenize` and `POST /detokenize`, as in vLLM."""

from __future__ import annotations

from fastapi import APIRouter

from d3llm_ray.serving.openapi import ALL_BODIES, errors
from d3llm_ray.serving.replies import DetokenizedText, TokenizedText
from d3llm_ray.serving.schemas import DetokenizeRequest, TokenizeRequest
from d3llm_ray.serving.service import ChatService


def router(service: ChatService) -> APIRouter:
    routes = APIRouter()

    @routes.post("/tokenize", responses=errors(*ALL_BODIES))
    async def tokenize(body: TokenizeRequest) -> TokenizedText:
        """Token ids of a text, or of a conversation with the model's chat template."""
        if body.model is not None:
            service.check_model(body.model)
        if body.prompt is not None:
            tokens = await service.texts.of_text(body.prompt)
        else:
            tokens = await service.texts.of_messages(body.messages or [])
        return TokenizedText(count=len(tokens), max_model_len=service.llm.engine.context, tokens=tokens)

    @routes.post("/detokenize", responses=errors(*ALL_BODIES))
    async def detokenize(body: DetokenizeRequest) -> DetokenizedText:
        """The text of token ids, special tokens by their names."""
        if body.model is not None:
            service.check_model(body.model)
        return DetokenizedText(prompt=await service.texts.decoded(body.tokens, "tokens"))

    return routes
