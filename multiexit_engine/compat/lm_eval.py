"""lm-evaluation-harness runs its tasks on this engine: the model ``multiexit``.

lm-eval finds models by a table in its own package and looks for no plug-ins, so this module has to
be imported before a run: ``multiexit lm-eval`` does it, a program says
``import multiexit_engine.compat.lm_eval``. Knows lm-eval's requests and the engine's face; nothing
of tasks.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from multiexit_engine.compat.ibm_config import MultiExitConfiguration
from multiexit_engine.engine import Engine
from multiexit_engine.errors import RequestFailed
from multiexit_engine.params import DecodingMode, SamplingParams, parse_decoding

logger = logging.getLogger(__name__)

# those of IBM's arguments that say which exits give the numbers
_IBM_CHOICE = ("use_original_head", "output_layer_index", "contrast_layer_indices")
_DEFAULT_MAX_GEN_TOKS = 256


@register_model("multiexit", "multi_exit_hf")
class MultiExitLM(TemplateLM):  # type: ignore[misc]
    """A multi-exit model in one decoding mode, for lm-eval.

    Log-likelihoods are those of ``Engine.score``, each position from the mode's own distribution.
    In the mode ``original`` the numbers are those of lm-eval's ``hf`` model up to float rounding,
    given the same ``max_length``.

    Args:
        pretrained: hub id, folder, or "demo".
        decoding: the mode in its command-line form. As lm-eval splits its arguments at commas,
            fields may be parted by semicolons: ``contrast:24;12;alpha=0.2``.
        use_original_head: as in IBM's MultiExitConfiguration, as are the next two.
        output_layer_index: the exit whose numbers count.
        contrast_layer_indices: ``24;12`` or ``original;12``.
        batch_size: most requests that run at once; "auto" leaves it to the engine.
        max_batch_size: the same, for batch_size "auto".
        max_length: most tokens that the model reads to predict one more. At most, and by default,
            one less than the model's positions, where ``hf`` takes them all: give ``hf`` the same.
        prefix_token_id: stands before texts without a context; default the tokenizer's beginning
            of text, else its end of text.
        device: a CUDA device, which is lm-eval's default, becomes the CPU where there is none.
        options: further options of ``Engine.from_pretrained``, such as dtype, quantization,
            vocab_projection_mode, lm_head_layer_indices.

    Raises:
        ValueError: an argument has no meaning for this model, or contradicts another one.
        TypeError: an option that does not exist.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        decoding: str | None = None,
        use_original_head: bool | str | None = None,
        output_layer_index: int | str | None = None,
        contrast_layer_indices: str | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        prefix_token_id: int | None = None,
        device: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        chosen = (use_original_head, output_layer_index, contrast_layer_indices)
        ibm = {k: v for k, v in zip(_IBM_CHOICE, chosen, strict=True) if v is not None}
        _check_options(options)
        self.engine = Engine.from_pretrained(
            pretrained,
            decoding=_mode(decoding, ibm),
            max_model_len=None if max_length is None else max_length + 1,
            device=_device(device),
            **_batching(batch_size, max_batch_size) | options,
        )
        if self.engine.tokenizer is None:
            raise ValueError(f"pretrained={pretrained!r}: has no tokenizer, and tasks are texts")
        self.tokenizer = self.engine.tokenizer
        self._pretrained = pretrained
        self._prefix_token_id = prefix_token_id

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        candidates = (self._prefix_token_id, self.tokenizer.bos_token_id)
        return int(next((c for c in candidates if c is not None), self.eot_token_id))

    @property
    def max_length(self) -> int:
        """Most tokens that are read to predict one more."""
        return self.engine.config.max_model_len - 1

    @property
    def max_gen_toks(self) -> int:
        return min(_DEFAULT_MAX_GEN_TOKS, self.max_length - 1)

    @property
    def tokenizer_name(self) -> str:
        return self._pretrained.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokens of a text; one that begins with the beginning of text does not get another."""
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and string.startswith(
            self.tokenizer.decode([self.prefix_token_id])
        ):
            special = {"add_special_tokens": False}
        return list(self.tokenizer.encode(string, **special))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, by the tokenizer's template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each whole text, in windows as large as the model reads."""
        windows = [self._rolling_windows(request.args[0]) for request in requests]
        answers = iter(
            self._loglikelihood_tokens(
                [(None, *window) for part in windows for window in part], disable_tqdm
            )
        )
        totals = [sum(next(answers)[0] for _ in part) for part in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop string, which is not part of them."""
        prompts, samplings = [], []
        for context, options in (request.args for request in requests):
            sampling = self._sampling(options)
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={sampling.max_new_tokens}: must be less than max_length="
                    f"{self.max_length}; give --gen_kwargs max_gen_toks={self.max_length // 2}"
                )
            prompts.append(self.tok_encode(context)[-room:])
            samplings.append(sampling)
        outputs = self.engine.generate(prompts, samplings, progress=_bar(disable_tqdm))
        texts = []
        for request, output in zip(requests, outputs, strict=True):
            if output.error is not None:
                raise RequestFailed(output.error)
            texts.append(output.outputs[0].text)
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
    ) -> list[tuple[float, bool]]:
        items = [self._scored_item(context, target) for _, context, target in requests]
        scores = self.engine.score(items, progress=_bar(disable_tqdm)) if items else []
        answers = [(score.total, all(score.is_greedy)) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _scored_item(self, context: list[int], target: list[int]) -> tuple[list[int], list[int]]:
        """The pair, its context cut on the left to what the model can read."""
        room = self.max_length + 1 - len(target)
        if room < 1:
            raise ValueError(
                f"a continuation has {len(target)} tokens: this model reads {self.max_length}"
            )
        if len(context) > room:
            logger.warning("a context of %d tokens is cut to its last %d", len(context), room)
        return context[-room:], target

    def _rolling_windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [make_disjoint_window(window) for window in windows]

    def _sampling(self, options: Mapping[str, Any]) -> SamplingParams:
        wanted = dict(normalize_gen_kwargs(dict(options), self.max_gen_toks))
        stop = handle_stop_sequences(wanted.pop("until", None), eos=None)
        values = {
            "stop": [text for text in stop if text],
            "max_new_tokens": wanted.pop("max_gen_toks"),
        }
        if wanted.pop("do_sample") and not wanted.get("temperature"):
            # as generate() of transformers, whose temperature is 1 unless given
            wanted["temperature"] = 1.0
        allowed = {f.name for f in fields(SamplingParams)} - {"n"}
        if unknown := sorted(wanted.keys() - allowed):
            raise ValueError(
                f"gen_kwargs: {unknown[0]}={wanted[unknown[0]]!r}: allowed are until, "
                f"max_gen_toks, do_sample and {', '.join(sorted(allowed))}"
            )
        return SamplingParams(**values | wanted)


def _mode(decoding: str | None, ibm: Mapping[str, Any]) -> DecodingMode | None:
    if decoding is not None and ibm:
        raise ValueError(f"decoding={decoding!r} and {next(iter(ibm))}: give one way of choosing")
    if decoding is not None:
        return parse_decoding(_with_commas(decoding))
    return MultiExitConfiguration(**ibm).decoding if ibm else None


def _with_commas(form: str) -> str:
    """The mode's command-line form; ``dola:2;4`` has a list and keeps its semicolons."""
    return form if "," in form or form.startswith("dola:") else form.replace(";", ",")


def _batching(batch_size: int | str, max_batch_size: int | None) -> dict[str, Any]:
    if isinstance(batch_size, str) and batch_size.partition(":")[0] == "auto":
        return {} if max_batch_size is None else {"max_batch_size": max_batch_size}
    try:
        return {"max_batch_size": int(batch_size)}
    except ValueError:
        raise ValueError(f"batch_size={batch_size!r}: must be a count or 'auto'") from None


def _device(device: str) -> str:
    if device.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("device=%s: this machine has none, the engine picks another", device)
        return "auto"
    return device


def _check_options(options: Mapping[str, Any]) -> None:
    own = {"model", "decoding", "device", "max_model_len", "max_batch_size"}
    allowed = inspect.signature(Engine.from_pretrained).parameters.keys() - own
    if unknown := sorted(options.keys() - allowed):
        raise TypeError(
            f"model_args: unknown {unknown[0]!r}: allowed are pretrained, decoding, "
            f"{', '.join(_IBM_CHOICE)}, max_length, prefix_token_id, device, "
            f"{', '.join(sorted(allowed))}"
        )


def _bar(disable_tqdm: bool) -> bool | None:
    return False if disable_tqdm else None
