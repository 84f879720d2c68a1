"""The model `d3llm` of lm-eval: requests of its tasks answered by `DiffusionLLM`."""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from d3llm_ray.decoding import DiffusionLLM, decoding_settings
from d3llm_ray.errors import InputError, one_line, require
from d3llm_ray.harness.generation import generation_options
from d3llm_ray.harness.scoring import LikelihoodScorer, ScoredText
from d3llm_ray.models.chat import check_unicode, encode_text
from d3llm_ray.progress import Progress

NAME = "d3llm"
BATCH_SIZE = 32  # where lm-eval is told "auto"
logger = logging.getLogger("d3llm_ray.harness")


def register() -> type[Any]:
    """Make `d3llm` known to lm-eval, and return its class; an error that names the package where it is missing."""
    import lm_eval.models  # noqa: F401 (else the registry, once it has ours, never gets lm-eval's own)
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import get_model, model_registry, register_model

    if NAME not in model_registry:
        register_model(NAME)(type("D3LLM", (HarnessModel, TemplateLM), {}))
    registered: type[Any] = get_model(NAME)
    return registered


class HarnessModel:
    """What lm-eval's `TemplateLM` leaves to a model. Texts are tokenised as they come, without a token in front.

    `pretrained`: zoo name or checkpoint folder. `decoder`, `dtype`, `device` and `decoder_settings` are those of
    `DiffusionLLM.from_pretrained`; `batch_size` is its `max_batch_size`, and sequences a forward in scoring.
    `max_gen_toks` holds for tasks that do not say theirs; `mc_num` maskings estimate a likelihood (`scoring.py`).
    """

    cache_hook: Any  # lm-eval's

    def __init__(
        self,
        pretrained: str = "",
        decoder: str | None = None,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,  # of lm-eval's search for a batch size, which there is none of here
        mc_num: int = 128,
        max_gen_toks: int = 256,
        seed: int = 0,
        **decoder_settings: Any,
    ) -> None:
        super().__init__()
        require(bool(pretrained), "pretrained", pretrained, "--model_args pretrained=NAME, or a checkpoint folder")
        accepted = "a positive whole number, or auto"
        size = BATCH_SIZE if batch_size is None or str(batch_size).startswith("auto") else batch_size
        require(str(size).isdecimal() and int(size) > 0, "batch_size", batch_size, accepted)
        for name, value, least in (("mc_num", mc_num, 1), ("max_gen_toks", max_gen_toks, 1), ("seed", seed, 0)):
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            require(whole, name, value, f"a whole number, {least} or more")
        if int(size) == 1:
            logger.warning("batch_size 1: one request after the other; lm-eval's --batch_size %s is faster", BATCH_SIZE)
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            logger.warning("device %s is not here: cpu", device)  # lm-eval's command line says cuda:0 unless told
            device = None
        self._llm = DiffusionLLM.from_pretrained(
            pretrained, decoder, dtype, device or "cpu", max_batch_size=int(size), **decoder_settings
        )
        if self._llm.tokenizer is None:
            raise InputError(f"pretrained: {pretrained} has no tokenizer; accepted: a checkpoint with one")
        self.tokenizer = self._llm.tokenizer
        self._name, self._size, self._max_gen_toks, self._seed = str(pretrained), int(size), max_gen_toks, seed
        self._mc_num = mc_num
        self._scorer = LikelihoodScorer(self._llm, self._size, mc_num, seed)

    # --- tokens and templates

    @property
    def eot_token_id(self) -> int:
        return self._llm.family.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def max_length(self) -> int:
        return self._llm.engine.context

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; control tokens in it are such, as the chat template has put them there."""
        check_unicode(string, "context")
        return encode_text(self.tokenizer, string, control=True)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation; without `add_generation_prompt` the answer goes on with its last message."""
        try:
            text = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except Exception as error:  # a template is the checkpoint's program
            raise InputError(f"messages: the model's chat template refuses them: {one_line(error)}") from error
        assert isinstance(text, str)
        return text

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results."""
        settings = decoding_settings(self._llm.decoder())
        return {"pretrained": self._name, "decoder_settings": settings, "mc_num": self._mc_num, "seed": self._seed}

    # --- requests

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first `until` string: one call of the engine for all requests that are generated alike.

        A sampled request that is repeated draws again, by the next seed. A context that leaves no room for the answer
        loses its beginning, which is logged.
        """
        groups: dict[str, list[int]] = defaultdict(list)
        prompts, options, met = [], [], Counter[tuple[str, str]]()
        for number, request in enumerate(requests):
            context, gen_kwargs = request.args
            chosen = generation_options(gen_kwargs, self._max_gen_toks)
            key = json.dumps(chosen)
            met[context, key] += 1
            chosen["seed"] = self._seed + (met[context, key] - 1 if chosen["temperature"] else 0)
            groups[json.dumps(chosen)].append(number)
            options.append(chosen)
            prompts.append(self.tok_encode(context) or [self.prefix_token_id])
        texts = [""] * len(requests)
        progress = Progress(quiet=disable_tqdm)
        for numbers in groups.values():
            chosen = options[numbers[0]]
            cut = self._cut([prompts[number] for number in numbers], chosen["max_tokens"])
            with progress.stage("lm-eval generate_until", len(numbers), "request"):
                outputs = self._llm.generate(cut, progress=progress, **chosen)
            for number, output in zip(numbers, outputs, strict=True):
                texts[number] = output.text
        return texts

    def _cut(self, prompts: list[list[int]], max_tokens: Any) -> list[list[int]]:
        room = self.max_length - max_tokens if isinstance(max_tokens, int) else self.max_length
        if room < 1:
            return prompts  # `generate` refuses them with the reason
        long = sum(len(prompt) > room for prompt in prompts)
        if long:
            logger.warning("%d of %d contexts are cut to their last %d tokens", long, len(prompts), room)
        return [prompt[-room:] for prompt in prompts]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, is_greedy) of (cache key, context, continuation); what a long context loses is logged."""
        longest = self._scorer.most_tokens
        texts = [ScoredText(context[len(target) - longest :], target) for _, context, target in requests]
        if long := sum(len(context) + len(target) > longest for _, context, target in requests):
            logger.warning("%d of %d contexts are cut to fit in %d tokens", long, len(texts), longest)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(texts)
        for number, likelihood in self._followed(texts, "loglikelihood", disable_tqdm):
            found[number] = tuple(likelihood)
            self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts: the sum over windows of the context's length, each token in one of them."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        texts, owners = [], []
        for owner, (string,) in enumerate(request.args for request in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(string), self.prefix_token_id, self._scorer.most_tokens - 1, context_len=1
            )
            for context, target in map(make_disjoint_window, windows):
                texts.append(ScoredText(context, target))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for number, likelihood in self._followed(texts, "loglikelihood_rolling", disable_tqdm):
            totals[owners[number]] += likelihood.logprob
        return totals

    def _followed(self, texts: list[ScoredText], stage: str, quiet: bool) -> Iterator[Any]:
        progress = Progress(quiet=quiet)
        with progress.stage(f"lm-eval {stage}", len(texts), "text"):
            for done, found in enumerate(self._scorer.score(texts), start=1):
                progress.update(done)
                yield found
