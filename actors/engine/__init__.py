"""The embedded engine: a small server that speaks the part of the SGLang HTTP API that the actors use.

    python -m actors.engine.server --model-path DIR --port 30000

It answers as SGLang 0.5.23 does, with these differences.

More than SGLang:
- Streams are always incremental (`--incremental-streaming-output`), and `meta_info.weight_version` of an event is the
  version under which ALL tokens of that event were sampled: an event never spans a change of weights.
- `/pause_generation` answers `{"status": "ok", "emitted": {rid: count}}`: how many response tokens each live stream has
  been given. They are written to the streams before the answer, so a client that has read `count` tokens has them all.
- `/weights_checker` names tensors as Hugging Face does and hashes them with BLAKE2b (16 bytes); tied names are absent.
- Token ids outside the vocabulary are refused (400); SGLang's scheduler dies of them.
- `input_token_logprobs` reports the vocabulary's last id as itself; SGLang writes 0.

Less than SGLang, each refused with 400: n > 1, sampling masks, penalties, logit bias, grammars, hidden states, LoRA,
images. A weight update must arrive in the engine's own dtype. `sampling_seed` is ignored.
"""
