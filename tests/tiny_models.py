"""Tiny random Hugging Face Llama models, all offline.

No two axes of a model are equal, so that a swapped axis cannot pass.
"""

import dataclasses
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# As of OpenBLAS in conftest.py.
torch.set_num_threads(1)

BOS, EOS, MARK, DEFINED = "<s>", "</s>", "<|mark|>", "<defined>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|mark|>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|mark|>assistant\n{% endif %}"
)
CORPUS = (
    "The train leaves at 1234 and the next train at 2345; how long does the trainer wait?\n\n"
    "def wait(a, b):\n    return b - a  # in hours\n\nÄpfel, naïve cafés and 中文 text.   Runs  of."
) * 3
# The splitting rules as the original tokenizers state them (tokenizer.json of SmolLM2 and Llama 3).
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    # Of the seven wavelengths two are kept, one is blended, the others are divided.
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A model's sizes and options. transformers wants the width to be a multiple of the heads."""

    num_heads: int
    num_kv_heads: int
    tied: bool
    rope: str = "default"
    bias: bool = False
    activation: str = "silu"
    sharded: bool = False
    width: int = 132
    mlp_width: int = 71
    head_size: int = 14
    num_layers: int = 3


ZOO = {
    "mha_untied": Tiny(5, 5, tied=False, width=115),
    "gqa_tied_linear_sharded": Tiny(6, 3, tied=True, rope="linear", sharded=True),
    "mqa_untied_llama3_bias": Tiny(6, 1, tied=False, rope="llama3", bias=True),
    "gqa_tied_llama3_bias_gelu": Tiny(
        6, 2, tied=True, rope="llama3", bias=True, activation="gelu_pytorch_tanh"
    ),
}


def build_model(tiny: Tiny, vocab_size: int, seed: int = 0) -> LlamaForCausalLM:
    """The model with random weights whose scale keeps every activation near one."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=tiny.width,
        intermediate_size=tiny.mlp_width,
        num_hidden_layers=tiny.num_layers,
        num_attention_heads=tiny.num_heads,
        num_key_value_heads=tiny.num_kv_heads,
        head_dim=tiny.head_size,
        hidden_act=tiny.activation,
        max_position_embeddings=257,
        rms_norm_eps=2.0**-17,  # exact in float32, as GGUF stores it
        rope_parameters=ROPES[tiny.rope],
        attention_bias=tiny.bias,
        mlp_bias=tiny.bias,
        tie_word_embeddings=tiny.tied,
        bos_token_id=0,
        eos_token_id=1,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=random)
            if name.endswith("norm.weight"):
                weight.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                weight.copy_(0.3 * noise)
            elif "embed_tokens" in name and not tiny.tied:
                weight.copy_(noise)
            else:
                weight.copy_(1.5 * noise / weight.shape[1] ** 0.5)
    return model


def build_tokenizer(pre: str = "smollm", num_merges: int = 40) -> PreTrainedTokenizerFast:
    """A byte-level BPE, trained on `CORPUS`, that splits and adds tokens like the original."""
    backend = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    if pre == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=256 + 3 + num_merges,
        special_tokens=[BOS, EOS, MARK],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([CORPUS], trainer)
    backend.add_tokens([AddedToken(DEFINED, normalized=False)])
    if pre == "llama-bpe":
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tiny(tiny: Tiny, directory: Path, seed: int = 0) -> Path:
    """The model and its tokenizer as a Hugging Face directory."""
    tokenizer = build_tokenizer()
    model = build_model(tiny, len(tokenizer), seed)
    model.save_pretrained(directory, max_shard_size="40KB" if tiny.sharded else "1GB")
    tokenizer.save_pretrained(directory)
    num_files = len(list(directory.glob("*.safetensors")))
    assert (num_files > 1) == tiny.sharded
    return directory
