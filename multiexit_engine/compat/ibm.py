"""IBM's autocontrastive-gen: the same names and arguments, run by this engine.

A program written for that library needs new import lines, nothing else. What differs on purpose:

* ``generate`` returns a LongTensor also for the released checkpoints, whose config makes IBM's
  own return a dictionary;
* ``model(ids).logits`` holds every position, as in the library of 2023; later versions give the
  last one only and contrast earlier ones with the wrong distribution;
* missing exit heads raise instead of becoming random weights;
* a model is for inference; exits are trained with ``multiexit train``.

Knows nothing of how tokens are computed: that is the engine's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from multiexit_engine.compat.generation_options import GenerationOptions, resolve_options
from multiexit_engine.compat.ibm_config import (
    MultiExitConfiguration,
    calculate_contrasted_logits,
)
from multiexit_engine.config import VocabularyProjectionMode
from multiexit_engine.engine import Engine
from multiexit_engine.errors import RequestFailed
from multiexit_engine.outputs import CompletionOutput
from multiexit_engine.params import DecodingMode, Original

__all__ = [
    "AutoMultiExitModel",
    "MultiExitConfiguration",
    "MultiExitForCausalLM",
    "VocabularyProjectionMode",
    "calculate_contrasted_logits",
]

_HUB_SETTINGS = {
    "token": "set the environment variable HF_TOKEN or run `hf auth login`",
    "cache_dir": "set the environment variable HF_HUB_CACHE",
    "local_files_only": "set the environment variable HF_HUB_OFFLINE=1",
}


class MultiExitForCausalLM:
    """A loaded model with the parts of transformers' interface that inference needs.

    Attributes:
        engine: runs the requests; also usable on its own.
        config: the checkpoint's transformers config.
        generation_config: its generation defaults.
        multi_exit_config: what it was loaded with.
    """

    # what a pipeline shows of its model
    input_modalities = ("text",)
    output_modalities = ("text",)

    def __init__(
        self,
        engine: Engine,
        config: PreTrainedConfig,
        generation_config: GenerationConfig,
        multi_exit_config: MultiExitConfiguration,
    ) -> None:
        self.engine = engine
        self.config = config
        self.generation_config = generation_config
        self.multi_exit_config = multi_exit_config
        self._decoding = multi_exit_config.decoding
        # the names that pipelines know; others run as well, but after a logged error
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("multiexit", type(self).__name__)

    @property
    def device(self) -> torch.device:
        return self.engine.config.device

    @property
    def dtype(self) -> torch.dtype:
        return self.engine.config.dtype

    def can_generate(self) -> bool:
        """True: transformers' pipeline("text-generation") asks."""
        return True

    def eval(self) -> Self:
        """Itself: a loaded model is always in evaluation mode."""
        return self

    def to(self, device: str | torch.device) -> Self:
        """Itself, when it already is on this device; raises ValueError otherwise."""
        wanted = torch.device(device)
        if wanted.type == self.device.type and wanted.index in (None, self.device.index or 0):
            return self
        raise ValueError(
            f"to({str(device)!r}): this model was loaded on {str(self.device)!r} and stays there; "
            f"give from_pretrained(..., device_map={str(device)!r})"
        )

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CausalLMOutput:
        """Outputs of the configured exits for every position, ``.logits`` [batch, tokens, vocab].

        Float32; for a contrast they are log-probabilities. Positions that attention_mask excludes
        are 0.
        """
        rows = _unpadded_rows(input_ids, _checked_mask(input_ids, attention_mask))
        width = input_ids.shape[1]
        outputs = [self.engine.logits(row, self._decoding) for row in rows]
        logits = outputs[0].new_zeros(len(rows), width, outputs[0].shape[-1])
        for target, output in zip(logits, outputs, strict=True):
            target[width - output.shape[0] :] = output
        return CausalLMOutput(logits=logits.to(input_ids.device))

    forward = __call__

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput:
        """Prompts and their continuations, [batch * num_return_sequences, tokens] int64.

        Options are transformers' and mean the same; one that this engine does not offer raises.
        In addition ``seed`` fixes the random numbers of the call; without it they depend on
        ``torch.manual_seed``. Prompts keep their left padding, finished rows are filled with
        pad_token_id. Padding is not text: unlike in transformers penalties do not see it, so the
        tokens of a row never depend on its neighbours. With return_dict_in_generate=True the result
        has ``.sequences`` and, under beam search, ``.sequences_scores``. ``dola_layers`` contrasts
        layers as transformers 4.55 does at batch 1, whatever the batch.

        Raises:
            ValueError: an option or its value is not supported, or a prompt does not fit.
            TypeError: an option that does not exist.
            RequestFailed: the contrast function or the model's numbers failed.
        """
        wanted = resolve_options(self.generation_config, generation_config, options)
        if input_ids is None:
            if wanted.bos_token_id is None:
                raise ValueError("input_ids=None: this model has no bos_token_id to start from")
            input_ids = torch.tensor([[wanted.bos_token_id]])
        if attention_mask is None:
            attention_mask = _inferred_mask(input_ids, wanted)
        rows = _unpadded_rows(input_ids, _checked_mask(input_ids, attention_mask))
        seed = wanted.seed
        if seed is None:
            seed = int(torch.randint(2**62, ()).item())
        sampling = [
            wanted.sampling(input_ids.shape[1], self.engine.config.max_model_len, seed + place)
            for place in range(len(rows))
        ]
        outputs = self.engine.generate(rows, sampling, self._mode(wanted))
        for output in outputs:
            if output.error is not None:
                raise RequestFailed(output.error)
        completions = [completion for output in outputs for completion in output.outputs]
        sequences = _joined(input_ids, completions, wanted)
        if not wanted.returns_dict:
            return sequences
        if sampling[0].num_beams == 1:
            return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
        scores = torch.tensor([completion.cumulative_logprob for completion in completions])
        return GenerateBeamDecoderOnlyOutput(sequences=sequences, sequences_scores=scores)  # type: ignore[arg-type]

    def _mode(self, wanted: GenerationOptions) -> DecodingMode:
        if wanted.dola is None:
            return self._decoding
        if self._decoding != Original():
            raise ValueError(
                f"dola_layers={wanted.values['dola_layers']!r}: needs the model's own head; "
                "load it with MultiExitConfiguration(use_original_head=True)"
            )
        return wanted.dola


class AutoMultiExitModel:
    """Loads a model with exits, as IBM's class of this name does."""

    @staticmethod
    def from_pretrained(
        model_name_or_path: str,
        multi_exit_config: MultiExitConfiguration,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: str | torch.device | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> MultiExitForCausalLM:
        """The model of a hub id or a local folder, ready to generate.

        Args:
            model_name_or_path: hub id, folder, or "demo".
            multi_exit_config: which exits generate.
            dtype: of the computation. Default float32 whatever the file holds, as IBM's library
                computes; "auto" takes the file's own.
            torch_dtype: the older name of dtype.
            device_map: a device, "auto", or ``{"": device}``. Default: a GPU when there is one.
            options: further options of ``Engine.from_pretrained`` (revision, max_model_len,
                kv_cache_memory, ...).

        Raises:
            ValueError: the model lacks a requested exit, or a value is not allowed.
            TypeError: an option that does not exist.
        """
        if dtype is not None and torch_dtype is not None:
            raise ValueError(f"dtype={dtype} and torch_dtype={torch_dtype}: give one of them")
        _check_engine_options(options)
        decoding = multi_exit_config.decoding
        layers = multi_exit_config.lm_head_layer_indices
        # the original head alone needs no exits, so a plain checkpoint must load
        needs_exits = decoding != Original() or layers is not None
        engine = Engine.from_pretrained(
            model_name_or_path,
            device=_device(device_map, options),
            dtype=dtype or torch_dtype or torch.float32,
            decoding=decoding,
            vocab_projection_mode=(
                multi_exit_config.vocab_projection_mode if needs_exits else None
            ),
            lm_head_layer_indices=layers,
            **options,
        )
        if engine.model_config.encoder is not None:
            raise ValueError(
                f"{model_name_or_path}: this interface continues prompts; the model is an "
                "encoder-decoder, which Engine.from_pretrained opens with the same exits and modes"
            )
        folder = str(engine.checkpoint.folder)
        config = AutoConfig.from_pretrained(folder)
        return MultiExitForCausalLM(
            engine, config, _generation_config(folder, config), multi_exit_config
        )


def _generation_config(folder: str, config: PreTrainedConfig) -> GenerationConfig:
    """The folder's generation_config.json, else what transformers derives from its config."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return GenerationConfig.from_model_config(config)


def _check_engine_options(options: Mapping[str, Any]) -> None:
    own = {"model", "dtype", "decoding", "vocab_projection_mode", "lm_head_layer_indices"}
    allowed = inspect.signature(Engine.from_pretrained).parameters.keys() - own - {"self", "cls"}
    for name in _HUB_SETTINGS.keys() & options.keys():
        raise TypeError(f"from_pretrained() has no option {name!r}: {_HUB_SETTINGS[name]}")
    if unknown := sorted(options.keys() - allowed):
        raise TypeError(
            f"from_pretrained() got an unknown option {unknown[0]!r}: supported are dtype, "
            f"torch_dtype, device_map, {', '.join(sorted(allowed))}"
        )


def _device(device_map: object, options: dict[str, Any]) -> str:
    given = options.pop("device", None)
    if given is not None and device_map is not None:
        raise ValueError(f"device={given!r} and device_map={device_map!r}: give one of them")
    value = given if given is not None else device_map
    if isinstance(value, Mapping) and set(value) == {""}:
        value = value[""]
    if isinstance(value, int) and not isinstance(value, bool):
        value = f"cuda:{value}"
    if isinstance(value, str | torch.device):
        return str(value)
    if value is None:
        return "auto"
    raise ValueError(
        f"device_map={device_map!r}: must be one device, 'auto' or {{'': device}}; "
        f"a model is not spread over devices here"
    )


def _inferred_mask(input_ids: Tensor, options: GenerationOptions) -> Tensor | None:
    """As transformers: a padding token in the prompts marks padding unless it ends texts too."""
    pad = options.given_pad_token_id
    if pad is None or pad in options.eos_token_ids or not bool((input_ids == pad).any()):
        return None
    return input_ids != pad


def _checked_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The mask as bool [batch, tokens]; raises ValueError unless rows are padded on the left."""
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        kind = f"shape {list(input_ids.shape)}, dtype {input_ids.dtype}"
        raise ValueError(f"input_ids of {kind}: must be token ids [batch, tokens]")
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask of shape {list(attention_mask.shape)}: must be that of input_ids, "
            f"{list(input_ids.shape)}"
        )
    mask = attention_mask.bool()
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()) or not bool(mask[:, -1].all()):
        raise ValueError(
            "attention_mask: only tokens at the left may be masked; set the tokenizer's "
            "padding_side='left'"
        )
    return mask


def _unpadded_rows(input_ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[keep].tolist() for row, keep in zip(input_ids, mask, strict=True)]


def _joined(
    input_ids: Tensor, completions: list[CompletionOutput], options: GenerationOptions
) -> Tensor:
    """Prompts and new tokens side by side, short rows filled with the padding token."""
    width = max(len(completion.token_ids) for completion in completions)
    pad = options.pad_token_id or 0
    new = [c.token_ids + [pad] * (width - len(c.token_ids)) for c in completions]
    prompts = input_ids.repeat_interleave(options.num_return_sequences, dim=0)
    return torch.cat([prompts, torch.tensor(new).to(prompts)], dim=1)
