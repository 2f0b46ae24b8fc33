"""The transformer: GPT-2 (Radford et al., 2019), read from the bottom up.

    dropout                      random zeros, against overfitting
    KeyValueCache                keys and values of earlier tokens, kept while text is generated
    written_out_attention        attention by its formula, for training on a CPU
    CausalSelfAttention, MLP     the two halves of a block
    Block                        x + attention(norm(x)), then x + mlp(norm(x))
    LinearCrossEntropy           the output head and its loss in one, a chunk of the logits at a time
    GPT                          embeddings, blocks, final norm, output head

Architecture and parameter names are GPT-2's own: tanh GELU, biases, LayerNorm eps 1e-5, the output head tied to the
token embedding. So a model trained here is a GPT-2 to every other tool. One thing differs: the four projections of a
block are (out, in) here, as in nn.Linear, and (in, out) in GPT-2's own files.

Shapes in the comments: B sequences, T tokens, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import ModelConfig

# Logits that the loss computes at a time. Fewer save memory, but add to the output head's gradient more often. Measured
# on a CPU (benchmarks/loss.py, docs/experiments.md). With torch.compile no float32 copy of them exists, so there may be
# more: this saves a GPU half the launches and 6 % of the bytes (counted, tests/test_gpu_loss.py).
LOGITS_AT_ONCE, LOGITS_AT_ONCE_COMPILED = 2**27, 2**28
# Of these, the logits that a CPU turns into probabilities at a time: few enough to stay in its cache.
LOGITS_IN_CACHE = 2**20
# The longest context whose attention a CPU trains faster written out than in PyTorch's fused kernel (docs/experiments.md).
WRITTEN_OUT_UP_TO = 512


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """In training, set each element to 0 with probability `p`, and divide the others by 1 - p (Srivastava et al., 2014).

    On a CPU, F.dropout draws one random number after another, which took longer than all matrix products of a small
    model. Here 64 random bits decide about four elements, and `p` is rounded to a multiple of 1/65,536.
    """
    if p == 0 or not training:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits of each
    numbers = bits.view(torch.int16)[: x.numel()].view(x.shape)  # from -2^15 to 2^15 - 1
    keep = numbers >= min(round(p * 2**16), 2**16 - 1) - 2**15  # as an int16, 2^15 would wrap around
    return x * keep.to(x.dtype).div_(1 - p)


class KeyValueCache:
    """The keys and values of the tokens that a model has seen, so that each token's are computed only once.

    The first tokens allocate it for the whole context, on their device and in their dtype. On a CPU it is float32, in
    which attention with one query is four times faster than in bfloat16. Each layer appends to its own part, and
    `GPT.forward` then increases `length`.
    """

    def __init__(self, config: ModelConfig):
        self.block_size = config.block_size
        self.layers: list[Tensor | None] = [None] * config.n_layer  # (2, B, H, block_size, D) each: keys, values
        self.length = 0  # tokens that all layers hold

    def append(self, layer: int, kv: Tensor) -> Tensor:
        """Add the keys and values of T new tokens (2, B, H, T, D). Returns those of all tokens (2, B, H, length + T, D)."""
        if self.layers[layer] is None:
            dtype = torch.float32 if kv.device.type == "cpu" else kv.dtype
            self.layers[layer] = kv.new_empty(*kv.shape[:3], self.block_size, kv.shape[-1], dtype=dtype)
        end = self.length + kv.shape[3]
        self.layers[layer][:, :, :, self.length : end] = kv
        return self.layers[layer][:, :, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, (rows,) int64: fewer when sequences have ended, repeated when they fork."""
        self.layers = [None if kv is None else kv[:, rows] for kv in self.layers]


def faster_written_out(q: Tensor, p: float) -> bool:
    """Whether `written_out_attention` trains faster than PyTorch's own: on CPUs, whose fused kernel has a slow backward pass
    in bfloat16 and no dropout."""
    slow = q.device.type == "cpu" and (q.dtype == torch.bfloat16 or p > 0)
    return slow and q.size(2) <= WRITTEN_OUT_UP_TO and torch.is_grad_enabled()


def written_out_attention(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """Causal attention by its formula: dropout(softmax(q k^T / sqrt(D))) v, each tensor (B, H, T, D)."""
    B, H, T, D = q.shape
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (BH, T, D) each
    future = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)  # hides from each token those after it
    scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=1 / math.sqrt(D))  # future + q k^T / sqrt(D), (BH, T, T)
    return torch.bmm(dropout(scores.softmax(dim=-1), p), v).view(B, H, T, D)


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and the tokens before it (Vaswani et al., 2017)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values of all heads at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, layer: int = 0) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        q, k, v = qkv  # (B, H, T, D) each
        if cache is not None:
            k, v = cache.append(layer, qkv[1:])  # (B, H, S, D) each: S - T earlier tokens, then these T
            q = q.to(k.dtype)
        S = k.size(2)
        # is_causal aligns the first query with the first key, which is right only without earlier tokens. A single
        # query, the newest, sees every key and needs no mask. Several queries after earlier tokens need an explicit one.
        mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T) if 1 < T < S else None
        p = self.dropout if self.training else 0.0
        if cache is None and faster_written_out(q, p):
            y = written_out_attention(q, k, v, p)
        else:  # softmax(q k^T / sqrt(D)) v, in the fused kernel that PyTorch has for the device (FlashAttention on GPUs)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == S, dropout_p=p)
        y = y.transpose(1, 2).reshape(B, T, C).to(x.dtype)  # the heads side by side again
        return dropout(self.c_proj(y), p)


class MLP(nn.Module):
    """The position-wise feed-forward network: widen, apply a nonlinearity, narrow again."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")  # GELU (Hendrycks and Gimpel, 2016) in GPT-2's form
        return dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """One layer. Each half reads a normalised copy of the residual stream and adds to the stream itself (pre-norm)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, layer: int = 0) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, layer)
        x = x + self.mlp(self.ln_2(x))
        return x


class LinearCrossEntropy(torch.autograd.Function):
    """Output head and cross-entropy in one, a chunk of rows at a time, gradients included.

    With a vocabulary of 50,257 tokens the logits are by far the largest tensor of training. The plain way holds four of them: the result
    of the matrix product, its float32 copy, and the gradients of both. Here the forward pass turns a chunk of logits into
    its loss and into its share of the gradients of `x` and `weight` (the gradient of softmax and cross-entropy is softmax
    minus one-hot), and then forgets the chunk. The backward pass only scales.

    The method is Liger Kernel's (Hsu et al., 2024; in the spirit of Cut Cross-Entropy, Wijmans et al., 2024), here in
    plain PyTorch. benchmarks/loss.py measures it; tests/test_gpu_loss.py counts the kernels and bytes of a GPU.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, dtype: torch.dtype, with_gradient: bool
    ) -> Tensor:
        compiling = torch.compiler.is_compiling()
        rows = rows_within(LOGITS_AT_ONCE_COMPILED if compiling else LOGITS_AT_ONCE, weight)
        # Small parts gain nothing on a GPU, nor with torch.compile, which fuses all steps on a chunk into one kernel.
        in_parts = x.device.type == "cpu" and not compiling
        rows_in_part = min(rows, rows_within(LOGITS_IN_CACHE, weight)) if in_parts else rows
        losses: list[Tensor] = []
        grad_x: list[Tensor] = []
        grad_weight: Tensor | None = None
        with torch.autocast(x.device.type, enabled=False):
            w = weight.to(dtype)  # (padded V, C)
            # The chunks share their memory: allocating it again and again costs a CPU page faults
            buffer = torch.empty(min(rows, len(x)), len(w), dtype=dtype, device=x.device)
            for x_chunk, targets_chunk in zip(x.to(dtype).split(rows), targets[:, None].split(rows), strict=True):
                chunk = torch.mm(x_chunk, w.T, out=buffer[: len(x_chunk)])  # (rows, padded V)
                chunk[:, vocab_size:] = -math.inf  # probability 0, gradient 0
                for logits, target in zip(chunk.split(rows_in_part), targets_chunk.split(rows_in_part), strict=True):
                    losses.append(cross_entropy_(logits, target, with_gradient))
                if with_gradient:
                    grad_logits = chunk  # the buffer now holds the gradients of its logits
                    grad_x.append((grad_logits @ w).to(x.dtype))
                    share = grad_logits.T @ x_chunk
                    grad_weight = share.float() if grad_weight is None else grad_weight.add_(share)
        if with_gradient:
            ctx.save_for_backward(torch.cat(grad_x), grad_weight)
        return torch.cat(losses).mean()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        scale = grad_loss / len(grad_x)
        return grad_x * scale, grad_weight * scale, None, None, None, None


def cross_entropy_(logits: Tensor, target: Tensor, with_gradient: bool) -> Tensor:
    """The cross-entropy of each row in nats, float32. May overwrite the logits; with `with_gradient` they become the
    gradient of the sum of all rows.

    Args:
        logits: (rows, padded V).
        target: (rows, 1) token ids.
    """
    exact = logits.float()
    likeliest, at_target = exact.amax(dim=1, keepdim=True), exact.gather(1, target)  # (rows, 1) each
    probabilities = torch.softmax(exact, dim=1, out=exact)
    # -log p(target) = z_max - z_target - log p(max), since p(target) / p(max) = exp(z_target - z_max). Unlike the target's p,
    # the likeliest token's cannot be rounded to 0
    losses = likeliest - at_target - probabilities.amax(dim=1, keepdim=True).log()
    if with_gradient:  # last, since float32 logits share their memory with `exact` and `probabilities`
        # Of the sum, not of the mean, whose gradient float16 could not hold
        if torch.compiler.is_compiling():  # compiles to one kernel, which reads and writes the logits once
            one_hot = torch.zeros_like(probabilities).scatter_(1, target, 1.0)
            logits.copy_(torch.sub(probabilities, one_hot, out=one_hot))
        else:  # saves two passes, but writes to single columns, which would be a kernel of its own
            logits.copy_(probabilities.scatter_add_(1, target, torch.full_like(likeliest, -1.0)))
    return losses


def rows_within(logits: int, weight: Tensor) -> int:
    """The most rows, as a power of two, that have at most `logits` logits in all. A power of two divides most batches
    into equal chunks, which share a compiled kernel."""
    return 2 ** int(math.log2(max(1, logits // len(weight))))


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """The mean cross-entropy of the logits `x @ weight.T`, a chunk of which exists at a time.

    Args:
        x: (N, C) input of the output head, in float32 or autocast's dtype.
        weight: (padded V, C), float32. Its rows from `vocab_size` on get probability 0 and gradient 0.
        targets: (N,) token ids.

    Returns:
        Nats per token, a float32 scalar.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return LinearCrossEntropy.apply(x, weight, targets, vocab_size, dtype, torch.is_grad_enabled())


class GPT(nn.Module):
    """Tokens in, logits of the next token out.

    The embedding has `config.padded_vocab_size` rows. Only the first `vocab_size` are real: loss and logits leave the
    others out. The output head is the token embedding itself, transposed (Press and Wolf, 2017).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),  # the token's identity
                "wpe": nn.Embedding(config.block_size, config.n_embd),  # its position
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, eps=1e-5),
            }
        )
        self.apply(self._init_weights)
        # GPT-2: projections that add to the residual stream start smaller, by the root of the number of additions.
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Logits, or the loss if targets are given.

        Args:
            idx: (B, T) token ids, T at most `block_size`.
            targets: (B, T) the token that follows each token of `idx`.
            cache: the tokens before `idx`, to which `idx` is added. Both together are at most `block_size` tokens.

        Returns:
            Without targets, logits (B, T, V). With a cache, only those of the last token, (B, 1, V): the head is most of
            the work when few tokens are added. With targets, the mean cross-entropy in nats per token, a float32 scalar.
        """
        _, T = idx.shape
        start = 0 if cache is None else cache.length
        positions = self.transformer.wpe.weight[start : start + T]
        x = self.transformer.wte(idx) + positions  # (B, T, C) + (T, C)
        x = dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, cache, layer)
        if cache is not None:
            cache.length += T
            x = x[:, -1:]
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.head(x)[..., : self.config.vocab_size]
        return linear_cross_entropy(
            x.flatten(0, 1), self.transformer.wte.weight, targets.flatten(), self.config.vocab_size
        )

    def head(self, x: Tensor) -> Tensor:
        """The output head: (..., C) to logits (..., padded V)."""
        return F.linear(x, self.transformer.wte.weight)

    def num_parameters(self) -> dict[str, int]:
        """Trained parameters without the padded rows: `blocks` (with the final norm), `embedding` (tokens and positions),
        `total`."""
        blocks = sum(p.numel() for p in self.transformer.h.parameters())
        blocks += sum(p.numel() for p in self.transformer.ln_f.parameters())
        embedding = (self.config.vocab_size + self.config.block_size) * self.config.n_embd
        return {"blocks": blocks, "embedding": embedding, "total": blocks + embedding}

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token, forward and backward (PaLM, Chowdhery et al., 2022, appendix
        B): 6 for each weight in a matrix product (the output head counts, embedding look-ups do not), and 12 T C in
        each layer for attention's own products. Biases and norms count as well: 0.3 % of the default's blocks."""
        c = self.config
        weights = self.num_parameters()["blocks"] + c.vocab_size * c.n_embd
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size
