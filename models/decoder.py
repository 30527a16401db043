"""`MemoryLM`: one decoder for every mixer.

    h = embed(ids);  for each block:  h += mixer(norm(h)),  h += mlp(norm(h));  logits = head(norm(h))

The model keeps the promises of the layer contract over token ids: any split into calls gives the same
numbers, padding and packing are exact, a state is a value. Masked batches are packed once, at the entry; all
blocks then share one `SequenceContext`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ..layers.contract import LayerOutput, MixerConfig, SequenceContext, State, TokenMixer, build_context
from ..layers.parts.norm import RMSNorm
from ..layers.parts.state_space import Float32Parameters
from ..layers.registry import build_mixer
from .config import ModelConfig

# Dimensions: B batch rows, T tokens, N sequences, L tokens of all sequences together, M model width, V
# vocabulary


@dataclass(kw_only=True)
class ModelState(State):
    """The states of all blocks.

    Attributes:
        layers: one state per block, in order.
    """

    layers: tuple[State, ...]


@dataclass
class ModelOutput:
    """What `MemoryLM` returns.

    Attributes:
        logits: (B, T, V); (N, V) from `step` and for `last_only`.
        state: the state after the last token, when asked for.
        hidden_states: when asked for, the embeddings and the output of each block, the last one normalised;
            (B, T, M) each. Or that last one alone.
        aux: losses of the layers, "layers.<i>.<name>" -> (sum, count), each (N,).
        extras: per-token tensors of the layers for whole-model losses, "layers.<i>.<name>" -> (B, T, ...),
            when asked for.
    """

    logits: Tensor
    state: ModelState | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    aux: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, 2020), without biases."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., M) to (..., M)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GeluMLP(nn.Module):
    """down(gelu(up(x))), without biases."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., M) to (..., M)."""
        return self.down_proj(F.gelu(self.up_proj(x)))


class DecoderBlock(nn.Module):
    """A mixer and an MLP, each behind its norm and added to the residual stream.

    A mixer that owns its norm is given the raw residual; a block without MLP has no `mlp_norm`.
    """

    def __init__(self, config: ModelConfig, mixer: MixerConfig, mlp: Mapping[str, Any]) -> None:
        super().__init__()
        self.mixer: TokenMixer = build_mixer(mixer)
        self.mixer_norm = None if self.mixer.owns_norm else _build_norm(config)
        self.mlp: nn.Module | None = None
        if mlp["type"] != "none":
            self.mlp = (SwiGLU if mlp["type"] == "swiglu" else GeluMLP)(config.d_model, mlp["d_ff"])
        self.mlp_norm = None if self.mlp is None else _build_norm(config)
        self.residual_in_fp32 = config.residual_in_fp32

    def forward(
        self, hidden: Tensor, ctx: SequenceContext, state: Any = None, is_step: bool = False
    ) -> LayerOutput:
        """Maps the residual stream (B, T, M) or (1, L, M), in internal form, to the next one."""
        x = self.mixer_input(hidden)
        out = self.mixer.mix_step(x, ctx, state) if is_step else self.mixer.mix(x, ctx, state)
        return LayerOutput(self.after_mixer(hidden, out.hidden), out.state, out.aux, out.extras)

    def mixer_input(self, hidden: Tensor) -> Tensor:
        """What the mixer reads: the normalised residual, or the raw one if it owns its norm."""
        return hidden if self.mixer_norm is None else self._normed(self.mixer_norm, hidden)

    def after_mixer(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """The residual stream after the block, given the mixer's output."""
        hidden = hidden + mixed
        if self.mlp is not None and self.mlp_norm is not None:
            hidden = hidden + self.mlp(self._normed(self.mlp_norm, hidden))
        return hidden

    def _normed(self, norm: RMSNorm | nn.LayerNorm, hidden: Tensor) -> Tensor:
        normed: Tensor = norm(hidden)
        return normed.to(norm.weight.dtype) if self.residual_in_fp32 else normed


class MemoryLM(nn.Module):
    """A causal language model whose blocks hold any mixers.

    Args:
        config: what to build.
        device: where to create the parameters; "meta" creates none, see `materialize`.
        dtype: of the parameters; default torch's default dtype.

    Attributes:
        gradient_checkpointing: recompute each block in the backward pass instead of storing its
            activations (training only).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        with torch.device(device if device is not None else torch.get_default_device()), _NoDrawsOnMeta():
            self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
            self.layers = nn.ModuleList(
                DecoderBlock(config, mixer, mlp)
                for mixer, mlp in zip(config.mixers, config.mlps, strict=True)
            )
            self.norm = _build_norm(config)
            self.lm_head = (
                None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
            )
            self.init_weights()
        if dtype is not None:
            self.to(dtype)

    @property
    def blocks(self) -> tuple[DecoderBlock, ...]:
        """The entries of `layers`, typed."""
        return tuple(cast(DecoderBlock, layer) for layer in self.layers)

    def init_weights(self) -> None:
        """Initialises everything but the mixers, which initialise themselves."""
        mixers = {id(module) for layer in self.blocks for module in layer.mixer.modules()}
        for module in self.modules():
            if id(module) in mixers:
                continue
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            elif isinstance(module, (RMSNorm, nn.LayerNorm)):
                module.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the whole model, mixers included."""
        self.init_weights()
        for layer in self.blocks:
            layer.mixer.reset_parameters()

    def materialize(self, device: torch.device | str = "cpu") -> MemoryLM:
        """Gives a model built on the meta device real, freshly initialised parameters; returns itself."""
        tags = parameter_tags(self)
        self.to_empty(device=device)
        restore_parameter_tags(self, tags)
        self.reset_parameters()
        return self

    def forward(
        self,
        input_ids: Tensor,
        state: ModelState | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        streams: Mapping[str, Tensor] | None = None,
        overrides: Mapping[str, int] | None = None,
        return_state: bool = False,
        return_extras: bool = False,
        return_hidden_states: bool | Literal["last"] = False,
        last_only: bool = False,
    ) -> ModelOutput:
        """Reads tokens and predicts the next one at each position.

        Args:
            input_ids: (B, T) integers, T >= 1.
            state: what an earlier call returned for the same sequences; None is an empty memory.
            mask: (B, T) bool, True = real token, any pattern. Logits of padding are 0.
            cu_seqlens: (N + 1,) boundaries of N sequences packed in one row (B = 1).
            streams: per-token integers (B, T) that some mixers need (roles, segments).
            overrides: sizes to use in this call only, see the mixers.
            return_state: also return the state after the last token.
            return_extras: also return what whole-model losses need.
            return_hidden_states: also return the residual stream before, between and after the blocks;
                "last" keeps only what the head reads.
            last_only: logits (N, V) of the last real token of each sequence instead of (B, T, V); 0 where a
                sequence has no token in this call.

        Raises:
            ValueError: no tokens, ids outside the vocabulary, or mask, boundaries, state and streams that do
                not fit.
        """
        if input_ids.dim() != 2:
            raise ValueError(
                f"input_ids must be (B, T), got the shape {tuple(input_ids.shape)}. Add a batch dimension."
            )
        self._check_streams(streams)
        ctx = build_context(
            (input_ids.shape[0], input_ids.shape[1]),
            input_ids.device,
            num_seen=self._num_seen(state),
            mask=mask,
            cu_seqlens=cu_seqlens,
            streams=streams,
            overrides=overrides,
            return_state=return_state,
            return_extras=return_extras,
        )
        if sum(ctx.lengths) == 0:
            raise ValueError(
                "the input holds no token (an empty prompt). Give at least one, a bos token for instance."
            )
        hidden = self.embed(ctx.pack(input_ids))  # (B, T, M) or (1, L, M)
        hidden, new_state, aux, extras, seen = self._run(hidden, ctx, state, return_hidden_states is True)
        if return_hidden_states:
            seen = [ctx.unpack(item) for item in (*seen, hidden)]
        if last_only:
            logits = self.head(self._last_tokens(hidden, ctx))  # (N, V)
        else:
            logits = ctx.unpack(self.head(hidden))  # (B, T, V)
        extras = {name: ctx.unpack(value) for name, value in extras.items()}
        return ModelOutput(logits, new_state, tuple(seen) if return_hidden_states else None, aux, extras)

    def step(
        self,
        input_ids: Tensor,
        state: ModelState,
        *,
        streams: Mapping[str, Tensor] | None = None,
        donate: bool = False,
    ) -> ModelOutput:
        """Reads one token of every sequence; same numbers as `forward` on it.

        Args:
            input_ids: (N,) integers.
            state: the state so far (`init_state` for an empty memory).
            streams: per-token integers (N,).
            donate: allow the memory of `state` to be reused; it cannot be used afterwards.

        Returns:
            logits (N, V) and the new state.
        """
        if input_ids.dim() != 1:
            raise ValueError(
                f"step reads input_ids of shape (N,), got {tuple(input_ids.shape)}. "
                "Use forward for several tokens."
            )
        if state is None:
            raise ValueError("step needs a state, got None. Start with model.init_state(batch_size).")
        self._check_streams(streams)
        ctx = build_context(
            (input_ids.shape[0], 1),
            input_ids.device,
            num_seen=self._num_seen(state),
            streams={name: stream[:, None] for name, stream in (streams or {}).items()},
            return_state=True,
            in_place=donate,
        )
        hidden = self.embed(input_ids[:, None])  # (N, 1, M)
        hidden, new_state, aux, extras, _ = self._run(hidden, ctx, state, False, is_step=True)
        if donate:
            state.poison()
        return ModelOutput(self.head(hidden).squeeze(1), new_state, None, aux, extras)

    def embed(self, input_ids: Tensor) -> Tensor:
        """The residual stream (B, T, M) before the first block.

        Raises:
            ValueError: no integers, or ids outside the vocabulary.
        """
        if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise ValueError(f"input_ids must be integers, got {input_ids.dtype}.")
        if input_ids.device.type != "meta" and input_ids.numel() and not torch.compiler.is_compiling():
            low, high = (int(value) for value in torch.aminmax(input_ids))
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"input_ids hold {low if low < 0 else high}, but the vocabulary has the ids 0 to "
                    f"{self.config.vocab_size - 1}. Is the tokenizer that of this model?"
                )
        hidden = self.embed_tokens(input_ids)
        return hidden.float() if self.config.residual_in_fp32 and hidden.dtype != torch.float64 else hidden

    @property
    def head_weight(self) -> Tensor:
        """(V, M), the map from normalised hidden states to logits; the embeddings where they are tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of normalised hidden states (..., M)."""
        if self.lm_head is None:
            return F.linear(hidden, self.embed_tokens.weight)
        logits: Tensor = self.lm_head(hidden)
        return logits

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ModelState:
        """An empty memory for `batch_size` sequences; `dtype` is that of the activations."""
        return ModelState(
            num_tokens=torch.zeros(batch_size, dtype=torch.int64),
            layers=tuple(
                layer.mixer.init_state(batch_size, device=device, dtype=dtype) for layer in self.blocks
            ),
        )

    def state_num_bytes(
        self, num_tokens: int, batch_size: int = 1, dtype: torch.dtype = torch.float32
    ) -> int:
        """Bytes of the state after `num_tokens` tokens."""
        own = 8 * batch_size
        return own + sum(layer.mixer.state_num_bytes(num_tokens, batch_size, dtype) for layer in self.blocks)

    def flops_per_token(self, num_tokens: int) -> int:
        """Matrix-product FLOPs (2 per multiply-add) of one `step` after `num_tokens` tokens."""
        flops = 2 * self.config.vocab_size * self.config.d_model
        for layer in self.blocks:
            flops += layer.mixer.flops_per_token(num_tokens)
            if layer.mlp is not None:
                flops += sum(2 * weight.numel() for weight in layer.mlp.parameters())
        return flops

    def num_parameters(self) -> int:
        """Number of parameters; tied embeddings count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _run(
        self,
        hidden: Tensor,
        ctx: SequenceContext,
        state: ModelState | None,
        keep_all: bool,
        is_step: bool = False,
    ) -> tuple[Tensor, ModelState | None, dict[str, tuple[Tensor, Tensor]], dict[str, Tensor], list[Tensor]]:
        """The blocks and the last norm; the list holds the residual stream before each block."""
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        states: list[State] = []
        seen: list[Tensor] = []
        aux: dict[str, tuple[Tensor, Tensor]] = {}
        extras: dict[str, Tensor] = {}
        for index, layer in enumerate(self.blocks):
            if keep_all:
                seen.append(hidden)
            incoming = None if state is None else state.layers[index]
            if recompute:
                out = checkpoint(layer, hidden, ctx, incoming, is_step, use_reentrant=False)
            else:
                out = layer(hidden, ctx, incoming, is_step)
            hidden = out.hidden
            states.append(out.state)
            aux.update({f"layers.{index}.{name}": value for name, value in out.aux.items()})
            extras.update({f"layers.{index}.{name}": value for name, value in out.extras.items()})
        hidden = self.norm(hidden)
        if self.config.residual_in_fp32:
            hidden = hidden.to(self.norm.weight.dtype)
        new_state = (
            ModelState(num_tokens=ctx.num_tokens_after, layers=tuple(states)) if ctx.return_state else None
        )
        return hidden, new_state, aux, extras, seen

    def _last_tokens(self, hidden: Tensor, ctx: SequenceContext) -> Tensor:
        """(N, M), the last token of each sequence; zeros where a sequence has none in this call."""
        if ctx.cu_seqlens is None:
            return hidden[:, -1]
        last = hidden[0, (ctx.cu_seqlens[1:] - 1).clamp(min=0).to(hidden.device)]
        if min(ctx.lengths) > 0:
            return last
        is_empty = torch.tensor([length == 0 for length in ctx.lengths], device=hidden.device)
        return last.masked_fill(is_empty[:, None], 0)

    def _num_seen(self, state: Any) -> Tensor | None:
        if state is None:
            return None
        if not isinstance(state, ModelState):
            raise TypeError(
                f"state must be what MemoryLM returned (a ModelState), got {type(state).__name__}. "
                "Use state=None or model.init_state(batch_size) for an empty memory."
            )
        state.check_usable()
        if len(state.layers) != len(self.layers):
            raise ValueError(
                f"state holds {len(state.layers)} layers, the model has {len(self.layers)}. "
                "It is of another model."
            )
        for index, (layer, part) in enumerate(zip(self.blocks, state.layers, strict=True)):
            try:
                layer.mixer.check_state(part)
            except (TypeError, ValueError) as error:
                raise type(error)(f"layer {index}: {error}") from error
        return state.num_tokens

    def _check_streams(self, streams: Mapping[str, Tensor] | None) -> None:
        for index, layer in enumerate(self.blocks):
            missing = layer.mixer.needs - set(streams or {})
            if missing:
                raise ValueError(
                    f"layer {index} ({layer.mixer.config.type}) needs the per-token streams "
                    f"{sorted(missing)}, got {sorted(streams or {})}. "
                    "Pass streams={name: integers of shape (B, T)}."
                )


def parameter_tags(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The plain attributes of all parameters (no weight decay, own learning rate), by name."""
    return {name: dict(vars(parameter)) for name, parameter in model.named_parameters()}


def restore_parameter_tags(model: nn.Module, tags: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts attributes back that replacing the parameters (meta device, assigning weights) has dropped."""
    for name, parameter in model.named_parameters():
        vars(parameter).update(tags.get(name, {}))


def float32_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters that stay float32 where the model is converted to a half precision."""
    return [
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, Float32Parameters)
        for name in module.float32_parameters
    ]


class _NoDrawsOnMeta(TorchFunctionMode):
    """Leaves out the drawing of normal numbers into tensors that have no storage.

    The first such call brings torch's compiler into the process: seconds, and more memory than a small model.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function, unless it draws for nothing."""
        kwargs = kwargs or {}
        if func in (Tensor.normal_, nn.init.normal_):
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def _build_norm(config: ModelConfig) -> RMSNorm | nn.LayerNorm:
    if config.norm == "rms":
        return RMSNorm(config.d_model, config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps)
