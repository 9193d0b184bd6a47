"""Rank r has some words of the output matrix: prints the largest differences to the whole one in one process.

Run by ``test_words.py`` under torchrun, as one process of several on gloo.
"""

import functools
import json

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from cheaper.config import DistillationConfig
from cheaper.losses import chunked
from cheaper.losses.cross_entropy import linear_cross_entropy
from cheaper.losses.distillation import SparseTeacher, linear_distillation, sparse_distillation

TOKENS, WIDTH, WORDS = 23, 12, 31  # no number of processes divides the words
chunked.CHUNK_BYTES["cpu"] = 5 * WORDS * 4  # a few tokens at a time, the last chunk smaller

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
torch.manual_seed(1)
hidden, weight = torch.randn(TOKENS, WIDTH), torch.randn(WORDS, WIDTH)
labels = torch.randint(WORDS, (TOKENS,)).masked_fill(torch.arange(TOKENS) % 5 == 0, -100)
teacher_hidden, teacher_weight = torch.randn(TOKENS, 8), torch.randn(WORDS + 3, 8)
logits = teacher_hidden @ teacher_weight[:WORDS].T


def online(teacher_weight=teacher_weight, **settings):
    kept = {"teacher_hidden_NE": teacher_hidden, "teacher_weight_VE": teacher_weight}
    return functools.partial(linear_distillation, **kept, settings=DistillationConfig(**settings))


def cached(teacher):
    return functools.partial(sparse_distillation, teacher=teacher, settings=DistillationConfig(kd_alpha=0.5))


split_teacher = distribute_tensor(teacher_weight, mesh, [Shard(0)])
losses = {
    "cross-entropy": linear_cross_entropy,
    "forward KL": online(kd_alpha=0.7, temperature=2.0),
    "reverse KL": online(divergence="reverse_kl"),
    "Jensen-Shannon": online(divergence="jensen_shannon", beta=0.3),
    "top 5": online(top_k=5),
    "top 30": online(top_k=30),
    "cached top 5": cached(SparseTeacher.top(logits, 5, 1.0)),
    "sampled": cached(SparseTeacher.sampled(logits, 8, 1.0, torch.Generator().manual_seed(0))),
    "teacher split otherwise": online(split_teacher),
}
differences = {}
for name, loss in losses.items():
    results = []
    for matrix in (weight, distribute_tensor(weight, mesh, [Shard(0)])):
        h, w = hidden.clone().requires_grad_(), matrix.clone().detach().requires_grad_()
        if name == "teacher split otherwise" and matrix is weight:
            loss_sum, sums = online()(h, w, labels)
        else:
            loss_sum, sums = loss(h, w, labels)
        (2 * loss_sum).backward()
        grad = w.grad.full_tensor() if matrix is not weight else w.grad
        results.append([loss_sum.detach(), h.grad, grad, *sums.values()])
    differences[name] = max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))
if dist.get_rank() == 0:
    print(json.dumps(differences))
dist.destroy_process_group()
