"""Which layers `auto` adapts in the families it knows: the linear layers of the blocks.

Not in the table, on purpose: output heads and poolers; routers, and the indexers of sparse
attention, which choose and get no useful gradient; Mamba's `dt_proj`, whose weight fused kernels
read; the narrow gates of linear attention; routed experts (see `targets`). Families are named by
`config.model_type`; `chatglm`, `btlm`, `RefinedWeb` and `rwkv7` come with code of their own. A name
is a suffix of a module's path; a family lists the names of all its variants.
"""

_Q_K_V_O = ("q_proj", "k_proj", "v_proj", "o_proj")
_Q_K_V_OUT = ("q_proj", "k_proj", "v_proj", "out_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_LATENT = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
_LINEAR_Q_K_V = ("linear_q", "linear_k", "linear_v")
_QUERY_KEY_VALUE = ("query", "key", "value")
_BERT_DENSE = ("attention.output.dense", "intermediate.dense", "output.dense")
_NEOX = ("query_key_value", "dense_h_to_4h", "dense_4h_to_h")

_LAYOUTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        _Q_K_V_O + _GATED,
        "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text gemma4_text gemma4_unified_text gemma4"
        " cohere"
        " cohere2 olmo olmo2 olmo3 granite granite_swa smollm3 stablelm ernie4_5 exaone4 seed_oss"
        " helium ministral ministral3 mimo_v2_flash cwm bitnet blt diffllama hunyuan_v1_dense"
        " internlm3 hyperclovax vaultgemma t5gemma eurobert nomic_bert esmc gte iquestcoder doge"
        " gemma3n_text qwen2_vl_text qwen2_5_vl_text qwen3_vl_text",
    ),
    (
        _Q_K_V_O + _GATED,  # experts beside dense or shared layers
        "mixtral qwen2_moe qwen3_moe qwen3_vl_moe_text olmoe phimoe gpt_oss granitemoe minimax_m2"
        " granitemoe_swa granitemoeshared llama4 llama4_text ernie4_5_moe glm4_moe hunyuan_v1_moe"
        " aria_text afmoe dots1 exaone_moe flex_olmo solar_open cohere2_moe flint hy_v3 mellum"
        " laguna",
    ),
    ((*_Q_K_V_O, "up_proj", "down_proj"), "apertus arcee jais2 nemotron"),
    ((*_Q_K_V_O, "gate_up_proj", "down_proj"), "glm glm4 minimax_m3_vl_text"),
    (("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), "phi3"),
    (
        _LATENT + _GATED,
        "deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash minicpm3"
        " youtu axk1 hy_v4",
    ),
    (
        _Q_K_V_O + _GATED + ("in_proj_qkvz", "in_proj_qkv", "in_proj_z", "out_proj"),
        "qwen3_next qwen3_5_text qwen3_5_moe_text qwen3_5 qwen3_5_moe",
    ),
    (
        (*_LATENT, "k_proj", "v_proj", "f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj", *_GATED),
        "kimi_linear",
    ),
    ((*_Q_K_V_O, "g_proj", *_GATED), "olmo_hybrid"),
    ((*_Q_K_V_O, "qkv_proj", "out_proj", "output_gate"), "minimax"),
    (_Q_K_V_O + _GATED + ("in_proj", "out_proj"), "bamba falcon_h1 zamba"),
    (_Q_K_V_O + _GATED + ("in_proj", "x_proj", "out_proj"), "jamba"),
    ((*_Q_K_V_O, "up_proj", "down_proj", "in_proj", "out_proj"), "nemotron_h"),
    (
        (*_Q_K_V_O, "in_proj", "out_proj", "shared_mlp.input_linear", "shared_mlp.output_linear"),
        "granitemoehybrid",
    ),
    (_Q_K_V_O + _GATED + ("linear_x", "linear_y", "linear_out"), "recurrent_gemma"),
    ((*_Q_K_V_OUT, "in_proj", "w1", "w2", "w3"), "lfm2 lfm2_moe"),
    (("in_proj", "x_proj", "out_proj"), "mamba falcon_mamba mamba2"),
    (("key", "value", "receptance", "output"), "rwkv"),
    (("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"), "rwkv7"),
    ((*_Q_K_V_O, "c_fc", "c_proj"), "starcoder2"),
    ((*_Q_K_V_O, "fc1", "fc2"), "nanochat jina_embeddings_v3"),
    (("q_proj", "k_proj", "v_proj", "self_attn.dense", "fc1", "fc2"), "phi"),
    ((*_Q_K_V_OUT, "fc_in", "fc_out"), "gptj"),
    ((*_Q_K_V_OUT, "c_fc", "c_proj"), "gpt_neo"),
    (("qkv_proj", "out_proj", "fc_in", "fc_out"), "codegen"),
    (("c_attn", "c_proj", "c_fc"), "gpt2 gpt-sw3 gpt_bigcode openai-gpt imagegpt"),
    (("c_attn", "c_proj", "c_fc", "c_fc2"), "btlm"),
    (("attention.dense", *_NEOX), "gpt_neox gpt_neox_japanese"),
    (("self_attention.dense", *_NEOX), "bloom falcon RefinedWeb RefinedWebModel chatglm"),
    (("self_attn.dense", *_NEOX), "persimmon fuyu"),
    (("Wqkv", "attn.out_proj", "up_proj", "down_proj"), "mpt"),
    (("Wqkv", "attn.out_proj"), "dbrx"),
    ((*_Q_K_V_OUT, "fc1", "fc2"), "opt xglm biogpt trocr"),
    (
        (*_Q_K_V_OUT, "fc1", "fc2"),  # encoder and decoder
        "bart mbart pegasus pegasus_x marian m2m_100 nllb-moe blenderbot blenderbot-small plbart"
        " mvp fsmt bigbird_pegasus whisper speech_to_text",
    ),
    (("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"), "t5 mt5 umt5 longt5 switch_transformers"),
    (
        _QUERY_KEY_VALUE + _BERT_DENSE,
        "bert roberta xlm-roberta xlm-roberta-xl electra camembert ernie layoutlm rembert roformer"
        " megatron-bert data2vec-text roberta-prelayernorm bert-generation big_bird roc_bert esm"
        " nystromformer tapas yoso mra",
    ),
    (("query_proj", "key_proj", "value_proj", *_BERT_DENSE), "deberta-v2"),
    (("in_proj", "pos_proj", "pos_q_proj", *_BERT_DENSE), "deberta"),
    ((*_QUERY_KEY_VALUE, "attention.dense", "ffn", "ffn_output"), "albert"),
    (("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"), "distilbert xlm flaubert"),
    (("attn.q", "attn.k", "attn.v", "attn.o", "intermediate.dense", "output.dense"), "mpnet"),
    (("Wqkv", "q_proj", "k_proj", "v_proj", "Wo", "Wi"), "modernbert modernbert-decoder"),
    (
        (*_Q_K_V_O, "fc1", "fc2"),
        "vit deit beit dinov2 dinov2_with_registers ijepa vit_msn segformer swin"
        " audio-spectrogram-transformer",
    ),
    ((*_Q_K_V_OUT, "fc1", "fc2"), "clip metaclip_2 siglip siglip2"),
    (("qkv", "self_attn.projection", "fc1", "fc2", *_QUERY_KEY_VALUE, *_BERT_DENSE), "blip"),
    (
        (*_Q_K_V_OUT, "q", "k", "v", "o", "wi_0", "wi_1", "wo", "fc1", "fc2", *_GATED),
        "blip-2",
    ),
    (
        (*_Q_K_V_OUT, "intermediate_dense", "output_dense"),
        "wav2vec2 hubert wavlm sew unispeech unispeech-sat data2vec-audio",
    ),
    (
        (*_LINEAR_Q_K_V, "linear_out", "linear_pos", "intermediate_dense", "output_dense"),
        "wav2vec2-bert wav2vec2-conformer",
    ),
)

FAMILIES: dict[str, tuple[str, ...]] = {
    family: names for names, families in _LAYOUTS for family in families.split()
}
"""`config.model_type` -> the names of the layers that `auto` adapts."""

SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "query", "q", "q_lin", "query_proj", "to_q", "attn.q", "Wq", "q_a_proj"),
    ("k_proj", "key", "k", "k_lin", "key_proj", "to_k", "attn.k", "Wk", "kv_a_proj_with_mqa"),
    ("v_proj", "value", "v", "v_lin", "value_proj", "to_v", "attn.v", "Wv", "kv_b_proj"),
    ("o_proj", "out_proj", "o", "out_lin", "Wo", "to_out.0", "c_proj", "dense"),
    ("query_key_value", "qkv_proj", "Wqkv", "c_attn", "qkv", "in_proj", "in_proj_weight"),
    ("gate_up_proj", "gate_proj", "w1", "w3", "wi_0", "wi_1", "up_proj"),
    (
        "up_proj",
        "fc1",
        "c_fc",
        "dense_h_to_4h",
        "wi",
        "lin1",
        "fc_in",
        "Wi",
        "linear1",
        "gate_up_proj",
    ),
    ("down_proj", "fc2", "w2", "wo", "dense_4h_to_h", "lin2", "fc_out", "linear2", "c_proj"),
    ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embeddings"),
    ("lm_head", "embed_out", "proj_out", "head", "output"),
)
"""Names of the same layer in different families: for the hint when a name is not there."""


def synonym(name: str, known: set[str]) -> str | None:
    """What a model that knows the names `known` calls the layer that others call `name`."""
    fused = SYNONYMS[4]
    for group in SYNONYMS:
        if name in group:
            candidates = (*group, *fused) if group in SYNONYMS[:3] else group
            return next((other for other in candidates if other in known), None)
    return None
