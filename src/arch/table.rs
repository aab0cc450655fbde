//! The table of architectures. Each row lists its differences from [`PLAIN`].

use super::role::Role;
use super::rope::RopeStyle;
use super::row::{Activation, Arch, Norms, QkNorm, Windows, MOE};

/// The base of all rows: the block of Llama.
const PLAIN: Arch = Arch {
    gguf: "",
    model_types: &[],
    rope: RopeStyle::Neox,
    folder_rope: RopeStyle::Neox,
    norms: Norms::Before,
    own_norm_names: None,
    own_gguf_norms: None,
    renamed: &[],
    qk_norm: QkNorm::None,
    sinks: false,
    moe_names: MOE,
    value_norm: false,
    unscaled_attention: false,
    uneven_blocks: false,
    per_layer: false,
    output_scale: false,
    delta_nets: false,
    gated_attention: false,
    activation: Activation::Silu,
    scaled_embedding: false,
    norms_minus_one: false,
    fused_gate_up: false,
    windows: Windows::Uniform,
    rope_free_every: 0,
    rope_in_windows_only: false,
    rope_freqs: false,
    takes_bias: false,
    defaults: "{}",
};

/// The base of the Gemma rows.
const GEMMA: Arch = Arch {
    activation: Activation::GeluTanh,
    scaled_embedding: true,
    norms_minus_one: true,
    ..PLAIN
};

/// The base of the rows of Qwen 3.5, 3.6 and 3.8: three delta nets, then attention.
const QWEN35: Arch = Arch {
    // In these files the norm before the feed-forward layer has this name.
    own_gguf_norms: Some(["attn_norm", "", "post_attention_norm", ""]),
    qk_norm: QkNorm::Head,
    delta_nets: true,
    gated_attention: true,
    norms_minus_one: true,
    defaults: r#"{"head_dim": 256, "partial_rotary_factor": 0.25, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32}"#,
    ..PLAIN
};

/// The supported architectures.
pub(super) const ROWS: &[Arch] = &[
    Arch {
        gguf: "llama",
        model_types: &["llama", "mistral", "mixtral"],
        rope: RopeStyle::Interleaved,
        rope_freqs: true,
        takes_bias: true,
        ..PLAIN
    },
    Arch { gguf: "qwen2", model_types: &["qwen2"], ..PLAIN },
    Arch { gguf: "qwen3", model_types: &["qwen3"], qk_norm: QkNorm::Head, ..PLAIN },
    Arch { gguf: "qwen2moe", model_types: &["qwen2_moe"], ..PLAIN },
    Arch { gguf: "qwen3moe", model_types: &["qwen3_moe"], qk_norm: QkNorm::Head, ..PLAIN },
    Arch { gguf: "qwen35", model_types: &["qwen3_5_text"], ..QWEN35 },
    Arch { gguf: "qwen35moe", model_types: &["qwen3_5_moe_text"], ..QWEN35 },
    Arch {
        gguf: "gemma",
        model_types: &["gemma"],
        defaults: r#"{"tie_word_embeddings": true, "head_dim": 256}"#,
        ..GEMMA
    },
    Arch {
        gguf: "gemma2",
        model_types: &["gemma2"],
        norms: Norms::Around,
        windows: Windows::AllBut(2),
        defaults: r#"{"tie_word_embeddings": true, "head_dim": 256, "query_pre_attn_scalar": 256,
            "sliding_window": 4096, "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0}"#,
        ..GEMMA
    },
    Arch {
        gguf: "gemma3",
        model_types: &["gemma3_text"],
        norms: Norms::Around,
        qk_norm: QkNorm::Head,
        windows: Windows::AllBut(6),
        // The `config.json` of the 4B model leaves all of these out.
        defaults: r#"{"tie_word_embeddings": true, "head_dim": 256, "query_pre_attn_scalar": 256,
            "sliding_window": 4096, "num_attention_heads": 8, "num_key_value_heads": 4,
            "vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0}"#,
        ..GEMMA
    },
    Arch {
        gguf: "gemma4",
        // The second is the text model of a 12B model that reads pictures without an encoder.
        model_types: &["gemma4_text", "gemma4_unified_text"],
        norms: Norms::Around,
        moe_names: ["experts", "router.proj"],
        qk_norm: QkNorm::Head,
        value_norm: true,
        unscaled_attention: true,
        uneven_blocks: true,
        per_layer: true,
        output_scale: true,
        norms_minus_one: false,
        windows: Windows::AllBut(6),
        rope_freqs: true,
        defaults: r#"{"tie_word_embeddings": true, "head_dim": 256, "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "proportional", "rope_theta": 1000000.0,
                "partial_rotary_factor": 0.25}}}"#,
        ..GEMMA
    },
    // Positions in pictures have three axes. In text, the three positions are equal.
    Arch {
        gguf: "qwen2vl",
        model_types: &["qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"],
        ..PLAIN
    },
    Arch {
        gguf: "qwen3vl",
        model_types: &["qwen3_vl", "qwen3_vl_text"],
        qk_norm: QkNorm::Head,
        ..PLAIN
    },
    Arch {
        gguf: "phi3",
        model_types: &["phi3"],
        fused_gate_up: true,
        defaults: r#"{"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}"#,
        ..PLAIN
    },
    Arch {
        gguf: "mistral3",
        model_types: &["ministral3"],
        rope: RopeStyle::Interleaved,
        rope_freqs: true,
        takes_bias: true,
        defaults: r#"{"rms_norm_eps": 1e-5, "head_dim": 128}"#,
        ..PLAIN
    },
    Arch {
        gguf: "olmo2",
        model_types: &["olmo2", "olmo3"],
        norms: Norms::After,
        qk_norm: QkNorm::Whole,
        windows: Windows::AllBut(4),
        defaults: r#"{"rms_norm_eps": 1e-5}"#,
        ..PLAIN
    },
    Arch {
        gguf: "olmoe",
        model_types: &["olmoe"],
        qk_norm: QkNorm::Whole,
        defaults: r#"{"rms_norm_eps": 1e-5}"#,
        ..PLAIN
    },
    Arch {
        gguf: "gpt-oss",
        model_types: &["gpt_oss"],
        own_gguf_norms: Some(["attn_norm", "", "post_attention_norm", ""]),
        renamed: &[(Role::Router, "mlp.router")],
        sinks: true,
        activation: Activation::ClampedSwiglu,
        windows: Windows::AllBut(2),
        defaults: r#"{"rms_norm_eps": 1e-5, "head_dim": 64, "sliding_window": 128,
            "rope_theta": 150000.0}"#,
        ..PLAIN
    },
    // llama.cpp applies biases of `attn_output` and `ffn_down` here too, but multiplies them by the
    // residual factor: so `takes_bias` stays false.
    Arch {
        gguf: "granite",
        model_types: &["granite"],
        rope: RopeStyle::Interleaved,
        rope_freqs: true,
        ..PLAIN
    },
    Arch {
        gguf: "ernie4_5",
        model_types: &["ernie4_5"],
        rope: RopeStyle::Interleaved,
        folder_rope: RopeStyle::Interleaved,
        defaults: r#"{"tie_word_embeddings": true, "head_dim": 128, "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0}"#,
        ..PLAIN
    },
    Arch {
        gguf: "minicpm",
        model_types: &["minicpm"],
        rope: RopeStyle::Interleaved,
        rope_freqs: true,
        defaults: r#"{"tie_word_embeddings": true, "scale_emb": 1, "scale_depth": 1.0}"#,
        ..PLAIN
    },
    Arch {
        gguf: "smollm3",
        model_types: &["smollm3"],
        rope: RopeStyle::Interleaved,
        rope_free_every: 4,
        defaults: r#"{"tie_word_embeddings": true, "rope_theta": 2000000.0}"#,
        ..PLAIN
    },
    Arch {
        gguf: "exaone4",
        model_types: &["exaone4"],
        norms: Norms::After,
        qk_norm: QkNorm::Head,
        windows: Windows::AllBut(4),
        rope_in_windows_only: true,
        rope_freqs: true,
        defaults: r#"{"rms_norm_eps": 1e-5}"#,
        ..PLAIN
    },
    Arch {
        gguf: "glm4",
        model_types: &["glm4"],
        rope: RopeStyle::Interleaved,
        folder_rope: RopeStyle::Interleaved,
        norms: Norms::Around,
        own_norm_names: Some([
            "input_layernorm",
            "post_self_attn_layernorm",
            "post_attention_layernorm",
            "post_mlp_layernorm",
        ]),
        fused_gate_up: true,
        defaults: r#"{"rms_norm_eps": 1.5625e-7, "head_dim": 128, "partial_rotary_factor": 0.5}"#,
        ..PLAIN
    },
    Arch {
        gguf: "glm4moe",
        model_types: &["glm4_moe"],
        own_gguf_norms: Some(["attn_norm", "", "post_attention_norm", ""]),
        renamed: &[
            (Role::SharedGate, "mlp.shared_experts.gate_proj"),
            (Role::SharedUp, "mlp.shared_experts.up_proj"),
            (Role::SharedDown, "mlp.shared_experts.down_proj"),
        ],
        qk_norm: QkNorm::Head,
        defaults: r#"{"rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "n_shared_experts": 1}"#,
        ..PLAIN
    },
];

/// Well-known architectures that can't be run, each with the reason: a part that this decoder
/// lacks.
pub(super) const FOREIGN: &[(&[&str], &str)] = &[
    (&["qwen3next", "qwen3_next"], "its delta nets have projections in another order"),
    (
        &["gemma3n", "gemma3n_text"],
        "it has four residual streams, and feed-forward layers that keep few activations",
    ),
    (
        &["gemma4-assistant", "gemma4_assistant", "gemma4_unified_assistant"],
        "it drafts for another model, whose keys and values it reads",
    ),
    (&["diffusion_gemma", "diffusion_gemma_text"], "it writes a text in many passes (diffusion)"),
    (&["qwen4exp", "qwen4_exp"], "it has hyper-connections and sparse attention"),
    (&["gptoss"], "it is gpt-oss in Ollama's own layout; use a file made by llama.cpp"),
    (
        &["deepseek2", "deepseek_v2", "deepseek_v3", "glm-dsa", "kimi_k25"],
        "it has latent attention (MLA)",
    ),
    (&["llama4", "llama4_text"], "its attention is chunked, and experts scale their input"),
    (&["lfm2", "lfm2moe", "lfm2_moe"], "most of its blocks are short convolutions"),
    (
        &[
            "mamba",
            "mamba2",
            "falcon_h1",
            "falcon-h1",
            "jamba",
            "nemotron_h",
            "nemotron_h_moe",
            "granitehybrid",
            "granitemoehybrid",
            "plamo2",
        ],
        "it has state-space blocks",
    ),
    (&["rwkv6", "rwkv7", "rwkv"], "it is a recurrent net without attention"),
    (
        &["granitemoe", "granitemoeshared", "phimoe", "minimax-m2", "minimax_m2"],
        "its experts follow other rules than those of the supported ones",
    ),
    (
        &[
            "command-r",
            "cohere",
            "cohere2",
            "phi2",
            "phi",
            "falcon",
            "gpt2",
            "gptneox",
            "gpt_neox",
            "starcoder2",
            "stablelm",
            "bloom",
            "mpt",
        ],
        "its norms subtract the mean (LayerNorm)",
    ),
];
