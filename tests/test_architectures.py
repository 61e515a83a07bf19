"""Targets, blocks and groups of tiny models of many architectures, compared exactly with architectures.json.

After a deliberate change, `python tests/test_architectures.py --update` rewrites the file; read its diff.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers as tf
from torch import nn

from gap_hf.config import GaPConfig
from gap_hf.partition import make_partition
from gap_hf.targets import Targets, find_targets

EXPECTED = Path(__file__).with_name("architectures.json")

# Checks that do not rest on how targets are found: names that these libraries give to what is never pruned by
# default, and to what lies inside a layer or stage.
NEVER = re.compile(r"embed|lm_head|classifier|pooler|\bhead\b|\bfc\b|predict|shared\.|router|conv1d|dwconv")
INSIDE = re.compile(r"(\.|^)((layers?|block|blocks|h|stages|albert_layer_groups)\.\d+|layer\d)\.")

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
LLAMA: dict[str, Any] = SMALL | {
    "num_key_value_heads": 1,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
VISION: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TINY_RESNET: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
DETR: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_queries": 5,
    "num_labels": 3,
}


def _resnet_config() -> tf.ResNetConfig:
    return tf.ResNetConfig(**TINY_RESNET, out_features=["stage2", "stage3", "stage4"])


def _clip_parts() -> dict[str, Any]:
    text = SMALL | {"max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text["sep_token_id"] = 2
    return {"text_config": text, "vision_config": VISION | {"image_size": 16, "patch_size": 8}}


# Name -> (a function that builds the model, number of groups).
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "albert": (
        lambda: tf.AlbertForMaskedLM(tf.AlbertConfig(**SMALL, embedding_size=8, num_hidden_groups=2)),
        2,
    ),
    "bart": (lambda: tf.BartForConditionalGeneration(tf.BartConfig(**SEQ2SEQ)), 3),
    "bert": (lambda: tf.BertForMaskedLM(tf.BertConfig(**SMALL | {"num_hidden_layers": 3})), 2),
    "bert-one-layer": (lambda: tf.BertForSequenceClassification(tf.BertConfig(**SMALL | {"num_hidden_layers": 1})), 1),
    "blip": (
        lambda: tf.BlipForConditionalGeneration(
            tf.BlipConfig(
                **{k: v | {"encoder_hidden_size": 16} if k == "text_config" else v for k, v in _clip_parts().items()},
                projection_dim=16,
            )
        ),
        2,
    ),
    "clip": (lambda: tf.CLIPModel(tf.CLIPConfig(**_clip_parts(), projection_dim=16)), 2),
    "convnext": (
        lambda: tf.ConvNextForImageClassification(
            tf.ConvNextConfig(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 2, 1], num_labels=3)
        ),
        3,
    ),
    "dbrx": (
        lambda: tf.DbrxForCausalLM(
            tf.DbrxConfig(
                d_model=16,
                n_heads=2,
                n_layers=2,
                vocab_size=40,
                attn_config={"kv_n_heads": 1, "clip_qkv": 8, "rope_theta": 1e4},
                ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 3, "hidden_size": 16},
                pad_token_id=0,
            )
        ),
        2,
    ),
    "deberta-v2": (
        lambda: tf.DebertaV2ForMaskedLM(
            tf.DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"], conv_kernel_size=3)
        ),
        2,
    ),
    "deformable-detr": (
        lambda: tf.DeformableDetrForObjectDetection(
            tf.DeformableDetrConfig(
                **DETR | {"d_model": 32},
                backbone_config=_resnet_config(),
                with_box_refine=True,
                two_stage=True,
                two_stage_num_proposals=5,
            )
        ),
        3,
    ),
    "detr": (lambda: tf.DetrForObjectDetection(tf.DetrConfig(**DETR, backbone_config=_resnet_config())), 2),
    "detr-timm": (
        lambda: tf.DetrForObjectDetection(
            tf.DetrConfig(
                **DETR,
                backbone_config=tf.TimmBackboneConfig(backbone="test_resnet", use_pretrained_backbone=False),
            )
        ),
        3,
    ),
    "distilbert": (
        lambda: tf.DistilBertForMaskedLM(
            tf.DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24)
        ),
        2,
    ),
    "electra": (lambda: tf.ElectraForPreTraining(tf.ElectraConfig(**SMALL, embedding_size=8)), 2),
    "gemma3": (lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**LLAMA)), 2),
    "gpt-neox": (lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SMALL, bos_token_id=1, eos_token_id=2)), 2),
    "gpt-oss": (lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**LLAMA, num_local_experts=3)), 2),
    "gpt2": (
        lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, bos_token_id=1, eos_token_id=2)
        ),
        2,
    ),
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)), 2),
    "llama4": (
        lambda: tf.Llama4ForCausalLM(
            tf.Llama4TextConfig(**LLAMA, intermediate_size_mlp=24, num_local_experts=3, interleave_moe_layer_step=1)
        ),
        2,
    ),
    "llava": (
        lambda: tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(
                vision_config=tf.CLIPVisionConfig(**VISION, image_size=16, patch_size=8),
                text_config=tf.LlamaConfig(**LLAMA),
                image_token_index=39,
            )
        ),
        2,
    ),
    "m2m100": (lambda: tf.M2M100ForConditionalGeneration(tf.M2M100Config(**SEQ2SEQ)), 2),
    "mamba": (
        lambda: tf.MambaForCausalLM(
            tf.MambaConfig(
                vocab_size=40,
                hidden_size=16,
                state_size=4,
                num_hidden_layers=2,
                time_step_rank=2,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
        ),
        2,
    ),
    "marian": (lambda: tf.MarianMTModel(tf.MarianConfig(**SEQ2SEQ)), 3),
    "mistral": (lambda: tf.MistralForCausalLM(tf.MistralConfig(**LLAMA)), 2),
    "mixtral": (lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**LLAMA, num_local_experts=3)), 2),
    "modernbert": (
        lambda: tf.ModernBertForMaskedLM(
            tf.ModernBertConfig(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
        ),
        2,
    ),
    "nllb-moe": (
        lambda: tf.NllbMoeForConditionalGeneration(
            tf.NllbMoeConfig(**SEQ2SEQ, num_experts=3, encoder_sparse_step=2, decoder_sparse_step=2)
        ),
        2,
    ),
    "opt": (
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(
                vocab_size=40,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                ffn_dim=24,
                word_embed_proj_dim=8,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        2,
    ),
    "qwen2": (lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**{k: v for k, v in LLAMA.items() if k != "head_dim"})), 2),
    "qwen2-moe": (
        lambda: tf.Qwen2MoeForCausalLM(
            tf.Qwen2MoeConfig(
                **{k: v for k, v in LLAMA.items() if k != "head_dim"},
                num_experts=3,
                num_experts_per_tok=2,
                moe_intermediate_size=12,
                shared_expert_intermediate_size=20,
            )
        ),
        2,
    ),
    "qwen3": (lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**LLAMA, tie_word_embeddings=True)), 2),
    "qwen3-moe": (
        lambda: tf.Qwen3MoeForCausalLM(
            tf.Qwen3MoeConfig(**LLAMA, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12)
        ),
        2,
    ),
    "resnet": (lambda: tf.ResNetForImageClassification(tf.ResNetConfig(**TINY_RESNET, num_labels=3)), 3),
    "roberta": (lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**SMALL)), 2),
    "segformer": (
        lambda: tf.SegformerForSemanticSegmentation(
            tf.SegformerConfig(
                depths=[1, 1, 1, 1],
                hidden_sizes=[4, 8, 12, 16],
                num_attention_heads=[1, 1, 2, 2],
                mlp_ratios=[2] * 4,
                decoder_hidden_size=8,
                num_labels=3,
            )
        ),
        2,
    ),
    "swin": (
        lambda: tf.SwinForImageClassification(
            tf.SwinConfig(
                image_size=32, embed_dim=8, depths=[1, 2, 1], num_heads=[1, 2, 4], window_size=2, num_labels=3
            )
        ),
        3,
    ),
    "switch-transformers": (
        lambda: tf.SwitchTransformersForConditionalGeneration(
            tf.SwitchTransformersConfig(
                vocab_size=40,
                d_model=16,
                d_kv=8,
                d_ff=24,
                num_layers=2,
                num_decoder_layers=2,
                num_heads=2,
                num_experts=3,
                num_sparse_encoder_layers=1,
                num_sparse_decoder_layers=1,
                expert_capacity=4,
            )
        ),
        2,
    ),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=2)
        ),
        3,
    ),
    "timm-resnet18": (
        lambda: timm.create_model("resnet18", pretrained=False, channels=(8, 8, 8, 8), stem_width=8, num_classes=3),
        3,
    ),
    "timm-vit-tiny": (
        lambda: timm.create_model(
            "vit_tiny_patch16_224", pretrained=False, img_size=32, embed_dim=16, depth=2, num_heads=2, num_classes=3
        ),
        2,
    ),
    "torchvision-resnet18": (lambda: torchvision.models.resnet18(num_classes=3), 3),
    "vit": (lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION, image_size=16, patch_size=8, num_labels=3)), 2),
    "wav2vec2": (
        lambda: tf.Wav2Vec2ForCTC(
            tf.Wav2Vec2Config(
                **SMALL,
                conv_dim=[8, 8],
                conv_stride=[5, 2],
                conv_kernel=[10, 3],
                num_feat_extract_layers=2,
                num_conv_pos_embeddings=8,
                num_conv_pos_embedding_groups=2,
            )
        ),
        2,
    ),
    "whisper": (
        lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(
                **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"},
                num_mel_bins=8,
                max_source_positions=16,
                max_target_positions=16,
            )
        ),
        2,
    ),
}


@cache
def _build(name: str) -> tuple[nn.Module, Targets]:
    torch.manual_seed(0)
    model = MODELS[name][0]()
    return model, find_targets(model, _config(name))


def _config(name: str) -> GaPConfig:
    return GaPConfig(sparsity=0.8, num_partitions=MODELS[name][1])


def _describe(name: str) -> dict[str, Any]:
    """What is compared. Blocks in a row whose weights have the same names, shapes and layouts share one entry."""
    model, targets = _build(name)
    weights: list[dict[str, list[str]]] = []
    for block in targets.blocks:
        rows = [
            f"{w.name.removeprefix(block + '.')} {'x'.join(map(str, w.shape))} {w.layout} {w.module_type}"
            for w in targets.weights
            if w.block == block
        ]
        if weights and weights[-1]["weights"] == rows:
            weights[-1]["blocks"].append(block)
        else:
            weights.append({"blocks": [block], "weights": rows})
    return {
        "model": type(model).__name__,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_prunable_tensors": len(targets.weights),
        "num_prunable_weights": sum(w.numel for w in targets.weights),
        "prunable": weights,
        "dense": {skip.name: skip.reason for skip in targets.skipped},
        "groups": [
            {"blocks": list(group.blocks), "num_tensors": len(group.names), "num_weights": group.numel}
            for group in make_partition(targets, _config(name))
        ],
    }


def _expected() -> dict[str, Any]:
    return json.loads(EXPECTED.read_text(encoding="utf-8"))


def test_every_model_is_listed() -> None:
    assert list(_expected()["models"]) == sorted(MODELS) and len(MODELS) >= 24


@pytest.mark.parametrize("name", sorted(MODELS))
def test_as_committed(name: str) -> None:
    expected = _expected()
    found, wanted = _describe(name), expected["models"][name]
    if tf.__version__ != expected["made_with"]["transformers"]:
        # What is dense must be the same; why may differ, since releases tie heads differently (Deformable DETR).
        found["dense"], wanted["dense"] = list(found["dense"]), list(wanted["dense"])
    assert found == wanted, f"the file was made with {expected['made_with']}"


@pytest.mark.parametrize("name", sorted(MODELS))
def test_nothing_is_lost(name: str) -> None:
    model, targets = _build(name)
    params = [n for n, p in model.named_parameters() if p.ndim >= 2]
    weights, skipped = [w.name for w in targets.weights], [s.name for s in targets.skipped]
    assert sorted(weights + skipped) == sorted(params)
    assert [n for n in params if n in set(weights)] == weights  # network order
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert all(shapes[w.name] == w.shape and w.name.startswith(w.block + ".") for w in targets.weights)
    groups = make_partition(targets, _config(name))
    assert [n for group in groups for n in group.names] == weights
    assert [b for group in groups for b in group.blocks] == list(targets.blocks)  # no block is cut


@pytest.mark.parametrize("name", sorted(MODELS))
def test_right_by_the_names_of_the_library(name: str) -> None:
    """Inside a layer or stage every trained Linear and convolution is a target; outside nothing is."""
    model, targets = _build(name)
    modules = dict(model.named_modules())
    for param_name, param in model.named_parameters():
        module = modules[param_name.rpartition(".")[0]]
        is_layer = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | tf.pytorch_utils.Conv1D)
        is_expert = "Experts" in type(module).__name__
        is_gate = param_name.endswith("shared_expert_gate.weight")
        wanted = (
            param.ndim >= 2
            and not param_name.endswith("bias")
            and param.requires_grad
            and (is_layer or is_expert)
            and INSIDE.search(param_name) is not None
            and NEVER.search(param_name) is None
            and not is_gate
            and not re.search(r"feature_extractor|decode_head|bbox|class_embed", param_name)
        )
        assert (param_name in {w.name for w in targets.weights}) == wanted, param_name


def test_layouts_say_which_side_is_the_input() -> None:
    """For every layout, one model whose sizes are known by name."""
    by_name = {n: {w.name: w for w in _build(n)[1].weights} for n in ("gpt2", "bert", "mixtral", "gpt-oss", "llama4")}
    up = by_name["gpt2"]["transformer.h.0.mlp.c_fc.weight"]
    assert (up.layout, up.shape) == ("in_out", (16, 64))
    up = by_name["bert"]["bert.encoder.layer.0.intermediate.dense.weight"]
    assert (up.layout, up.shape) == ("out_in", (24, 16))
    up = by_name["mixtral"]["model.layers.0.mlp.experts.gate_up_proj"]
    assert (up.layout, up.shape) == ("expert_out_in", (3, 48, 16))
    up = by_name["gpt-oss"]["model.layers.0.mlp.experts.gate_up_proj"]
    assert (up.layout, up.shape) == ("expert_in_out", (3, 16, 48))
    up = by_name["llama4"]["model.layers.0.feed_forward.experts.gate_up_proj"]
    assert (up.layout, up.shape) == ("expert_in_out", (3, 16, 48))


def _update() -> None:
    versions = {m.__name__: m.__version__.split("+")[0] for m in (torch, tf, timm, torchvision)}
    data = {"made_with": versions, "models": {name: _describe(name) for name in sorted(MODELS)}}
    EXPECTED.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit("usage: python tests/test_architectures.py --update")
    _update()
