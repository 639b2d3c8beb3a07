"""Transformers: each model by the name of its class, with the fields of its configuration that make it tiny."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn

from .entry import Entry

Inputs = Callable[[], dict[str, Any]]

# names that most configurations of language models share
TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2}
HEAD_8 = {**GROUPED, "head_dim": 8}
EXPERTS = {**HEAD_8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
PATCHES: dict[str, Any] = {
    "image_size": 32, "patch_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_labels": 5,
}  # fmt: skip
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "use_cache": False, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip
SPEECH: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "conv_dim": (16, 16),
    "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2, "vocab_size": 32, "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip
TOWERS: dict[str, Any] = {
    "text_config": {**TEXT, "projection_dim": 16},
    "vision_config": {**PATCHES, "projection_dim": 16},
    "projection_dim": 16,
}


def ids(length: int = 9) -> Inputs:
    return lambda: {"input_ids": torch.randint(3, 60, (2, length))}


def both() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 60, (2, 9)), "decoder_input_ids": torch.randint(3, 60, (2, 5))}


def pixels(size: int = 32) -> Inputs:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


def with_text() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 60, (2, 9)), "pixel_values": torch.randn(2, 3, 32, 32)}


def waves() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 800)}


def spectrum() -> dict[str, Any]:
    return {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": torch.randint(3, 60, (2, 5))}


def model(
    family: str, name: str, inputs: Inputs, fields: Mapping[str, Any], targets: str | Sequence[str] = "all-linear"
) -> Entry:
    def make() -> nn.Module:
        kind = getattr(transformers, name)
        return kind(kind.config_class(**fields))

    known, title = KNOWN.get(name, {}), name
    if targets != "all-linear":
        known, title = {}, f"{name}, {', '.join(targets)}"
    return Entry(title, "transformers", family, make, inputs, known, targets)


DECODERS = [
    ("LlamaForCausalLM", GROUPED),
    ("MistralForCausalLM", GROUPED),
    ("Qwen2ForCausalLM", GROUPED),
    ("Qwen3ForCausalLM", HEAD_8),
    ("GemmaForCausalLM", HEAD_8),
    ("Gemma2ForCausalLM", HEAD_8),
    ("Gemma3ForCausalLM", HEAD_8),
    ("PhiForCausalLM", TEXT),
    ("Phi3ForCausalLM", GROUPED),
    ("Olmo2ForCausalLM", GROUPED),
    ("CohereForCausalLM", GROUPED),
    ("StableLmForCausalLM", GROUPED),
    ("Starcoder2ForCausalLM", GROUPED),
    ("GraniteForCausalLM", GROUPED),
    ("GlmForCausalLM", HEAD_8),
    ("NemotronForCausalLM", GROUPED),
    ("SmolLM3ForCausalLM", GROUPED),
    ("GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    ("GPTNeoForCausalLM",
     {**TEXT, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4}),
    ("GPTNeoXForCausalLM", TEXT),
    ("GPTJForCausalLM",
     {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}),
    ("GPTBigCodeForCausalLM", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    ("CodeGenForCausalLM",
     {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}),
    ("OPTForCausalLM", {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    ("BloomForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    ("FalconForCausalLM", {**TEXT, "num_kv_heads": 4}),
    ("MptForCausalLM", {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    ("XGLMForCausalLM",
     {"vocab_size": 64, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48,
      "max_position_embeddings": 64}),
]  # fmt: skip

EXPERT_DECODERS = [
    ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ("Qwen2MoeForCausalLM", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    ("Qwen3MoeForCausalLM", EXPERTS),
    ("OlmoeForCausalLM", EXPERTS),
    ("GraniteMoeForCausalLM", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ("DeepseekV3ForCausalLM",
     {**TEXT, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
      "n_group": 2, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
      "v_head_dim": 8, "first_k_dense_replace": 1, "n_shared_experts": 1}),
    ("GptOssForCausalLM", {**HEAD_8, "num_local_experts": 4, "num_experts_per_tok": 2}),
]  # fmt: skip

RECURRENT = [
    ("MambaForCausalLM", {**TEXT, "state_size": 8}),
    ("Mamba2ForCausalLM",
     {**TEXT, "state_size": 8, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 2, "chunk_size": 4}),
    ("FalconMambaForCausalLM", {**TEXT, "state_size": 8}),
    ("RwkvForCausalLM", {**TEXT, "context_length": 64, "attention_hidden_size": 32}),
    ("JambaForCausalLM",
     {**GROUPED, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
      "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False}),
]  # fmt: skip

ENCODERS = [
    ("BertForSequenceClassification", TEXT),
    ("RobertaForTokenClassification", TEXT),
    ("XLMRobertaForMaskedLM", TEXT),
    ("DistilBertForSequenceClassification",
     {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}),
    ("AlbertForSequenceClassification", {**TEXT, "embedding_size": 16}),
    ("ElectraForPreTraining", {**TEXT, "embedding_size": 16}),
    ("DebertaV2ForSequenceClassification",
     {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}),
    ("ModernBertForMaskedLM", {**TEXT, "global_attn_every_n_layers": 2, "local_attention": 8}),
    ("MPNetForMaskedLM", TEXT),
    ("ConvBertForMaskedLM", {**TEXT, "embedding_size": 32}),
    ("MobileBertForMaskedLM",
     {**TEXT, "embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16, "intermediate_size": 32}),
    ("SqueezeBertForMaskedLM", {**TEXT, "embedding_size": 32}),
    ("NystromformerForMaskedLM", {**TEXT, "num_landmarks": 3, "segment_means_seq_len": 9}),
    ("RoFormerForMaskedLM", {**TEXT, "embedding_size": 32}),
    ("XLNetForSequenceClassification",
     {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    ("FunnelForSequenceClassification",
     {"vocab_size": 64, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48,
      "num_decoder_layers": 1}),
    ("FNetForMaskedLM", TEXT),
]  # fmt: skip

SEQ2SEQS = [
    ("T5ForConditionalGeneration", T5),
    ("MT5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
    ("SwitchTransformersForConditionalGeneration",
     {**T5, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}),
    ("BartForConditionalGeneration", SEQ2SEQ),
    ("MBartForConditionalGeneration", SEQ2SEQ),
    ("PegasusForConditionalGeneration", SEQ2SEQ),
    ("MarianMTModel", {**SEQ2SEQ, "decoder_vocab_size": 64}),
    ("BlenderbotForConditionalGeneration", SEQ2SEQ),
    ("M2M100ForConditionalGeneration", SEQ2SEQ),
    ("ProphetNetForConditionalGeneration",
     {"vocab_size": 64, "hidden_size": 32, "num_encoder_layers": 2, "num_decoder_layers": 2,
      "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
      "max_position_embeddings": 64, "ngram": 2, "num_buckets": 8, "relative_max_distance": 16, "use_cache": False}),
]  # fmt: skip

VISION = [
    ("ViTForImageClassification", PATCHES, 32),
    ("DeiTForImageClassification", PATCHES, 32),
    ("BeitForImageClassification", PATCHES, 32),
    ("Data2VecVisionForImageClassification", PATCHES, 32),
    ("Dinov2ForImageClassification", PATCHES, 32),
    ("SwinForImageClassification",
     {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}, 32),
    ("Swinv2ForImageClassification",
     {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}, 32),
    ("ConvNextForImageClassification", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, 32),
    ("SegformerForSemanticSegmentation",
     {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3],
      "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2], "decoder_hidden_size": 16}, 32),
    ("PvtForImageClassification",
     {"image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "sequence_reduction_ratios": [2, 1],
      "hidden_sizes": [16, 32], "patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [2, 4],
      "mlp_ratios": [2, 2]}, 32),
    ("MobileViTForImageClassification",
     {"image_size": 32, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32],
      "num_attention_heads": 4, "initializer_range": 0.3}, 64),
    ("PoolFormerForImageClassification",
     {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, 64),
    ("DPTForDepthEstimation",
     {**PATCHES, "image_size": 32, "patch_size": 8, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
      "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}, 32),
    ("YolosForObjectDetection", {**PATCHES, "image_size": [32, 32], "num_detection_tokens": 4}, 32),
]  # fmt: skip

AUDIO = [
    ("Wav2Vec2ForCTC", SPEECH),
    ("WavLMForCTC", SPEECH),
    ("HubertForCTC", SPEECH),
    ("UniSpeechSatForCTC", SPEECH),
    ("Data2VecAudioForCTC", {**SPEECH, "num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 3}),
    ("SEWForCTC", {**SPEECH, "squeeze_factor": 2}),
]

DETR_BACKBONE: dict[str, Any] = {
    "backbone_config": {
        "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1],
        "out_features": ["stage4"],
    },
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
}  # fmt: skip

FIELDS = dict(EXPERT_DECODERS + RECURRENT)
# what PEFT refuses or understands otherwise, left out
IN_PARTS = [
    ("MambaForCausalLM", ("in_proj", "x_proj")),
    ("Mamba2ForCausalLM", ("in_proj",)),
    ("FalconMambaForCausalLM", ("in_proj", "x_proj")),
    ("DeepseekV3ForCausalLM", ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
]

REFUSED = dict.fromkeys(("PEFT", "PEFT fused", "saved"), "PEFT refuses out_proj in this type of model")
RETARGETED = "PEFT puts adapters for gate_proj, up_proj and down_proj of this type of model on its experts"
KNOWN: dict[str, Mapping[str, str]] = {
    "DeepseekV3ForCausalLM": dict.fromkeys(("PEFT", "PEFT fused"), RETARGETED),
    "MambaForCausalLM": REFUSED,
    "Mamba2ForCausalLM": REFUSED,
    "FalconMambaForCausalLM": REFUSED,
}

OTHERS = [
    ("text, long", "LongformerForSequenceClassification", ids(16), {**TEXT, "attention_window": 4}),
    ("text, long", "LEDForConditionalGeneration", both,
     {**{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"}, "attention_window": 4,
      "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}),
    ("text, long", "BigBirdForMaskedLM", ids(16), {**TEXT, "block_size": 4, "num_random_blocks": 1}),
    ("images and text", "CLIPModel", with_text, TOWERS),
    ("images and text", "SiglipModel", with_text, TOWERS),
    ("images and text", "AltCLIPModel", with_text, TOWERS),
    ("images and text", "BlipForImageTextRetrieval", with_text,
     {"text_config": {**TEXT, "encoder_hidden_size": 32, "projection_dim": 16}, "vision_config": PATCHES,
      "projection_dim": 16, "image_text_hidden_size": 16}),
    ("images and text", "ViltForQuestionAnswering", with_text, {**TEXT, **PATCHES}),
    ("images and text", "FlavaModel", with_text,
     {"text_config": TEXT, "image_config": PATCHES, "multimodal_config": {**TEXT, "num_hidden_layers": 1},
      "hidden_size": 32, "projection_dim": 16, "image_codebook_config": {}}),
    ("speech", "WhisperForConditionalGeneration", spectrum,
     {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32,
      "suppress_tokens": None, "begin_suppress_tokens": None}),
    ("speech", "ASTForAudioClassification", lambda: {"input_values": torch.randn(2, 32, 16)},
     {**{k: v for k, v in PATCHES.items() if k != "image_size"}, "patch_size": 8, "max_length": 32, "num_mel_bins": 16,
      "frequency_stride": 8, "time_stride": 8}),
    ("detection", "DetrForObjectDetection", pixels(64),
     {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
      "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 4, **DETR_BACKBONE}),
    ("time series", "PatchTSTForPrediction", lambda: {"past_values": torch.randn(2, 32, 2)},
     {"num_input_channels": 2, "context_length": 32, "patch_length": 4, "patch_stride": 4, "d_model": 32,
      "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "prediction_length": 4}),
    ("robots", "DecisionTransformerModel",
     lambda: {"states": torch.randn(2, 5, 3), "actions": torch.randn(2, 5, 2), "rewards": torch.randn(2, 5, 1),
              "returns_to_go": torch.randn(2, 5, 1), "timesteps": torch.arange(5).expand(2, 5),
              "attention_mask": torch.ones(2, 5, dtype=torch.long)},
     {"state_dim": 3, "act_dim": 2, "hidden_size": 32, "n_layer": 2, "n_head": 4, "max_ep_len": 16}),
]  # fmt: skip

MODELS = [
    *(model("text, decoder", name, ids(), fields) for name, fields in DECODERS),
    *(model("text, experts", name, ids(), fields) for name, fields in EXPERT_DECODERS),
    *(model("text, state space", name, ids(), fields) for name, fields in RECURRENT),
    *(model("parts of the above", name, ids(), FIELDS[name], targets) for name, targets in IN_PARTS),
    *(model("text, encoder", name, ids(), fields) for name, fields in ENCODERS),
    *(model("text, encoder and decoder", name, both, fields) for name, fields in SEQ2SEQS),
    *(model("images", name, pixels(size), fields) for name, fields, size in VISION),
    *(model("speech", name, waves, fields) for name, fields in AUDIO),
    *(model(family, name, inputs, fields) for family, name, inputs, fields in OTHERS),
]
