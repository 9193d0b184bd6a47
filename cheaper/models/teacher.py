"""Teachers: our own decoder where it can compute the model, else the model as ``transformers`` runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import register_fsdp_forward_method

from cheaper.checkpoints import find_model, is_checkpoint, load_decoder, model_record, model_shape
from cheaper.data.tokenize import Tokenizer, load_tokenizer
from cheaper.distributed.shard_files import fill_from_shards, is_shards
from cheaper.distributed.sharding import divide, set_weights, shard
from cheaper.errors import UserError
from cheaper.models import hf
from cheaper.models.decoder import Decoder, row_positions


class Teacher(Protocol):
    """What distillation asks of a model."""

    output_weight: torch.Tensor  # [V, E]

    def hidden(self, input_ids_BT: torch.Tensor, document_lengths_BN: torch.Tensor | None) -> torch.Tensor:
        """Hidden states [B, T, E], whose products with the output matrix are the logits."""
        ...


def check_teacher(source: str, tokenizer: Tokenizer) -> Path:
    """Finds a teacher and proves, without loading it, that its words are those of ``tokenizer``.

    Args:
        source: A run folder or checkpoint of ours, a ``transformers`` folder or a hub id.
        tokenizer: The student's.

    Raises:
        UserError: It is missing, has another tokenizer or fewer words.
    """
    path = find_model(source, "training.teacher_model")
    if is_checkpoint(path):
        record = model_record(path)
        vocabulary, words = record["vocabulary"], record["model"]["vocab_size"]
    else:
        vocabulary, words = load_tokenizer(str(path)).vocabulary, _config(path).get("vocab_size", 0)
    if vocabulary != tokenizer.vocabulary:
        raise UserError(
            f"training.teacher_model {source}: its tokenizer has fingerprint {vocabulary[:12]}, the run's "
            f"({tokenizer.name}) {tokenizer.vocabulary[:12]}; a teacher must have the student's words"
        )
    if words < tokenizer.vocab_size:
        raise UserError(
            f"training.teacher_model {source}: has {words} words, expected at least the tokenizer's "
            f"{tokenizer.vocab_size}"
        )
    return path


def load_teacher(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    mesh: DeviceMesh | None = None,
) -> Teacher:
    """Loads a frozen model.

    Args:
        path: What ``check_teacher`` found.
        device: Where it computes.
        dtype: Of its weights.
        trust_remote_code: Let a repository run its own code.
        mesh: Over which it is divided as the student is; every process has a whole one without.

    Raises:
        UserError: It cannot be read, or its logits are not hidden states times a matrix.
    """
    if is_checkpoint(path) or _config(path).get("model_type") in ("llama", "llama4_text"):
        teacher = _divided(path, mesh, dtype) if mesh else load_decoder(path)
    else:
        teacher = TransformersModel.load(path, dtype, trust_remote_code)
        if mesh:
            teacher.requires_grad_(False)
            shard(teacher, teacher.layers, mesh, dtype, cpu_offload=False)
            register_fsdp_forward_method(teacher, "hidden")
    return teacher.to(device, dtype).requires_grad_(False).eval()


def _divided(path: Path, mesh: DeviceMesh, dtype: torch.dtype) -> Decoder:
    """This process's share of a decoder, whose tensors are read from their files no further than they are needed."""
    with torch.device("meta"):
        share = Decoder(model_shape(path) if is_checkpoint(path) else hf.load_config(path))
        share = share.to(dtype).requires_grad_(False)
    divide(share, mesh, dtype, cpu_offload=False)
    if is_shards(path):
        fill_from_shards(share.state_dict(), path)
    else:
        set_weights(share, load_decoder(path).state_dict())
    return share


def _config(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


class TransformersModel(nn.Module):
    """A causal language model of ``transformers`` as a ``Teacher``."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @classmethod
    def load(cls, source: Path, dtype: torch.dtype, trust_remote_code: bool) -> TransformersModel:
        """Loads ``source`` and proves that its logits are hidden states times its output matrix.

        Raises:
            UserError: It is no causal language model, or its logits are made otherwise.
        """
        from transformers import AutoModelForCausalLM  # slow to import, and only needed here

        try:
            model = AutoModelForCausalLM.from_pretrained(
                source, torch_dtype=dtype, trust_remote_code=trust_remote_code, attn_implementation="sdpa"
            )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"training.teacher_model {source}: cannot be loaded ({reason})") from None
        teacher = cls(model.eval())
        with torch.no_grad():
            ids = torch.arange(8)[None]
            ours, logits = F.linear(teacher.hidden(ids), teacher.output_weight), model(ids, use_cache=False).logits
        if not torch.allclose(ours.float(), logits.float(), atol=1e-2, rtol=1e-2):
            raise UserError(f"training.teacher_model {source}: its logits are not hidden states times a matrix")
        return teacher

    @property
    def layers(self) -> nn.ModuleList:
        """The model's blocks: its longest list of modules."""
        return max((module for module in self.modules() if isinstance(module, nn.ModuleList)), key=len)

    @property
    def output_weight(self) -> torch.Tensor:
        return self.model.get_output_embeddings().weight

    def hidden(self, input_ids_BT: torch.Tensor, document_lengths_BN: torch.Tensor | None = None) -> torch.Tensor:
        documents = {}
        if document_lengths_BN is not None:
            positions_BT = row_positions(input_ids_BT, document_lengths_BN)
            document_BT = (positions_BT == 0).cumsum(-1)
            same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
            documents = {"position_ids": positions_BT, "attention_mask": same_BTT.tril()[:, None]}
        return self.model.base_model(input_ids=input_ids_BT, use_cache=False, **documents).last_hidden_state
