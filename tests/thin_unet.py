"""diffusers' configuration of the thin U-Nets that the demo makes."""

from __future__ import annotations


def config(family):
    common = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "act_fn": "silu",
    }
    if family == "sdxl":
        return common | {
            "block_out_channels": [8, 16, 32],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [1, 2, 4],
            "cross_attention_dim": 64,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 88,
        }
    return common | {
        "block_out_channels": [8, 16, 32, 32],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "attention_head_dim": 4,
        "cross_attention_dim": 24 if family == "sd1" else 32,
        "use_linear_projection": family == "sd2",
    }
