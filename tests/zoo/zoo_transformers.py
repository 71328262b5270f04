"""The models of the package transformers in the zoo; see zoo.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from zoo_inputs import BATCH, CLASSES, LENGTH, WORDS, Made, image, tokens

Options = dict[str, Any]


def words(**_) -> Options:
    return {"input_ids": tokens()}


def pairs(**_) -> Options:
    return {"input_ids": tokens(), "decoder_input_ids": tokens()}


def pictures(size: int = 32, **_) -> Options:
    return {"pixel_values": image(size)}


def captions(size: int = 32, **_) -> Options:
    return {"input_ids": tokens(), "pixel_values": image(size)}


def sound(samples: int = 800, **_) -> Options:
    return {"input_values": torch.randn(BATCH, samples)}


TEXT = {
    "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
EXPERTS = {**LLAMA, "moe_intermediate_size": 12, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
PATCHES = {
    "image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "num_labels": CLASSES,
}  # fmt: skip
STAGES = {"depths": [1, 1], "hidden_sizes": [8, 16], "num_labels": CLASSES}
SWIN = {
    "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4,
    "num_labels": CLASSES,
}  # fmt: skip
SEQUENCES = {
    "vocab_size": WORDS, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
T5 = {
    "vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "num_decoder_layers": 1,
    "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
WAVES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": WORDS,
    "conv_dim": (8, 8, 8), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3), "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip

# Name of the configuration, without "Config": the model, what its inputs are, and the configuration
TABLE: dict[str, tuple[str, Callable[..., Options], Options]] = {
    "AST": ("ASTForAudioClassification", lambda: {"input_values": torch.randn(BATCH, 32, 16)}, {
        **TEXT, "patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 32, "num_mel_bins": 16,
        "num_labels": CLASSES}),
    "Albert": ("AlbertForSequenceClassification", words, {**TEXT, "embedding_size": 8}),
    "Bart": ("BartForConditionalGeneration", pairs, SEQUENCES),
    "Beit": ("BeitForImageClassification", pictures, PATCHES),
    "Bert": ("BertForSequenceClassification", words, {**TEXT, "num_labels": CLASSES}),
    "BigBird": ("BigBirdForMaskedLM", words, {**TEXT, "attention_type": "original_full"}),
    "Bit": ("BitForImageClassification", pictures, {
        "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "num_groups": 2, "num_labels": CLASSES}),
    "Bloom": ("BloomForCausalLM", words, {"vocab_size": WORDS, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "CLIP": ("CLIPModel", captions, {"projection_dim": 8, "text_config": {**TEXT}, "vision_config": PATCHES}),
    "ConvBert": ("ConvBertForMaskedLM", words, {**TEXT, "embedding_size": 16, "head_ratio": 1, "conv_kernel_size": 3}),
    "ConvNext": ("ConvNextForImageClassification", pictures, {**STAGES, "num_stages": 2}),
    "ConvNextV2": ("ConvNextV2ForImageClassification", pictures, {**STAGES, "num_stages": 2}),
    "Cvt": ("CvtForImageClassification", pictures, {
        "embed_dim": [8, 16, 16], "num_heads": [1, 2, 2], "depth": [1, 2, 3], "num_labels": CLASSES}),
    "DPT": ("DPTForDepthEstimation", pictures, {
        **PATCHES, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 8, 8],
        "fusion_hidden_size": 8}),
    "DebertaV2": ("DebertaV2ForMaskedLM", words, {
        **TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}),
    "DeepseekV3": ("DeepseekV3ForCausalLM", words, {
        **TEXT, "moe_intermediate_size": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
        "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 8, "first_k_dense_replace": 1, "num_key_value_heads": 2}),
    "DeiT": ("DeiTForImageClassification", pictures, PATCHES),
    "Dinov2": ("Dinov2ForImageClassification", pictures, PATCHES),
    "DistilBert": ("DistilBertForSequenceClassification", words, {
        "vocab_size": WORDS, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 32}),
    "EfficientNet": ("EfficientNetForImageClassification", pictures, {
        "num_labels": CLASSES, "hidden_dim": 1280, "width_coefficient": 1.0}),
    "Electra": ("ElectraForPreTraining", words, {**TEXT, "embedding_size": 8}),
    "Encodec": ("EncodecModel", lambda: {"input_values": torch.randn(BATCH, 1, 640)}, {
        "num_filters": 4, "hidden_size": 16, "codebook_size": 16, "codebook_dim": 16, "upsampling_ratios": [4, 2],
        "num_lstm_layers": 1}),
    "FNet": ("FNetForMaskedLM", words, TEXT),
    "Falcon": ("FalconForCausalLM", words, {**TEXT, "alibi": False}),
    "FocalNet": ("FocalNetForImageClassification", pictures, {
        "image_size": 32, "embed_dim": 8, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3],
        "hidden_sizes": [8, 16], "num_labels": CLASSES}),
    "Funnel": ("FunnelForMaskedLM", words, {
        "vocab_size": WORDS, "block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24,
        "num_decoder_layers": 1}),
    "GPT2": ("GPT2LMHeadModel", words, {
        "vocab_size": WORDS, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "GPTBigCode": ("GPTBigCodeForCausalLM", words, {
        "vocab_size": WORDS, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "GPTJ": ("GPTJForCausalLM", words, {
        "vocab_size": WORDS, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}),
    "GPTNeo": ("GPTNeoForCausalLM", words, {
        "vocab_size": WORDS, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 32}),
    "GPTNeoX": ("GPTNeoXForCausalLM", words, TEXT),
    "Gemma2": ("Gemma2ForCausalLM", words, LLAMA),
    "GptOss": ("GptOssForCausalLM", words, {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Granite": ("GraniteForCausalLM", words, LLAMA),
    "Hubert": ("HubertForCTC", sound, WAVES),
    "Levit": ("LevitForImageClassification", lambda: pictures(64), {
        "image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1],
        "key_dim": [8, 8, 8], "num_labels": CLASSES}),
    "Llama": ("LlamaForCausalLM", words, LLAMA),
    "Longformer": ("LongformerForMaskedLM", words, {**TEXT, "attention_window": 4}),
    "MPNet": ("MPNetForMaskedLM", words, TEXT),
    "Mamba": ("MambaForCausalLM", words, {
        "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4}),
    "Mamba2": ("Mamba2ForCausalLM", words, {
        "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "num_heads": 4, "head_dim": 8,
        "n_groups": 1, "chunk_size": 4}),
    "Mistral": ("MistralForCausalLM", words, LLAMA),
    "Mixtral": ("MixtralForCausalLM", words, {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "MobileBert": ("MobileBertForMaskedLM", words, {
        **TEXT, "embedding_size": 8, "intra_bottleneck_size": 16, "num_feedforward_networks": 1}),
    "MobileViT": ("MobileViTForImageClassification", lambda: pictures(64), {
        "image_size": 64, "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32],
        "num_labels": CLASSES}),
    "ModernBert": ("ModernBertForMaskedLM", words, {**TEXT, "cls_token_id": 1, "sep_token_id": 2}),
    "Nystromformer": ("NystromformerForMaskedLM", words, {
        **TEXT, "segment_means_seq_len": LENGTH, "num_landmarks": LENGTH}),
    "OPT": ("OPTForCausalLM", words, {**TEXT, "ffn_dim": 24, "word_embed_proj_dim": 8}),
    "Olmo2": ("Olmo2ForCausalLM", words, LLAMA),
    "PatchTST": ("PatchTSTForPrediction", lambda: {"past_values": torch.randn(BATCH, 32, 2)}, {
        "num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8, "d_model": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24, "prediction_length": 4}),
    "Perceiver": ("PerceiverForMaskedLM", lambda: {"inputs": tokens()}, {
        "vocab_size": WORDS, "d_model": 16, "d_latents": 16, "num_latents": 4, "num_self_attends_per_block": 1,
        "num_self_attention_heads": 2, "num_cross_attention_heads": 2, "max_position_embeddings": LENGTH,
        "qk_channels": 16, "v_channels": 16}),
    "Phi": ("PhiForCausalLM", words, TEXT),
    "Phi3": ("Phi3ForCausalLM", words, {**TEXT, "num_key_value_heads": 1}),
    "PoolFormer": ("PoolFormerForImageClassification", pictures, {
        "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_labels": CLASSES}),
    "Pvt": ("PvtForImageClassification", lambda: pictures(64), {
        "image_size": 64, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2],
        "num_labels": CLASSES}),
    "Qwen2Moe": ("Qwen2MoeForCausalLM", words, {
        **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 12}),
    "Qwen3": ("Qwen3ForCausalLM", words, LLAMA),
    "RegNet": ("RegNetForImageClassification", pictures, {
        "embedding_size": 8, "hidden_sizes": [32, 64], "depths": [1, 1], "groups_width": 8, "num_labels": CLASSES}),
    "ResNet": ("ResNetForImageClassification", pictures, {
        "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": CLASSES}),
    "Roberta": ("RobertaForMaskedLM", words, TEXT),
    "RoFormer": ("RoFormerForMaskedLM", words, {**TEXT, "embedding_size": 16}),
    "Rwkv": ("RwkvForCausalLM", words, {
        "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16,
        "intermediate_size": 24}),
    "SamVision": ("SamVisionModel", pictures, {
        "image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "mlp_dim": 24, "output_channels": 8, "window_size": 2, "global_attn_indexes": [1]}),
    "Segformer": ("SegformerForSemanticSegmentation", lambda: pictures(64), {
        "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2],
        "decoder_hidden_size": 8, "num_labels": CLASSES}),
    "Siglip": ("SiglipModel", captions, {
        "text_config": {**TEXT, "projection_size": 16}, "vision_config": PATCHES}),
    "SqueezeBert": ("SqueezeBertForMaskedLM", words, {**TEXT, "embedding_size": 16, **{
        f"{of}_groups": 2 for of in ("q", "k", "v", "post_attention", "intermediate", "output")}}),
    "Swin": ("SwinForImageClassification", pictures, SWIN),
    "Swinv2": ("Swinv2ForImageClassification", pictures, SWIN),
    "SwitchTransformers": ("SwitchTransformersForConditionalGeneration", pairs, {
        **T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}),
    "T5": ("T5ForConditionalGeneration", pairs, T5),
    "ViT": ("ViTForImageClassification", pictures, PATCHES),
    "Vilt": ("ViltForMaskedLM", captions, {**TEXT, **PATCHES}),
    "Wav2Vec2": ("Wav2Vec2ForCTC", sound, WAVES),
    "Whisper": ("WhisperForConditionalGeneration", lambda: {
        "input_features": torch.randn(BATCH, 8, 32), "decoder_input_ids": tokens()}, {
        **SEQUENCES, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}),
    "XLNet": ("XLNetLMHeadModel", words, {
        "vocab_size": WORDS, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}),
    "Yolos": ("YolosForObjectDetection", pictures, {
        **PATCHES, "image_size": [32, 32], "num_detection_tokens": 4}),
}  # fmt: skip


def transformers_model(config: str, model: str, inputs: Callable[..., Options], options: Options) -> Made:
    transformers = importlib.import_module("transformers")
    made = getattr(transformers, model)(getattr(transformers, f"{config}Config")(**options))
    for module in made.modules():
        if hasattr(module, "_requires_grad"):  # of audio models, which otherwise require the gradient of their input
            module._requires_grad = False
    return made, inputs()


def transformers_models() -> dict[str, Callable[[], Made]]:
    """The models by name."""
    return {f"transformers.{name}": partial(transformers_model, name, *row) for name, row in TABLE.items()}
