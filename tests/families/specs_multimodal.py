"""Types with a vision or audio part whose text part is what is trained, and the text parts under their own types."""

from tests.families.specs import Spec, rope, spec
from tests.families.specs_dense import BY_KIND, CHUNKED, FULL, LOCAL
from tests.families.specs_recurrent import LINEAR, QWEN4

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
VISION_QWEN = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
VISION_EMU = {
    "codebook_size": 16,
    "base_channels": 32,
    "channel_multiplier": [1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "hidden_size": 32,
}
GEMMA4 = {"sliding_window": 16, "layer_types": [LOCAL, FULL], "rope_parameters": BY_KIND}
GEMMA3N = {
    "vocab_size_per_layer_input": 352,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
    "sliding_window": 16,
    "num_kv_shared_layers": 0,
}

BYTES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
    "intermediate_size": 96,
    "vocab_size": 352,
}

MULTIMODAL: tuple[Spec, ...] = (
    Spec("Gemma 3", "gemma3", {"vision_config": VISION}, text={"sliding_window": 16, "layer_types": [LOCAL, FULL]}),
    Spec(
        "Gemma 3, capped",
        "gemma3",
        {"vision_config": VISION},
        text={"sliding_window": 16, "layer_types": [LOCAL, FULL], "final_logit_softcapping": 5.0},
    ),
    spec("Gemma 3n text", "gemma3n_text", layer_types=[LOCAL, FULL], **GEMMA3N),
    spec(
        "Gemma 3n text, keys shared, sparse",
        "gemma3n_text",
        layer_types=[LOCAL, FULL, LOCAL, FULL],
        num_hidden_layers=4,
        activation_sparsity_pattern=[0.9, 0.0, 0.0, 0.0],
        **GEMMA3N | {"num_kv_shared_layers": 2},
    ),
    spec("Gemma 4 text", "gemma4_text", hidden_size_per_layer_input=16, vocab_size_per_layer_input=352, **GEMMA4),
    spec(
        "Gemma 4 text, keys as values, experts",
        "gemma4_text",
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        enable_moe_block=True,
        top_k_experts=2,
        final_logit_softcapping=5.0,
        **GEMMA4,
    ),
    spec(
        "Gemma 4 text, keys shared",
        "gemma4_text",
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=352,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        **GEMMA4 | {"layer_types": [LOCAL, FULL, LOCAL, FULL]},
    ),
    Spec(
        "Gemma 4",
        "gemma4",
        {
            "vision_config": None,
            "audio_config": None,
            "image_token_id": 340,
            "video_token_id": 341,
            "audio_token_id": 342,
        },
        text=GEMMA4
        | {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 352, "final_logit_softcapping": 5.0},
    ),
    spec("Gemma 4 unified text", "gemma4_unified_text", use_bidirectional_attention=None, **GEMMA4),
    Spec(
        "Gemma 4 unified",
        "gemma4_unified",
        {
            "vision_config": None,
            "audio_config": None,
            "image_token_id": 340,
            "video_token_id": 341,
            "audio_token_id": 342,
        },
        text=GEMMA4 | {"final_logit_softcapping": 5.0},
    ),
    Spec(
        "Llama 4",
        "llama4",
        {"vision_config": VISION | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}},
        text={
            "attention_chunk_size": 16,
            "intermediate_size_mlp": 96,
            "layer_types": [CHUNKED, FULL],
            "no_rope_layers": [1, 0],
            "num_experts_per_tok": 1,
        },
    ),
    Spec("Qwen3.5", "qwen3_5", {"vision_config": VISION_QWEN}, text={"layer_types": [LINEAR, FULL]}),
    Spec("Qwen3.5 MoE", "qwen3_5_moe", {"vision_config": VISION_QWEN}, text={"layer_types": [LINEAR, FULL]}),
    Spec(
        "Qwen4 experimental", "qwen4_exp", {"vision_config": VISION_QWEN}, text={"layer_types": [LINEAR, FULL], **QWEN4}
    ),
    Spec(
        "Mllama",
        "mllama",
        {
            "vision_config": VISION
            | {
                "num_global_layers": 1,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 32,
                "attention_heads": 2,
            }
        },
        text={"cross_attention_layers": [1], "num_hidden_layers": 3, "pad_token_id": 0, "rope_parameters": rope()},
    ),
    Spec("Emu3", "emu3", {"vocabulary_map": {"<image>": 340}, "vq_config": VISION_EMU}, text={}),
    spec(
        "Phi 4 multimodal",
        "phi4_multimodal",
        sliding_window=16,
        vision_config=VISION | {"crop_size": 28},
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 16,
            "input_size": 16,
        },
    ),
    spec("Moshi", "moshi", sliding_window=16, ffn_dim=96),
    Spec("Fuyu", "fuyu", {"image_size": 28, "patch_size": 14, "image_token_id": 340}, text={}),
    Spec(
        "GOT-OCR 2",
        "got_ocr2",
        {
            "image_token_index": 340,
            "vision_config": {
                "hidden_size": 16,
                "output_channels": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 16,
                "mlp_dim": 32,
                "global_attn_indexes": [0],
                "window_size": 2,
            },
        },
        text={},
    ),
    spec("GIT", "git", vision_config=VISION, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    spec(
        "BLT",
        "blt",
        encoder_hash_byte_group_size=[3, 4],
        encoder_hash_byte_group_vocab=97,
        patcher_config=BYTES,
        encoder_config=BYTES | {"hidden_size_global": 128},
        decoder_config=BYTES | {"hidden_size_global": 128},
        global_config=BYTES | {"hidden_size": 128},
    ),
)
