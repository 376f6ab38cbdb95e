"""farspan: train, evaluate and fine-tune long-context language models.

Importing it registers the decoder with transformers, so that `AutoModelForCausalLM.from_pretrained` loads what farspan
trained.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from farspan.lm.config import DecoderConfig
from farspan.lm.decoder import Decoder, DecoderForCausalLM

__all__ = ["Decoder", "DecoderConfig", "DecoderForCausalLM"]

AutoConfig.register(DecoderConfig.model_type, DecoderConfig)
AutoModel.register(DecoderConfig, Decoder)
AutoModelForCausalLM.register(DecoderConfig, DecoderForCausalLM)
