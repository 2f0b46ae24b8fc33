"""The transformer: GPT-2 (Radford et al., 2019), read from the bottom up.

    MLP, CausalSelfAttention     the two halves of a block
    Block                        x + attention(norm(x)), then x + mlp(norm(x))
    GPT                          embeddings, blocks, final norm, output head

Architecture, details and parameter names are GPT-2's own (tanh GELU, biases, LayerNorm eps 1e-5, the output head tied
to the token embedding), so that a model trained here is a GPT-2 to every other tool. One difference in memory only:
GPT-2's own files hold the four projections of a block transposed.

Shapes in the comments: B sequences, T tokens, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import ModelConfig


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and what came before it (Vaswani et al., 2017)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values of all heads at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        # softmax(q k^T / sqrt(D)) v, in the fused kernel that PyTorch has for the device (FlashAttention on GPUs)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """The position-wise feed-forward network: wider, a nonlinearity, narrow again."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner)
        self.gelu = nn.GELU(approximate="tanh")  # GPT-2's form of it (Hendrycks and Gimpel, 2016)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """One layer: each half reads a normalised copy of the residual stream and adds to the stream itself (pre-norm)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """Tokens in, logits of the next token out.

    The embedding has `config.padded_vocab_size` rows, of which only the first `vocab_size` are real: neither loss nor
    logits know the others. The output head is the token embedding itself, transposed (Press and Wolf, 2017).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),  # what the token is
                "wpe": nn.Embedding(config.block_size, config.n_embd),  # where it stands
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, eps=1e-5),
            }
        )
        # A bias of -inf gives the padded rows probability 0 in the loss, and so no gradient, at no cost.
        padding = torch.zeros(config.padded_vocab_size)
        padding[config.vocab_size :] = -math.inf
        self.register_buffer("padding_bias", padding, persistent=False)

        self.apply(self._init_weights)
        # GPT-2: what adds to the residual stream starts smaller, by the root of how many such additions there are.
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, or with targets the loss.

        Args:
            idx: (B, T) token ids, T at most `block_size`.
            targets: (B, T) the token that follows each one of `idx`.

        Returns:
            Without targets, logits (B, T, V). With them, the mean cross-entropy in nats per token, a float32 scalar.
        """
        _, T = idx.shape
        positions = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C) + (T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        logits = F.linear(x, self.transformer.wte.weight, self.padding_bias)  # (B, T, padded V)
        if targets is None:
            return logits[..., : self.config.vocab_size]
        return F.cross_entropy(logits.view(-1, logits.size(-1)).float(), targets.reshape(-1))

    def num_parameters(self) -> dict[str, int]:
        """How many trained numbers there are, without the padded rows: in the blocks (with the final norm), in the
        embeddings (tokens and positions), in total."""
        blocks = sum(p.numel() for p in self.transformer.h.parameters())
        blocks += sum(p.numel() for p in self.transformer.ln_f.parameters())
        embedding = (self.config.vocab_size + self.config.block_size) * self.config.n_embd
        return {"blocks": blocks, "embedding": embedding, "total": blocks + embedding}

    def flops_per_token(self) -> int:
        """Floating-point operations of training on one token, forward and backward (PaLM, Chowdhery et al., 2022,
        appendix B): 6 for each weight in a matrix product, the output head included, the embedding look-ups not; and
        12 T C a layer for attention's own products."""
        c = self.config
        weights = self.num_parameters()["blocks"] + c.vocab_size * c.n_embd
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size
