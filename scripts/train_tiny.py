"""Train the tiny VLM that ships in trio_deploy/data/tiny, on a CPU, from nothing.

    python scripts/train_tiny.py --work out/tiny --out trio_deploy/data/tiny

Three stages, each resumable (run the same command again) and each with fixed seeds and step counts:

data    scenes, dense patch labels and questions into uint8 arrays under --work
tower   the vision tower alone classifies every patch (a stand-in for CLIP's pre-training); its
        features are then cached
lm      projector and language model on questions, first with half of the layers; the other half is
        then inserted in between as identities, which leaves the function unchanged, and trained

All questions about a picture share one sequence: each attends to the picture and itself, and its
positions continue right after the picture, so inputs are those of `generate`. At the end held-out
scenes are answered through the saved folder, with transformers' own processor and `generate`, and
the model card is written from the measurements.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as RawTokenizer
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers import LlavaForConditionalGeneration as Llava

from trio_deploy.evaluation import scenes
from trio_deploy.runtimes.machine import usable_cores

SCENES, SMOOTH_EVERY, SETS, ASKED = 24_000, 8, 4, 16
TOWER_STEPS, TOWER_BATCH = 1600, 32
HALF_STEPS, FULL_STEPS, LM_BATCH = 2000, 2400, 8
ALIGN_STEPS, CUE_FROM = 600, 1200
HIDDEN, LAYERS, TOWER_LAYERS, PATCHES = 128, 16, 5, 256
WIDTH = 12  # longest question with its answer, in input tokens
TEMPLATE = "USER: <image>\n{question} ASSISTANT:"

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
WORDS = [
    *"0123456789",
    *"? yes no user: assistant: top bottom left right".split(),
    *"what color is the shape there a an how many are digit on plate where of above".split(),
    *(*scenes.COLOURS, *scenes.SHAPES, *scenes.PLURALS.values()),
]
VOCAB = {w: i for i, w in enumerate(dict.fromkeys(SPECIAL + WORDS))}
PAD, BOS, EOS, IMAGE = (VOCAB[w] for w in ("<pad>", "<s>", "</s>", "<image>"))


def words(text: str) -> list[int]:
    return [VOCAB[w] for w in text.lower().replace("?", " ?").split()]


# --- data -------------------------------------------------------------------------------------

HEADS = {
    "kind": len(scenes.TEXTURES) + len(scenes.SHAPES) + len(scenes.DISTRACTORS) + 1,
    "colour": 1 + len(scenes.COLOURS) + len(scenes.DISTRACTOR_COLOURS),
    "digit": 11,
    "part": 1 + 9 + 4,  # place among a shape's 3 x 3 patches, or on the plate
    "row": 16,
    "column": 16,
}
_COLOURS = ["", *scenes.COLOURS, *scenes.DISTRACTOR_COLOURS]


def patch_labels(scene: scenes.Scene) -> np.ndarray:
    """Class of each patch per head of HEADS, [16,16,6]."""
    out = np.zeros((16, 16, 6), np.uint8)
    out[..., 0] = scene.textures.repeat(4, 0).repeat(4, 1)
    out[..., 4], out[..., 5] = np.mgrid[0:16, 0:16]
    first = len(scenes.TEXTURES)
    for d in scene.distractors:
        r, c = round(d.y / 12) - 1, round(d.x / 12) - 1
        kind = first + len(scenes.SHAPES) + scenes.DISTRACTORS.index(d.name)
        out[r : r + 2, c : c + 2, :2] = kind, _COLOURS.index(d.colour)
    for s in scene.shapes:
        r, c = s.y // 12 - 1, s.x // 12 - 1
        block = out[r : r + 3, c : c + 3]
        block[..., 0] = first + scenes.SHAPES.index(s.name)
        block[..., 1] = _COLOURS.index(s.colour)
        block[..., 2] = 1 + int(s.digits) if s.digits else 0
        block[..., 3] = 1 + np.arange(9).reshape(3, 3)
    r, c = scene.plate.y // 12, scene.plate.x // 12
    for i, digit in enumerate(scene.plate.digits):
        out[r, c + i, :4] = HEADS["kind"] - 1, 0, 1 + int(digit), 10 + i
    return out


def pairs_present(scene: scenes.Scene) -> np.ndarray:
    """Whether each pair of colour and shape is in the picture, [48]: the target of CLS."""
    out = np.zeros((len(scenes.COLOURS), len(scenes.SHAPES)), np.uint8)
    for s in scene.shapes:
        out[list(scenes.COLOURS).index(s.colour), scenes.SHAPES.index(s.name)] = 1
    return out.reshape(-1)


def encode(question: scenes.Question) -> tuple[np.ndarray, np.ndarray]:
    """Input tokens and targets [WIDTH]; a target of PAD is not trained on."""
    asked = words(question.text + " ASSISTANT:")
    said = words(question.answer)
    ids, target = np.full(WIDTH, PAD, np.uint8), np.full(WIDTH, PAD, np.uint8)
    ids[: len(asked) + len(said)] = asked + said
    target[len(asked) - 1 : len(asked) + len(said)] = [*said, EOS]
    return ids, target


def _family(seed: int) -> str:
    return "smooth" if seed % SMOOTH_EVERY == 0 else "busy"


def _make(seed: int) -> tuple[np.ndarray, ...]:
    scene = scenes.generate(seed, _family(seed), ASKED)
    rng = np.random.default_rng([seed, 77])
    asked = [encode(q) for _ in range(SETS) for q in scenes.ask(scene, rng, ASKED)]
    questions = np.array(asked).reshape(SETS, ASKED, 2, WIDTH)
    return np.asarray(scene.image), patch_labels(scene), pairs_present(scene), questions


def make_data(work: Path, count: int) -> dict[str, np.ndarray]:
    """Training scenes as arrays: images, labels, pairs, questions [scenes,SETS,ASKED,2,WIDTH]."""
    shapes = {
        "images": (count, 192, 192, 3),
        "labels": (count, 16, 16, 6),
        "pairs": (count, 48),
        "questions": (count, SETS, ASKED, 2, WIDTH),
    }
    if not (work / "data.done").exists():
        began = time.time()
        arrays = [
            np.lib.format.open_memmap(work / f"{k}.npy", "w+", np.uint8, s)
            for k, s in shapes.items()
        ]
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            for i, made in enumerate(pool.imap(_make, scenes.TRAIN_SEEDS[:count], 64)):
                for array, value in zip(arrays, made, strict=True):
                    array[i] = value
        (work / "data.done").write_text(f"{time.time() - began:.0f}")
    return {k: np.load(work / f"{k}.npy", mmap_mode="r") for k in shapes}


# --- model ------------------------------------------------------------------------------------


def build_model(layers: int = LAYERS) -> Llava:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=HIDDEN,
            intermediate_size=384,
            num_hidden_layers=TOWER_LAYERS,
            num_attention_heads=4,
            image_size=192,
            patch_size=12,
            projection_dim=HIDDEN,
        ),
        text_config=LlamaConfig(
            vocab_size=len(VOCAB),
            hidden_size=HIDDEN,
            intermediate_size=384,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=1024,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
            tie_word_embeddings=False,
        ),
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return Llava(config)


def tower_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """One CLIP layer, [B,S,d]; plain attention, since SDPA's backward is slow on a CPU."""
    b, s, d = x.shape
    att, h = layer.self_attn, layer.layer_norm1(x)
    q, k, v = (
        p(h).view(b, s, att.num_heads, -1).transpose(1, 2)
        for p in (att.q_proj, att.k_proj, att.v_proj)
    )
    a = torch.softmax(q @ k.transpose(2, 3) * att.scale, -1).to(v.dtype)
    x = x + att.out_proj((a @ v).transpose(1, 2).reshape(b, s, d))
    h = layer.mlp.fc1(layer.layer_norm2(x))
    return x + layer.mlp.fc2(h * torch.sigmoid(1.702 * h))


def tower_features(tower: nn.Module, images: Tensor, step=tower_layer) -> Tensor:
    """uint8 [B,192,192,3] -> CLS and patches [B,257,d] as `vision_feature_layer=-2` takes them."""
    b = len(images)
    x = images.float().div(127.5).sub(1).view(b, 16, 12, 16, 12, 3)
    x = x.permute(0, 1, 3, 5, 2, 4).reshape(b, PATCHES, -1)
    emb = tower.embeddings
    x = F.linear(x, emb.patch_embedding.weight.flatten(1)).float()
    x = torch.cat([emb.class_embedding.expand(b, 1, -1), x], 1) + emb.position_embedding.weight
    x = tower.pre_layrnorm(x)
    for layer in tower.encoder.layers[:-1]:
        x = step(layer, x)
    return x


class Optimizer:
    """Muon on the matrices, AdamW on the rest; warm-up and cosine over the stage."""

    def __init__(self, matrices: list, rest: list, steps: int, decay: bool = True):
        lr, adam = 0.01, 2e-3
        self.muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, momentum=0.95)
        self.adam = torch.optim.AdamW(rest, lr=adam, betas=(0.9, 0.98), weight_decay=0.0)
        self.base, self.steps, self.decay = (lr, adam), steps, decay
        self.params = matrices + rest

    def step(self, i: int, warm: int = 50) -> None:
        scale = min(1.0, (i + 1) / warm)
        if self.decay:
            scale *= 0.02 + 0.49 * (1 + math.cos(math.pi * i / self.steps))
        nn.utils.clip_grad_norm_(self.params, 1.0)
        for opt, base in zip((self.muon, self.adam), self.base, strict=True):
            opt.param_groups[0]["lr"] = base * scale
            opt.step()
            opt.zero_grad(set_to_none=True)

    def state(self) -> list:
        return [self.muon.state_dict(), self.adam.state_dict()]

    def load(self, state: list) -> None:
        self.muon.load_state_dict(state[0])
        self.adam.load_state_dict(state[1])


def save_state(path: Path, **state) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def log(**values) -> None:
    line = " ".join(
        f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()
    )
    print(time.strftime("%H:%M:%S"), line, flush=True)


# --- the tower --------------------------------------------------------------------------------


def dense_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Mean cross-entropy over heads, with weight 0.2 for ground; and accuracies on things."""
    thing = (labels[..., 0] >= len(scenes.TEXTURES)).float().flatten()
    weight = thing + 0.2 * (1 - thing)
    loss, right = 0.0, {}
    for i, (name, part) in enumerate(
        zip(HEADS, logits.split(list(HEADS.values()), -1), strict=True)
    ):
        target = labels[..., i].flatten().long()
        part = part.flatten(0, 1).float()
        scale = 0.2 if name in ("row", "column") else 1.0
        loss = (
            loss
            + scale
            * (F.cross_entropy(part, target, reduction="none") * weight).sum()
            / weight.sum()
        )
        asked = thing.bool() & (target > 0 if name in ("digit", "part", "colour") else target >= 0)
        right[name] = (part.argmax(-1) == target)[asked].float().mean().item()
    return loss, right


def train_tower(work: Path, data: dict, model: Llava, steps: int) -> nn.ModuleList:
    """Train the tower on patch labels; return it with its heads, which only measuring uses."""
    tower = model.model.vision_tower
    heads = nn.Linear(HIDDEN, sum(HEADS.values()))
    cls_head = nn.Linear(HIDDEN, 48)
    layers = tower.encoder.layers[:-1]
    matrices = [p for p in layers.parameters() if p.ndim == 2]
    rest = [p for p in layers.parameters() if p.ndim == 1]
    rest += [*tower.embeddings.parameters(), *tower.pre_layrnorm.parameters()]
    rest += [*heads.parameters(), *cls_head.parameters()]
    opt = Optimizer(matrices, rest, steps)
    parts = nn.ModuleList([tower, heads, cls_head])
    path, start, spent = work / "tower.pt", 0, 0.0
    if path.exists():
        state = torch.load(path)
        parts.load_state_dict(state["model"])
        opt.load(state["opt"])
        start, spent = state["step"], state["spent"]
    step = torch.compile(tower_layer)
    began = time.time() - spent
    for i in range(start, steps):
        rng = np.random.default_rng([1, i])
        rows = np.sort(rng.choice(len(data["images"]), TOWER_BATCH, replace=False))
        labels = torch.from_numpy(data["labels"][rows]).flatten(1, 2)
        with torch.autocast("cpu", torch.bfloat16):
            x = tower_features(tower, torch.from_numpy(data["images"][rows]), step)
            loss, right = dense_loss(heads(x[:, 1:]), labels)
            pairs = torch.from_numpy(data["pairs"][rows]).float()
            loss = loss + F.binary_cross_entropy_with_logits(cls_head(x[:, 0]).float(), pairs)
        loss.backward()
        opt.step(i)
        if i % 50 == 0:
            log(tower=i, s=time.time() - began, loss=loss.item(), **right)
        if (i + 1) % 300 == 0 or i + 1 == steps:
            spent = time.time() - began
            save_state(path, model=parts.state_dict(), opt=opt.state(), step=i + 1, spent=spent)
    return parts


@torch.no_grad()
def cache_features(work: Path, data: dict, tower: nn.Module) -> np.ndarray:
    """The frozen tower's patches of all training scenes, [scenes,256,d] fp16."""
    path, count = work / "features.npy", len(data["images"])
    if not (work / "features.done").exists():
        began = time.time()
        out = np.lib.format.open_memmap(path, "w+", np.float16, (count, PATCHES, HIDDEN))
        for i in range(0, count, 64):
            with torch.autocast("cpu", torch.bfloat16):
                x = tower_features(tower, torch.from_numpy(data["images"][i : i + 64].copy()))
            out[i : i + 64] = x[:, 1:].half().numpy()
        (work / "features.done").write_text(f"{time.time() - began:.0f}")
    return np.load(path, mmap_mode="r")


# --- the language model -----------------------------------------------------------------------

PREFIX = 2 + PATCHES  # <s>, "USER:" and the picture


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat([-two, one], -1) * sin


def block_layer(layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One Llama layer over a picture and its questions, [B, PREFIX + questions * WIDTH, d].

    Attention is causal, and no question attends to another one.
    """
    b, s, _ = x.shape
    n = (s - PREFIX) // WIDTH
    att, h = layer.self_attn, layer.input_layernorm(x)
    q, k, v = (
        p(h).view(b, s, -1, att.head_dim).transpose(1, 2)
        for p in (att.q_proj, att.k_proj, att.v_proj)
    )
    q, k = _rotate(q, cos, sin).to(v.dtype) * att.scaling, _rotate(k, cos, sin).to(v.dtype)
    heads = q.shape[1]
    later = torch.ones(PREFIX, PREFIX, dtype=torch.bool).triu(1)
    kp, vp = k[:, :, :PREFIX], v[:, :, :PREFIX]
    a = (q[:, :, :PREFIX] @ kp.transpose(2, 3)).float().masked_fill(later, -1e9)
    picture = torch.softmax(a, -1).to(v.dtype) @ vp

    qq, kq, vq = (t[:, :, PREFIX:] for t in (q, k, v))
    own = qq.reshape(b, heads, n, WIDTH, -1) @ kq.reshape(b, heads, n, WIDTH, -1).transpose(3, 4)
    own = own.float().masked_fill(later[:WIDTH, :WIDTH], -1e9).view(b, heads, n * WIDTH, WIDTH)
    a = torch.softmax(torch.cat([(qq @ kp.transpose(2, 3)).float(), own], -1), -1).to(v.dtype)
    prefix, own = a.split([PREFIX, WIDTH], -1)
    own = own.reshape(b, heads, n, WIDTH, WIDTH) @ vq.reshape(b, heads, n, WIDTH, -1)
    asked = prefix @ vp + own.view(b, heads, n * WIDTH, -1)

    x = x + att.o_proj(torch.cat([picture, asked], 2).transpose(1, 2).reshape(b, s, -1))
    mlp, h = layer.mlp, layer.post_attention_layernorm(x)
    return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))


def block_forward(
    model: Llava, features: Tensor, ids: Tensor, step=block_layer
) -> tuple[Tensor, Tensor]:
    """Logits [B,questions,WIDTH,V] and projected features, from features [B,256,d] and ids."""
    b, n = ids.shape[:2]
    text = model.model.language_model
    projected = model.model.multi_modal_projector(features)
    head = text.embed_tokens(torch.tensor([BOS, VOCAB["user:"]])).expand(b, -1, -1)
    x = torch.cat([head, projected.float(), text.embed_tokens(ids.flatten(1))], 1)
    places = torch.cat([torch.arange(PREFIX), (PREFIX + torch.arange(WIDTH)).repeat(n)])
    cos, sin = text.rotary_emb(x, places[None])
    cos, sin = cos[:, None], sin[:, None]
    for layer in text.layers:
        x = step(layer, x, cos, sin)
    logits = model.lm_head(text.norm(x[:, PREFIX:])).float()
    return logits.view(b, n, WIDTH, -1), projected


def word_targets(labels: np.ndarray) -> Tensor:
    """Words that name the thing at each patch, [B,256,V], from patch labels [B,16,16,6]."""
    flat = torch.from_numpy(labels).flatten(1, 2).long()
    out = torch.zeros(*flat.shape[:2], len(VOCAB))
    kind = flat[..., 0] - len(scenes.TEXTURES)
    shape = (kind >= 0) & (kind < len(scenes.SHAPES))
    word = {name: torch.tensor([VOCAB[w] for w in group]) for name, group in _GROUPS.items()}
    for mask, index in (
        (shape, word["shape"][kind.clamp(0, len(scenes.SHAPES) - 1)]),
        (shape, word["colour"][(flat[..., 1] - 1).clamp(0, len(scenes.COLOURS) - 1)]),
        (flat[..., 2] > 0, word["digit"][(flat[..., 2] - 1).clamp(0)]),
    ):
        out.scatter_add_(2, index[..., None], mask[..., None].float())
    return out


_GROUPS = {"shape": scenes.SHAPES, "colour": list(scenes.COLOURS), "digit": list("0123456789")}


def cue_loss(
    logits: Tensor, ids: Tensor, targets: Tensor, named: Tensor, labels: Tensor, pairs: bool
) -> Tensor:
    """Loss of predicting, at a colour or shape word of a question, attributes of matching things.

    At "star" the targets are the colours and digits of the stars: the model looks a word up in the
    picture, without the second step of passing the result on to the answer. Without this loss that
    takes far longer to emerge. With `pairs`, the targets at "star" after "red" are the red star's
    attributes, its place, and yes, or no if there is none; and at "stars" their number.

    Args:
        named: [B,256,V] as from `word_targets`.
        labels: [B,256,6], labels of the patches.
    """
    b, n, w = ids.shape
    named = named * (labels[..., 3] == 5)[..., None]  # each shape counts once
    word = _SINGULAR[ids].view(b, 1, n * w).expand(b, PATCHES, -1)
    fits = named.gather(2, word)  # [B,256,n*w]: the things this word fits
    several = torch.zeros(b, n * w, dtype=torch.bool)
    if pairs:
        before = torch.cat([torch.full((b, n, 1), PAD), ids[:, :, :-1]], 2).view(b, -1)
        both = _IS["colour"][before] & _IS["shape"][ids.view(b, -1)]
        other = named.gather(2, before.view(b, 1, -1).expand_as(word))
        fits = torch.where(both[:, None], fits * other, fits)
        several = _IS["plural"][ids.view(b, -1)]
        low, right = (labels[..., 4] > 7).long(), (labels[..., 5] > 7).long()
        for choice, index in ((("top", "bottom"), low), (("left", "right"), right)):
            place = torch.tensor([VOCAB[c] for c in choice])[index]
            named = named + F.one_hot(place, len(VOCAB))
    number = fits.sum(1).long()  # [B,n*w]
    wanted = fits.transpose(1, 2) @ named  # [B,n*w,V]
    wanted.scatter_(2, word[:, :1].transpose(1, 2), 0.0)
    if pairs:
        wanted.scatter_(
            2, before[..., None], wanted.gather(2, before[..., None]) * ~both[..., None]
        )
        answer = torch.where(number > 0, VOCAB["yes"], VOCAB["no"])
        wanted = wanted + F.one_hot(answer, len(VOCAB)) * both[..., None]
        wanted = torch.where(
            several[..., None], F.one_hot(VOCAB["0"] + number.clamp(max=9), len(VOCAB)), wanted
        )
    wanted = (wanted / wanted.sum(-1, keepdim=True).clamp(1e-6)).view(b, n, w, -1)
    asked = _IS["colour"] | _IS["shape"] | _IS["plural"]
    cue = (targets == PAD) & (wanted.sum(-1) > 0) & asked[ids]
    return -(wanted * F.log_softmax(logits, -1)).sum(-1)[cue].mean()


_SINGULAR = torch.arange(len(VOCAB))
for _one, _many in scenes.PLURALS.items():
    _SINGULAR[VOCAB[_many]] = VOCAB[_one]
_IS = {}
for _name, _group in (
    ("colour", scenes.COLOURS),
    ("shape", scenes.SHAPES),
    ("plural", scenes.PLURALS.values()),
):
    _IS[_name] = torch.zeros(len(VOCAB), dtype=torch.bool)
    _IS[_name][[VOCAB[w] for w in _group]] = True


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 2), targets.flatten().long(), ignore_index=PAD)


def correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether greedy decoding gives every token of the answer and its end, bool [B,questions]."""
    return ((logits.argmax(-1) == targets) | (targets == PAD)).all(-1)


class HeldOut:
    """Scenes, questions and cached features of a seed range, answered under the block mask."""

    def __init__(self, seeds: range, family: str, tower: nn.Module):
        made = [scenes.generate(s, family) for s in seeds]
        self.kinds = np.array([[q.kind for q in s.questions] for s in made])
        asked = np.array([[encode(q) for q in s.questions] for s in made])
        self.ids, self.targets = torch.from_numpy(asked[:, :, 0]), torch.from_numpy(asked[:, :, 1])
        images = torch.from_numpy(np.stack([np.asarray(s.image) for s in made]))
        with torch.no_grad():
            self.features = torch.cat([tower_features(tower, x)[:, 1:] for x in images.split(32)])

    @torch.no_grad()
    def measure(self, model: Llava, fast: bool = False) -> tuple[dict[str, float], np.ndarray]:
        """Accuracy per kind of question, and whether each answer is right [scenes,questions]."""
        right = []
        for f, ids, targets in zip(
            self.features.split(16), self.ids.split(16), self.targets.split(16), strict=True
        ):
            with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                right.append(correct(block_forward(model, f, ids.long())[0], targets))
        right = torch.cat(right).numpy()
        return {k: float(right[self.kinds == k].mean()) for k in scenes.KINDS}, right


def grow(half: Llava) -> Llava:
    """Double the layers: each is followed by a copy with zero output matrices, an identity."""
    full = build_model(LAYERS)
    rest = {k: v for k, v in half.state_dict().items() if ".layers." not in k or "vision" in k}
    full.load_state_dict(rest, strict=False)
    new = full.model.language_model.layers
    for i, layer in enumerate(half.model.language_model.layers):
        new[2 * i].load_state_dict(layer.state_dict())
        new[2 * i + 1].load_state_dict(layer.state_dict())
        nn.init.zeros_(new[2 * i + 1].self_attn.o_proj.weight)
        nn.init.zeros_(new[2 * i + 1].mlp.down_proj.weight)
    return full


def train_lm(
    work: Path, data: dict, features: np.ndarray, model: Llava, name: str, steps: int, decay: bool
) -> Llava:
    """Train projector and language model on the cached features of the frozen tower."""
    text, projector = model.model.language_model, model.model.multi_modal_projector
    trained = [*text.layers.parameters(), *projector.parameters()]
    matrices = [p for p in trained if p.ndim == 2]
    rest = [p for p in trained if p.ndim == 1]
    rest += [*text.embed_tokens.parameters(), *text.norm.parameters(), *model.lm_head.parameters()]
    opt = Optimizer(matrices, rest, steps, decay=decay)
    held_out = HeldOut(scenes.TUNING_SEEDS[:64], "busy", model.model.vision_tower)
    path, start, spent = work / f"{name}.pt", 0, 0.0
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        opt.load(state["opt"])
        start, spent = state["step"], state["spent"]
    step = torch.compile(block_layer)
    began = time.time() - spent
    for i in range(start, steps):
        rng = np.random.default_rng([2, LAYERS if decay else LAYERS // 2, i])
        align = 0.0 if decay else max(0.0, 1 - i / ALIGN_STEPS)
        batch = LM_BATCH * 2 if align else LM_BATCH
        rows = np.sort(rng.choice(len(data["images"]), batch, replace=False))
        asked = torch.from_numpy(data["questions"][rows, rng.integers(SETS, size=batch)])
        ids, targets = asked[:, :, 0].long(), asked[:, :, 1]
        with torch.autocast("cpu", torch.bfloat16):
            cached = torch.from_numpy(features[rows]).float()
            logits, projected = block_forward(model, cached, ids, step)
            loss = total = answer_loss(logits, targets)
            named = word_targets(data["labels"][rows])
            if align:
                said = F.log_softmax((projected @ text.embed_tokens.weight.T).float(), -1)
                total = loss - align * (named * said).sum() / named.sum()
            elif decay or i >= CUE_FROM:
                labels = torch.from_numpy(data["labels"][rows]).flatten(1, 2)
                weight = 0.5 * (1 - i / steps) if decay else 0.5
                total = loss + weight * cue_loss(logits, ids, targets, named, labels, decay)
        total.backward()
        opt.step(i)
        if i % 50 == 0:
            log(**{name: i}, s=time.time() - began, loss=loss.item(), total=total.item())
        if (i + 1) % 200 == 0 or i + 1 == steps:
            log(**{name: i + 1}, **held_out.measure(model, True)[0])
            spent = time.time() - began
            save_state(path, model=model.state_dict(), opt=opt.state(), step=i + 1, spent=spent)
    return model


# --- the folder that ships --------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %} ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def build_processor() -> LlavaProcessor:
    raw = RawTokenizer(tokenizers.models.WordLevel(VOCAB, unk_token="<unk>"))
    raw.normalizer = tokenizers.normalizers.Lowercase()
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.WhitespaceSplit(),
            tokenizers.pre_tokenizers.Split("?", "isolated"),
        ]
    )
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": 192},
        crop_size={"height": 192, "width": 192},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=12,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS, which "default" drops again
        chat_template=CHAT_TEMPLATE,
    )


def save_folder(model: Llava, out: Path) -> None:
    """Save the folder that transformers reads: weights in fp16, processor, tokenizer, template."""
    out.mkdir(parents=True, exist_ok=True)
    shipped = build_model(LAYERS)
    shipped.load_state_dict(model.state_dict())
    shipped.generation_config.max_new_tokens = 8
    shipped.half().save_pretrained(out)
    processor = build_processor()
    processor.save_pretrained(out)
    # What transformers 4 looks for; 5 reads processor_config.json and takes either class name.
    processor.image_processor.save_pretrained(out)
    own = json.loads((out / "tokenizer_config.json").read_text())
    own |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    own["extra_special_tokens"] = {"image_token": "<image>"}
    (out / "tokenizer_config.json").write_text(json.dumps(own, indent=2) + "\n")
    for file in out.iterdir():
        file.chmod(0o644)


def through_transformers(
    out: Path, seeds: range, family: str, blind: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Answer each scene's questions with the saved folder's processor and `generate`.

    Returns kinds and whether answers are right, both [scenes,questions]. `blind` leaves the picture
    out, for the accuracy of guessing from the text.
    """
    model = Llava.from_pretrained(out, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(out, backend="pil")
    kinds, right = [], []
    for seed in seeds:
        scene = scenes.generate(seed, family)
        prompts = [
            processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [{"type": "image"}] * (not blind)
                        + [{"type": "text", "text": q.text}],
                    }
                ],
                add_generation_prompt=True,
            )
            for q in scene.questions
        ]
        images = None if blind else [scene.image] * len(prompts)
        feeds = processor(images=images, text=prompts, padding=True, return_tensors="pt")
        with torch.no_grad():
            said = model.generate(**feeds, max_new_tokens=8, do_sample=False)
        said = processor.batch_decode(
            said[:, feeds["input_ids"].shape[1] :], skip_special_tokens=True
        )
        kinds.append([q.kind for q in scene.questions])
        right.append([a.strip() == q.answer for a, q in zip(said, scene.questions, strict=True)])
    return np.array(kinds), np.array(right)


# --- measuring --------------------------------------------------------------------------------


def interval(right: np.ndarray) -> dict[str, float | int]:
    """Accuracy with its 95 % Wilson interval."""
    n, p, z = len(right), float(right.mean()), 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + s * half) / (1 + z * z / n) for s in (-1, 1))
    return {"n": n, "accuracy": round(p, 4), "low": round(low, 4), "high": round(high, 4)}


def by_kind(kinds: np.ndarray, right: np.ndarray) -> dict[str, dict]:
    out = {k: interval(right[kinds == k]) for k in scenes.KINDS if (kinds == k).any()}
    return out | {"all": interval(right.flatten())}


@torch.no_grad()
def tower_accuracy(parts: nn.ModuleList, seeds: range) -> dict[str, float]:
    """Accuracy of the tower's heads on patches with things in unseen busy scenes."""
    tower, heads, _ = parts
    made = [scenes.generate(s) for s in seeds]
    images = torch.from_numpy(np.stack([np.asarray(s.image) for s in made]))
    labels = torch.from_numpy(np.stack([patch_labels(s) for s in made])).flatten(1, 2)
    return dense_loss(heads(tower_features(tower, images)[:, 1:]), labels)[1]


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "CPU")
    threads = torch.get_num_threads()
    return f"{cpu}, {usable_cores()} cores, torch {torch.__version__} with {threads} threads"


def measure(work: Path, out: Path, parts: nn.ModuleList, model: Llava, count: int) -> dict:
    """Figures of the model card."""
    kinds, right = through_transformers(out, scenes.TEST_SEEDS[:count], "busy")
    block = HeldOut(scenes.TEST_SEEDS[:count], "busy", model.model.vision_tower).measure(model)[1]
    smooth = through_transformers(out, scenes.TEST_SEEDS[: count // 2], "smooth")
    blind = through_transformers(out, scenes.TEST_SEEDS[: count // 2], "busy", blind=True)
    stages = {n: torch.load(work / f"{n}.pt") for n in ("tower", "half", "full")}
    seconds = {n: float((work / f"{n}.done").read_text()) for n in ("data", "features")}
    seconds |= {n: state["spent"] for n, state in stages.items()}
    return {
        "machine": machine(),
        "scenes": len(np.load(work / "pairs.npy", mmap_mode="r")),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": {k: round(v) for k, v in seconds.items()},
        "steps": {n: state["step"] for n, state in stages.items()},
        "tower": {
            k: round(v, 4) for k, v in tower_accuracy(parts, scenes.TUNING_SEEDS[:128]).items()
        },
        "busy": by_kind(kinds, right),
        "smooth": by_kind(*smooth),
        "text_only": by_kind(*blind),
        "agreement_with_block_mask": float((block == right).mean()),
    }


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# tiny: a vision-language model to try token pruning on

A LLaVA of {millions:.2f} M parameters (fp16, {megabytes:.1f} MB) in the format of transformers'
`LlavaForConditionalGeneration`: CLIP tower (192 px, patches of 12 px: 256 visual tokens,
{tower_layers} layers, the last but one is read), two-layer projector, Llama with {layers} layers of
width {hidden} (2 heads of 64). It answers questions about synthetic scenes
(`trio_deploy/evaluation/scenes.py`) and knows {vocab} words; it is of no use for anything else. It
exists so that pruning can be tried, tested and measured end to end in seconds on a CPU.

```python
from transformers import AutoProcessor, LlavaForConditionalGeneration

processor = AutoProcessor.from_pretrained(folder)
model = LlavaForConditionalGeneration.from_pretrained(folder)
content = [{{"type": "image"}}, {{"type": "text", "text": "what color is the star?"}}]
prompt = processor.apply_chat_template(
    [{{"role": "user", "content": content}}], add_generation_prompt=True
)
feeds = processor(images=image, text=prompt, return_tensors="pt").to(model.dtype)
print(processor.decode(model.generate(**feeds)[0], skip_special_tokens=True))
```

The prompt is `USER: <image>\\n{{question}} ASSISTANT:`; tokens are whole words in lower case,
`<s>` goes first, `</s>` ends an answer, plates are read digit by digit (`4 7 1 </s>`).

## How it was trained
`python scripts/train_tiny.py`, from nothing, with fixed seeds and steps, on {machine}.
Other work shared the machine at the time. Only generated scenes with seeds {train} were used, one
in {smooth} of the smooth family.

| stage | steps | minutes on the clock |
|---|---|---|
{stages}

1. *tower*: every patch predicts what is there (texture, shape, distractor; colour; digit; where in
   the thing), and CLS predicts which pairs of colour and shape are in the picture. This replaces
   CLIP's pre-training. On unseen scenes, patches on things: {tower}. Frozen from here on.
2. *half*: projector and 8 language layers on questions, 16 per picture under a block mask.
   At first the projected patches are also drawn to the embeddings of the words that name them;
   later a colour or shape word in a question must also bring up what else is true of the things
   it fits (before that, at step {cue}, looking words up in the picture had not emerged).
3. *full*: 8 more layers, inserted as identities, and all of it trained further. The words now also
   bring up where things are, a colour and a shape together whether there is such a thing, and a
   plural how many there are; this loss fades to nothing.

Muon on matrices, AdamW on the rest, bf16 autocast.
{note}

## How it was measured
Held-out scenes (seeds from {test}), each with 16 questions, through this folder with transformers'
own processor and greedy `generate` in fp32; an answer counts if it is exactly the expected string.
In brackets 95 % Wilson intervals (questions about one picture are not independent; the intervals
treat them as if they were). Text only: the same questions without the picture.

| kind | busy scenes | questions | smooth scenes | text only |
|---|---|---|---|---|
{table}

The evaluation used in training (all questions of a picture in one sequence) agrees with `generate`
on {agreement:.2%} of these answers.

## Limits
Synthetic pictures only, one phrasing per kind, no words beyond the {vocab} known ones. `left` and
`above` are yes-or-no questions: guessing gets about half of them. `exists` likewise.
Weights under the project's licence; trained on nothing but generated pictures.
"""


def card(metrics: dict, out: Path, note: str) -> str:
    def cell(x: dict | None) -> str:
        if not x:
            return "not asked"
        return f"{x['accuracy']:.1%} ({x['low']:.1%} to {x['high']:.1%})"

    table = "\n".join(
        f"| {k} | {cell(b)} | {b['n']} | {cell(metrics['smooth'].get(k))} "
        f"| {cell(metrics['text_only'].get(k))} |"
        for k, b in metrics["busy"].items()
    )
    stages = "\n".join(
        f"| {k} | {metrics['steps'].get(k, '')} | {s / 60:.1f} |"
        for k, s in (metrics["seconds"] | {"all": sum(metrics["seconds"].values())}).items()
    )
    return CARD.format(
        millions=metrics["parameters"] / 1e6,
        megabytes=(out / "model.safetensors").stat().st_size / 1e6,
        tower_layers=TOWER_LAYERS,
        layers=LAYERS,
        hidden=HIDDEN,
        vocab=len(VOCAB),
        machine=metrics["machine"],
        train=f"{scenes.TRAIN_SEEDS.start} to {metrics['scenes'] - 1}",
        scenes=metrics["scenes"],
        smooth=SMOOTH_EVERY,
        cue=CUE_FROM,
        note=note,
        stages=stages,
        tower=", ".join(f"{k} {v:.1%}" for k, v in metrics["tower"].items()),
        test=scenes.TEST_SEEDS.start,
        table=table,
        agreement=metrics["agreement_with_block_mask"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny VLM; run again to resume.")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and data, 5 GB")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="fewer scenes and steps, for a rehearsal"
    )
    parser.add_argument("--test-scenes", type=int, default=200)
    parser.add_argument("--note", default="", help="a remark on this run, for the model card")
    parser.add_argument("--stage", choices=("all", "train"), default="all")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    tower_steps, half_steps, full_steps = (
        max(2, round(args.scale * n)) for n in (TOWER_STEPS, HALF_STEPS, FULL_STEPS)
    )
    data = make_data(args.work, max(64, round(args.scale * SCENES)))
    model = build_model(LAYERS // 2)
    parts = train_tower(args.work, data, model, tower_steps)
    features = cache_features(args.work, data, model.model.vision_tower)
    model = train_lm(args.work, data, features, model, "half", half_steps, False)
    model = train_lm(args.work, data, features, grow(model), "full", full_steps, True)
    save_folder(model, args.out)
    if args.stage == "train":
        return
    metrics = measure(args.work, args.out, parts, model, args.test_scenes)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (args.out / "README.md").write_text(card(metrics, args.out, args.note))


if __name__ == "__main__":
    main()
