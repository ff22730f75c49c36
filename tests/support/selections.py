"""A second, slow and literal reading of one pruning point in fp64, to hold the graphs against.

Torch autograd for the saliency, a sequential greedy loop for the selection: one row at a time,
no blocks, no batching, nothing shared with `trio_deploy.export.graphs`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F

from trio_deploy.families.base import TextConfig


def greedy(scores: np.ndarray, features: np.ndarray, keep: int, threshold: float) -> np.ndarray:
    """Indices kept by sequential greedy NMS, filled up with the best suppressed ones; ascending."""
    order = np.argsort(-scores, kind="stable")
    norm = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    unit = features / np.maximum(norm, 1e-12)
    suppressed = np.zeros(len(scores), bool)
    kept: list[int] = []
    for i in order:
        if len(kept) == keep:
            break
        if not suppressed[i]:
            kept.append(int(i))
            suppressed |= unit @ unit[i] >= threshold
    kept += [int(i) for i in order if i not in set(kept)][: keep - len(kept)]
    return np.array(sorted(kept), np.int64)


def probe_positions(visual: np.ndarray, probe: str, probes: int) -> np.ndarray:
    """The probe positions of a row: its last text tokens, or shifted by one."""
    text = np.flatnonzero(~visual)
    return text[-probes:] if probe == "last" else text[:-1][-probes:]


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _rotate(x: torch.Tensor, positions: torch.Tensor, inverse_frequency: torch.Tensor):
    angle = positions[:, None] * inverse_frequency
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def saliency(
    x: np.ndarray,
    positions: np.ndarray,
    visual: np.ndarray,
    weights: Mapping[str, np.ndarray],
    config: TextConfig,
    layer: int,
    *,
    probe: str = "last",
    probes: int = 4,
    inverse_frequency: np.ndarray,
) -> np.ndarray:
    """Norms of the proxy loss's gradient at the visual tokens of one row, fp64 autograd; [S]."""
    prefix = f"language_model.layers.{layer}."
    get = {k: torch.from_numpy(np.asarray(v, np.float64)) for k, v in weights.items()}
    head = get[
        "lm_head.weight" if "lm_head.weight" in get else "language_model.embed_tokens.weight"
    ]

    def linear(name: str, y: torch.Tensor) -> torch.Tensor:
        return F.linear(y, get[prefix + name + ".weight"], get.get(prefix + name + ".bias"))

    length = len(x)
    where = probe_positions(visual, probe, probes)
    if not len(where) or not visual.any():
        return np.zeros(length)
    rows = torch.tensor(x.astype(np.float64), requires_grad=True)
    pos, freq = torch.from_numpy(positions.astype(np.float64)), torch.from_numpy(inverse_frequency)
    n = _norm(rows, get[prefix + "input_layernorm.weight"], config.rms_norm_eps)
    heads, kv, dim = config.num_heads, config.num_kv_heads, config.head_dim
    q = _rotate(linear("self_attn.q_proj", n).view(length, heads, dim).transpose(0, 1), pos, freq)
    k = _rotate(linear("self_attn.k_proj", n).view(length, kv, dim).transpose(0, 1), pos, freq)
    v = linear("self_attn.v_proj", n).view(length, kv, dim).transpose(0, 1)
    k, v = (t.repeat_interleave(heads // kv, 0) for t in (k, v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = rows + linear("self_attn.o_proj", o.transpose(0, 1).reshape(length, heads * dim))
    z = _norm(y, get[prefix + "post_attention_layernorm.weight"], config.rms_norm_eps)
    y = y + linear("mlp.down_proj", F.silu(linear("mlp.gate_proj", z)) * linear("mlp.up_proj", z))
    logits = _norm(y, get["language_model.norm.weight"], config.rms_norm_eps)[where] @ head.T
    label = logits.argmax(-1, keepdim=True)
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, label[:, 0]), logits, retain_graph=True)
    exact = logits.softmax(-1).scatter(-1, label, 0.0) / len(where)
    exact = exact.scatter(-1, label, -exact.sum(-1, keepdim=True))
    assert torch.allclose(plain, exact, rtol=1e-9, atol=1e-14)  # but for the label's cancellation
    logits.backward(exact.detach())
    assert rows.grad is not None
    return rows.grad.norm(dim=-1).numpy() * visual
